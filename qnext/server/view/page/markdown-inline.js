// Markdown inside a line: emphasis, code, links. Gives DOM nodes; the text of a model only becomes text nodes.

import { h } from "./dom.js";

const MAX_LEVEL = 10; // of elements inside each other
const LOOKBACK = 16; // openers that a closing mark is compared with
const MAX_ADDRESS = 2048;
const SPECIAL = /[\\`*_~[!<:\n]/g;
const ALNUM = /[\p{L}\p{N}]/u;

/** Characters that turn the direction of text around are shown by their code point. */
export function visible(text) {
  return text.replace(/[\u202a-\u202e\u2066-\u2069]/g, (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase()}]`);
}

/** An absolute http or https address, or null. */
export function safeAddress(text) {
  if (text.length > MAX_ADDRESS || !/^https?:\/\//i.test(text)) return null;
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url : null;
  } catch {
    return null;
  }
}

export function renderInline(text, links = true) {
  return new InlineParser(text, links).run();
}

class InlineParser {
  constructor(text, links) {
    this.text = text;
    this.links = links;
    this.out = []; // {node, level}
    this.openers = []; // {mark, size, at: index in out}
    this.plain = "";
    this.closing = links && text.includes("[") ? matchBrackets(text) : null;
    this.noCodeEnd = new Set(); // sizes of backtick runs that do not come again
  }

  run() {
    let at = 0;
    while (at < this.text.length) {
      SPECIAL.lastIndex = at;
      const match = SPECIAL.exec(this.text);
      if (!match) break;
      this.plain += this.text.slice(at, match.index);
      at = this.special(match.index, match[0]);
    }
    this.plain += this.text.slice(at);
    this.flush();
    return this.out.map((entry) => entry.node);
  }

  /** Handle the mark at `at`; gives where to go on. */
  special(at, mark) {
    const { text } = this;
    if (mark === "\\") return this.escape(at);
    if (mark === "`") return this.code(at);
    if (mark === "\n") return this.newline(at);
    if (mark === "*" || mark === "_" || mark === "~") return this.emphasis(at, mark);
    if (mark === "[" && this.closing) return this.link(at, at);
    if (mark === "!" && text[at + 1] === "[" && this.closing) return this.link(at, at + 1);
    if (mark === ":" && this.links && text.startsWith("://", at)) return this.address(at);
    if (mark === "<" && /^<br ?\/?>/i.test(text.slice(at, at + 6))) {
      this.push(h("br"));
      return text.indexOf(">", at) + 1;
    }
    this.plain += mark;
    return at + 1;
  }

  flush() {
    if (this.plain) this.out.push({ node: document.createTextNode(visible(this.plain)), level: 0 });
    this.plain = "";
  }

  push(node, level = 1) {
    this.flush();
    this.out.push({ node, level });
  }

