// Restore: a picture before and after; denoise, fill in, enlarge; samples, uncertainty, refined work, downloads.

import { Problem, able, events, send, sizeOf } from "./api.js";
import { $, $$, digits, fill, h, later, save, showProblem } from "./dom.js";
import { bitmapOf, blobOf, decoded, deepPng, kindOf, ofJson, ofNpy } from "./picture.js";
import { callPanel } from "./snippets.js";
import { Viewer } from "./viewer.js";

const NAMES = { denoise: "Denoise", inpaint: "Fill in", "super-resolve": "Enlarge" };
const DONE = { denoise: "restored", inpaint: "filled", "super-resolve": "enlarged" };
const MOST_STREAMED = 2 ** 18; // pixels: the images of larger pictures are too much JSON
const SAMPLES = 4;
const FACTOR = 2;
const NPY = "application/x-npy";

const form = $("#restore-form");
const status = $("#restore-status");
const viewer = new Viewer($("#view"), changed);
const showCall = callPanel($("#restore-call"), "restore");
const picked = (name) => form.elements[name].value;

let picture = null; // { blob, name, tiff, deep, width, height }
let level = null; // null: the model finds it
let foundNoise = "";
let answer = null; // { call, blob, bitmap, seed }
let models = [];
let byHand = false; // whether the person has chosen the model
let work = null; // the AbortController of the work in progress
let samples = [];

export async function open() {
  await choose();
}

/** Fill the list of models for the chosen task. */
async function choose() {
  const task = picked("task");
  models = await able([task]);
  fill($("#restore-model"), models.map((model) => model.model));
  suit();
  $("#noise-group").hidden = task === "super-resolve";
  $("#brush-group").hidden = task !== "inpaint";
  $("#run").textContent = NAMES[task];
  viewer.setMode(task === "inpaint" ? picked("brush") : "move");
  enable();
  if (!models.length) status.textContent = `No served model can ${task}.`;
}

const model = () => models.find((one) => one.model === $("#restore-model").value);

/** Choose the model for the picture, unless the person has: one of exactly its size, else one of any size. */
function suit() {
  const fits = (one) => picture && sizeOf(one) && String(sizeOf(one).slice(1)) === String(sent());
  const best = models.find(fits) ?? models.find((one) => !sizeOf(one)) ?? models[0];
  if (best && !byHand) $("#restore-model").value = best.model;
  chooseNoise();
}

/** Height and width of the answer. */
function sent() {
  const factor = picked("task") === "super-resolve" ? FACTOR : 1;
  return [picture.height * factor, picture.width * factor];
}

function chooseNoise() {
  const families = model()?.noise_families ?? [];
  const none = picked("task") === "inpaint" ? "none" : "found by the model";
  fill($("#noise"), ["", ...families], [none, ...families]);
  showLevel();
}

/** Let the model find the level. */
function findLevel() {
  level = null;
  $("#level-auto").hidden = true;
  $("#level-text").textContent = "auto";
  $("#level-hint").textContent = "The model finds the level; the slider changes it.";
}

/** Pixels that are filled in may be without noise, and so without its level. */
function showLevel() {
  $("#level-group").hidden = picked("task") === "inpaint" && !$("#noise").value;
}

function enable() {
  const ready = picture !== null && models.length > 0;
  $("#run").disabled = !ready || (picked("task") === "inpaint" && !viewer.painted && !answer);
  for (const id of ["uncertainty", "draw-samples", "save-png", "save-deep"]) $(`#${id}`).disabled = !answer;
}

/** Take a picture file and restore it at once, if the task is to denoise or to enlarge. */
async function take(blob, name) {
  stop();
  forget();
  showProblem($("#restore-problem"), null);
  const mine = (picture = { blob, name });
  Object.assign(mine, await kindOf(blob));
  findLevel();
  if (!(await show()) || picture !== mine) return;
  if (picked("task") !== "inpaint") await run();
  else status.textContent = "Brush over what is missing.";
}

/** Show what will be sent. What a browser cannot show, or not in all its bits, the service shows. */
async function show() {
  const mine = picture;
  try {
    const scale = $("#scale").value.trim();
    const seen = picture.tiff || picture.deep || scale ? null : await decoded(picture.blob);
    suit();
    const bitmap = seen ?? (await answered(previewCall(scale))).bitmap;
    if (picture !== mine) return false;
    Object.assign(picture, { width: bitmap.width, height: bitmap.height, natural: Boolean(seen) });
    viewer.setBefore(bitmap);
    suit();
    $("#empty").hidden = true;
    $("#file-name").textContent = `${picture.name}, ${bitmap.width} × ${bitmap.height}${picture.tiff || picture.deep ? ", shown by the service" : ""}`;
    enable();
    return true;
  } catch (problem) {
    if (picture !== mine) return false;
    picture = null;
    enable();
    showProblem($("#restore-problem"), problem);
    return false;
  }
}

