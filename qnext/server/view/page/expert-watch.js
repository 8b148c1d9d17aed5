// What the watch over the experts says of a layer, in words: drift from the baseline, and the alerts that stand.

import { percent } from "./dom.js";

const NAMES = { skew: "skew", dead: "unused", collapse: "collapse", drift: "drift" };

/** A measure as people read it: skew is a multiple of the even load, the others are shares. */
export function measureText(name, value) {
  return `${NAMES[name]} ${name === "skew" ? `${value.toFixed(1)}×` : percent(value)}`;
}

/** For the tip of a layer; `watch` may be missing. */
export function watchTexts(watch) {
  if (!watch) return [];
  const drift = watch.drift === null ? [] : [measureText("drift", watch.drift)];
  return watch.alerts.length ? [...drift, `alert: ${watch.alerts.map((name) => NAMES[name]).join(", ")}`] : drift;
}

/** [{layer, text}] of the alerts that stand. */
export function alertsOf({ layers, thresholds }) {
  return layers.flatMap(({ layer, alerts, ...values }) =>
    alerts.map((name) => {
      const now = values[name] === null ? NAMES[name] : measureText(name, values[name]);
      return { layer, text: `${now}, alert from ${measureText(name, thresholds[name]).replace(`${NAMES[name]} `, "")}` };
    }),
  );
}
