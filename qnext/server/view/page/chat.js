// The conversation that is shown: sending, stopping, editing, versions.

import { $, announce, count, icon, perFrame } from "./dom.js";
import { ApiError } from "./api.js";
import { generate, requestFor } from "./generation.js";
import { askForKey } from "./keybox.js";
import { MessageView } from "./message.js";
import { addNode, chooseSibling, newConversation, openCalls, path, removeLeaf, siblings, titleOf } from "./tree.js";

const SAVE_EVERY = 1000; // ms, while an answer comes
const NEAR_END = 60; // px from the end at which the view follows

export class Chat {
  #store;
  #server;
  #settings;
  #changed;
  #views = new Map(); // by node id, of the conversation that is shown
  #running = null; // {conversation, node, controller}
  #follows = true;
  #grow = perFrame(() => this.#showGrowth());

  /** `changed` is called when the list of conversations has to be drawn again. */
  constructor(store, server, settings, changed) {
    this.#store = store;
    this.#server = server;
    this.#settings = settings;
    this.#changed = changed;
    this.conversation = newConversation();
    $("scroller").addEventListener("scroll", () => {
      const box = $("scroller");
      this.#follows = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END;
    }, { passive: true });
  }

  get isRunning() {
    return this.#running !== null;
  }

  open(conversation) {
    this.conversation = conversation;
    this.#views.clear();
    this.#follows = true;
    this.hideNotice();
    this.show();
  }

  startNew() {
    const { system } = this.conversation;
    this.open(newConversation());
    this.conversation.system = system;
  }

