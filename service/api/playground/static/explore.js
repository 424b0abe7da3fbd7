// Explore: draw, a map of two latents, sliders for any latent, a walk between two images, a wall of samples.

import { able, json, send, sizeOf } from "./api.js";
import { $, $$, fill, h, latest, paint, showProblem } from "./dom.js";
import { base64Of } from "./picture.js";
import { Sketch } from "./sketch.js";
import { callPanel } from "./snippets.js";

const LARGEST_PAD = 128; // pixels: larger images are no sketches
const PNG = "image/png";
const MAP = 20; // images along each side of the map
const STEPS = 16;
const SLIDERS = 10; // shown at once
const FREE = 64; // height and width of samples where a model has no size of its own

/** A panel: its elements, its models and the problem of its last call. */
class Panel {
  constructor(id) {
    this.root = $(`#${id}`);
    this.select = $("select", this.root);
    this.problem = $("[data-problem]", this.root);
    this.canvases = $$("canvas", this.root);
    this.showCall = callPanel($("[data-call]", this.root), id);
    this.select.addEventListener("change", () => this.changed?.());
  }

  /** Offer the models that can do these operations; says so where there are none. */
  async offer(operations, test) {
    this.models = await able(operations, test);
    fill(this.select, this.models.map((model) => model.model));
    if (!this.models.length) showProblem(this.problem, { title: "no model", detail: `No served model can ${operations.join(" and ")} here.` });
    return this.models.length > 0;
  }

  get model() {
    return this.models?.find((model) => model.model === this.select.value);
  }

  path(operation) {
    return `v1/models/${this.model.model}/${operation}`;
  }

  out(name) {
    return $(`[data-out="${name}"]`, this.root);
  }

  input(name) {
    return $(`[data-in="${name}"]`, this.root);
  }

  on(name, work) {
    for (const button of $$(`[data-do="${name}"]`, this.root)) button.addEventListener("click", () => work(button));
  }

  /** Send a call and show it; a problem is shown and gives null. */
  async asked(call, read) {
    this.showCall(call);
    try {
      const answer = await read(await send(call));
      showProblem(this.problem, null);
      return answer;
    } catch (problem) {
      showProblem(this.problem, problem);
      return null;
    }
  }

  picture(call) {
    return this.asked(call, async (answer) => createImageBitmap(await answer.blob()));
  }
}

const draw = new Panel("draw");
const map = new Panel("map");
const latents = new Panel("latents");
const walk = new Panel("walk");
const wall = new Panel("wall");

const ofOneSize = (model) => sizeOf(model) !== null;
const sketchable = (model) => ofOneSize(model) && model.input_shape[0] === 1 && Math.max(...model.input_shape) <= LARGEST_PAD;
const flat = (model) => ofOneSize(model) && model.latent_shape.every(Number.isInteger);

export async function open() {
  const ready = await Promise.all([
    draw.offer(["reconstruct"], sketchable),
    map.offer(["decode", "traverse"], (model) => model.latent_dim === 2 && model.prior === "standard_normal"),
    latents.offer(["decode"], flat),
    walk.offer(["interpolate", "sample"], sketchable),
    wall.offer(["sample"]),
  ]);
  draw.changed();
  await Promise.all([map, latents, walk, wall].filter((_, k) => ready[k + 1]).map((panel) => panel.changed()));
}

// ---- Draw

let drawnAt = 0;
const sketch = new Sketch(draw.canvases[0], $(".pen", draw.root), (time) => {
  drawnAt = time;
  answer();
  placed();
});

const answer = latest(async () => {
  if (!draw.model) return;
  const [begun, image] = [drawnAt, base64Of(sketch.canvas)];
  if (sketch.empty) return clearAnswer();
  const bitmap = await draw.picture({ path: draw.path("reconstruct"), json: { images: [image] }, accept: PNG, out: "reconstruction.png" });
  if (!bitmap) return;
  paint(draw.canvases[1], bitmap);
  const ms = Math.round(performance.now() - begun);
  draw.out("ms").textContent = `${ms} ms`;
  draw.out("ms").dataset.ms = ms;
  if (draw.model.operations.includes("score")) await scored(image);
});

