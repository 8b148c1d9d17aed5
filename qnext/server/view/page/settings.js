// The settings panel: system prompt, sampling, form of the answer, tools.

import { $, button, h, iconButton } from "./dom.js";

const STORED = "qnext-settings";

const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, help: "0 always takes the likeliest token" },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.01, help: "Keep the likeliest tokens up to this probability" },
  { name: "top_k", label: "Top k", min: -1, max: 1_000_000, step: 1, help: "Keep this many of the likeliest tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, help: "Drop tokens below this share of the likeliest" },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 10_000_000, step: 1, help: "Longest answer; empty: as long as the context allows" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, help: "The same seed gives the same answer; empty: another each time" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.01, max: 10, step: 0.01, help: "1 is none" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, help: "0 is none" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, help: "0 is none" },
];

const TEXTS = [
  { name: "stop", label: "Stop texts", rows: 2, help: "One a line; the answer ends before them", read: readStop },
  { name: "schema", label: "JSON schema of the answer", rows: 4, help: "The answer will fit it", read: (text) => readJson(text, isObject, "an object") },
  { name: "tools", label: "Tools", rows: 5, help: "A JSON list of functions, as the chat API takes them", read: (text) => readJson(text, Array.isArray, "a list") },
];

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

function readStop(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  if (lines.length > 16) throw new Error("at most 16 stop texts");
  return lines.length ? lines : undefined;
}

function readJson(text, fits, what) {
  if (!text.trim()) return undefined;
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("not JSON");
  }
  if (!fits(value)) throw new Error(`must be ${what}`);
  return value;
}

function readNumber({ min, max, step }, text) {
  if (text.trim() === "") return undefined;
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Error("not a number");
  if (value < min || value > max) throw new Error(`must be ${min} to ${max}`);
  if (step === 1 && !Number.isInteger(value)) throw new Error("must be a whole number");
  return value;
}

const FIELDS = [...NUMBERS.map((field) => ({ ...field, read: (text) => readNumber(field, text) })), ...TEXTS];

export class Settings {
  #changes = stored(); // text by field, of what differs from the server's defaults
  #defaults = {};
  #chat = null;

  setDefaults(sampling) {
    this.#defaults = sampling ?? {};
  }

  /** Whose system prompt is edited. */
  setChat(chat) {
    this.#chat = chat;
  }

  /** What a field shows. */
  #text(name) {
    const value = this.#changes[name] ?? this.#defaults[name];
    if (value === undefined || value === null) return "";
    return Array.isArray(value) ? value.join("\n") : String(value);
  }

  /** The first field that cannot be sent, as a sentence; "" when all can. */
  problem() {
    for (const field of FIELDS) {
      try {
        field.read(this.#text(field.name));
      } catch (error) {
        return `Settings, ${field.label}: ${error.message}.`;
      }
    }
    return "";
  }

  /** What the panel shows, as fields of a request. */
  requestFields(isChat) {
    const found = {};
    for (const { name, read } of FIELDS) {
      const value = read(this.#text(name));
      if (value !== undefined) found[name] = value;
    }
    const { schema, tools, ...fields } = found;
    if (schema) fields.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
    if (tools?.length && isChat) fields.tools = tools;
    return fields;
  }

  #set(name, text, control, note) {
    if (text === this.#defaultText(name)) delete this.#changes[name];
    else this.#changes[name] = text;
    localStorage.setItem(STORED, JSON.stringify(this.#changes));
    this.#check(name, control, note);
  }

  #defaultText(name) {
    const value = this.#defaults[name];
    return value === undefined || value === null ? "" : String(value);
  }

  #check(name, control, note) {
    const field = FIELDS.find((one) => one.name === name);
    let wrong = "";
    try {
      field.read(control.value);
    } catch (error) {
      wrong = error.message;
    }
    control.setAttribute("aria-invalid", String(Boolean(wrong)));
    note.textContent = wrong || field.help;
    note.classList.toggle("wrong", Boolean(wrong));
  }

  open() {
    const panel = $("settings-panel");
    const reset = button("Back to the server's defaults", () => {
      this.#changes = {};
      localStorage.removeItem(STORED);
      this.#fill(panel, reset);
    });
    this.#fill(panel, reset);
    panel.showModal();
  }

  #fill(panel, reset) {
    const head = h("div", { class: "sheet-head" }, h("h2", { text: "Settings" }), iconButton("close", "Close settings", () => panel.close()));
    const numbers = h("div", { class: "number-grid" }, ...NUMBERS.map((field) => this.#numberField(field)));
    const texts = TEXTS.map((field) => this.#textField(field));
    const chatOnly = this.#chat.hasChat ? [this.#systemField()] : [];
    panel.replaceChildren(head, ...chatOnly, h("h3", { text: "Sampling" }), numbers, h("h3", { text: "Form of the answer" }), ...texts, reset);
  }

  #systemField() {
    const area = h("textarea", { id: "set-system", rows: "4", placeholder: "How the model should answer in this conversation" });
    area.value = this.#chat.system;
    area.addEventListener("input", () => (this.#chat.system = area.value));
    return h("div", { class: "field" }, h("label", { for: "set-system", text: "System prompt of this conversation" }), area);
  }

  #numberField(field) {
    const { min, max, step } = field;
    // Any step: the browser would refuse 0.123; the limits are checked here.
    const input = h("input", { type: "number", min, max, step: step === 1 ? 1 : "any", inputmode: "decimal", autocomplete: "off" });
    return this.#field(field, input);
  }

  #textField(field) {
    const area = h("textarea", { rows: field.rows, spellcheck: "false", class: "mono" });
    return this.#field(field, area);
  }

  #field({ name, label }, control) {
    control.id = `set-${name}`;
    control.value = this.#text(name);
    const note = h("p", { class: "help", id: `help-${name}` });
    control.setAttribute("aria-describedby", note.id);
    control.addEventListener("input", () => this.#set(name, control.value, control, note));
    this.#check(name, control, note);
    return h("div", { class: "field" }, h("label", { for: control.id, text: label }), control, note);
  }
}

function stored() {
  try {
    const found = JSON.parse(localStorage.getItem(STORED) ?? "{}");
    return Object.fromEntries(Object.entries(found).filter(([, value]) => typeof value === "string"));
  } catch {
    return {};
  }
}
