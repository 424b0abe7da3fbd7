// Operate: what the key may do, load and rates from /metrics, refusals, models with their cards, loading and unloading.

import { MODELS, Problem, json, models, send } from "./api.js";
import { $, h, paint, showProblem } from "./dom.js";
import { rendered } from "./markdown.js";
import { callPanel } from "./snippets.js";

const EVERY_MS = 2000;
const KEPT = 60; // points of a line
const METRICS = { method: "GET", path: "metrics", text: true };
const ACCESS = { method: "GET", path: "page/access" };
const WHY = {
  unauthenticated: "The call had no API key, or an unknown one.",
  forbidden: "The key lacks the right that the call needs.",
  control_off: "Loading over HTTP is off: VAE_MODEL_CONTROL turns it on.",
  cross_site: "A page of another origin sent it: VAE_CORS_ORIGINS names those that may.",
  unknown_host: "The Host header is no name of the service: VAE_ALLOWED_HOSTS adds names.",
  rate_limited: "The key or the address was above its limit.",
  unknown_model: "There is no such model or version.",
  wrong_model: "The latents came from another model, as the fingerprint shows.",
  load_refused: "A version failed its checks; its reason is below.",
  too_large: "More bytes, rows, pixels or memory than a request may use.",
  overloaded: "The queue was full, the wait too long, or memory short.",
  not_ready: "No version of the model was served.",
  deadline_passed: "The time for the request ran out.",
  unreadable_body: "The body could not be read.",
  malformed_request: "The request was malformed.",
  unsupported_media_type: "No reader takes this Content-Type.",
  not_acceptable: "The answer cannot have the format that Accept names.",
  invalid_shape: "The arrays or pictures have a shape that the model does not take.",
  invalid_value: "A number lies outside its range.",
  invalid_option: "An option is unknown, or its value is not allowed.",
  unsupported_operation: "The model cannot do this.",
  inference_failed: "The model failed; the log has the cause.",
  internal_error: "The service failed; the log has the cause.",
  disconnected: "The caller left before the answer.",
};

let may = { infer: null, control: null };
let before = null; // the counters of the last reading, and when
const history = { rate: [], queued: [], running: [] };
const showMetricsCall = callPanel($("#metrics-call"), "metrics");
const showModelsCall = callPanel($("#models-call"), "models");
const showMayCall = callPanel($("#may-call"), "rights");

export async function open() {
  showMayCall(ACCESS);
  const access = await json(ACCESS);
  may = access.may;
  showMay(access);
  await Promise.all([showModels(), showMetrics()]);
  const timer = setInterval(async () => {
    if (!$("#operate").hidden && !document.hidden && !(await showMetrics())) clearInterval(timer);
  }, EVERY_MS);
}

function showMay({ key }) {
  const lines = [
    [true, key ? `The key ${key} reads models, their cards and the metrics.` : "This service needs no key: everyone reads models, cards and metrics."],
    [!may.infer, may.infer ? `Operations are refused: ${may.infer}.` : "Operations: restore, encode, sample and the others."],
    [!may.control, may.control ? `Load and unload are refused: ${may.control}.` : "Load and unload models."],
  ];
  $("#may").replaceChildren(...lines.map(([yes, text]) =>
    h("li", { className: yes ? "yes" : "no" }, h("span", { className: "badge" }, yes ? "yes" : "no"), text)));
}

// ---- Metrics