async function scored(image) {
  const call = { path: draw.path("score"), json: { images: [image], seed: 1 }, accept: "application/json" };
  const found = await draw.asked(call, (reply) => reply.json());
  if (!found) return;
  for (const name of ["elbo", "log_likelihood", "kl"]) draw.out(name).textContent = `${found[name][0].toFixed(1)} nats`;
  const share = found.percentile?.[0];
  $("meter", draw.root).value = share ?? 0;
  draw.out("percentile").textContent = share == null ? "–" : `${share.toFixed(0)} %`;
  draw.out("verdict").textContent = share == null ? "This model has no percentiles."
    : `of the validation images are less likely. ${share < 1 ? "The model has hardly seen such a thing." : "Larger is more typical."}`;
}

function clearAnswer() {
  for (const name of ["percentile", "elbo", "log_likelihood", "kl"]) draw.out(name).textContent = "–";
  draw.out("ms").textContent = "";
  draw.out("verdict").textContent = "Draw a digit to see how likely the model finds it.";
  $("meter", draw.root).value = 0;
  const canvas = draw.canvases[1];
  canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
}

draw.changed = () => {
  if (!draw.model) return;
  const [, height, width] = draw.model.input_shape;
  sketch.resize(width, height);
  drawnAt = performance.now();
  answer();
};
draw.on("clear", () => {
  sketch.clear();
  answer();
  placed();
});
draw.on("example", async () => {
  try {
    const file = await send({ method: "GET", path: new URL("digit.png", import.meta.url).href });
    sketch.show(await createImageBitmap(await file.blob()), performance.now());
  } catch (problem) {
    showProblem(draw.problem, problem);
  }
});

/** The drawing, if a model takes images of its size. */
function drawing(model) {
  const { width, height } = sketch.canvas;
  const fits = !sketch.empty && String(model.input_shape) === String([1, height, width]);
  return fits ? base64Of(sketch.canvas) : null;
}

const nothingDrawn = { title: "nothing drawn", detail: "Draw something above first, of a size that this model takes." };

// ---- Map

let z = [0, 0];
const pointed = latest(async () => {
  const call = { path: map.path("decode"), json: { latents: [z], fingerprint: map.model.fingerprint }, accept: PNG, out: "image.png" };
  const bitmap = await map.picture(call);
  if (bitmap) paint(map.canvases[1], bitmap);
});

map.changed = async () => {
  const sheet = await map.picture({ path: map.path("traverse"), query: { axes: "0,1", size: MAP }, accept: PNG, out: "map.png" });
  if (sheet) paint(map.canvases[0], sheet);
  await Promise.all([moveTo(0.5, 0.5), placed()]);
};

/** Decode the point at these parts of the width and the height. */
function moveTo(x, y) {
  const inside = (part) => Math.min(0.995, Math.max(0.005, part));
  z = [quantile(inside(x)), quantile(1 - inside(y))].map((value) => Number(value.toFixed(3)));
  map.out("z").textContent = z.map((value) => value.toFixed(2)).join(", ");
  mark($(".point", map.root), inside(x), inside(y));
  return pointed();
}

function mark(element, x, y) {
  element.hidden = false;
  element.style.left = `${100 * x}%`;
  element.style.top = `${100 * y}%`;
}

/** Mark where the drawing is. */
const placed = latest(async () => {
  const place = $(".place", map.root);
  const image = map.model && drawing(map.model);
  place.hidden = !image;
  map.out("place").textContent = "";
  if (!image) return;
  try {
    const [mean] = (await json({ path: map.path("encode"), json: { images: [image] } })).mean;
    mark(place, share(mean[0]), 1 - share(mean[1]));
    map.out("place").textContent = ` The ring is your drawing, at ${mean.map((value) => value.toFixed(2)).join(", ")}.`;
  } catch (problem) {
    showProblem(map.problem, problem);
  }
});

