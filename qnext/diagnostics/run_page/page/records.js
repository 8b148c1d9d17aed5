// The lines of metrics.jsonl, fetched as the file grows.

/** A line as an object. Python writes numbers that are not finite as words that JSON does not have. */
export function parse(line) {
  try {
    return JSON.parse(line);
  } catch {
    try {
      return JSON.parse(line.replace(/(?<=[:[,]\s*)(NaN|-?Infinity)(?=\s*[,\]}])/g, "null"));
    } catch {
      return null; // damaged
    }
  }
}

export class Records {
  steps = []; // one for each step; experts and health stand in some of them
  evaluations = [];
  samples = [];
  run = "";
  #file = "";
  #next = 0;

  /** Fetch what is new. Returns whether there was something. */
  async update() {
    let isNew = false;
    for (;;) {
      const reply = await fetch(`metrics?file=${this.#file}&from=${this.#next}`);
      if (!reply.ok) throw new Error(`status ${reply.status}`);
      const [head, ...lines] = (await reply.text()).split("\n");
      const place = JSON.parse(head);
      this.run = place.run;
      if (place.file !== this.#file) {
        isNew ||= this.steps.length > 0;
        [this.steps, this.evaluations, this.samples] = [[], [], []];
      }
      [this.#file, this.#next] = [place.file, place.next];
      const found = lines.filter(Boolean).map(parse).filter(Boolean);
      for (const record of found) {
        if (record.evaluation) this.evaluations.push(record);
        else if (record.sample !== undefined) this.samples.push(record);
        else this.steps.push(record);
      }
      if (!found.length) return isNew;
      isNew = true;
    }
  }

  /** The last step that holds `key`. */
  last(key) {
    return this.steps.findLast((step) => step[key]);
  }
}
