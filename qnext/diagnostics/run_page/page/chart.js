// Lines over the run, as SVG.

import { h, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 130;
const BUCKETS = 300;
const CLASSES = ["", "second", "third"];

/** Numbers as people read them: 12,345 or 0.00123. */
export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "-";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
  return Math.abs(value) >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
}

/** At most two points of a bucket, its least and its largest: a spike stays to be seen. */
function thinned(points) {
  if (points.length <= 2 * BUCKETS) return points;
  const kept = [];
  for (let bucket = 0; bucket < BUCKETS; bucket++) {
    const part = points.slice(Math.floor((bucket * points.length) / BUCKETS), Math.floor(((bucket + 1) * points.length) / BUCKETS));
    const least = part.reduce((a, b) => (b[1] < a[1] ? b : a));
    const largest = part.reduce((a, b) => (b[1] > a[1] ? b : a));
    kept.push(...(least[0] <= largest[0] ? [least, largest] : [largest, least]));
  }
  return kept;
}

/**
 * A figure. `lines`: [{name, points: [[x, y], ...]}]; `marks`: x of steps that were skipped. With `isLog` the height is
 * the logarithm.
 */
export function chart(title, lines, { isLog = false, span = [0, 1], format = short, marks = [] } = {}) {
  const usable = lines.map((line) => ({ ...line, points: line.points.filter(([, y]) => Number.isFinite(y) && (!isLog || y > 0)) })).filter((line) => line.points.length);
  if (!usable.length) return null;
  const scale = isLog ? Math.log10 : (y) => y;
  let [low, high] = [Infinity, -Infinity];
  for (const { points } of usable) for (const [, y] of points) [low, high] = [Math.min(low, y), Math.max(high, y)];
  const [bottom, top] = [scale(low), scale(high)];
  const atX = (x) => (((x - span[0]) / (span[1] - span[0] || 1)) * WIDTH).toFixed(1);
  const atY = (y) => (top === bottom ? HEIGHT / 2 : HEIGHT - ((scale(y) - bottom) / (top - bottom)) * HEIGHT).toFixed(1);
  const paths = usable.map(({ points }, index) => {
    const drawn = thinned(points).map(([x, y]) => `${atX(x)} ${atY(y)}`);
    const isOne = drawn.length === 1; // a line without length is not seen
    return svg("path", { d: `M${drawn.join("L")}${isOne ? "h0.01" : ""}`, class: `${CLASSES[index % CLASSES.length]} ${isOne ? "dot" : ""}` });
  });
  if (marks.length) paths.push(svg("path", { class: "skipped", d: marks.map((x) => `M${atX(x)} ${HEIGHT - 2}h0.01`).join("") }));
  const latest = usable.map((line) => format(line.points.at(-1)[1])).join(" · ");
  const keys = usable.map((line, index) => h("span", { class: CLASSES[index % CLASSES.length] }, h("i"), line.name));
  if (marks.length) keys.push(h("span", { class: "skipped" }, h("i"), "skipped"));
  return h(
    "figure",
    {},
    h("figcaption", {}, h("span", { text: title }), h("b", { text: latest })),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": `${title}: ${latest}, between ${format(low)} and ${format(high)}` }, ...paths),
    h("div", { class: "ends" }, h("span", { text: `${format(low)} to ${format(high)}${isLog ? ", logarithmic" : ""}` })),
    keys.length > 1 ? h("div", { class: "key" }, ...keys) : null,
  );
}
