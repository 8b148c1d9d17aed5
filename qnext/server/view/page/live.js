// The live view: follows the server's ticks while somebody can see it.

import { $, count, h } from "./dom.js";
import { ApiError, stream } from "./api.js";
import { ExpertGrid } from "./grid.js";
import { ExpertLists } from "./expert-lists.js";
import { StateStrips } from "./states.js";
import { Tiles } from "./tiles.js";

const LONGEST_PAUSE = 15; // seconds between attempts to connect
const QUIET_AFTER = 12_000; // ms without a tick: the connection is dead

export class LiveView {
  #model = null;
  #grid = null;
  #tiles = null;
  #lists = null;
  #states = new StateStrips();
  #connection = null; // AbortController of the stream
  #mayAsk = true;

  constructor() {
    document.addEventListener("visibilitychange", () => this.setShown());
    addEventListener("resize", () => this.setShown());
    for (const name of ["now", "load"]) {
      $(`show-${name}`).addEventListener("click", () => this.#setMode(name));
    }
    $("zoom-out").addEventListener("click", () => this.#grid?.zoom(null));
  }

  /** `model` is what /live/model says. */
  start(model) {
    this.#model = model;
    this.#mayAsk = true;
    this.#grid ??= new ExpertGrid($("grid"), { zoomed: (layer) => this.#zoomed(layer) });
    this.#tiles = new Tiles($("tiles"), model);
    this.#lists ??= new ExpertLists((layer, expert) => this.#grid.show(layer, expert));
    // What experts do tells what others ask: only some keys see it.
    const isOwn = model.view === "own";
    const sparse = isOwn ? [] : model.layers.filter((layer) => layer.experts > 0);
    $("live-title").textContent = isOwn ? "Your requests" : "Experts at work";
    $("own-note").hidden = $("own-requests").hidden = !isOwn;
    for (const part of [document.querySelector(".grid-card"), document.querySelector("#live .segments")]) part.hidden = sparse.length === 0;
    $("expert-lists").hidden = sparse.length === 0;
    $("layer-table").hidden = sparse.length === 0;
    this.#states.setLayers(isOwn ? [] : model.layers);
    this.#grid.setLayers(sparse);
    this.#lists.setLayers(sparse);
    this.#zoomed(null);
    this.#disconnect();
    this.setShown();
  }

  /** The server does not let this key look. */
  refuse(message) {
    this.#mayAsk = false;
    this.#disconnect();
    this.#say(message, "off");
  }

  /** Connect when the view can be seen, else let go: the server makes no ticks that nobody looks at. */
  setShown() {
    const isSeen = !document.hidden && $("live").getClientRects().length > 0;
    if (isSeen && this.#model && this.#mayAsk) {
      this.#grid.resize();
      if (!this.#connection) this.#follow();
    } else {
      this.#disconnect();
    }
  }

  #disconnect() {
    this.#connection?.abort();
    this.#connection = null;
  }

  async #follow() {
    const connection = (this.#connection = new AbortController());
    for (let pause = 1; !connection.signal.aborted; pause = Math.min(LONGEST_PAUSE, pause * 2)) {
      try {
        await this.#read(connection.signal, () => (pause = 1));
        if (!connection.signal.aborted) this.#say("The stream ended; connecting again", "off");
      } catch (error) {
        if (connection.signal.aborted) return;
        if (!(error instanceof ApiError)) throw error;
        if (error.status === 401 || error.status === 403) return this.refuse(error.message);
        pause = Math.max(pause, error.retryAfter ?? 0);
        this.#say(error.message, "off");
      }
      await new Promise((resolve) => setTimeout(resolve, pause * 1000));
    }
  }

  async #read(outer, alive) {
    const quiet = new AbortController();
    const signal = AbortSignal.any([outer, quiet.signal]);
    let timer = setTimeout(() => quiet.abort(), QUIET_AFTER);
    try {
      for await (const tick of stream("live/stream", { signal })) {
        clearTimeout(timer);
        timer = setTimeout(() => quiet.abort(), QUIET_AFTER);
        alive();
        this.#take(tick);
      }
    } catch (error) {
      if (quiet.signal.aborted && !outer.aborted) throw new ApiError("The server is silent.", { kind: "network" });
      throw error;
    } finally {
      clearTimeout(timer);
    }
  }

  #take(tick) {
    const { running, waiting } = tick.requests;
    const isBusy = running + waiting > 0;
    const isOwn = tick.view === "own";
    const texts = isOwn ? ["Your requests only: working", "Your requests only: none now"] : [`Working, step ${count(tick.step)}`, `Idle after ${count(tick.step)} steps`];
    this.#say(texts[isBusy ? 0 : 1], isBusy ? "busy" : "idle");
    this.#tiles.take(tick);
    if (isOwn) showOwn(tick.states);
    this.#states.take(tick.inside);
    if (!tick.experts) return;
    const watched = new Map(tick.expert_watch?.layers.map((one) => [one.layer, one]));
    const layers = tick.experts.layers.map((layer) => ({ ...layer, now: bytes(layer.now), load: bytes(layer.load), watch: watched.get(layer.layer) }));
    this.#grid.take(layers);
    this.#lists.take(layers, tick.expert_watch ?? null);
  }

  #say(text, state) {
    $("live-status").textContent = text;
    $("live").dataset.state = state;
  }

  #setMode(mode) {
    for (const name of ["now", "load"]) $(`show-${name}`).setAttribute("aria-pressed", String(name === mode));
    this.#grid?.setMode(mode);
  }

  #zoomed(layer) {
    $("zoom-out").hidden = layer === null;
    $("bars-note").hidden = layer !== null;
    const [first] = this.#model.layers.filter((one) => one.experts > 0);
    if (layer) {
      $("grid-caption").textContent = `${layer.name}, ${layer.experts} experts`;
    } else if (first) {
      const size = this.#model.layers.filter((one) => one.experts > 0).length;
      $("grid-caption").textContent = `${size} layers × ${first.experts} experts`;
    }
  }
}

const PHASES = { queue: "waits", prompt: "reads its prompt", answer: "writes its answer", done: "ends" };

/** The requests of the key that looks, one line each. */
function showOwn(states) {
  const lines = states.map((one) => {
    const cached = one.cached_tokens ? `, ${count(one.cached_tokens)} of them known` : "";
    const text = `${PHASES[one.phase] ?? one.phase} · ${count(one.prompt_tokens ?? 0)} tokens read${cached} · ${count(one.output_tokens)} written`;
    return h("li", {}, h("code", { text: one.request_id }), h("span", { text: ` ${text}` }));
  });
  $("own-requests").replaceChildren(...lines);
}

function bytes(text) {
  const raw = atob(text);
  const found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found;
}
