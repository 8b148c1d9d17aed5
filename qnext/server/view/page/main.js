// Puts the page together.

import { $, count, icon } from "./dom.js";
import { ApiError, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { askForKey } from "./keybox.js";
import { LiveView } from "./live.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { Store } from "./store.js";
import { setUpTheme } from "./theme.js";

const lastOpen = sessionStorage.getItem("qnext-open"); // before anything else is opened
const store = new Store();
const settings = new Settings();
/** What is known of the server; a key without the right to look at it can chat all the same. */
const server = { model: "", hasChat: true, maxModelLen: 0 };
let sidebar = null;
const chat = new Chat(store, server, settings, () => sidebar?.show());
const live = new LiveView();

function drawIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
}

async function describeServer() {
  try {
    const model = await getJson("live/model");
    Object.assign(server, { model: model.model, hasChat: model.has_chat, maxModelLen: model.max_model_len });
    settings.setDefaults(model.sampling);
    live.start(model);
    welcome(model);
  } catch (error) {
    await withoutDescription(error);
  }
  $("model-name").textContent = server.model;
  document.title = server.model ? `${server.model} · qnext` : "qnext";
  chat.show();
}

async function withoutDescription(error) {
  if (!(error instanceof ApiError)) throw error;
  live.refuse(error.message);
  if (error.status === 401) {
    if (await askForKey(error.message)) await describeServer();
  } else if (error.status === 403) {
    const models = await getJson("v1/models").catch(() => null);
    server.model = models?.data?.[0]?.id ?? "";
    server.maxModelLen = models?.data?.[0]?.max_model_len ?? 0;
  } else {
    chat.notice(error.message);
  }
}

function welcome(model) {
  const sparse = model.layers.filter((layer) => layer.experts > 0 && !layer.mtp);
  const facts = [`${model.layers.filter((layer) => !layer.mtp).length} layers`];
  if (sparse.length) facts.push(`${sparse[0].top_k} of ${sparse[0].experts} experts for each token`);
  facts.push(`${count(model.max_model_len)} tokens of context`);
  $("welcome-title").textContent = model.has_chat ? `Ask ${model.model}` : `Let ${model.model} go on`;
  $("welcome-kind").hidden = model.has_chat;
  $("welcome-facts").textContent = facts.join(" · ");
  $("prompt").placeholder = model.has_chat ? "Ask anything" : "Text that the model continues";
}

function setUpComposer() {
  const prompt = $("prompt");
  const fit = () => {
    prompt.style.height = "auto";
    prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.4)}px`;
  };
  const submit = () => {
    if (chat.isRunning) return;
    if (chat.send(prompt.value)) {
      prompt.value = "";
      fit();
    }
  };
  prompt.addEventListener("input", fit);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (chat.isRunning) chat.stop();
    else submit();
  });
}

function startNew() {
  chat.startNew();
  sidebar.setOpen(false);
  sidebar.show();
  showTab("chat");
  $("prompt").focus();
}

function setUpKeys() {
  addEventListener("keydown", (event) => {
    const isTyping = event.target.closest?.("input, textarea, dialog");
    if (event.key === "Escape" && chat.isRunning && !document.querySelector("dialog[open]")) chat.stop();
    else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) startNew();
    else if (event.key === "/" && !isTyping) $("prompt").focus();
    else return;
    event.preventDefault();
  });
}

function showTab(tab) {
  document.body.dataset.tab = tab;
  for (const name of ["chat", "live"]) $(`tab-${name}`).setAttribute("aria-pressed", String(name === tab));
  live.setShown();
}

function setUpPanels() {
  $("new-chat").addEventListener("click", startNew);
  $("settings").addEventListener("click", () => settings.open());
  $("key").addEventListener("click", async () => {
    if (await askForKey()) dispatchEvent(new Event("keychange"));
  });
  $("tab-chat").addEventListener("click", () => showTab("chat"));
  $("tab-live").addEventListener("click", () => showTab("live"));
  const toggle = $("live-toggle");
  const setLive = (isOpen) => {
    document.body.classList.toggle("live-closed", !isOpen);
    toggle.setAttribute("aria-pressed", String(isOpen));
    localStorage.setItem("qnext-live", isOpen ? "open" : "closed");
    live.setShown();
  };
  toggle.addEventListener("click", () => setLive(document.body.classList.contains("live-closed")));
  setLive(localStorage.getItem("qnext-live") !== "closed");
}

/** The conversation that is shown, as far as the settings panel may touch it. */
const shownConversation = {
  get hasChat() {
    return server.hasChat;
  },
  get system() {
    return chat.conversation.system;
  },
  set system(text) {
    chat.conversation.system = text;
    if (store.get(chat.conversation.id)) store.put(chat.conversation);
  },
};

drawIcons();
setUpTheme($("theme"));
settings.setChat(shownConversation);
setUpPanels();
setUpComposer();
setUpKeys();
chat.show();
await store.load();
sidebar = new Sidebar(store, chat);
if (store.get(lastOpen)) chat.open(store.get(lastOpen));
sidebar.show();
if (!store.isLasting) chat.notice("This browser keeps nothing for this page: conversations are gone when it is closed.");
addEventListener("keychange", describeServer);
await describeServer();
document.documentElement.dataset.ready = "true";
