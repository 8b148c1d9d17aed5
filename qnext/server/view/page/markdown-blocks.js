// Markdown text into blocks: plain objects, no DOM. Work is linear in the text, whatever it holds.

const MAX_DEPTH = 8; // of quotes and lists inside each other; deeper ones stay text
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?: |$)/;

/**
 * Blocks of `text`, in order. Each has `type` and `start` (offset of its first line), and by its type:
 * heading {level, text}, paragraph {text}, rule, code {language, text, closed}, quote {text}, list {ordered, first,
 * items}, table {alignments, rows} whose first row is the head.
 */
export function parseBlocks(text, depth = 0) {
  const lines = text.split("\n");
  const blocks = [];
  let offset = 0;
  let index = 0;
  const take = (block, size) => {
    blocks.push({ ...block, start: offset });
    for (const end = index + size; index < end; index++) offset += lines[index].length + 1;
  };
  while (index < lines.length) {
    const line = lines[index];
    if (!line.trim()) {
      offset += line.length + 1;
      index += 1;
      continue;
    }
    const [block, size] = blockAt(lines, index, depth);
    take(block, size);
  }
  return blocks;
}

function blockAt(lines, index, depth) {
  const line = lines[index];
  const fence = fenceOf(line);
  if (fence) return code(lines, index, fence);
  const heading = headingOf(line);
  if (heading) return [heading, 1];
  if (isRule(line)) return [{ type: "rule" }, 1];
  if (depth < MAX_DEPTH && isQuote(line)) return quote(lines, index);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, index);
  if (isTable(lines, index)) return table(lines, index);
  return paragraph(lines, index, depth);
}

function indentOf(line) {
  let size = 0;
  while (line[size] === " ") size += 1;
  return size;
}

function fenceOf(line) {
  const indent = indentOf(line);
  const mark = line[indent];
  if (indent > 3 || (mark !== "`" && mark !== "~")) return null;
  let end = indent;
  while (line[end] === mark) end += 1;
  const info = line.slice(end).trim();
  if (end - indent < 3 || (mark === "`" && info.includes("`"))) return null;
  return { mark, size: end - indent, indent, language: info.split(" ", 1)[0].slice(0, 32) };
}

function code(lines, index, { mark, size, indent, language }) {
  const body = [];
  for (let at = index + 1; at < lines.length; at++) {
    const line = lines[at].trim();
    if (line.length >= size && line === mark.repeat(line.length)) {
      return [{ type: "code", language, text: body.join("\n"), closed: true }, at - index + 1];
    }
    body.push(lines[at].slice(Math.min(indent, indentOf(lines[at]))));
  }
  return [{ type: "code", language, text: body.join("\n"), closed: false }, lines.length - index];
}

function headingOf(line) {
  const match = /^ {0,3}(#{1,6})(?:[ \t]|$)/.exec(line);
  if (!match) return null;
  let text = line.slice(match[0].length).trim();
  let end = text.length;
  while (text[end - 1] === "#") end -= 1;
  if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trim();
  return { type: "heading", level: match[1].length, text };
}

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function isQuote(line) {
  const indent = indentOf(line);
  return indent <= 3 && line[indent] === ">";
}

function startsBlock(line) {
  return fenceOf(line) !== null || headingOf(line) !== null || isRule(line) || isQuote(line) || ITEM.test(line);
}

function quote(lines, index) {
  const body = [];
  let at = index;
  for (; at < lines.length && lines[at].trim(); at++) {
    if (isQuote(lines[at])) body.push(lines[at].slice(indentOf(lines[at]) + 1).replace(/^ /, ""));
    else if (startsBlock(lines[at])) break;
    else body.push(lines[at]);
  }
  return [{ type: "quote", text: body.join("\n") }, at - index];
}

function list(lines, index) {
  const first = ITEM.exec(lines[index]);
  const isOrdered = first[2].length > 1;
  const mark = first[2].at(-1);
  const items = [];
  let width = 0;
  let at = index;
  for (; at < lines.length; at++) {
    const line = lines[at];
    const match = ITEM.exec(line);
    if (match && indentOf(line) < Math.max(2, width) && !isRule(line)) {
      if (match[2].at(-1) !== mark || match[2].length > 1 !== isOrdered) break;
      width = match[0].length;
      items.push([line.slice(width)]);
    } else if (!line.trim()) {
      if (!continues(lines, at)) break;
      items.at(-1).push("");
    } else if (indentOf(line) >= 2) {
      items.at(-1).push(line.slice(Math.min(width, indentOf(line))));
    } else if (lines[at - 1].trim() && !startsBlock(line)) {
      items.at(-1).push(line);
    } else {
      break;
    }
  }
  const made = { type: "list", ordered: isOrdered, first: isOrdered ? Number.parseInt(first[2], 10) : 1 };
  return [{ ...made, items: items.map((body) => body.join("\n")) }, at - index];
}

/** Whether a list goes on after the empty line `at`. At most one more empty line is looked through. */
function continues(lines, at) {
  const next = lines[at + 1]?.trim() ? lines[at + 1] : (lines[at + 2] ?? "");
  return next.trim() !== "" && (indentOf(next) >= 2 || ITEM.test(next));
}

function cells(line) {
  const trimmed = line.trim();
  const found = [];
  let cell = "";
  for (let at = trimmed[0] === "|" ? 1 : 0; at < trimmed.length; at++) {
    if (trimmed[at] === "\\" && trimmed[at + 1] === "|") {
      cell += "|";
      at += 1;
    } else if (trimmed[at] === "|") {
      found.push(cell.trim());
      cell = "";
    } else {
      cell += trimmed[at];
    }
  }
  if (cell.trim()) found.push(cell.trim());
  return found;
}

function isTable(lines, index) {
  const [head, rule] = [lines[index], lines[index + 1] ?? ""];
  if (!head.includes("|") || !rule.includes("-") || /[^\s|:-]/.test(rule)) return false;
  return cells(head).length === cells(rule).length;
}

function table(lines, index) {
  const alignments = cells(lines[index + 1]).map((cell) => {
    if (cell.startsWith(":") && cell.endsWith(":")) return "center";
    return cell.endsWith(":") ? "right" : "left";
  });
  const rows = [cells(lines[index])];
  let at = index + 2;
  for (; at < lines.length && lines[at].trim() && lines[at].includes("|"); at++) rows.push(cells(lines[at]));
  return [{ type: "table", alignments, rows }, at - index];
}

function paragraph(lines, index, depth) {
  let at = index + 1;
  while (at < lines.length && lines[at].trim() && !isTable(lines, at)) {
    if (startsBlock(lines[at]) && !(depth >= MAX_DEPTH && (isQuote(lines[at]) || ITEM.test(lines[at])))) break;
    at += 1;
  }
  return [{ type: "paragraph", text: lines.slice(index, at).join("\n") }, at - index];
}
