// A conversation is a tree of messages; what is shown is one path from its root to a leaf. Pure data.

export const newId = () => crypto.randomUUID?.() ?? [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return {
    id: newId(),
    title: "",
    system: "",
    created: now,
    updated: now,
    root: { children: [], chosen: null },
    nodes: {},
  };
}

const parentOf = (conversation, node) => (node.parent === null ? conversation.root : conversation.nodes[node.parent]);

/** Add a message below `parent` (null: the root) and show it. */
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, children: [], chosen: null, created: Date.now(), content: "", ...fields };
  conversation.nodes[node.id] = node;
  const above = parentOf(conversation, node);
  above.children.push(node.id);
  above.chosen = node.id;
  conversation.updated = node.created;
  return node;
}

/** The messages that are shown, from the first to the last. */
export function path(conversation) {
  const found = [];
  for (let at = conversation.root; at.chosen !== null; ) {
    at = conversation.nodes[at.chosen];
    found.push(at);
  }
  return found;
}

export function siblings(conversation, node) {
  return parentOf(conversation, node).children;
}

/** Show the sibling `offset` places away, if there is one. */
export function chooseSibling(conversation, node, offset) {
  const above = parentOf(conversation, node);
  const wanted = above.children[above.children.indexOf(node.id) + offset];
  if (wanted) above.chosen = wanted;
}

/** Remove a message that has nothing below it. */
export function removeLeaf(conversation, node) {
  const above = parentOf(conversation, node);
  above.children = above.children.filter((id) => id !== node.id);
  if (above.chosen === node.id) above.chosen = above.children.at(-1) ?? null;
  delete conversation.nodes[node.id];
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation)[0]?.content.trim().replace(/\s+/g, " ") ?? "";
  return first ? (first.length > 60 ? `${first.slice(0, 59)}…` : first) : "New conversation";
}

/** Calls of tools that wait for a result: those of the last answer, less the results below it. */
export function openCalls(conversation) {
  const shown = path(conversation);
  const last = shown.findLastIndex((node) => node.role === "assistant");
  if (last < 0) return [];
  const answered = new Set(shown.slice(last + 1).map((node) => node.toolCallId));
  if (shown.slice(last + 1).some((node) => node.role === "user")) return [];
  return (shown[last].toolCalls ?? []).filter((call) => !answered.has(call.id));
}

/** What the chat endpoint gets for the path that ends with `node`. */
export function messagesFor(conversation, node) {
  const messages = [];
  for (let at = node; at; at = at.parent === null ? null : conversation.nodes[at.parent]) {
    if (at.role === "tool") {
      messages.push({ role: "tool", tool_call_id: at.toolCallId, content: at.content });
    } else if (at.role === "assistant") {
      const message = { role: "assistant", content: at.content };
      if (at.toolCalls?.length) {
        message.tool_calls = at.toolCalls.map((call) => ({
          id: call.id,
          type: "function",
          function: { name: call.name, arguments: call.arguments },
        }));
      }
      messages.push(message);
    } else {
      messages.push({ role: "user", content: at.content });
    }
  }
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  return messages.reverse();
}

/** What the completion endpoint gets: all text of the path that ends with `node`. */
export function textFor(conversation, node) {
  const parts = [];
  for (let at = node; at; at = at.parent === null ? null : conversation.nodes[at.parent]) parts.push(at.content);
  return parts.reverse().join("");
}

export function matches(conversation, words) {
  const wanted = words.trim().toLowerCase();
  if (!wanted) return true;
  if (titleOf(conversation).toLowerCase().includes(wanted)) return true;
  return Object.values(conversation.nodes).some((node) => node.content.toLowerCase().includes(wanted));
}
