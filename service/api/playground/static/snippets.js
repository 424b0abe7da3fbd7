// The call of a panel as curl, Python and JavaScript. It is the call that the page has sent itself.

import { hasKey, urlOf } from "./api.js";
import { h } from "./dom.js";

const NAMES = { curl: "curl", python: "Python", javascript: "JavaScript" };
let chosen = "curl";
let panels = 0;

/** Add the panel "The same call" to an element. Returns a function that shows a call in it. */
export function callPanel(place, name) {
  const group = `call-${panels++}`;
  const code = h("code");
  const status = h("span", { className: "hint", role: "status" });
  const choices = Object.entries(NAMES).map(([value, label]) =>
    h("label", {}, h("input", { type: "radio", name: group, value, checked: value === chosen }), h("span", {}, label)));
  const copy = h("button", { type: "button" }, "Copy");
  const details = h("details", { className: "call", hidden: true },
    h("summary", {}, "The same call ", h("span", { className: "hint" }, "curl, Python, JavaScript")),
    h("div", { className: "title" },
      h("div", { className: "segments", role: "group", "aria-label": `Language of the call: ${name}` }, ...choices), status, copy),
    h("pre", { tabIndex: 0, role: "region", "aria-label": `The call: ${name}` }, code));
  let shown = null;
  const write = () => {
    if (shown) code.textContent = WRITERS[chosen](shown);
  };
  details.addEventListener("change", (event) => {
    chosen = event.target.value;
    write();
  });
  details.addEventListener("toggle", () => {
    for (const input of details.querySelectorAll("input")) input.checked = input.value === chosen;
    write();
  });
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      status.textContent = "copied";
    } catch { // a page over plain HTTP may not use the clipboard
      getSelection().selectAllChildren(code);
      status.textContent = "selected; copy with Ctrl+C";
    }
  });
  place.append(details);
  return (call) => {
    shown = call;
    details.hidden = false;
    status.textContent = "";
    write();
  };
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

/** The name of a file as curl's -F reads it, where `;` and `,` part further arguments. */
const formName = (name) => /[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name;

function curl(call) {
  const words = ["curl -sSf"];
  if (method(call) !== "GET" && !call.files && !call.json) words.push("-X POST");
  for (const { field, name } of call.files ?? []) words.push(`-F ${quoted(`${field}=@${formName(name)}`)}`);
  if (call.json) words.push("-H 'Content-Type: application/json'", `-d ${quoted(JSON.stringify(call.json))}`);
  if (call.accept) words.push(`-H ${quoted(`Accept: ${call.accept}`)}`);
  if (hasKey()) words.push('-H "Authorization: Bearer $KEY"');
  words.push(quoted(urlOf(call)));
  if (call.out) words.push(`-o ${quoted(call.out)}`);
  return words.join(" \\\n  ");
}

function python(call) {
  const lines = hasKey() ? ["import os", "", "import httpx", ""] : ["import httpx", ""];
  const headers = [];
  if (call.accept) headers.push(`"Accept": ${JSON.stringify(call.accept)}`);
  if (hasKey()) headers.push('"Authorization": f"Bearer {os.environ[\'KEY\']}"');
  const given = [JSON.stringify(urlOf(call))];
  if (headers.length) given.push(`headers={${headers.join(", ")}}`);
  if (call.files) {
    given.push(`files=[${call.files.map(({ field, name }) => `("${field}", open(${JSON.stringify(name)}, "rb"))`).join(", ")}]`);
  }
  if (call.json) given.push(`json=${literal(call.json)}`);
  given.push("timeout=600");
  lines.push(`answer = httpx.${method(call).toLowerCase()}(\n    ${given.join(",\n    ")},\n).raise_for_status()`);
  lines.push(call.out ? `open(${JSON.stringify(call.out)}, "wb").write(answer.content)` : `print(answer.${call.text ? "text" : "json()"})`);
  return lines.join("\n");
}

/** A JSON value as Python. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${literal(one)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}

function javascript(call) {
  const lines = [];
  const files = [...(call.files ? ["readFile"] : []), ...(call.out ? ["writeFile"] : [])];
  if (files.length) lines.push(`import { ${files.join(", ")} } from "node:fs/promises";`, "");
  const headers = [];
  if (call.accept) headers.push(`Accept: ${JSON.stringify(call.accept)}`);
  if (call.json) headers.push('"Content-Type": "application/json"');
  if (hasKey()) headers.push("Authorization: `Bearer ${process.env.KEY}`");
  const given = [`method: "${method(call)}"`];
  if (headers.length) given.push(`headers: { ${headers.join(", ")} }`);
  if (call.files) {
    lines.push("const body = new FormData();");
    for (const { field, name } of call.files) {
      lines.push(`body.append("${field}", new Blob([await readFile(${JSON.stringify(name)})]), ${JSON.stringify(name)});`);
    }
    given.push("body");
  }
  if (call.json) given.push(`body: JSON.stringify(${JSON.stringify(call.json)})`);
  lines.push(`const answer = await fetch(${JSON.stringify(urlOf(call))}, {\n  ${given.join(",\n  ")},\n});`);
  lines.push("if (!answer.ok) throw new Error(await answer.text());");
  lines.push(call.out
    ? `await writeFile(${JSON.stringify(call.out)}, new Uint8Array(await answer.arrayBuffer()));`
    : `console.log(await answer.${call.text ? "text" : "json"}());`);
  return lines.join("\n");
}

const method = (call) => call.method ?? "POST";
const WRITERS = { curl, python, javascript };
