// One message on the page.

import { button, count, h, icon, iconButton, percent, rate, seconds } from "./dom.js";
import { copyText } from "./clipboard.js";
import { codeBlock, MarkdownView } from "./markdown.js";
import { PlainView } from "./plain.js";

/**
 * Shows a node of a conversation. `actions`: edit(node, text), regenerate(node), choose(node, offset),
 * answerTools(node, results).
 */
export class MessageView {
  #actions;
  #node;
  #state = {};
  #answer;
  #thoughts = null;
  #isFoldTouched = false;
  #callsShown = "";
  #calls = h("div", { class: "calls" });
  #problem = h("p", { class: "problem", role: "alert", hidden: true });
  #foot = h("footer", {});
  #body;

  constructor(node, actions) {
    this.#node = node;
    this.#actions = actions;
    this.#answer = node.isPlain ? new PlainView() : new MarkdownView();
    this.#body = h("div", { class: "body" });
    const names = { user: "You", assistant: "Answer", tool: `Result of ${node.name || "a tool"}` };
    this.element = h("article", { class: `message ${node.role}`, "aria-label": names[node.role], "data-id": node.id }, this.#body, this.#foot);
    this.#showBody();
  }

  #showBody() {
    const node = this.#node;
    if (node.role === "assistant") {
      this.#body.replaceChildren(this.#answer.element, this.#calls, this.#problem);
      if (this.#thoughts) this.#body.prepend(this.#thoughts.element);
    } else if (node.role === "tool") {
      const title = h("p", { class: "call-title" }, icon("tool"), `Result of ${node.name || "a tool"}`);
      this.#body.replaceChildren(title, codeBlock({ language: "result", text: pretty(node.content) }));
    } else {
      this.#body.replaceChildren(h("div", { class: "bubble", dir: "auto", text: node.content }));
    }
  }

  /** `state`: {isRunning, position, total, openCalls, isBusy}. */
  update(node, state) {
    this.#node = node;
    this.#state = state;
    if (node.role === "assistant") this.#updateAnswer();
    this.#updateFoot();
  }

  /** Only what streaming changes. */
  grow() {
    this.#updateAnswer();
  }

  #updateAnswer() {
    const node = this.#node;
    const isRunning = Boolean(this.#state.isRunning);
    this.element.classList.toggle("running", isRunning);
    this.element.classList.toggle("waiting", isRunning && !node.content && !node.reasoning && !node.toolCalls?.length);
    this.element.setAttribute("aria-busy", String(isRunning));
    if (node.reasoning) this.#showThoughts(isRunning && !node.content && !node.toolCalls?.length);
    this.#answer.update(node.content, !isRunning);
    this.#showCalls();
    this.#problem.hidden = !node.error;
    if (node.error && this.#problem.dataset.text !== node.error) {
      this.#problem.dataset.text = node.error;
      this.#problem.replaceChildren(node.error, " ", button("Try again", () => this.#actions.regenerate(this.#node), "small"));
    }
  }

  #showThoughts(isThinking) {
    if (!this.#thoughts) {
      const view = new MarkdownView();
      const summary = h("summary", { on: { click: () => (this.#isFoldTouched = true) } });
      const element = h("details", { class: "thoughts" }, summary, view.element);
      this.#thoughts = { view, summary, element };
      this.#body.prepend(element);
    }
    const { view, summary, element } = this.#thoughts;
    const time = this.#node.reasoningSeconds;
    summary.textContent = isThinking ? "Thinking…" : time === undefined ? "Thoughts" : `Thought for ${seconds(time)}`;
    element.classList.toggle("thinking", isThinking);
    if (!this.#isFoldTouched) element.open = isThinking;
    view.update(this.#node.reasoning, !isThinking);
  }

  #showCalls() {
    const calls = this.#node.toolCalls ?? [];
    const open = this.#state.openCalls ?? [];
    const shown = JSON.stringify([calls, open.map((call) => call.id)]);
    if (shown === this.#callsShown) return;
    this.#callsShown = shown;
    const cards = calls.map((call) =>
      h(
        "div",
        { class: "call" },
        h("p", { class: "call-title" }, icon("tool"), "Calls ", h("strong", { text: call.name })),
        codeBlock({ language: "json", text: pretty(call.arguments) }),
      ),
    );
    this.#calls.replaceChildren(...cards, ...(open.length ? [this.#resultForm(open)] : []));
  }

  #resultForm(open) {
    const fields = open.map((call) => h("textarea", { rows: "2", "aria-label": `Result of ${call.name}`, placeholder: `What ${call.name} returned` }));
    const send = (event) => {
      event.preventDefault();
      this.#actions.answerTools(this.#node, open.map((call, index) => ({ call, content: fields[index].value })));
    };
    const submit = h("button", { type: "submit", class: "button primary small", text: open.length > 1 ? "Send results" : "Send result" });
    return h("form", { class: "results", on: { submit: send } }, ...fields, submit);
  }

  #updateFoot() {
    const node = this.#node;
    const { isRunning, position, total, isBusy } = this.#state;
    const parts = [];
    if (total > 1) {
      const step = (offset) => () => this.#actions.choose(node, offset);
      const left = iconButton("left", "Previous version", step(-1), "small");
      const right = iconButton("right", "Next version", step(1), "small");
      left.disabled = position === 0 || isBusy;
      right.disabled = position === total - 1 || isBusy;
      parts.push(h("span", { class: "versions" }, left, h("span", { text: `${position + 1}/${total}` }), right));
    }
    if (!isRunning) {
      const copy = iconButton("copy", "Copy", () => copyText(node.content, copy), "small");
      parts.push(copy);
      if (node.role !== "tool") parts.push(iconButton("edit", "Edit", () => this.#edit(), "small"));
      if (node.role === "assistant") parts.push(iconButton("again", "Regenerate", () => this.#actions.regenerate(node), "small"));
      for (const control of parts.slice(-3)) if (isBusy && control !== copy && control.localName === "button") control.disabled = true;
      const figures = figuresText(node);
      if (figures) parts.push(h("span", { class: "figures", text: figures }));
    }
    this.#foot.replaceChildren(...parts);
  }

  #edit() {
    const area = h("textarea", { class: "edit", "aria-label": "Edit the message" });
    area.value = this.#node.content;
    area.rows = Math.min(16, Math.max(3, this.#node.content.split("\n").length + 1));
    const close = () => {
      this.#showBody();
      this.#updateFoot();
    };
    const save = () => {
      close();
      if (area.value.trim()) this.#actions.edit(this.#node, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && this.#node.role === "user") save();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const label = this.#node.role === "user" ? "Send" : "Save as a version";
    const row = h("div", { class: "row end" }, button("Cancel", close, "small"), button(label, save, "small primary"));
    this.#body.replaceChildren(area, row);
    this.#foot.replaceChildren();
    area.focus();
  }
}

/** JSON with line breaks where it is JSON. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function figuresText({ figures, finish }) {
  const parts = [];
  if (figures) {
    if (figures.firstToken !== undefined) parts.push(`first token ${seconds(figures.firstToken)}`);
    if (figures.rate !== undefined) parts.push(`${rate(figures.rate)} tokens/s`);
    if (figures.outputTokens !== undefined) parts.push(`${count(figures.outputTokens)} tokens`);
    if (figures.cachedTokens) parts.push(`${count(figures.cachedTokens)} cached`);
    if (figures.drafted) parts.push(`drafts ${percent(figures.accepted / figures.drafted)}`);
  }
  if (finish === "length") parts.push("ended by max tokens");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}
