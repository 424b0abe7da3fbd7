// Model cards: the Markdown that the trainer writes, as elements. Nothing in a card becomes HTML.

import { h } from "./dom.js";

const INLINE = /`([^`]+)`|\*\*([^*]+)\*\*|!\[([^\]]*)\]\(([^)\s]+)\)|\[([^\]]+)\]\(([^)\s]+)\)/g;

/**
 * Elements of a Markdown text.
 * @param picture (address, text) -> the element of a picture.
 */
export function rendered(text, picture) {
  const found = [];
  const lines = text.split("\n");
  for (let k = 0; k < lines.length;) {
    const run = (test) => {
      const from = k;
      while (k < lines.length && test(lines[k])) k++;
      return lines.slice(from, k);
    };
    const heading = lines[k].match(/^(#{1,4}) (.*)/);
    if (!lines[k].trim()) k++;
    else if (heading) {
      found.push(h(`h${Math.min(6, heading[1].length + 3)}`, {}, ...inline(heading[2], picture)));
      k++;
    } else if (lines[k].startsWith("```")) {
      k++;
      found.push(h("pre", { tabIndex: 0 }, h("code", {}, run((line) => !line.startsWith("```")).join("\n"))));
      k++;
    } else if (lines[k].startsWith("|")) found.push(table(run((line) => line.startsWith("|")), picture));
    else if (/^[-*] /.test(lines[k])) {
      const items = run((line) => /^([-*] | {2,}\S)/.test(line)).join("\n").split(/\n?^[-*] /m).filter(Boolean);
      found.push(h("ul", {}, ...items.map((item) => h("li", {}, ...inline(item, picture)))));
    } else {
      const paragraph = run((line) => line.trim() && !/^(#{1,4} |\||```|[-*] )/.test(line));
      if (paragraph.length) found.push(h("p", {}, ...inline(paragraph.join(" "), picture)));
      else k++;
    }
  }
  return found;
}

function table(lines, picture) {
  const cells = (line) => line.replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const [head, , ...rows] = lines;
  const row = (name) => (line) => h("tr", {}, ...cells(line).map((cell) => h(name, {}, ...inline(cell, picture))));
  return h("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": cells(head).join(", ") || "Table" },
    h("table", {}, h("thead", {}, row("th")(head)), h("tbody", {}, ...rows.map(row("td")))));
}

function inline(text, picture) {
  const parts = [];
  let from = 0;
  for (const found of text.matchAll(INLINE)) {
    parts.push(text.slice(from, found.index));
    const [whole, code, bold, alt, source, label, address] = found;
    if (code) parts.push(h("code", {}, code));
    else if (bold) parts.push(h("strong", {}, bold));
    else if (source) parts.push(picture(source, alt));
    else if (/^https?:/.test(address)) parts.push(h("a", { href: address, rel: "noreferrer" }, label));
    else parts.push(label);
    from = found.index + whole.length;
  }
  return [...parts, text.slice(from)];
}
