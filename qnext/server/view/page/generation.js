// One answer: the request, its stream, and what of it goes into the node.

import { stream } from "./api.js";
import { messagesFor, textFor } from "./tree.js";

/** The path and body of the request for what follows `parent`. */
export function requestFor(conversation, parent, server, settings) {
  const common = { stream: true, stream_options: { include_usage: true }, timings: true, ...settings.requestFields(server.hasChat) };
  if (server.model) common.model = server.model;
  // Without a number a completion would have the 16 tokens of OpenAI's API.
  if (!server.hasChat) return ["v1/completions", { prompt: textFor(conversation, parent), max_tokens: 256, ...common }];
  return ["v1/chat/completions", { messages: messagesFor(conversation, parent), ...common }];
}

/** Fill `node` from the stream; `grown` is called when it has. Raises what `stream` raises; the node keeps what came. */
export async function generate(node, path, body, signal, grown) {
  const clock = { start: performance.now(), first: null, last: null, thoughts: null };
  let usage = null;
  let timings = null;
  try {
    for await (const chunk of stream(path, { body, signal })) {
      usage = chunk.usage ?? usage;
      timings = chunk.timings ?? timings;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      if (choice.finish_reason) node.finish = choice.finish_reason;
      if (!take(node, choice.delta ?? { content: choice.text }, clock)) continue;
      clock.last = performance.now();
      clock.first ??= clock.last;
      grown();
    }
  } finally {
    endThoughts(node, clock);
    node.figures = figuresOf(clock, usage, timings);
  }
}

/** Add a delta to the node; whether it brought anything. */
function take(node, delta, clock) {
  const thoughts = delta.reasoning_content ?? delta.reasoning;
  let isNew = false;
  if (thoughts) {
    clock.thoughts ??= performance.now();
    node.reasoning = (node.reasoning ?? "") + thoughts;
    isNew = true;
  }
  if (delta.content) {
    endThoughts(node, clock);
    node.content += delta.content;
    isNew = true;
  }
  for (const part of delta.tool_calls ?? []) {
    endThoughts(node, clock);
    addCall(node, part);
    isNew = true;
  }
  return isNew;
}

function endThoughts(node, clock) {
  if (clock.thoughts !== null) node.reasoningSeconds ??= (performance.now() - clock.thoughts) / 1000;
}

function addCall(node, part) {
  node.toolCalls ??= [];
  const index = Number.isInteger(part.index) ? part.index : node.toolCalls.length;
  if (index > 127) return; // the server allows 128 tools; a hole in the array would be worse
  while (node.toolCalls.length <= index) node.toolCalls.push({ id: "", name: "", arguments: "" });
  const call = node.toolCalls[index];
  if (part.id) call.id = part.id;
  if (part.function?.name) call.name += part.function.name;
  if (part.function?.arguments) call.arguments += part.function.arguments;
}

function figuresOf(clock, usage, timings) {
  const figures = {};
  const outputTokens = usage?.completion_tokens;
  if (clock.first !== null) {
    figures.firstToken = (clock.first - clock.start) / 1000;
    const span = (clock.last - clock.first) / 1000;
    if (outputTokens > 1 && span > 0) figures.rate = (outputTokens - 1) / span;
  }
  if (usage) {
    figures.promptTokens = usage.prompt_tokens;
    figures.outputTokens = outputTokens;
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached) figures.cachedTokens = cached;
  }
  if (timings) {
    if (timings.tokens_per_second > 0) figures.rate = timings.tokens_per_second;
    if (timings.drafted) Object.assign(figures, { drafted: timings.drafted, accepted: timings.accepted });
    if (timings.cached_tokens) figures.cachedTokens = timings.cached_tokens;
  }
  return figures;
}
