"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const columns = [["data", "data"], ["network", "network"], ["norm", "normalizer"], ["batch", "(grad, stat)"], ["budget", "budget"],
  ["seed", "seed"], ["moving", "moving %"], ["online", "online %"], ["precise", "precise %"], ["minutes", "min"], ["note", "note"], ["id", "id"]];
const table = document.getElementById("table"), filter = document.getElementById("filter");
let key = "data", down = false;
const element = (name, text) => { const found = document.createElement(name); if (text !== undefined) found.textContent = text; return found; };
const svg = (name, attributes) => {
  const found = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [k, v] of Object.entries(attributes)) found.setAttribute(k, v);
  return found;
};
function curve(run) {
  const kinds = [["curve_moving", "#D55E00", ""], ["curve_online", "#0072B2", "5 3"], ["loss", "#777777", "2 2"]].filter(([k]) => run[k] && run.step);
  if (!kinds.length || run.step.length < 2) return null;
  const drawn = svg("svg", { viewBox: "0 0 420 150", role: "img", "aria-label": "accuracy and training loss against steps" });
  const last = run.step[run.step.length - 1];
  const accuracies = [...(run.curve_moving || []), ...(run.curve_online || [])].filter(v => v !== null && v !== undefined);
  const high = Math.max(1, ...accuracies), top = Math.max(...(run.loss || [1]).filter(v => v !== null));
  drawn.append(svg("path", { d: "M34 8V124H386", fill: "none", stroke: "#999" }));
  const say = (x, y, text, anchor) => { const t = svg("text", { x, y, "font-size": 10, "text-anchor": anchor, fill: "#555" }); t.textContent = text; drawn.append(t); };
  say(31, 14, high.toFixed(0), "end"); say(31, 124, "0", "end"); say(386, 137, last.toLocaleString() + " steps", "end"); say(389, 14, top.toFixed(2), "start");
  say(40, 147, "orange: moving %, blue: online %, grey: training loss (right)", "start");
  for (const [name, colour, dashes] of kinds) {
    const scale = name === "loss" ? top : high;
    const points = run[name].map((v, i) => v === null ? "" : `${(34 + 352 * run.step[i] / last).toFixed(1)},${(124 - 116 * v / scale).toFixed(1)}`);
    drawn.append(svg("polyline", { points: points.join(" "), fill: "none", stroke: colour, "stroke-width": 1.6, "stroke-dasharray": dashes }));
  }
  return drawn;
}
function opened(run) {
  const row = element("tr"), cell = row.appendChild(element("td"));
  cell.colSpan = columns.length;
  const drawn = curve(run);
  if (drawn) cell.append(drawn);
  const said = [run.command, `${run.parameters ?? "?"} parameters; ${run.rate ?? "?"} images/s; ${run.where}; schedule ${run.schedule}; ${run.made}`];
  for (const line of said) cell.append(element("pre", line));
  cell.append(element("a", "its record"));
  cell.lastChild.href = `records/${run.id}.json`;
  return row;
}
function show() {
  const asked = (location.hash.match(/^#runs=(.+)/) || [, ""])[1].split(",").filter(Boolean);
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = run => columns.map(([k]) => run[k] ?? "").join(" ").toLowerCase();
  const chosen = runs.filter(run => (!asked.length || asked.includes(run.id)) && words.every(word => text(run).includes(word)));
  const order = (a, b) => {
    const [x, y] = [a[key], b[key]];
    const found = x === undefined ? 1 : y === undefined ? -1 : typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return down ? -found : found;
  };
  chosen.sort((a, b) => order(a, b) || a.norm.localeCompare(b.norm) || a.seed - b.seed);
  document.getElementById("count").textContent = `${chosen.length} of ${runs.length}`;
  table.tBodies[0].replaceChildren(...chosen.flatMap(run => {
    const row = element("tr");
    row.className = "run";
    for (const [k] of columns) row.append(element("td", run[k] ?? ""));
    row.addEventListener("click", () => row.nextSibling && !row.nextSibling.className ? row.nextSibling.remove() : row.after(opened(run)));
    return asked.length && chosen.length < 7 ? [row, opened(run)] : [row];
  }));
  table.parentElement.style.maxHeight = asked.length && chosen.length < 7 ? "none" : "";
  if (asked.length) document.getElementById("runs").scrollIntoView();
}
const head = element("tr");
for (const [k, name] of columns) {
  const cell = head.appendChild(element("th", name));
  cell.addEventListener("click", () => { down = key === k && !down; key = k; show(); });
}
table.tHead.append(head);
filter.addEventListener("input", show);
document.getElementById("all").addEventListener("click", () => { filter.value = ""; history.replaceState(null, "", "#runs"); show(); });
addEventListener("hashchange", show);
show();
