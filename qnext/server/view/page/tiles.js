// Figures beside the experts: rates with their last minute, requests, memory, drafts, prefixes, reads from disk.

import { count, h, percent, rate, svg } from "./dom.js";

const LENGTH = 120; // points of a spark line
const WIDTH = 120;
const HEIGHT = 28;

class Spark {
  #values = [];
  #line = svg("polyline", { class: "spark-line" });
  #area = svg("polygon", { class: "spark-area" });
  #fixed;

  /** `top` is the value at the upper edge; without it the highest of the values. */
  constructor(top = 0) {
    this.#fixed = top;
    this.element = svg("svg", { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" }, this.#area, this.#line);
  }

  push(value) {
    this.#values.push(value);
    if (this.#values.length > LENGTH) this.#values.shift();
    const top = this.#fixed || Math.max(1e-9, ...this.#values) * 1.1;
    const start = LENGTH - this.#values.length;
    const points = this.#values.map((v, i) => `${(((start + i) * WIDTH) / (LENGTH - 1)).toFixed(1)},${(HEIGHT - 1 - (v / top) * (HEIGHT - 3)).toFixed(1)}`);
    const left = ((start * WIDTH) / (LENGTH - 1)).toFixed(1);
    this.#line.setAttribute("points", points.join(" "));
    this.#area.setAttribute("points", `${left},${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
  }
}

class Tile {
  #value = h("p", { class: "tile-value" });
  #note = h("p", { class: "tile-note" });

  constructor(title, figure) {
    this.element = h("div", { class: "tile" }, h("p", { class: "tile-title", text: title }), this.#value, figure, this.#note);
  }

  set(value, unit, note) {
    this.#value.replaceChildren(value, h("span", { class: "unit", text: unit ? ` ${unit}` : "" }));
    this.#note.textContent = note;
  }
}

/** A bar of parts that together are a total. */
class Bar {
  #parts;

  constructor(names) {
    this.#parts = names.map((name) => svg("rect", { class: `part ${name}`, y: 0, height: 8 }));
    this.element = svg("svg", { class: "stack", viewBox: "0 0 100 8", preserveAspectRatio: "none", "aria-hidden": "true" }, ...this.#parts);
  }

  set(values, total) {
    let x = 0;
    this.#parts.forEach((part, i) => {
      const width = total ? (100 * values[i]) / total : 0;
      part.setAttribute("x", x.toFixed(2));
      part.setAttribute("width", width.toFixed(2));
      x += width;
    });
  }
}

export class Tiles {
  #output = new Spark();
  #drafts = new Spark(1);
  #hits = new Spark(1);
  #blocks = new Bar(["running", "cached"]);
  #slots = new Bar(["running", "cached"]);
  #speed = new Tile("Writing", this.#output.element);
  #acceptance = new Tile("Drafts accepted", this.#drafts.element);
  #experts = new Tile("Experts in memory", this.#hits.element);
  #requests = new Tile("Requests", null);
  #prefix = new Tile("Prefix hits", null);
  #blockTile = new Tile("Key-value blocks", this.#blocks.element);
  #slotTile = new Tile("State slots", this.#slots.element);
  #before = null; // counters of drafts at the last tick

  constructor(box, model) {
    const isOwn = model.view === "own";
    const drafts = model.mtp ? [this.#acceptance] : [];
    const experts = model.streams_experts && !isOwn ? [this.#experts] : [];
    const memory = isOwn ? [] : [this.#blockTile, this.#slotTile]; // everybody's, together
    const tiles = [this.#speed, ...drafts, ...experts, this.#requests, this.#prefix, ...memory];
    box.replaceChildren(...tiles.map((tile) => tile.element));
    box.dataset.count = tiles.length;
  }

  take(tick) {
    const { output_tokens_per_second: output, prompt_tokens_per_second: prompt } = tick.rates;
    this.#output.push(output);
    this.#speed.set(rate(output), "tokens/s", `reading ${rate(prompt)} tokens/s`);
    this.#requests.set(count(tick.requests.running), "running", `${count(tick.requests.waiting)} waiting`);
    this.#takePrefix(tick.prefix);
    this.#takeDrafts(tick.drafts);
    if (tick.expert_reads) this.#takeReads(tick.expert_reads);
    if (!tick.blocks) return;
    const { blocks, slots } = tick;
    // Cached prefixes may share blocks with requests: what is not cached is the requests' alone.
    const own = Math.max(0, blocks.used - blocks.cached);
    this.#blocks.set([own, blocks.used - own], blocks.total);
    this.#blockTile.set(blocks.total ? percent(blocks.used / blocks.total) : "–", "used", `${count(blocks.cached)} cached · ${count(blocks.total - blocks.used)} free`);
    this.#slots.set([slots.running, slots.cached], slots.total);
    this.#slotTile.set(count(slots.running), "running", `${count(slots.cached)} cached · ${count(slots.total - slots.used)} free`);
  }

  #takePrefix({ prompt_tokens_cached: cached, prompt_tokens_computed: computed }) {
    const all = cached + computed;
    this.#prefix.set(all ? percent(cached / all) : "–", "", `of ${count(all)} tokens`);
  }

  #takeReads({ hit_ratio: hits, bytes_per_token: bytes, wait_ratio: waits }) {
    if (hits !== null) this.#hits.push(hits);
    const read = bytes === null ? [] : [`${rate(bytes / 1e6)} MB read per token`];
    const waited = waits === null ? [] : [`${percent(waits)} of the time waiting`]; // unknown on a GPU
    this.#experts.set(hits === null ? "–" : percent(hits), hits === null ? "" : "hits", [...read, ...waited].join(" · "));
  }

  #takeDrafts({ drafted, accepted }) {
    const before = this.#before ?? { drafted, accepted };
    this.#before = { drafted, accepted };
    const fresh = drafted - before.drafted;
    if (fresh > 0) this.#drafts.push((accepted - before.accepted) / fresh);
    this.#acceptance.set(drafted ? percent(accepted / drafted) : "–", "", `${count(accepted)} of ${count(drafted)}`);
  }
}