/** Samples of Prometheus' text format: [{ name, labels, value }]. */
export function parsed(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const sample = line.match(/^(\w+)(?:\{(.*)\})? (\S+)$/);
    if (!sample) continue;
    const labels = Object.fromEntries([...(sample[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((pair) => [pair[1], pair[2]]));
    found.push({ name: sample[1], labels, value: Number(sample[3]) });
  }
  return found;
}

/** Read the metrics once. Returns whether they may be there the next time. */
async function showMetrics() {
  showMetricsCall(METRICS);
  try {
    const answer = await send(METRICS);
    const samples = parsed(await answer.text());
    showProblem($("#metrics-problem"), null);
    const now = performance.now();
    const operations = byOperation(samples);
    const seconds = before ? (now - before.at) / 1000 : 0;
    for (const [name, one] of operations) {
      one.rate = before ? (one.requests - (before.operations.get(name)?.requests ?? 0)) / seconds : 0;
    }
    before = { at: now, operations };
    const all = (name) => samples.filter((one) => one.name === name).reduce((sum, one) => sum + one.value, 0);
    keep("rate", [...operations.values()].reduce((sum, one) => sum + one.rate, 0));
    keep("queued", all("vae_queued_rows"));
    keep("running", all("vae_running_batches"));
    showGauges();
    showRates(operations);
    showRefused(samples);
    return true;
  } catch (problem) {
    const elsewhere = problem.status === 404;
    const detail = "The metrics are on a port of their own, VAE_OPS_PORT, which this page does not reach.";
    showProblem($("#metrics-problem"), elsewhere ? new Problem({ ...problem, detail }) : problem);
    return !elsewhere;
  }
}

function keep(name, value) {
  history[name].push(value);
  if (history[name].length > KEPT) history[name].shift();
}

function showGauges() {
  const gauges = [
    ["rate", "requests a second", (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0))],
    ["queued", "rows in the queue", (value) => value.toFixed(0)],
    ["running", "batches running", (value) => value.toFixed(0)],
  ];
  $("#gauges").replaceChildren(...gauges.map(([name, label, write]) => {
    const points = history[name];
    return h("div", { className: "gauge" }, h("strong", { id: `gauge-${name}` }, write(points.at(-1))), h("span", {}, label), line(points));
  }));
}

/** A line of the last minutes. */
function line(points) {
  const make = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [attribute, value] of Object.entries(attributes)) element.setAttribute(attribute, value);
    return element;
  };
  const top = Math.max(1, ...points);
  const places = points.map((value, k) => `${KEPT - points.length + k},${(30 - (28 * value) / top).toFixed(1)}`);
  const svg = make("svg", { viewBox: `0 0 ${KEPT - 1} 32`, preserveAspectRatio: "none", "aria-hidden": "true" });
  svg.append(make("polyline", { points: places.join(" "), "vector-effect": "non-scaling-stroke" }));
  return svg;
}

function byOperation(samples) {
  const found = new Map();
  for (const { name, labels, value } of samples) {
    if (!labels.operation) continue;
    const key = `${labels.model} ${labels.operation}`;
    if (!found.has(key)) found.set(key, { ...labels, requests: 0, ok: 0, rows: 0, rate: 0 });
    const one = found.get(key);
    if (name === "vae_requests_total") {
      one.requests += value;
      if (labels.outcome === "ok") one.ok += value;
    } else if (name === "vae_rows_total") one.rows += value;
    else if (/_(sum|count)$/.test(name)) one[name] = value;
  }
  return new Map([...found].sort(([, a], [, b]) => b.requests - a.requests));
}

function showRates(operations) {
  const all = [...operations.values()];
  const asked = all.filter((one) => one.requests)
    .map((one) => [one.model, one.operation, one.requests, one.requests - one.ok, one.rows, one.rate.toFixed(1)]);
  table($("#rates"), ["Model", "Operation", "Requests", "Refused", "Rows", "Per second"], asked, "No request yet.", 2);
  const mean = (one, name, unit) => {
    const value = (unit * one[`vae_${name}_sum`]) / one[`vae_${name}_count`];
    return value < 10 ? value.toFixed(2) : value.toFixed(0);
  };
  const busiest = all.filter((one) => one.vae_inference_seconds_count)
    .sort((a, b) => b.vae_inference_seconds_count - a.vae_inference_seconds_count);
  const run = busiest.map((one) => [
    one.model, one.operation, one.vae_inference_seconds_count,
    mean(one, "batch_rows", 1), mean(one, "queue_seconds", 1000), mean(one, "inference_seconds", 1000),
  ]);
  table($("#batches"), ["Model", "Program", "Batches", "Rows each", "Queue, ms", "Model, ms"], run, "No batch yet.", 2);
}

function showRefused(samples) {
  const rows = samples
    .filter(({ name, labels, value }) => value && (name === "vae_refused_total" || (name === "vae_requests_total" && labels.outcome !== "ok")))
    .map(({ labels, value }) => {
      const code = labels.code ?? labels.outcome;
      const where = labels.operation ? `${labels.model} ${labels.operation}` : "at the door";
      return [code, where, WHY[code] ?? "See the API's list of problems.", value];
    })
    .sort((a, b) => b[3] - a[3]);
  table($("#refused"), ["Code", "Where", "Why", "Calls"], rows, "Nothing was refused.", 3);
}

function table(place, head, rows, none, numbersFrom) {
  const cell = (name) => (value, k) => h(name, k >= numbersFrom ? { className: "number" } : {}, String(value));
  const body = rows.length ? rows.map((row) => h("tr", {}, ...row.map(cell("td")))) : [h("tr", {}, h("td", { colSpan: head.length }, none))];
  place.replaceChildren(h("thead", {}, h("tr", {}, ...head.map(cell("th")))), h("tbody", {}, ...body));
}

