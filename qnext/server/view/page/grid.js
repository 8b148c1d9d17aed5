// The experts as cells that light up when tokens go to them, and fade.

import { $, percent } from "./dom.js";
import { cellAt, cellBox, layoutOf, wantedHeight } from "./grid-layout.js";
import { palette } from "./palette.js";
import { drawMask } from "./grid-mask.js";
import { watchTexts } from "./expert-watch.js";

const FADE = 520; // ms in which a glow falls to 1/e
const RISE = [40, 190]; // ms, by cell: what one tick tells happened over 200 ms, so cells do not flash as one
const LEAST_GLOW = 0.3; // of a cell that had any token
const REST = 0.16; // brightness of the most used expert of a layer when it rests
const ENTER = new Set(["Enter", " "]);

export class ExpertGrid {
  #canvas;
  #context;
  #zoomed; // callback
  #layers = [];
  #shown = []; // rows: layers, or the one that is zoomed
  #layout = null;
  #colours = palette();
  #cells = document.createElement("canvas"); // one pixel per cell
  #halo = document.createElement("canvas");
  #mask = document.createElement("canvas");
  #mode = "now";
  #glow = new Float32Array(0); // of each cell of each layer
  #target = new Float32Array(0);
  #rise = new Float32Array(0);
  #frame = 0;
  #time = 0;
  #cursor = null; // {row, expert}
  #isStill = matchMedia("(prefers-reduced-motion: reduce)");

  constructor(canvas, { zoomed }) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#zoomed = zoomed;
    canvas.expertGrid = this; // for tests: where a cell lies
    canvas.addEventListener("pointermove", (event) => this.#point(event));
    canvas.addEventListener("pointerleave", () => this.#setCursor(null));
    canvas.addEventListener("click", (event) => this.#click(event));
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#setCursor(null));
    addEventListener("themechange", () => this.#restyle());
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
  }

  /** Layers with experts, as /live/model lists them. */
  setLayers(layers) {
    const widest = Math.max(1, ...layers.map((layer) => layer.experts));
    this.#layers = layers.map((layer, at) => ({
      ...layer,
      name: layer.mtp ? "MTP layer" : `Layer ${layer.index}`,
      at: at * widest,
      now: new Uint8Array(layer.experts),
      load: new Uint8Array(layer.experts),
      sums: { now: 0, load: 0 },
      entropy: 1,
      hot: [],
    }));
    this.#glow = new Float32Array(layers.length * widest);
    this.#target = new Float32Array(layers.length * widest);
    // A cell's own pace: a hash of its number, the same each time.
    this.#rise = this.#glow.map((_, i) => RISE[0] + (RISE[1] - RISE[0]) * (((i * 2654435761) >>> 0) / 2 ** 32));
    this.zoom(null);
  }

  /** Show one layer alone, or with null all of them. */
  zoom(layer) {
    this.#shown = layer ? [layer] : this.#layers;
    this.#setCursor(null);
    this.#zoomed(layer);
    this.resize(true);
  }

  /** Zoom to the layer with index `index`, at one of its experts. */
  show(index, expert) {
    const layer = this.#layers.find((one) => one.index === index);
    if (!layer) return;
    this.zoom(layer);
    this.#setCursor({ row: 0, expert });
  }

  setMode(mode) {
    this.#mode = mode;
    this.#draw();
  }

