// Conversations as a JSON file, out and in. What comes in is checked and rebuilt: nothing of it is trusted.

import { addNode, newConversation } from "./tree.js";

const FORMAT = "qnext-conversations";
const MAX_BYTES = 64 * 1024 * 1024;
const ROLES = new Set(["user", "assistant", "tool"]);

export function exportText(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** The conversations of a file, as new ones. Throws Error with a sentence that says what is wrong. */
export function importText(text) {
  if (text.length > MAX_BYTES) throw new Error("The file is larger than 64 MiB.");
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (found?.format !== FORMAT || found.version !== 1 || !Array.isArray(found.conversations)) {
    throw new Error("The file holds no conversations of this page.");
  }
  return found.conversations.map(rebuild);
}

const string = (value) => (typeof value === "string" ? value : "");
const number = (value) => (Number.isFinite(value) ? value : undefined);

function rebuild(source) {
  const made = newConversation();
  made.title = string(source?.title).slice(0, 200);
  made.system = string(source?.system);
  const nodes = new Map(Object.entries(source?.nodes ?? {}));
  const seen = new Set();
  // A stack in place of recursion: a file may be as deep as it likes.
  const waiting = [[source?.root, made.root, null]];
  while (waiting.length) {
    const [from, to, parent] = waiting.pop();
    if (!Array.isArray(from?.children)) continue;
    let chosen = null;
    for (const id of from.children) {
      const node = nodes.get(id);
      if (!node || seen.has(id) || !ROLES.has(node.role)) throw new Error("The file is damaged: its messages form no tree.");
      seen.add(id);
      const copy = addNode(made, parent, fields(node));
      if (id === from.chosen) chosen = copy.id;
      waiting.push([node, copy, copy.id]);
    }
    if (chosen) to.chosen = chosen;
  }
  made.created = number(source?.created) ?? made.created;
  made.updated = number(source?.updated) ?? made.updated;
  return made;
}

function fields(node) {
  const copy = { role: node.role, content: string(node.content), created: number(node.created) ?? Date.now() };
  if (string(node.reasoning)) copy.reasoning = node.reasoning;
  if (number(node.reasoningSeconds) !== undefined) copy.reasoningSeconds = node.reasoningSeconds;
  if (node.role === "tool") {
    copy.toolCallId = string(node.toolCallId);
    copy.name = string(node.name);
  }
  if (Array.isArray(node.toolCalls)) {
    copy.toolCalls = node.toolCalls.map((call) => ({
      id: string(call?.id),
      name: string(call?.name),
      arguments: string(call?.arguments),
    }));
  }
  if (node.figures && typeof node.figures === "object") {
    copy.figures = Object.fromEntries(Object.entries(node.figures).filter(([, value]) => Number.isFinite(value)));
  }
  return copy;
}
