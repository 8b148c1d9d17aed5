// Copying, and saying so.

import { announce, icon } from "./dom.js";

/** Copy `text`; `control`, the button that was pressed, shows for a moment that it is done. */
export async function copyText(text, control) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyBySelection(text); // an address without https has no clipboard
  }
  const before = [...control.childNodes];
  control.replaceChildren(icon("check"));
  announce("Copied");
  setTimeout(() => control.replaceChildren(...before), 1200);
}

function copyBySelection(text) {
  const area = document.createElement("textarea");
  area.value = text;
  area.className = "off-screen";
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