const files = () => [{ field: "file", name: picture.name, blob: picture.blob }];

function previewCall(scale) {
  if (!model()) throw new Problem({ title: "no model", detail: `No served model can ${picked("task")}.` });
  return { path: `page/models/${model().model}/preview`, query: { fit: fitOf(), scale }, accept: "image/png", files: files() };
}

/** How the picture gets the size of a model of one size. */
function fitOf() {
  const size = sizeOf(model());
  if (!size) return "";
  const [height, width] = sent();
  if (picture.natural && height === size[1] && width === size[2]) return "";
  const tiles = model().tileable && picture.natural && picked("task") !== "super-resolve" && height >= size[1] && width >= size[2];
  return tiles ? "tile" : "resize";
}

/** The call of the API for what the form says. */
async function callOf(further = {}) {
  const task = picked("task");
  const query = { quality: picked("quality") === "refined" ? "refined" : "" };
  const parts = files();
  if (task === "super-resolve") query.factor = FACTOR;
  else {
    query.noise = $("#noise").value;
    if (level !== null && (query.noise || task === "denoise")) {
      query.level = level;
      query.noise ||= foundNoise || "gaussian";
    }
  }
  if (task === "inpaint") parts.push({ field: "mask", name: "mask.png", blob: await blobOf(viewer.maskPicture()) });
  Object.assign(query, { fit: fitOf(), scale: $("#scale").value.trim(), ...further });
  return { path: `v1/models/${model().model}/${task}`, query, accept: "image/png", files: parts, out: `${DONE[task]}.png` };
}

async function run() {
  if (!picture) return;
  await working(async (signal) => {
    const call = await callOf();
    const begun = performance.now();
    showCall(call);
    forget();
    const streamed = call.query.quality === "refined" && picture.width * picture.height <= MOST_STREAMED;
    answer = streamed ? await stream(call, signal) : await whole(call, signal);
    if (answer.seed) answer.call = { ...call, query: { ...call.query, seed: answer.seed } };
    showCall(answer.call);
    viewer.setAfter(answer.bitmap);
    status.textContent = [`${answer.model}, ${((performance.now() - begun) / 1000).toFixed(2)} s`, told(), answer.notes]
      .filter(Boolean).join(" · ");
    status.dataset.seconds = ((performance.now() - begun) / 1000).toFixed(3);
  });
  enable();
}

/** The picture that answers a call: { response, blob, bitmap }. One with a scale of its own is too dark as a PNG. */
async function answered(call, signal) {
  if (call.query.scale) {
    const response = await send({ ...call, accept: NPY }, signal);
    return { response, blob: null, bitmap: await bitmapOf(ofNpy(await response.arrayBuffer())) };
  }
  const response = await send(call, signal);
  const blob = await response.blob();
  return { response, blob, bitmap: await createImageBitmap(blob) };
}

/** An answer, and what it says of itself. */
async function whole(call, signal) {
  const { response, blob, bitmap } = await answered(call, signal);
  const header = (name) => response.headers.get(name) ?? "";
  const notes = [...header("X-Note").matchAll(/detail="((?:[^"\\]|\\.)*)"/g)].map((found) => found[1]).join(" · ");
  return {
    call, blob, bitmap, notes, model: `${header("X-Model")} ${header("X-Model-Version")}`,
    level: header("X-Level"), noise: header("X-Noise"), seed: header("X-Seed"),
  };
}

/** An answer whose steps are shown as they come. */
async function stream(call, signal) {
  const asked = { ...call, query: { ...call.query, preview: true } };
  for await (const event of events(asked, signal)) {
    const bitmap = event.images && (await bitmapOf(ofJson(event.images)));
    if (event.event === "answer") {
      const notes = (event.notes ?? []).map((note) => note.detail).join(" · ");
      const [found, noise] = [event.level?.[0], event.noise?.[0] ?? ""];
      return {
        call, bitmap, notes, model: `${event.model} ${event.version}`, noise, seed: event.seed ?? "",
        level: found == null ? "" : String(found),
      };
    }
    status.textContent = event.tiles ? `tile ${event.tile} of ${event.tiles}` : `step ${event.step} of ${event.steps}`;
    if (bitmap) viewer.setAfter(bitmap);
  }
  return Promise.reject(new DOMException("the stream ended", "AbortError"));
}

