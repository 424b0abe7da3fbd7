// Small helpers for the document: elements, problems, and work of which only the latest counts.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** Make an element: h("p", { className: "hint" }, "text", child). */
export function h(name, properties = {}, ...children) {
  const element = document.createElement(name);
  for (const [property, value] of Object.entries(properties)) {
    if (property in element) element[property] = value;
    else element.setAttribute(property, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** Show what the API said in an element with role="alert"; null clears it. */
export function showProblem(place, problem) {
  if (!problem) return place.replaceChildren();
  console.info(problem); // not an error of the page
  const title = [problem.status || "", problem.code || problem.title || problem.name].filter(Boolean).join(" ");
  place.replaceChildren(
    h("div", { className: "problem" }, h("strong", {}, title), h("p", {}, problem.detail || problem.message),
      problem.request && h("small", {}, `request ${problem.request}`)),
  );
}

export function fill(select, values, labels = values) {
  const before = select.value;
  select.replaceChildren(...values.map((value, k) => h("option", { value }, labels[k])));
  if (values.includes(before)) select.value = before;
}

/** A function that runs `work` and, if it was called meanwhile, runs it once more: only the latest state counts. */
export function latest(work) {
  let running = false;
  let again = false;
  return async () => {
    again = true;
    if (running) return;
    running = true;
    try {
      while (again) {
        again = false;
        await work();
      }
    } finally {
      running = false;
    }
  };
}

export function later(work, ms) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, ms);
  };
}

/** Draw a picture over a whole canvas; with `own` the canvas takes its size. */
export function paint(canvas, bitmap, own = true) {
  if (own && (canvas.width !== bitmap.width || canvas.height !== bitmap.height)) {
    canvas.width = bitmap.width;
    canvas.height = bitmap.height;
  }
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
}

export function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const digits = (value, places = 3) => Number(value).toPrecision(places).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