// ---- Models

async function showModels() {
  showModelsCall(MODELS);
  const found = await models(true);
  $("#models").replaceChildren(...found.map(described));
  const failed = found.flatMap((model) => model.states.filter((one) => one.state === "failed"));
  const served = found.filter((model) => model.versions.length).length;
  $("#ready").textContent = `${served} of ${found.length} models served${failed.length ? `, ${failed.length} versions refused` : ""}.`;
}

function described(model) {
  const facts = model.versions.length ? [
    ["default for", model.default_for.join(", ") || "nothing"],
    ["can", model.operations.join(", ")],
    ["images", shapeOf(model.input_shape, model.variants.map((one) => one.input_shape[0]))],
    ["latents", model.latent_dim ?? model.latent_shape.join(" × ")],
    ["likelihood, prior", [model.likelihood, model.prior].filter(Boolean).join(", ").replaceAll("_", " ")],
    ["noise", model.noise_families.join(", ") || "none"],
    ["data", model.dataset],
    ["test NLL", model.quality?.test_nll_nats ? `${model.quality.test_nll_nats} nats` : ""],
    ["fingerprint", model.fingerprint],
  ].filter(([, value]) => value !== "" && value != null) : [];
  const card = h("details", { className: "card" }, h("summary", {}, "Model card"));
  card.addEventListener("toggle", () => card.open && card.childElementCount === 1 && showCard(model, card));
  return h("section", { className: "model", "aria-label": `Model ${model.model}` },
    h("div", { className: "title" }, h("h3", {}, model.model), ...buttons(model.model, "")),
    h("ul", { className: "versions" }, ...model.states.map((one) => h("li", {},
      h("span", { className: `badge ${one.state}` }, one.state), h("span", {}, `version ${one.version}`),
      one.reason && h("span", { className: "hint" }, one.reason), ...buttons(model.model, one.version, one.state)))),
    facts.length > 0 && h("dl", {}, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
    model.versions.length > 0 && card);
}

const shapeOf = ([channels, ...size], further) => `${[channels, ...further].join(" or ")} × ${size.join(" × ")}`;

/** Buttons that load and unload a version or, without one, the whole model. */
function buttons(model, version, state = "") {
  const place = version ? `v1/models/${model}/versions/${version}` : `v1/models/${model}`;
  const verbs = !version ? ["load", "unload"] : state === "ready" ? ["unload"] : ["load"];
  return verbs.map((verb) => {
    const name = `${verb === "load" ? "Load" : "Unload"} ${model}${version && ` version ${version}`}`;
    const button = h("button", { type: "button", disabled: Boolean(may.control), title: may.control ?? "", "aria-label": name },
      verb === "load" ? "Load" : "Unload");
    button.addEventListener("click", () => control({ path: `${place}/${verb}`, accept: "application/json" }, name));
    return button;
  });
}

async function control(call, name) {
  showModelsCall(call);
  $("#control-status").textContent = `${name}…`;
  showProblem($("#control-problem"), null);
  try {
    const { workers, followed } = await json(call);
    $("#control-status").textContent = `${name}: done in ${followed} of ${workers} workers.`;
  } catch (problem) {
    $("#control-status").textContent = "";
    showProblem($("#control-problem"), problem);
  }
  await showModels().catch((problem) => showProblem($("#control-problem"), problem));
  showModelsCall(call);
}

async function showCard(model, card) {
  const path = `v1/models/${model.model}/card`;
  const place = h("div", { className: "markdown" });
  card.append(place);
  try {
    const text = await (await send({ method: "GET", path })).text();
    place.replaceChildren(...rendered(text, (address, alt) => pictureOf(`${path}/${address}`, alt)));
  } catch (problem) {
    showProblem(place, problem);
  }
}

/** A picture of a card, fetched with the key. */
function pictureOf(path, alt) {
  const canvas = h("canvas", { role: "img", "aria-label": alt || "Picture of the card" });
  send({ method: "GET", path })
    .then(async (answer) => paint(canvas, await createImageBitmap(await answer.blob())))
    .catch((problem) => canvas.replaceWith(h("span", { className: "hint" }, problem.message)));
  return canvas;
}

$("#models-again").addEventListener("click", () => showModels().catch((problem) => showProblem($("#control-problem"), problem)));
