// The list of conversations.

import { $, h, iconButton } from "./dom.js";
import { exportText, importText } from "./exchange.js";
import { matches, titleOf } from "./tree.js";

const MAX_SHOWN = 200;

export class Sidebar {
  #store;
  #chat;
  #renaming = null; // id
  #removing = null; // id of the one that is asked about

  constructor(store, chat) {
    this.#store = store;
    this.#chat = chat;
    $("search").addEventListener("input", () => this.show());
    $("import").addEventListener("click", () => $("import-file").click());
    $("import-file").addEventListener("change", () => this.#import());
    $("export").addEventListener("click", () => save(exportText(this.#store.list()), "conversations"));
    $("export-one").addEventListener("click", () => save(exportText([this.#chat.conversation]), titleOf(this.#chat.conversation)));
    $("sidebar-open").addEventListener("click", () => this.setOpen(true));
    $("sidebar-close").addEventListener("click", () => this.setOpen(false));
    $("shade").addEventListener("click", () => this.setOpen(false));
  }

  /** On a phone the list lies above the page. */
  setOpen(isOpen) {
    document.body.classList.toggle("sidebar-open", isOpen);
    if (isOpen) $("sidebar-close").focus();
  }

  show() {
    if (this.#renaming) return; // not under the reader's hands
    const words = $("search").value;
    const found = this.#store.list().filter((one) => matches(one, words)).slice(0, MAX_SHOWN);
    const rows = found.map((one) => (one.id === this.#removing ? this.#question(one) : this.#row(one)));
    const none = h("li", { class: "empty", text: words ? "Nothing found." : "Conversations are kept in this browser." });
    $("conversations").replaceChildren(...(rows.length ? rows : [none]));
  }

  #row(conversation) {
    const isCurrent = conversation.id === this.#chat.conversation.id;
    const open = h("button", {
      type: "button",
      class: "conversation",
      "aria-current": isCurrent ? "true" : undefined,
      text: titleOf(conversation),
      title: titleOf(conversation),
      on: {
        click: () => {
          this.#chat.open(conversation);
          this.setOpen(false);
          this.show();
        },
      },
    });
    const row = h("li", { class: isCurrent ? "current" : "" }, open);
    const ask = () => {
      this.#removing = conversation.id;
      this.show();
      $("conversations").querySelector(".question button")?.focus();
    };
    row.append(
      iconButton("edit", "Rename", () => this.#rename(conversation, row), "small"),
      iconButton("trash", "Delete", ask, "small"),
    );
    return row;
  }

  #rename(conversation, row) {
    this.#renaming = conversation.id;
    const field = h("input", { type: "text", "aria-label": "Name of the conversation", maxlength: 200 });
    field.value = titleOf(conversation);
    const end = (isKept) => {
      if (this.#renaming !== conversation.id) return;
      this.#renaming = null;
      if (isKept) {
        conversation.title = field.value.trim();
        this.#store.put(conversation);
        $("title").textContent = titleOf(this.#chat.conversation);
      }
      this.show();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") end(true);
      else if (event.key === "Escape") end(false);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    field.addEventListener("blur", () => end(true));
    row.replaceChildren(field);
    field.select();
  }

  #question(conversation) {
    const answer = (isYes) => async () => {
      this.#removing = null;
      if (isYes) {
        this.#chat.leave(conversation);
        await this.#store.remove(conversation.id);
      }
      this.show();
    };
    const yes = h("button", { type: "button", class: "button small danger", text: "Delete", on: { click: answer(true) } });
    const no = h("button", { type: "button", class: "button small", text: "Keep", on: { click: answer(false) } });
    return h("li", { class: "question" }, h("span", { text: `Delete “${titleOf(conversation)}”?` }), yes, no);
  }

  async #import() {
    const [file] = $("import-file").files;
    $("import-file").value = "";
    if (!file) return;
    try {
      const found = importText(await file.text());
      for (const conversation of found) await this.#store.put(conversation);
      if (found.length) this.#chat.open(found[0]);
      this.show();
    } catch (error) {
      this.#chat.notice(`Not imported. ${error.message}`);
    }
  }
}

function save(text, name) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const file = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "") || "conversation"}.json`;
  h("a", { href: address, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