/** What the answer says of the noise. */
function told() {
  if (!answer.level) return "";
  const value = Number(answer.level.split(",")[0]);
  if (answer.noise) [foundNoise] = answer.noise.split(",");
  if (foundNoise === "none") foundNoise = "";
  if (level === null) {
    $("#level").value = Math.round(100 * Math.sqrt(value));
    $("#level-text").textContent = digits(value);
    $("#level-hint").textContent = `Found${answer.noise ? `: ${answer.noise}` : ""}. Move the slider to change it.`;
  }
  return `level ${digits(value)}${answer.noise ? ` (${answer.noise})` : ""}`;
}

/** Run work that can be stopped, and show what goes wrong. */
async function working(body) {
  stop();
  const mine = (work = new AbortController());
  $("#stop").hidden = $("#busy").hidden = false;
  showProblem($("#restore-problem"), null);
  status.textContent = "working…";
  try {
    await body(mine.signal);
  } catch (problem) {
    if (work !== mine) return;
    status.textContent = problem.name === "AbortError" ? "stopped" : "";
    if (problem.name !== "AbortError") showProblem($("#restore-problem"), problem);
  } finally {
    if (work === mine) {
      work = null;
      $("#stop").hidden = $("#busy").hidden = true;
    }
  }
}

function stop() {
  work?.abort();
}

/** Forget the answer to the picture as it was. */
function forget() {
  answer = null;
  samples = [];
  $("#samples").hidden = $("#legend").hidden = true;
  $("#uncertainty").setAttribute("aria-pressed", "false");
  $("#tag-after").textContent = "Restored";
  if (viewer.before) viewer.setAfter(null);
  enable();
}

/** Show the standard deviation of every pixel, or the answer again. */
async function uncertainty() {
  const button = $("#uncertainty");
  const on = button.getAttribute("aria-pressed") !== "true";
  if (on) {
    await working(async (signal) => {
      const call = await callOf({ uncertainty: "map" });
      call.out = "uncertainty.png";
      const response = await send(call, signal);
      viewer.setAfter(await createImageBitmap(await response.blob()));
      showCall(call);
      status.textContent = "Standard deviation of every pixel. Nine true pixels in ten lie within 1.645 of it.";
      $("#legend-top").textContent = `±${digits(response.headers.get("X-Std-Scale"), 2)} and more`;
      button.setAttribute("aria-pressed", "true");
    });
  } else {
    button.setAttribute("aria-pressed", "false");
    viewer.setAfter(answer.bitmap);
    showCall(answer.call);
  }
  const shown = button.getAttribute("aria-pressed") === "true";
  $("#legend").hidden = !shown;
  $("#tag-after").textContent = shown ? "Uncertainty" : "Restored";
}

/** Draw what the picture may have been, several times; each is one call with its own seed. */
async function drawSamples() {
  await working(async (signal) => {
    samples = [];
    const place = $("#samples");
    place.replaceChildren();
    for (let seed = 1; seed <= SAMPLES; seed++) {
      const call = await callOf({ draws: 1, seed, quality: "" });
      call.out = `sample-${seed}.png`;
      const { bitmap } = await answered(call, signal);
      const canvas = h("canvas", { role: "img", "aria-label": `Sample ${seed}` });
      const button = h("button", { type: "button", "aria-pressed": "false" }, canvas, h("span", {}, `seed ${seed}`));
      button.addEventListener("click", () => showSample(samples.find((one) => one.button === button)));
      place.append(button);
      samples.push({ call, bitmap, canvas, button });
      place.hidden = false;
      changed();
      status.textContent = `${seed} of ${SAMPLES} samples`;
    }
    status.textContent = "Samples of what the picture may have been. Choose one to compare it.";
    showCall(samples[0].call);
  });
}

function showSample(sample) {
  const on = sample.button.getAttribute("aria-pressed") !== "true";
  for (const one of samples) one.button.setAttribute("aria-pressed", String(on && one === sample));
  viewer.setAfter(on ? sample.bitmap : answer.bitmap);
  showCall(on ? sample.call : answer.call);
  $("#tag-after").textContent = on ? "Sample" : "Restored";
}