  /** Send what the reader wrote. Whether it was taken. */
  send(text) {
    if (this.isRunning || !text.trim()) return false;
    if (!this.#isReady()) return false;
    const last = path(this.conversation).at(-1);
    this.#follows = true;
    this.#answer(addNode(this.conversation, last?.id ?? null, { role: "user", content: text }));
    return true;
  }

  stop() {
    this.#running?.controller.abort();
  }

  /** `conversation` is about to be deleted: nothing of it is shown or answered any more. */
  leave(conversation) {
    if (conversation === this.conversation) this.startNew();
    if (conversation === this.#running?.conversation) this.stop();
  }

  #isReady() {
    const problem = this.#settings.problem();
    if (problem) this.notice(problem);
    return !problem;
  }

  // ---- what messages ask for ----

  edit(node, text) {
    if (this.isRunning || !this.#isReady()) return;
    const fields = { role: node.role, content: text };
    if (node.role === "assistant") {
      Object.assign(fields, { reasoning: node.reasoning, toolCalls: node.toolCalls });
      addNode(this.conversation, node.parent, fields);
      this.#save();
      this.show();
    } else {
      this.#answer(addNode(this.conversation, node.parent, fields));
    }
  }

  regenerate(node) {
    if (this.isRunning || !this.#isReady()) return;
    const { parent } = node;
    // An answer of which nothing came is replaced, not kept as a version.
    if (!node.content && !node.reasoning && !node.toolCalls && !node.children.length) removeLeaf(this.conversation, node);
    this.#answer(this.conversation.nodes[parent]);
  }

  choose(node, offset) {
    if (this.isRunning) return;
    chooseSibling(this.conversation, node, offset);
    this.#save();
    this.show();
  }

  answerTools(node, results) {
    if (this.isRunning || !this.#isReady()) return;
    let above = path(this.conversation).at(-1);
    for (const { call, content } of results) {
      above = addNode(this.conversation, above.id, { role: "tool", toolCallId: call.id, name: call.name, content });
    }
    this.#answer(above);
  }

  // ---- the answer ----

  async #answer(parent) {
    const { conversation } = this;
    const [address, body] = requestFor(conversation, parent, this.#server, this.#settings);
    const node = addNode(conversation, parent.id, { role: "assistant", isPlain: !this.#server.hasChat });
    const controller = new AbortController();
    this.#running = { conversation, node, controller };
    this.hideNotice();
    this.show();
    this.#save(conversation);
    const saving = setInterval(() => this.#save(conversation), SAVE_EVERY);
    let failure = null;
    try {
      await generate(node, address, body, controller.signal, this.#grow);
      if (!node.finish) node.error = "The connection ended before the answer was complete.";
    } catch (error) {
      failure = controller.signal.aborted ? null : error;
      if (controller.signal.aborted) node.finish = "stopped";
      else node.error = error instanceof ApiError ? error.message : `The page failed: ${error.message}`;
    } finally {
      clearInterval(saving);
      this.#running = null;
    }
    this.#save(conversation);
    this.show(); // also where another conversation is open: it may send again
    announce(node.error ?? "The answer is complete.");
    if (failure?.status === 401) this.#askAndRepeat(conversation, node, failure);
  }

  async #askAndRepeat(conversation, node, failure) {
    const isGiven = await askForKey(failure.message);
    if (!isGiven) return;
    dispatchEvent(new Event("keychange"));
    if (conversation === this.conversation && conversation.nodes[node.id]) this.regenerate(node);
  }

  #save(conversation = this.conversation) {
    const isDeleted = conversation !== this.conversation && !this.#store.get(conversation.id);
    if (isDeleted || !conversation.root.children.length) return;
    conversation.updated = Date.now();
    this.#store.put(conversation).catch(() => this.notice("This browser has no room left to keep the conversation."));
    this.#changed();
  }

  // ---- what is seen ----

  show() {
    const shown = path(this.conversation);
    const calls = this.isRunning ? [] : openCalls(this.conversation);
    const elements = shown.map((node) => {
      let view = this.#views.get(node.id);
      if (!view) this.#views.set(node.id, (view = new MessageView(node, this)));
      const versions = siblings(this.conversation, node);
      view.update(node, {
        isRunning: this.#running?.node === node,
        isBusy: this.isRunning,
        position: versions.indexOf(node.id),
        total: versions.length,
        openCalls: calls.filter((call) => node.toolCalls?.includes(call)),
      });
      return view.element;
    });
    const list = $("messages");
    const isSame = list.children.length === elements.length && elements.every((element, i) => list.children[i] === element);
    if (!isSame) list.replaceChildren(...elements);
    $("welcome").hidden = shown.length > 0;
    sessionStorage.setItem("qnext-open", this.conversation.id); // loading the page again shows it again
    $("title").textContent = titleOf(this.conversation);
    this.#showSendButton();
    this.#showContext(shown);
    this.#scroll();
  }

  #showGrowth() {
    const node = this.#running?.node;
    const view = node && this.#views.get(node.id);
    if (!view || !view.element.isConnected) return;
    view.grow();
    this.#scroll();
  }

  #scroll() {
    if (this.#follows) $("scroller").scrollTop = $("scroller").scrollHeight;
  }

  #showSendButton() {
    const button = $("send");
    const kind = this.isRunning ? "stop" : "send";
    if (button.dataset.kind === kind) return;
    button.dataset.kind = kind;
    button.setAttribute("aria-label", this.isRunning ? "Stop" : "Send");
    button.title = this.isRunning ? "Stop (Esc)" : "Send (Enter)";
    button.replaceChildren(icon(kind));
  }

  #showContext(shown) {
    const figures = shown.findLast((node) => node.figures?.promptTokens !== undefined)?.figures;
    const size = this.#server.maxModelLen;
    const gauge = $("context");
    gauge.hidden = !figures || !size;
    if (gauge.hidden) return;
    const used = figures.promptTokens + (figures.outputTokens ?? 0);
    const share = Math.min(1, used / size);
    gauge.setAttribute("aria-valuenow", share.toFixed(3));
    gauge.setAttribute("aria-valuetext", `${count(used)} of ${count(size)} tokens`);
    gauge.classList.toggle("full", share > 0.9);
    $("context-arc").style.strokeDasharray = `${share * 100} 100`;
    $("context-text").textContent = `${count(used)} / ${count(size)}`;
  }

  notice(text) {
    $("notice").textContent = text;
    $("notice").hidden = false;
  }

  hideNotice() {
    $("notice").hidden = true;
  }
}
