// How long the states of each layer last and how open its gates are: a strip per layer, beside the experts.

import { $, h, percent, svg } from "./dom.js";

const LONGEST = 4096; // tokens: a half-life of so many is brightest
const CELL = 8; // units of a head
const HEIGHT = 10;
const DARKEST = 0.1;

class Row {
  #cells = [];
  #strip = svg("svg", { class: "state-heads", preserveAspectRatio: "none", viewBox: `0 0 ${CELL} ${HEIGHT}`, "aria-hidden": "true" });
  #bar = svg("rect", { class: "gate-part", height: HEIGHT, width: 0 });
  #text = h("td", { class: "state-text" });
  #gateText = h("td", { class: "state-text" });

  constructor({ index, kind }) {
    this.kind = kind;
    const gate = svg("svg", { class: "gate-bar", preserveAspectRatio: "none", viewBox: `0 0 100 ${HEIGHT}`, "aria-hidden": "true" }, this.#bar);
    const name = h("th", { scope: "row" }, h("span", { class: `dot ${kind}` }), String(index));
    const strip = kind === "delta" ? [h("td", { class: "state-strip" }, this.#strip), this.#text] : [h("td", { class: "state-strip" }), this.#text];
    this.element = h("tr", { class: kind }, name, ...strip, h("td", { class: "gate-cell" }, gate), this.#gateText);
  }

  take({ half_life: lives, gate }) {
    if (lives.length !== this.#cells.length) this.#make(lives.length);
    lives.forEach((life, head) => {
      const part = Math.min(1, Math.max(0, Math.log2(Math.max(1, life)) / Math.log2(LONGEST)));
      this.#cells[head].setAttribute("fill-opacity", (DARKEST + (1 - DARKEST) * part).toFixed(3));
    });
    this.#text.textContent = lives.length ? `${tokens(median(lives))}, up to ${tokens(Math.max(...lives))}` : "";
    this.#bar.setAttribute("width", gate === null ? 0 : (100 * gate).toFixed(1));
    this.#gateText.textContent = gate === null ? "no gate" : percent(gate);
  }

  #make(count) {
    this.#strip.setAttribute("viewBox", `0 0 ${CELL * Math.max(1, count)} ${HEIGHT}`);
    this.#cells = Array.from({ length: count }, (_, i) => svg("rect", { class: "state-head", x: i * CELL, width: CELL - 1, height: HEIGHT }));
    this.#strip.replaceChildren(...this.#cells);
  }
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) / 2)];
}

function tokens(number) {
  return number >= 1e6 ? "over 1M" : number >= 1000 ? `${(number / 1000).toFixed(1)}k` : number.toFixed(number < 10 ? 1 : 0);
}

export class StateStrips {
  #rows = new Map(); // by index of the layer

  /** `layers` are those of /live/model, of a view that may see them; none without. */
  setLayers(layers) {
    this.#rows = new Map(layers.filter((layer) => !layer.mtp).map((layer) => [layer.index, new Row(layer)]));
    const head = ["Layer", "Heads", "Half-life, tokens", "Gates", "Open"].map((text) => h("th", { scope: "col", text }));
    const body = h("tbody", {}, ...[...this.#rows.values()].map((row) => row.element));
    $("state-rows").replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, ...head)), body));
    $("states").hidden = true; // until a step has been looked at
  }

  /** What a tick says of the inside of the model; nothing is new without it. */
  take(inside) {
    if (!inside || !this.#rows.size) return;
    $("states").hidden = false;
    for (const layer of inside.layers) this.#rows.get(layer.layer)?.take(layer);
  }
}
