// Colours of expert cells: 256 steps from rest to glow, as RGBA in one 32-bit number.

import { isDark } from "./theme.js";

// stops: [position, red, green, blue]
const DARK = {
  delta: [[0, 25, 31, 38], [0.1, 23, 52, 58], [0.4, 22, 116, 110], [0.75, 70, 214, 190], [1, 222, 255, 244]],
  attention: [[0, 33, 30, 28], [0.1, 58, 46, 31], [0.4, 138, 88, 36], [0.75, 245, 173, 82], [1, 255, 244, 220]],
};
const LIGHT = {
  delta: [[0, 236, 238, 234], [0.1, 211, 231, 225], [0.4, 86, 184, 168], [0.75, 12, 130, 115], [1, 3, 74, 66]],
  attention: [[0, 241, 237, 229], [0.1, 245, 226, 196], [0.4, 238, 172, 84], [0.75, 196, 108, 10], [1, 122, 62, 0]],
};

const isLittle = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

export function rgba(red, green, blue, alpha) {
  const [r, g, b, a] = [red, green, blue, alpha].map(Math.round);
  return (isLittle ? (a << 24) | (b << 16) | (g << 8) | r : (r << 24) | (g << 16) | (b << 8) | a) >>> 0;
}

function table(stops, alphaAt) {
  const found = new Uint32Array(256);
  for (let i = 0; i < 256; i++) {
    const at = i / 255;
    const upper = Math.max(1, stops.findIndex(([position]) => position >= at));
    const [from, to] = [stops[upper - 1], stops[upper]];
    const part = (at - from[0]) / (to[0] - from[0]);
    const [red, green, blue] = [1, 2, 3].map((c) => from[c] + part * (to[c] - from[c]));
    found[i] = rgba(red, green, blue, alphaAt(at));
  }
  return found;
}

/** Of the theme that is on: `cell` and `halo` tables by kind of layer; haloes are light that is added. */
export function palette() {
  const stops = isDark() ? DARK : LIGHT;
  const made = {};
  for (const kind of ["delta", "attention"]) {
    made[kind] = {
      cell: table(stops[kind], () => 255),
      halo: table(stops[kind], (at) => (at < 0.3 ? 0 : 200 * ((at - 0.3) / 0.7) ** 1.5)),
      solid: `rgb(${stops[kind][3].slice(1).join(" ")})`,
    };
  }
  return made;
}
