// Which experts carry most and which none, as text; and all layers as a table for those who cannot see the cells.

import { $, count, h, percent } from "./dom.js";
import { alertsOf, measureText } from "./expert-watch.js";

const LIST_EVERY = 1000; // ms
const TABLE_EVERY = 4000;
const NUM_HOT = 6;
const NUM_DEAD = 4;

export class ExpertLists {
  #layers = new Map(); // by index
  #select;
  #listed = 0;
  #tabled = 0;
  #last = [];
  #watch = null; // what the watch over the experts says, where there is one

  /** `select(layer, expert)` is called for an expert that the reader picks. */
  constructor(select) {
    this.#select = select;
    $("layer-table").addEventListener("toggle", () => this.#showTable());
  }

  setLayers(layers) {
    this.#layers = new Map(layers.map((layer) => [layer.index, layer]));
  }

  take(layers, watch) {
    this.#watch = watch;
    this.#last = layers.filter(({ layer }) => this.#layers.has(layer));
    const now = performance.now();
    if (now - this.#listed >= LIST_EVERY && !$("expert-lists").matches(":focus-within")) {
      this.#listed = now;
      this.#showLists();
    }
    if ($("layer-table").open && now - this.#tabled >= TABLE_EVERY) this.#showTable();
  }

  #name(index) {
    return this.#layers.get(index).mtp ? "MTP" : `layer ${index}`;
  }

  #showLists() {
    const hot = this.#last.flatMap(({ layer, hot: found }) => found.map(([expert, share]) => ({ layer, expert, share })));
    hot.sort((a, b) => b.share - a.share);
    const most = hot.slice(0, NUM_HOT).map(({ layer, expert, share }) => {
      const times = share * this.#layers.get(layer).experts;
      return this.#entry(layer, expert, `${percent(share)} · ${times.toFixed(times < 10 ? 1 : 0)}× even`);
    });
    const dead = this.#last.filter((one) => one.dead > 0).sort((a, b) => b.dead - a.dead);
    const least = dead.slice(0, NUM_DEAD).map(({ layer, dead: size }) => this.#deadEntry(layer, size));
    const total = dead.reduce((sum, one) => sum + one.dead, 0);
    const none = (text) => h("li", { class: "muted", text });
    $("expert-lists").replaceChildren(
      ...this.#alertList(),
      h("div", {}, h("h3", { text: "Busiest since start" }), h("ul", {}, ...(most.length ? most : [none("No token yet.")]))),
      h("div", {}, h("h3", { text: `Never used: ${count(total)}` }), h("ul", {}, ...(least.length ? least : [none("Every expert had tokens.")]))),
    );
  }

  /** The alerts that stand; nothing where nobody watches. */
  #alertList() {
    if (!this.#watch) return [];
    const found = alertsOf(this.#watch).filter(({ layer }) => this.#layers.has(layer));
    const entries = found.map(({ layer, text }) => {
      const name = h("span", {}, h("span", { class: "dot alert" }), this.#name(layer));
      return h("li", {}, h("button", { type: "button", class: "plain", on: { click: () => this.#select(layer, null) } }, name, h("span", { class: "muted", text })));
    });
    const none = h("li", { class: "muted", text: `None in the last ${count(this.#watch.tokens)} tokens.` });
    return [h("div", { id: "expert-alerts" }, h("h3", { text: `Alerts: ${found.length}` }), h("ul", {}, ...(entries.length ? entries : [none])))];
  }

  #entry(layer, expert, note) {
    const go = () => this.#select(layer, expert);
    const kind = this.#layers.get(layer).kind;
    const name = h("span", {}, h("span", { class: `dot ${kind}` }), `Expert ${expert}, ${this.#name(layer)}`);
    return h("li", {}, h("button", { type: "button", class: "plain", on: { click: go } }, name, h("span", { class: "muted", text: note })));
  }

  #deadEntry(layer, size) {
    const { experts, kind } = this.#layers.get(layer);
    const name = h("span", {}, h("span", { class: `dot ${kind}` }), `${count(size)} of ${experts}`);
    const go = () => this.#select(layer, null);
    return h("li", {}, h("button", { type: "button", class: "plain", on: { click: go } }, name, h("span", { class: "muted", text: this.#name(layer) })));
  }

  #showTable() {
    this.#tabled = performance.now();
    if (!$("layer-table").open) return;
    const more = this.#watch ? ["Drift", "Alerts"] : [];
    const head = ["Layer", "Kind", "Evenness", "Busiest experts", "Never used", ...more].map((text) => h("th", { scope: "col", text }));
    const rows = this.#last.map(({ layer, entropy, dead, hot, watch }) => {
      const { kind, mtp } = this.#layers.get(layer);
      const busiest = hot.map(([expert, share]) => `${expert} (${percent(share)})`).join(", ");
      const drift = watch?.drift == null ? "none" : measureText("drift", watch.drift).replace("drift ", "");
      const watched = this.#watch ? [drift, watch?.alerts.join(", ") || "none"] : [];
      const cells = [kind === "attention" ? "attention" : "DeltaNet", percent(entropy), busiest || "none", String(dead), ...watched];
      return h("tr", {}, h("th", { scope: "row", text: mtp ? "MTP" : String(layer) }), ...cells.map((text) => h("td", { text })));
    });
    const table = h("table", {}, h("thead", {}, h("tr", {}, ...head)), h("tbody", {}, ...rows));
    $("layer-table").querySelector(".table-scroll").replaceChildren(table);
  }
}
