// Calls of the API. Every panel describes its call as an object, which is sent here and printed by snippets.js:
// { method, path, query, accept, json, files: [{ field, name, blob }], out }. `path` is relative to the page.

export class Problem extends Error {
  /** What the service said (RFC 9457), or why there is no answer. */
  constructor({ status = 0, code = "", title = "", detail = "", request = "" }) {
    super(detail || title);
    Object.assign(this, { status, code, title, detail, request });
  }
}

let key = ""; // in memory only
let asking = null;
let ask = async () => "";

/** Use `dialog` to ask for a key: (reason) -> key, empty if the person gives none. */
export function askWith(dialog) {
  ask = dialog;
}

export function hasKey() {
  return key !== "";
}

export function forgetKey() {
  key = "";
}

export function home() {
  return new URL(".", document.baseURI).href;
}

export function urlOf(call) {
  const given = Object.entries(call.query ?? {}).filter(([, value]) => value !== "" && value != null);
  const query = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return new URL(call.path, home()).href + (query && `?${query.replaceAll("%2C", ",")}`);
}

/** Send a call. Returns the Response; throws a Problem, or an AbortError if `signal` stops it. */
export async function send(call, signal) {
  const used = key;
  const answer = await attempt(call, signal, used);
  if (answer.status !== 401) return checked(answer);
  if (key === used) { // nobody has given another one meanwhile
    const problem = await problemOf(answer);
    asking ??= ask(used ? problem.detail : "");
    try {
      key = await asking;
    } finally {
      asking = null;
    }
    if (!key) throw problem;
  }
  return key === used ? checked(answer) : send(call, signal);
}

async function attempt(call, signal, used) {
  const headers = call.accept ? { Accept: call.accept } : {};
  if (used) headers.Authorization = `Bearer ${used}`;
  let body;
  if (call.files) {
    body = new FormData();
    for (const { field, name, blob } of call.files) body.append(field, blob, name);
  } else if (call.json) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(call.json);
  }
  try {
    return await fetch(urlOf(call), { method: call.method ?? "POST", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({
      title: "The service does not answer",
      detail: `Nothing answers at ${home()}. Check that the service runs and that this machine reaches it, then try again.`,
    });
  }
}

async function checked(answer) {
  if (!answer.ok) throw await problemOf(answer);
  return answer;
}

async function problemOf(answer) {
  const request = answer.headers.get("X-Request-Id") ?? "";
  const said = answer.bodyUsed ? {} : await answer.json().catch(() => ({}));
  return new Problem({ status: answer.status, title: answer.statusText, ...said, request });
}

export async function json(call, signal) {
  return (await send(call, signal)).json();
}

/** Events of long work, one JSON object a line. Yields each; throws a Problem for an `error`. */
export async function* events(call, signal) {
  const answer = await send({ ...call, accept: "application/x-ndjson" }, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const event = JSON.parse(line);
      if (event.event === "error") throw new Problem(event);
      yield event;
    }
    if (done) return;
  }
}

let known = null;

/** Every model, as GET /v1/models tells; read once, and again with `anew`. */
export function models(anew = false) {
  if (anew || !known) {
    known = json(MODELS).then((answer) => answer.models);
    known.catch(() => { known = null; });
  }
  return known;
}

export const MODELS = { method: "GET", path: "v1/models" };

/** Served models that can do all these operations and pass a test, the default one of the first operation first. */
export async function able(operations, test = () => true) {
  const found = (await models()).filter(
    (model) => model.versions.length && operations.every((name) => model.operations.includes(name)) && test(model),
  );
  const first = (model) => (model.default_for.includes(operations[0]) ? 0 : 1);
  return found.sort((a, b) => first(a) - first(b));
}

/** Channels, height and width of a model's images; null where height and width are free. */
export function sizeOf(model) {
  return model.size ? null : model.input_shape;
}
