// Markdown on the page, also while it is still being written.

import { h, iconButton } from "./dom.js";
import { copyText } from "./clipboard.js";
import { highlight } from "./highlight.js";
import { parseBlocks } from "./markdown-blocks.js";
import { renderInline, visible } from "./markdown-inline.js";

/**
 * Shows a text that grows at its end. Blocks that can change no more are left alone, so that an update costs as much as
 * the last block, not as the whole text.
 */
export class MarkdownView {
  #settledTo = 0; // offset up to which `element` is final
  #live = []; // [{block, node}] after that
  #text = "";

  constructor() {
    this.element = h("div", { class: "markdown" });
  }

  /** Show `text`. `isWhole`: nothing follows. */
  update(text, isWhole) {
    if (!text.startsWith(this.#text.slice(0, this.#settledTo))) this.#reset();
    this.#text = text;
    const tail = text.slice(this.#settledTo);
    const blocks = parseBlocks(tail);
    this.#show(blocks, isWhole);
    const settled = isWhole ? blocks.length : numSettled(blocks, tail);
    if (settled === 0) return;
    this.#settledTo += settled < blocks.length ? blocks[settled].start : tail.length;
    const shift = settled < blocks.length ? blocks[settled].start : 0;
    this.#live = this.#live.slice(settled);
    for (const entry of this.#live) entry.block = { ...entry.block, start: entry.block.start - shift };
  }

  #reset() {
    this.element.replaceChildren();
    this.#settledTo = 0;
    this.#live = [];
  }

  #show(blocks, isWhole) {
    blocks.forEach((block, index) => {
      const isOpen = !isWhole && index === blocks.length - 1;
      const shown = this.#live[index];
      if (shown && isSame(shown, block, isOpen)) return;
      if (shown && isOpen && grow(shown, block)) return;
      const node = renderBlock(block, 0, isOpen);
      if (shown) shown.node.replaceWith(node);
      else this.element.append(node);
      this.#live[index] = { block, node, isOpen };
    });
    for (const { node } of this.#live.splice(blocks.length)) node.remove();
  }
}

/** Blocks that no further text changes: all but the last, or but two while the first line of the last is not over. */
function numSettled(blocks, tail) {
  const last = blocks.at(-1);
  if (!last) return 0;
  const isLineOver = tail.indexOf("\n", last.start) >= 0;
  return Math.max(0, blocks.length - (isLineOver ? 1 : 2));
}

function isSame({ block, isOpen }, next, isNextOpen) {
  if (block.type === "code" && isOpen !== isNextOpen) return false; // colours come at its end
  return block.start === next.start && block.type === next.type && JSON.stringify(block) === JSON.stringify(next);
}

/** Code that is being written gets its new text at the end. */
function grow(shown, next) {
  const { block, node } = shown;
  if (!shown.isOpen || block.type !== "code" || next.type !== "code" || block.start !== next.start) return false;
  if (block.language !== next.language || !next.text.startsWith(block.text)) return false;
  node.querySelector("code").append(visible(next.text.slice(block.text.length)));
  shown.block = next;
  return true;
}

const children = (text, depth) => parseBlocks(text, depth + 1).map((block) => renderBlock(block, depth + 1, false));

function renderBlock(block, depth, isOpen) {
  switch (block.type) {
    case "heading":
      // The page's own headings come before those of an answer.
      return h(`h${Math.min(6, block.level + 2)}`, { class: `level-${block.level}` }, ...renderInline(block.text));
    case "rule":
      return h("hr");
    case "code":
      return codeBlock(block, isOpen);
    case "quote":
      return h("blockquote", {}, ...children(block.text, depth));
    case "list":
      return renderList(block, depth);
    case "table":
      return renderTable(block);
    default:
      return h("p", {}, ...renderInline(block.text));
  }
}

function renderList(block, depth) {
  const items = block.items.map((text) => {
    const blocks = parseBlocks(text, depth + 1);
    // A single line is not a paragraph of its own.
    const nodes = blocks.flatMap((inner, index) =>
      inner.type === "paragraph" && index === 0 ? renderInline(inner.text) : [renderBlock(inner, depth + 1, false)],
    );
    return h("li", {}, ...nodes);
  });
  if (!block.ordered) return h("ul", {}, ...items);
  return h("ol", { start: block.first === 1 ? undefined : block.first }, ...items);
}

function renderTable({ alignments, rows }) {
  const [head, ...body] = rows;
  const row = (tag, cells) =>
    h("tr", {}, ...alignments.map((align, i) => h(tag, { class: `align-${align}` }, ...renderInline(cells[i] ?? ""))));
  const table = h("table", {}, h("thead", {}, row("th", head)), h("tbody", {}, ...body.map((cells) => row("td", cells))));
  return h("div", { class: "table-scroll", tabindex: "0", role: "region", "aria-label": "Table" }, table);
}

export function codeBlock({ language, text }, isOpen = false) {
  const code = h("code", {}, ...(isOpen ? [visible(text)] : highlight(visible(text), language)));
  const copy = iconButton("copy", "Copy code", () => copyText(code.textContent, copy));
  const bar = h("div", { class: "code-bar" }, h("span", { text: visible(language) || "text" }), copy);
  const body = h("pre", { tabindex: "0", dir: "ltr", role: "region", "aria-label": "Code" }, code);
  return h("div", { class: "code-block" }, bar, body);
}
