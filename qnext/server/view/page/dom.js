// Building DOM without markup: text only ever becomes text nodes.

const SVG = "http://www.w3.org/2000/svg";

/** Element `tag` with `props` (class, text, on: {event: handler}, booleans, attributes) and children. */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name === "on") for (const [event, run] of Object.entries(value)) element.addEventListener(event, run);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Icons are 20 x 20 line drawings: path data by name. */
const ICONS = {
  plus: "M10 4v12M4 10h12",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  copy: "M7 7h9v9H7zM13 7V4H4v9h3",
  check: "M4 10.5l4 4 8-9",
  edit: "M4 16l1-4 8-8 3 3-8 8zM11 6l3 3",
  again: "M16 10a6 6 0 1 1-2-4.5M16 3v4h-4",
  left: "M12 5l-5 5 5 5",
  right: "M8 5l5 5-5 5",
  down: "M5 8l5 5 5-5",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  gear: "M4 6h7M15 6h1M4 14h1M9 14h7M13 4v4M7 12v4",
  sun: "M10 7a3 3 0 1 0 0 6 3 3 0 0 0 0-6M10 2v2M10 16v2M2 10h2M16 10h2M4.5 4.5l1.3 1.3M14.2 14.2l1.3 1.3M4.5 15.5l1.3-1.3M14.2 5.8l1.3-1.3",
  moon: "M16 12A7 7 0 0 1 8 4a6.5 6.5 0 1 0 8 8z",
  menu: "M3 6h14M3 10h14M3 14h14",
  close: "M5 5l10 10M15 5L5 15",
  key: "M12.5 11a3.5 3.5 0 1 0-3.3-2.3L3 15v2h3v-2h2v-2l1.8-1.8c.8.5 1.7.8 2.7.8M13 7h.01",
  pulse: "M2 10h4l2-5 4 10 2-5h4",
  chat: "M4 4h12v9H9l-4 3v-3H4z",
  tool: "M12 4a4 4 0 0 0-3.6 5.6L3.5 14.5l2 2 4.9-4.9A4 4 0 0 0 16 8l-2.5 1.5-2-1L11.5 6z",
  upload: "M10 13V4M6 8l4-4 4 4M4 16h12",
  download: "M10 4v9M6 9l4 4 4-4M4 16h12",
  search: "M9 4a5 5 0 1 0 0 10A5 5 0 0 0 9 4M13 13l4 4",
  back: "M16 10H5M9 6l-4 4 4 4",
};

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

export function icon(name) {
  const path = svg("path", { d: ICONS[name] });
  return svg("svg", { viewBox: "0 0 20 20", class: "icon", "aria-hidden": "true", focusable: "false" }, path);
}

/** A button with an icon; `label` is its accessible name and tooltip. */
export function iconButton(name, label, click, extra = "") {
  return h("button", { type: "button", class: `icon-button ${extra}`, "aria-label": label, title: label, on: { click } }, icon(name));
}

export function button(text, click, extra = "") {
  return h("button", { type: "button", class: `button ${extra}`, text, on: { click } });
}

export const $ = (id) => document.getElementById(id);

const INTEGER = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = (value) => INTEGER.format(value);

export function rate(value) {
  if (!Number.isFinite(value)) return "–";
  return value >= 100 ? INTEGER.format(value) : value.toFixed(1);
}

export function seconds(value) {
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  return value < 60 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

export const percent = (value) => `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %`;

/** Run at most once per frame, with the newest arguments. */
export function perFrame(run) {
  let wanted = false;
  return () => {
    if (wanted) return;
    wanted = true;
    requestAnimationFrame(() => {
      wanted = false;
      run();
    });
  };
}

/** Say something to screen readers, without moving anything. */
export function announce(text) {
  $("announcer").textContent = text;
}
