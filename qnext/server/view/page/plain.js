// Text as it is: what a model without a chat format continues may be code.

import { h } from "./dom.js";

export class PlainView {
  element = h("pre", { class: "continued", tabindex: "0", "aria-label": "Continued text" });

  update(text) {
    if (this.element.textContent !== text) this.element.textContent = text;
  }
}
