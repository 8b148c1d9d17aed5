// The server: requests with the key, answers as objects, failures as ApiError.

import { events } from "./sse.js";

const KEY = "qnext-key";
let memoryKey = "";

export function apiKey() {
  return memoryKey || sessionStorage.getItem(KEY) || "";
}

/** Keep the key for this page, or with `keep` until the tab is closed. It never goes into an address. */
export function setApiKey(key, keep) {
  memoryKey = key;
  if (keep && key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

export const keepsKey = () => sessionStorage.getItem(KEY) !== null;

/** What went wrong, in a sentence for the reader. `retryAfter` is in seconds. */
export class ApiError extends Error {
  constructor(message, { status = 0, retryAfter = null, kind = "server" } = {}) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
    this.kind = kind;
  }
}

function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (value === null) return null;
  if (/^\d+$/.test(value.trim())) return Number(value);
  const date = Date.parse(value);
  return Number.isNaN(date) ? null : Math.max(0, Math.ceil((date - Date.now()) / 1000));
}

const TITLES = {
  400: "The server refused the request",
  401: "The server asks for an API key",
  403: "This key may not do that",
  404: "The server does not know this",
  413: "The request is too large",
  429: "Too many requests for this key",
  503: "The server is busy",
};

async function failure(response) {
  let detail = "";
  try {
    const text = (await response.text()).slice(0, 4096);
    const body = JSON.parse(text);
    detail = typeof body?.error === "string" ? body.error : (body?.error?.message ?? body?.detail ?? "");
  } catch {
    detail = ""; // a proxy's page, say: its status tells enough
  }
  const wait = retryAfter(response);
  const title = TITLES[response.status] ?? `The server failed (${response.status})`;
  const when = wait === null ? "" : ` It asks to wait ${wait === 1 ? "1 second" : `${wait} seconds`}.`;
  const message = `${title}${detail ? `: ${String(detail).replace(/\.$/, "")}` : ""}.${when}`;
  return new ApiError(message, { status: response.status, retryAfter: wait });
}

/** The response of a request that succeeded. `path` is relative to where the page lies. */
export async function request(path, { body, signal } = {}) {
  const headers = {};
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.", { kind: "network" });
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

/** Each object of a stream of events, up to [DONE]. An `error` object ends it as ApiError. */
export async function* stream(path, options) {
  const response = await request(path, options);
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return;
      let chunk;
      try {
        chunk = JSON.parse(data);
      } catch {
        throw new ApiError("The server sent something that is not JSON.");
      }
      if (chunk.error) {
        const message = chunk.error.message ?? "The server failed while it answered.";
        throw new ApiError(String(message), { kind: "stream" });
      }
      yield chunk;
    }
  } catch (error) {
    if (error instanceof ApiError || options.signal?.aborted) throw error;
    throw new ApiError("The connection to the server was lost.", { kind: "network" });
  }
}