const sheet = map.canvases[0];
sheet.addEventListener("pointermove", (event) => moveTo(event.offsetX / sheet.clientWidth, event.offsetY / sheet.clientHeight));
sheet.addEventListener("pointerdown", (event) => moveTo(event.offsetX / sheet.clientWidth, event.offsetY / sheet.clientHeight));
sheet.addEventListener("keydown", (event) => {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!way) return;
  event.preventDefault();
  moveTo(share(z[0]) + way[0] / MAP, 1 - share(z[1]) + way[1] / MAP);
});

/** The standard normal's distribution function (Abramowitz and Stegun, 26.2.17; error below 1e-7). */
function share(value) {
  const t = 1 / (1 + 0.2316419 * Math.abs(value));
  const tail = Math.exp(-value * value / 2) / Math.sqrt(2 * Math.PI)
    * t * (0.31938153 + t * (-0.356563782 + t * (1.781477937 + t * (-1.821255978 + t * 1.330274429))));
  return value > 0 ? 1 - tail : tail;
}

/** Its inverse, by bisection. */
function quantile(part) {
  let [low, high] = [-6, 6];
  for (let k = 0; k < 40; k++) {
    const middle = (low + high) / 2;
    if (share(middle) < part) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}

// ---- Latents

let values = [];
let first = 0;

const decode = latest(async () => {
  const nested = shaped(values, latents.model.latent_shape);
  const call = { path: latents.path("decode"), json: { latents: [nested], fingerprint: latents.model.fingerprint }, accept: PNG, out: "image.png" };
  const bitmap = await latents.picture(call);
  if (bitmap) paint(latents.canvases[0], bitmap);
});

/** Numbers as nested arrays of a shape. */
function shaped(numbers, shape) {
  if (shape.length === 1) return numbers;
  const size = numbers.length / shape[0];
  return Array.from({ length: shape[0] }, (_, k) => shaped(numbers.slice(k * size, (k + 1) * size), shape.slice(1)));
}

function setLatents(found) {
  values = found.flat(Infinity).map((value) => Number(value.toFixed(3)));
  showSliders();
  return decode();
}

function showSliders() {
  const shown = values.slice(first, first + SLIDERS);
  latents.out("sliders").replaceChildren(...shown.map((value, k) => {
    const name = `z${first + k}`;
    const text = h("output", { className: "number" }, value.toFixed(2));
    const input = h("input", { type: "range", min: -4, max: 4, step: 0.05, value, "aria-label": `Latent ${first + k}` });
    input.addEventListener("input", () => {
      values[first + k] = Number(input.value);
      text.textContent = values[first + k].toFixed(2);
      decode();
    });
    return h("label", {}, h("span", {}, name), input, text);
  }));
  latents.out("range").textContent = `${first} to ${first + shown.length - 1} of ${values.length}`;
  $("[data-do=before]", latents.root).disabled = first === 0;
  $("[data-do=after]", latents.root).disabled = first + SLIDERS >= values.length;
}

async function drawLatents(seed) {
  if (!latents.model.operations.includes("sample")) return setLatents(new Array(latents.model.latent_dim).fill(0));
  const call = { path: latents.path("sample"), query: { count: 1, seed, latents: true }, accept: "application/json" };
  const found = await latents.asked(call, (reply) => reply.json());
  return found && setLatents(found.latents[0]);
}

latents.changed = () => {
  first = 0;
  return drawLatents(1);
};
latents.on("draw", () => drawLatents(seedOf()));
latents.on("zero", () => setLatents(new Array(latents.model.latent_dim).fill(0)));
latents.on("drawing", async () => {
  const image = drawing(latents.model);
  if (!image) return showProblem(latents.problem, nothingDrawn);
  const call = { path: latents.path("encode"), json: { images: [image] }, accept: "application/json" };
  const found = await latents.asked(call, (reply) => reply.json());
  return found && setLatents(found.mean[0]);
});
for (const [name, step] of [["before", -SLIDERS], ["after", SLIDERS]]) {
  latents.on(name, () => {
    first += step;
    showSliders();
  });
}

// ---- Walk

const ends = [null, null];
let between = null; // the sheet of all steps

const stroll = latest(async () => {
  if (!ends[0] || !ends[1]) return;
  const call = { path: walk.path("interpolate"), json: { images: ends.map(base64Of), steps: STEPS }, accept: PNG, out: "walk.png" };
  const found = await walk.picture(call);
  if (!found) return;
  between = found;
  const [, height, width] = walk.model.input_shape;
  const strip = walk.canvases[3];
  Object.assign(strip, { width: STEPS * width, height });
  for (let k = 0; k < STEPS; k++) step(strip, k, k * width);
  showStep();
});

/** Draw one step of the walk; the service puts 16 images on a sheet of 4 x 4. */
function step(canvas, k, left) {
  const [, height, width] = walk.model.input_shape;
  const columns = between.width / width;
  const from = [(k % columns) * width, Math.floor(k / columns) * height, width, height];
  canvas.getContext("2d").drawImage(between, ...from, left, 0, width, height);
}

function showStep() {
  const [, height, width] = walk.model.input_shape;
  Object.assign(walk.canvases[1], { width, height });
  if (between) step(walk.canvases[1], Number($("input[type=range]", walk.root).value), 0);
}

function setEnd(k, bitmap) {
  const [, height, width] = walk.model.input_shape;
  const canvas = walk.canvases[2 * k];
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  ends[k] = canvas;
  return stroll();
}

async function sampleEnd(k, seed) {
  const bitmap = await walk.picture({ path: walk.path("sample"), query: { count: 1, seed }, accept: PNG, out: "end.png" });
  return bitmap && setEnd(k, bitmap);
}

walk.changed = async () => {
  ends.fill(null);
  await sampleEnd(0, 1);
  await sampleEnd(1, 3);
};
walk.on("sample", (button) => sampleEnd(Number(button.dataset.end), seedOf()));
walk.on("drawing", (button) => {
  if (!drawing(walk.model)) return showProblem(walk.problem, nothingDrawn);
  return setEnd(Number(button.dataset.end), sketch.canvas);
});
for (const input of $$("input[type=file]", walk.root)) {
  input.addEventListener("change", async () => {
    const [file] = input.files;
    input.value = "";
    try {
      if (file) await setEnd(Number(input.dataset.end), await createImageBitmap(file));
    } catch {
      showProblem(walk.problem, { title: "unreadable picture", detail: `This browser cannot read ${file.name}; choose a PNG or JPEG.` });
    }
  });
}
$("input[type=range]", walk.root).addEventListener("input", showStep);

// ---- Samples

const hang = latest(async () => {
  const query = { count: wall.input("count").value, seed: wall.input("seed").value };
  const temperature = wall.input("temperature").value / 100;
  if (temperature !== 1) query.temperature = temperature;
  if (wall.model.size) query.height = query.width = Math.min(FREE, wall.model.size.max);
  const bitmap = await wall.picture({ path: wall.path("sample"), query, accept: PNG, out: "samples.png" });
  if (bitmap) paint(wall.canvases[0], bitmap);
});
wall.changed = hang;
wall.on("shuffle", () => {
  wall.input("seed").value = seedOf();
  hang();
});
for (const name of ["seed", "count", "temperature"]) {
  wall.input(name).addEventListener("input", () => {
    wall.out("temperature").textContent = (wall.input("temperature").value / 100).toFixed(2);
    if (wall.input("seed").checkValidity()) hang();
  });
}

const seedOf = () => Math.floor(Math.random() * 1e6);