  take(layers) {
    for (const { layer: index, now, load, entropy, hot, watch } of layers) {
      const layer = this.#layers.find((one) => one.index === index);
      if (!layer || now.length !== layer.experts) continue;
      Object.assign(layer, { now, load, entropy, hot, watch });
      layer.sums = { now: sum(now), load: sum(load) };
      for (let e = 0; e < now.length; e++) {
        if (now[e] > 0) this.#target[layer.at + e] = LEAST_GLOW + ((1 - LEAST_GLOW) * now[e]) / 255;
        else if (this.#isStill.matches) this.#target[layer.at + e] = 0;
      }
    }
    if (this.#isStill.matches) this.#glow.set(this.#target);
    this.#showTip();
    this.#animate();
  }

  // ---- size ----

  resize(isForced = false) {
    const frame = this.#canvas.parentElement;
    const width = frame.clientWidth;
    if (!width || !this.#shown.length) return;
    const height = Math.round(wantedHeight(this.#shown.length, this.#shown[0].experts, width));
    const ratio = Math.min(3, devicePixelRatio || 1);
    const [wide, high] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (!isForced && this.#canvas.width === wide && this.#canvas.height === high) return;
    this.#canvas.width = this.#mask.width = wide;
    this.#canvas.height = this.#mask.height = high;
    this.#canvas.style.height = `${height}px`;
    this.#ratio = ratio;
    const isSingle = this.#shown.length === 1;
    this.#layout = layoutOf({
      width: wide,
      height: high,
      numRows: this.#shown.length,
      numExperts: Math.max(...this.#shown.map((layer) => layer.experts)),
      left: isSingle ? 0 : Math.round(34 * ratio),
      right: isSingle ? 0 : Math.round(52 * ratio),
      gap: Math.round((this.#shown.length > 24 ? 2 : 6) * ratio),
    });
    const { columns, lines, numRows } = this.#layout;
    for (const canvas of [this.#cells, this.#halo]) {
      canvas.width = columns;
      canvas.height = lines * numRows;
    }
    this.#image = new ImageData(columns, lines * numRows);
    this.#haloImage = new ImageData(columns, lines * numRows);
    this.#pixels = new Uint32Array(this.#image.data.buffer);
    this.#haloPixels = new Uint32Array(this.#haloImage.data.buffer);
    this.#restyle();
  }

  #ratio = 1;
  #image;
  #haloImage;
  #pixels;
  #haloPixels;

  #restyle() {
    this.#colours = palette();
    if (!this.#layout) return;
    drawMask(this.#mask, this.#layout, this.#shown, this.#colours, this.#ratio);
    this.#draw();
  }

  // ---- light ----

  #animate() {
    if (this.#isStill.matches) return this.#draw();
    if (this.#frame) return;
    this.#time = performance.now();
    const step = (time) => {
      this.#frame = 0;
      const isAlive = this.#advance(Math.min(100, Math.max(0, time - this.#time)));
      this.#time = time;
      this.#draw();
      if (isAlive) this.#frame = requestAnimationFrame(step);
    };
    this.#frame = requestAnimationFrame(step);
  }

  /** Whether any cell still changes. */
  #advance(elapsed) {
    const fade = Math.exp(-elapsed / FADE);
    let most = 0;
    for (let i = 0; i < this.#glow.length; i++) {
      const target = (this.#target[i] *= fade);
      const gap = target - this.#glow[i];
      this.#glow[i] = gap > 0 ? this.#glow[i] + gap * Math.min(1, elapsed / this.#rise[i]) : target;
      if (target > most) most = target;
    }
    if (most >= 0.004) return true;
    this.#glow.fill(0);
    this.#target.fill(0);
    return false;
  }

  #paintCells() {
    const { columns, lines } = this.#layout;
    this.#shown.forEach((layer, row) => {
      const { cell, halo } = this.#colours[layer.kind] ?? this.#colours.delta;
      const start = row * columns * lines;
      const isLoad = this.#mode === "load";
      for (let e = 0; e < layer.experts; e++) {
        const glow = isLoad ? 0 : this.#glow[layer.at + e];
        const rest = ((isLoad ? 1 : REST) * layer.load[e]) / 255;
        const level = Math.min(255, (255 * Math.max(glow, rest)) | 0);
        this.#pixels[start + e] = cell[level];
        this.#haloPixels[start + e] = halo[(255 * glow) | 0];
      }
    });
    this.#cells.getContext("2d").putImageData(this.#image, 0, 0);
    this.#halo.getContext("2d").putImageData(this.#haloImage, 0, 0);
  }

  #draw() {
    const { width, height } = this.#canvas;
    if (!this.#layout || !width) return;
    const context = this.#context;
    this.#paintCells();
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    this.#copyRows(this.#cells);
    context.drawImage(this.#mask, 0, 0);
    if (this.#mode === "now" && document.documentElement.dataset.theme === "dark") {
      context.imageSmoothingEnabled = true;
      context.globalCompositeOperation = "lighter";
      context.globalAlpha = 0.55;
      this.#copyRows(this.#halo);
      context.globalAlpha = 1;
      context.globalCompositeOperation = "source-over";
    }
    if (this.#shown.length > 1) this.#drawBars();
    this.#drawCursor();
  }

  #copyRows(source) {
    const { columns, lines, left, inner, pitch, rowHeight, numRows } = this.#layout;
    for (let row = 0; row < numRows; row++) {
      this.#context.drawImage(source, 0, row * lines, columns, lines, left, Math.round(row * pitch), inner, rowHeight);
    }
  }

  /** Beside each row: how even its load is (entropy), the share of its five busiest experts, and a dot for an alert. */
  #drawBars() {
    const { left, inner, pitch, rowHeight } = this.#layout;
    const ratio = this.#ratio;
    const start = left + inner + 8 * ratio;
    const size = 40 * ratio;
    const thick = Math.max(ratio, Math.min(3 * ratio, rowHeight / 3));
    const style = getComputedStyle(this.#canvas);
    const [even, hot, alert] = ["--bar-even", "--bar-hot", "--danger"].map((name) => style.getPropertyValue(name));
    this.#shown.forEach((layer, row) => {
      const middle = row * pitch + rowHeight / 2;
      this.#context.fillStyle = even;
      this.#context.fillRect(start, middle - thick - ratio / 2, size * layer.entropy, thick);
      this.#context.fillStyle = hot;
      this.#context.fillRect(start, middle + ratio / 2, size * Math.min(1, layer.hot.reduce((s, [, share]) => s + share, 0)), thick);
      if (!layer.watch?.alerts.length) return;
      this.#context.fillStyle = alert;
      this.#context.beginPath();
      this.#context.arc(start - 4 * ratio, middle, 2.5 * ratio, 0, 2 * Math.PI);
      this.#context.fill();
    });
  }

  #drawCursor() {
    if (this.#cursor?.expert == null) return;
    const { x, y, width, height } = cellBox(this.#layout, this.#cursor.row, this.#cursor.expert);
    const line = Math.max(1, Math.round(1.5 * this.#ratio));
    this.#context.strokeStyle = getComputedStyle(this.#canvas).getPropertyValue("--text");
    this.#context.lineWidth = line;
    this.#context.strokeRect(x - line / 2, y - line / 2, width + line, height + line);
  }

  /** Middle of a cell in device pixels of the canvas; for tests. */
  centreOf(layerIndex, expert) {
    const row = this.#shown.findIndex((layer) => layer.index === layerIndex);
    const { x, y, width, height } = cellBox(this.#layout, row, expert);
    return [x + (width >> 1), y + (height >> 1)];
  }

  // ---- pointing ----

  #locate(event) {
    const box = this.#canvas.getBoundingClientRect();
    return this.#layout && cellAt(this.#layout, (event.clientX - box.left) * this.#ratio, (event.clientY - box.top) * this.#ratio);
  }

  #point(event) {
    this.#setCursor(this.#locate(event));
  }

  #click(event) {
    const found = this.#locate(event);
    if (!found) return;
    if (this.#shown.length > 1 && event.pointerType !== "touch") this.zoom(this.#shown[found.row]);
    else if (this.#shown.length > 1 && (found.expert === null || this.#cursor?.row === found.row)) this.zoom(this.#shown[found.row]);
    else this.#setCursor(found);
  }

  #key(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (moves[event.key]) this.#move(...moves[event.key]);
    else if (ENTER.has(event.key) && this.#shown.length > 1 && this.#cursor) this.zoom(this.#shown[this.#cursor.row]);
    else if (event.key === "Escape" && this.#shown.length === 1 && this.#layers.length > 1) this.zoom(null);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  #move(rows, experts) {
    if (!this.#layout) return;
    const { columns, numRows } = this.#layout;
    const at = this.#cursor?.expert == null ? { row: 0, expert: 0 } : this.#cursor;
    const isSingle = numRows === 1;
    const row = Math.min(numRows - 1, Math.max(0, at.row + (isSingle ? 0 : rows)));
    const expert = at.expert + experts + (isSingle ? rows * columns : 0);
    const last = this.#shown[row].experts - 1;
    this.#setCursor({ row, expert: Math.min(last, Math.max(0, expert)) });
    $("grid-readout").textContent = this.#describe().join(", ");
  }

  #setCursor(cursor) {
    const isSame = cursor?.row === this.#cursor?.row && cursor?.expert === this.#cursor?.expert;
    this.#cursor = cursor;
    if (isSame) return;
    this.#showTip();
    if (!this.#frame) this.#draw();
  }

  #describe() {
    const { row, expert } = this.#cursor;
    const layer = this.#shown[row];
    const kind = layer.kind === "attention" ? "attention" : "DeltaNet";
    const hot = layer.hot.reduce((total, [, share]) => total + share, 0);
    if (expert === null) return [`${layer.name} · ${kind}`, `evenness ${percent(layer.entropy)}`, `five busiest ${percent(hot)}`, ...watchTexts(layer.watch)];
    const share = (name) => (layer.sums[name] ? percent(layer[name][expert] / layer.sums[name]) : "none");
    return [`Expert ${expert} · ${layer.name} · ${kind}`, `now ${share("now")}`, `since start ${share("load")}`];
  }

  #showTip() {
    const tip = $("grid-tip");
    tip.hidden = !this.#cursor || !this.#layout;
    if (tip.hidden) return;
    const [title, ...rest] = this.#describe();
    tip.replaceChildren(title, document.createElement("br"), rest.join(" · "));
    const box = cellBox(this.#layout, this.#cursor.row, this.#cursor.expert ?? 0);
    const width = this.#canvas.clientWidth;
    const x = Math.min(width - tip.offsetWidth - 4, Math.max(4, box.x / this.#ratio - tip.offsetWidth / 2));
    const above = box.y / this.#ratio - tip.offsetHeight - 8;
    const y = above > -8 ? above : (box.y + box.height) / this.#ratio + 8;
    tip.style.transform = `translate(${Math.round(x)}px, ${Math.round(y)}px)`;
  }
}

function sum(values) {
  let total = 0;
  for (const value of values) total += value;
  return total;
}
