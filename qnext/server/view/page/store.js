// Conversations in IndexedDB; in memory where the browser gives none.

const NAME = "qnext";
const TABLE = "conversations";

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function open() {
  const request = indexedDB.open(NAME, 1);
  request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
  return promised(request);
}

export class Store {
  #database = null;
  #all = new Map();
  isLasting = false;

  /** Read everything there is. Without IndexedDB it holds for this page only. */
  async load() {
    try {
      this.#database = await open();
      const rows = await promised(this.#table("readonly").getAll());
      this.#all = new Map(rows.map((row) => [row.id, row]));
      this.isLasting = true;
    } catch {
      this.#database = null;
    }
  }

  #table(mode) {
    return this.#database.transaction(TABLE, mode).objectStore(TABLE);
  }

  /** The newest first. */
  list() {
    return [...this.#all.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#all.get(id);
  }

  async put(conversation) {
    this.#all.set(conversation.id, conversation);
    if (this.#database) await promised(this.#table("readwrite").put(conversation));
  }

  async remove(id) {
    this.#all.delete(id);
    if (this.#database) await promised(this.#table("readwrite").delete(id));
  }
}