  escape(at) {
    const next = this.text[at + 1] ?? "";
    if (next === "\n") {
      this.push(h("br"));
      return at + 2;
    }
    if (/[!-/:-@[-`{-~]/.test(next)) {
      this.plain += next;
      return at + 2;
    }
    this.plain += "\\";
    return at + 1;
  }

  newline(at) {
    if (this.plain.endsWith("  ")) {
      this.plain = this.plain.trimEnd();
      this.push(h("br"));
    } else {
      this.plain += "\n";
    }
    return at + 1;
  }

  code(at) {
    const { text } = this;
    const size = runLength(text, at);
    for (let end = at + size; !this.noCodeEnd.has(size); ) {
      end = text.indexOf("`", end);
      if (end < 0) {
        this.noCodeEnd.add(size);
        break;
      }
      const found = runLength(text, end);
      if (found === size) {
        const inner = text.slice(at + size, end).replaceAll("\n", " ");
        const isPadded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
        this.push(h("code", { text: visible(isPadded ? inner.slice(1, -1) : inner) }));
        return end + size;
      }
      end += found;
    }
    this.plain += text.slice(at, at + size);
    return at + size;
  }

  emphasis(at, mark) {
    const { text } = this;
    const size = runLength(text, at);
    const before = text[at - 1] ?? " ";
    const after = text[at + size] ?? " ";
    const isWord = mark === "_" && ALNUM.test(before) && ALNUM.test(after);
    const canClose = before.trim() !== "" && !isWord;
    const canOpen = after.trim() !== "" && !isWord;
    let left = mark === "~" && size !== 2 ? 0 : size;
    if (left === 0) {
      this.plain += text.slice(at, at + size);
      return at + size;
    }
    while (left > 0 && canClose) {
      const used = this.close(mark, left);
      if (!used) break;
      left -= used;
    }
    if (left > 0 && canOpen) {
      this.push(document.createTextNode(mark.repeat(left)), 0);
      this.openers.push({ mark, size: left, at: this.out.length - 1 });
    } else {
      this.plain += mark.repeat(left);
    }
    return at + size;
  }

  /** Wrap what follows the nearest opener of `mark`; gives how many marks that took, 0 for none. */
  close(mark, size) {
    const { openers } = this;
    const lowest = Math.max(0, openers.length - LOOKBACK);
    let index = openers.length - 1;
    while (index >= lowest && openers[index].mark !== mark) index -= 1;
    if (index < lowest) return 0;
    this.flush();
    const opener = openers[index];
    const inner = this.out.slice(opener.at + 1);
    const level = 1 + inner.reduce((most, entry) => Math.max(most, entry.level), 0);
    if (level > MAX_LEVEL) openers.length = index; // not to be tried again: that would take time squared
    if (!inner.length || level > MAX_LEVEL) return 0;
    const used = size >= 2 && opener.size >= 2 ? 2 : 1;
    if (mark === "~" && used < 2) return 0;
    const tag = mark === "~" ? "del" : used === 2 ? "strong" : "em";
    this.out.length = opener.at + 1;
    this.out.push({ node: h(tag, {}, ...inner.map((entry) => entry.node)), level });
    opener.size -= used;
    this.out[opener.at].node.data = mark.repeat(opener.size);
    openers.length = opener.size ? index + 1 : index;
    return used;
  }

  /** `[text](address)`, and an image's `![text](address)`, of which only the link is shown. */
  link(at, bracket) {
    const { text } = this;
    const end = this.closing.get(bracket);
    if (end !== undefined && text[end + 1] === "(") {
      const close = addressEnd(text, end + 2);
      const url = close < 0 ? null : safeAddress(text.slice(end + 2, close).split(/\s/, 1)[0]);
      if (url) {
        const label = text.slice(bracket + 1, end);
        this.push(linkNode(url, renderInline(label, false), label), 2);
        return close + 1;
      }
    }
    this.plain += text.slice(at, bracket + 1);
    return bracket + 1;
  }

  /** A bare address: its scheme stands at the end of `plain`. */
  address(at) {
    const scheme = /https?$/i.exec(this.plain.slice(-5))?.[0];
    if (scheme && !ALNUM.test(this.plain.at(-scheme.length - 1) ?? " ")) {
      const match = /^[^\s<>"`]{1,2048}/.exec(this.text.slice(at, at + MAX_ADDRESS))[0];
      let size = match.length;
      while (/[.,;:!?)\]*_'~]/.test(match[size - 1]) && !(match[size - 1] === ")" && match.slice(0, size).includes("("))) size -= 1;
      const shown = scheme + match.slice(0, size);
      const url = safeAddress(shown);
      if (url && url.host) {
        this.plain = this.plain.slice(0, -scheme.length);
        this.push(linkNode(url, [document.createTextNode(visible(shown))], shown), 1);
        return at + size;
      }
    }
    this.plain += ":";
    return at + 1;
  }
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function addressEnd(text, from) {
  for (let at = from; at < text.length && at - from <= MAX_ADDRESS; at++) {
    if (text[at] === ")") return at;
    if (text[at] === "\n") return -1;
  }
  return -1;
}

/** Where each opening bracket closes. One pass. */
function matchBrackets(text) {
  const closing = new Map();
  const open = [];
  const marks = /[\\[\]]/g;
  for (let match = marks.exec(text); match; match = marks.exec(text)) {
    if (match[0] === "\\") marks.lastIndex = match.index + 2;
    else if (match[0] === "[") open.push(match.index);
    else if (open.length) closing.set(open.pop(), match.index);
  }
  return closing;
}

function linkNode(url, label, source) {
  const link = h("a", { href: url.href, rel: "noopener noreferrer", target: "_blank", referrerpolicy: "no-referrer" }, ...label);
  if (source.includes(url.host)) return link;
  return h("span", {}, link, h("span", { class: "host", text: ` (${visible(url.host)})` }));
}
