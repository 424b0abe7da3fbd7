// The page: its rooms, and the dialog that asks for a key.

import { askWith, forgetKey, hasKey } from "./api.js";
import { $, $$, h, showProblem } from "./dom.js";
import * as explore from "./explore.js";
import * as operate from "./operate.js";
import * as restore from "./restore.js";

const ROOMS = { restore, explore, operate };
const opened = new Set();

/** Show the room that the address names; its first showing opens it. */
async function show() {
  const name = location.hash.slice(1) in ROOMS ? location.hash.slice(1) : "restore";
  for (const room of Object.keys(ROOMS)) $(`#${room}`).hidden = room !== name;
  for (const link of $$("nav a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${$("nav [aria-current]").textContent} – VAE service`;
  if (opened.has(name)) return;
  opened.add(name);
  try {
    await ROOMS[name].open();
    showProblem($("#problem"), null);
  } catch (problem) {
    opened.delete(name);
    showProblem($("#problem"), problem);
    const again = h("button", { type: "button" }, "Try again");
    again.addEventListener("click", show);
    $(".problem", $("#problem")).append(again);
  }
  $("#forget").hidden = !hasKey();
}

const dialog = $("#key-dialog");

/** Ask for a key. Resolves to an empty string if the person gives none. */
function askKey(reason) {
  $("#key-reason").textContent = reason || "Its operator has given you one. It may have the rights infer, control or both.";
  $("#key").value = "";
  dialog.showModal();
  return new Promise((done) => {
    const finish = (key) => {
      dialog.onclose = null;
      dialog.close();
      $("#key").value = "";
      $("#forget").hidden = !key;
      done(key);
    };
    dialog.onclose = () => finish("");
    $("form", dialog).onsubmit = (event) => {
      event.preventDefault();
      finish($("#key").value.trim());
    };
    $("[value=cancel]", dialog).onclick = () => finish("");
  });
}

askWith(askKey);
$("#forget").addEventListener("click", () => {
  forgetKey();
  location.reload();
});
$(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("#main").focus();
});
addEventListener("hashchange", show);
$("#loading").remove();
show();
