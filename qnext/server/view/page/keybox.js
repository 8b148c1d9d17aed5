// The box for the API key.

import { $, button, h } from "./dom.js";
import { apiKey, keepsKey, setApiKey } from "./api.js";

let answer = null;

/** Ask for the key. Resolves to true when one was given, false when the box was closed. */
export function askForKey(reason = "") {
  const box = $("key-box");
  if (box.open) return Promise.resolve(false);
  const field = h("input", { id: "key-field", type: "password", autocomplete: "off", spellcheck: "false" });
  field.value = apiKey();
  const keep = h("input", { type: "checkbox", id: "key-keep" });
  keep.checked = keepsKey();
  const done = (isGiven) => {
    if (isGiven) setApiKey(field.value.trim(), keep.checked);
    box.close();
    answer?.(isGiven);
    answer = null;
  };
  const form = h(
    "form",
    { on: { submit: (event) => (event.preventDefault(), done(true)) } },
    h("h2", { text: "API key" }),
    reason ? h("p", { class: "reason", text: reason }) : null,
    h("label", { for: "key-field", text: "Key of this server" }),
    field,
    h("label", { class: "check" }, keep, "Keep it until this tab is closed"),
    h("p", { class: "muted", text: "Otherwise it is forgotten when the page is loaded again. It is sent to this server alone." }),
    h("div", { class: "row end" }, button("Cancel", () => done(false)), h("button", { type: "submit", class: "button primary", text: "Use key" })),
  );
  box.replaceChildren(form);
  box.oncancel = () => done(false);
  box.showModal();
  field.focus();
  return new Promise((resolve) => {
    answer = resolve;
  });
}
