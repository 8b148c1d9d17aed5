// Light and dark: the system's choice until the reader makes one.

import { icon } from "./dom.js";

const root = document.documentElement;
export const isDark = () => root.dataset.theme === "dark";

function apply(theme, control) {
  root.dataset.theme = theme;
  control.replaceChildren(icon(theme === "dark" ? "sun" : "moon"));
  dispatchEvent(new Event("themechange"));
}

export function setUpTheme(control) {
  apply(root.dataset.theme, control);
  control.addEventListener("click", () => {
    const theme = isDark() ? "light" : "dark";
    localStorage.setItem("qnext-theme", theme);
    apply(theme, control);
  });
  matchMedia("(prefers-color-scheme: light)").addEventListener("change", (event) => {
    if (!localStorage.getItem("qnext-theme")) apply(event.matches ? "light" : "dark", control);
  });
}