/** Save the answer as the service writes it, which keeps the bits that were sent; or with 16 bits. */
async function download(deep) {
  const asked = answer.call;
  const name = `${picture.name.replace(/\.\w+$/, "")}-${DONE[picked("task")]}`;
  await working(async (signal) => {
    if (!deep) save(answer.blob ?? (await (await send(asked, signal)).blob()), `${name}.png`);
    else if (picture.tiff) save(await (await send({ ...asked, accept: "image/tiff" }, signal)).blob(), `${name}.tiff`);
    else if (picture.deep) save(await (await send(asked, signal)).blob(), `${name}.png`);
    else {
      const numbers = await send({ ...asked, accept: NPY }, signal);
      save(await deepPng(ofNpy(await numbers.arrayBuffer())), `${name}-16.png`);
    }
    status.textContent = "saved";
  });
}

/** The view or the mask has changed. */
function changed() {
  $("#divide").value = Math.round(100 * viewer.divide);
  $("#divide").disabled = !viewer.after;
  $("#zoom").textContent = `${Math.round(100 * viewer.zoom)} %`;
  $("#tag-before").hidden = $("#tag-after").hidden = !viewer.after;
  for (const { canvas, bitmap } of samples) viewer.place(canvas, bitmap);
  enable();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  run();
});
form.addEventListener("change", async ({ target }) => {
  if (target.name === "task") {
    stop();
    showProblem($("#restore-problem"), null);
    await choose();
    if (picture) {
      forget();
      if (picked("task") !== "inpaint") run();
      else status.textContent = "Brush over what is missing.";
    }
  } else if (target.id === "restore-model") {
    byHand = true;
    chooseNoise();
    findLevel();
    if (picture && (picture.natural || (await show()))) again();
  } else if (target.name === "quality" || target.id === "noise") {
    showLevel();
    again();
  }
  else if (target.id === "scale" && picture && (await show())) again();
  else if (target.name === "brush") viewer.setMode(target.value);
});

/** Ask anew, if there is something to ask about. */
function again() {
  if (picture && (picked("task") !== "inpaint" || viewer.painted)) run();
}

const againSoon = later(again, 250);
$("#level").addEventListener("input", ({ target }) => {
  level = Number(((target.value / 100) ** 2).toPrecision(3));
  target.setAttribute("aria-valuetext", String(level));
  $("#level-text").textContent = digits(level);
  $("#level-hint").textContent = "You have set the level.";
  $("#level-auto").hidden = false;
  againSoon();
});
$("#level-auto").addEventListener("click", () => {
  findLevel();
  $("#level").focus();
  again();
});
$("#brush").addEventListener("input", ({ target }) => {
  viewer.brush = Number(target.value);
  $("#brush-text").textContent = target.value;
  viewer.draw();
});
$("#brush-clear").addEventListener("click", () => { viewer.clearMask(); forget(); });
$("#mask-save").addEventListener("click", async () => save(await blobOf(viewer.maskPicture()), "mask.png"));
$("#stop").addEventListener("click", stop);
$("#uncertainty").addEventListener("click", uncertainty);
$("#draw-samples").addEventListener("click", drawSamples);
$("#save-png").addEventListener("click", () => download(false));
$("#save-deep").addEventListener("click", () => download(true));
$("#divide").addEventListener("input", ({ target }) => viewer.setDivide(target.value / 100));
$("#zoom-in").addEventListener("click", () => viewer.zoomBy(1.5));
$("#zoom-out").addEventListener("click", () => viewer.zoomBy(1 / 1.5));
$("#zoom-fit").addEventListener("click", () => viewer.fit());
$("#file").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = ""; // so that the same file may be chosen again
  if (file) take(file, file.name);
});
for (const button of $$("[data-example]")) {
  button.addEventListener("click", async () => {
    const name = button.dataset.example;
    try {
      const path = new URL(name, import.meta.url).href;
      await take(await (await send({ method: "GET", path })).blob(), name);
    } catch (problem) {
      showProblem($("#restore-problem"), problem);
    }
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...(clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
  if (file && !$("#restore").hidden) take(file, file.name);
});
const drop = $("#drop");
document.addEventListener("dragover", (event) => event.preventDefault()); // a file that misses is not opened
document.addEventListener("drop", (event) => event.preventDefault());
drop.addEventListener("dragover", () => drop.classList.add("over"));
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", ({ dataTransfer }) => {
  drop.classList.remove("over");
  const [file] = dataTransfer.files;
  if (file) take(file, file.name);
});
