// Light colours for code: comments, strings, numbers, words that a language keeps for itself, and calls.

import { h } from "./dom.js";

const MAX_LENGTH = 50_000;

const words = (text) => new Set(text.split(" "));
const C_LIKE =
  "if else for while do return break continue switch case default struct enum static const void int float double char bool true false new class public private protected import export from function let var async await try catch finally throw typeof instanceof null undefined this super extends implements interface type fn mut pub use mod impl trait match self Self where loop func package go defer chan map range nil string auto namespace template using unsigned long sizeof";
const KEYWORDS = {
  python: words(
    "and as assert async await break class continue def del elif else except finally for from global if import in is lambda None nonlocal not or pass raise return True False try while with yield match case self",
  ),
  shell: words("if then else elif fi for in do done while case esac function return export local set cd echo exit sudo"),
  sql: words(
    "select from where and or not insert into values update delete create table join left right inner outer on group by order having limit as distinct null primary key SELECT FROM WHERE AND OR NOT INSERT INTO VALUES UPDATE DELETE CREATE TABLE JOIN LEFT RIGHT INNER OUTER ON GROUP BY ORDER HAVING LIMIT AS DISTINCT NULL PRIMARY KEY",
  ),
  json: words("true false null"),
  c: words(C_LIKE),
};
const FAMILY = {
  py: "python", python: "python", python3: "python", sh: "shell", bash: "shell", shell: "shell", zsh: "shell", console: "shell",
  sql: "sql", json: "json", jsonc: "json", yaml: "shell", yml: "shell", toml: "shell", dockerfile: "shell", make: "shell",
};
const PLAIN = new Set(["", "text", "txt", "plain", "markdown", "md", "output", "html", "xml", "css", "diff"]);

// Each alternative is linear: none can match the same text in two ways.
const STRING = String.raw`"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?`;
const REST = String.raw`\b\d[\w.]*|[A-Za-z_]\w*`;
const HASH = new RegExp(String.raw`(#[^\n]*)|("""[\s\S]*?(?:"""|$)|${STRING})|(${REST})`, "g");
const SLASH = new RegExp(String.raw`(\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$))|(${STRING}|${"`"}[^${"`"}]*${"`"}?)|(${REST})`, "g");
const DASH = new RegExp(String.raw`(--[^\n]*)|(${STRING})|(${REST})`, "g");

/** Text nodes and coloured spans that together are `text`. */
export function highlight(text, language) {
  const name = language.toLowerCase();
  if (text.length > MAX_LENGTH || PLAIN.has(name)) return [text];
  const family = FAMILY[name] ?? "c";
  const pattern = family === "sql" ? DASH : family === "python" || family === "shell" ? HASH : SLASH;
  const nodes = [];
  let end = 0;
  for (const match of text.matchAll(pattern)) {
    const kind = kindOf(match, text, KEYWORDS[family]);
    if (!kind) continue;
    if (match.index > end) nodes.push(text.slice(end, match.index));
    nodes.push(h("span", { class: `code-${kind}`, text: match[0] }));
    end = match.index + match[0].length;
  }
  nodes.push(text.slice(end));
  return nodes;
}

function kindOf(match, text, keywords) {
  const [whole, comment, string, word] = match;
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  if (/^\d/.test(word)) return "number";
  if (keywords.has(word)) return "keyword";
  return text[match.index + whole.length] === "(" ? "call" : null;
}
