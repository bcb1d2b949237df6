// Which models, a size budget and a measure; the models within the budget, best first, and all of them in a plot.
// Given are `rows` (the models), `groups` (those trained alike, by the dense model trained so), `fronts` (by size,
// measure and group, smallest first; the last that fits a budget wins) and `marks` (files beside the study).
const script = document.currentScript;
const all = script ? script.previousElementSibling : document.querySelector(".explorer:empty");
const measures = { "perplexity": { up: false, show: (x) => (x < 1e4 ? x.toPrecision(4) : Math.round(x).toLocaleString("en")) }, "open book": { up: true, show: (x) => (100 * x).toFixed(1) + " %" } };
const sizes = { "MB": "MB on disk", "M": "million parameters that are not zero" };
const looks = { "pruned": ["#777777", "circle"], "+ LoRA": ["#0072B2", "square"], "+ GPTQ": ["#D55E00", "triangle"], "+ EoRA": ["#009E73", "diamond"] };
const file = ["#E69F00", "star"], worst = 5; // perplexities above so many times the dense model's are not drawn
const make = (name, parent, text = "") => { const e = parent.appendChild(document.createElement(name)); e.textContent = text; return e; };
const draw = (name, parent, attributes) => {
  const e = parent.appendChild(document.createElementNS("http://www.w3.org/2000/svg", name));
  for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
  return e;
};

const controls = make("p", all);
const choice = (label, options) => {
  const box = make("label", controls, label + " ");
  box.style.marginRight = "1.5em";
  const select = make("select", box);
  for (const [value, text] of Object.entries(options)) make("option", select, text).value = value;
  select.addEventListener("change", () => { limit(); show(); });
  return select;
};
const size = choice("Size:", sizes);
const measure = choice("Measure:", Object.fromEntries(Object.keys(measures).map((m) => [m, m])));
const group = choice("Models:", groups);
const box = make("label", controls, "At most ");
const budget = make("input", box);
budget.type = "range"; budget.step = "any"; budget.setAttribute("aria-label", "size budget");
const said = make("output", box);
budget.addEventListener("input", () => show());
const plot = draw("svg", all, { viewBox: "0 0 670 355", role: "img", "aria-label": "the chosen models: the measure over the size; the budget is a dashed line", style: "width: 100%; max-width: 800px" });
const table = make("table", all); table.className = "dataframe";
const note = make("p", all);

const known = (r) => r[size.value] != null && r[measure.value] != null;
const usable = () => rows.filter((r) => known(r) && r.base === group.value);
function limit() {
  const sizes = usable().map((r) => r[size.value]);
  budget.min = Math.min(...sizes); budget.max = Math.max(...sizes); budget.value = budget.max;
}
function shape(kind, x, y, colour, full) {
  const paint = { fill: full ? colour : "none", stroke: colour };
  if (kind === "circle") return draw("circle", plot, { cx: x, cy: y, r: 4.5, ...paint });
  const corners = {
    square: [[-4, -4], [4, -4], [4, 4], [-4, 4]], triangle: [[0, -5.5], [5, 4], [-5, 4]], diamond: [[0, -6], [5, 0], [0, 6], [-5, 0]],
    star: [...Array(10).keys()].map((k) => [(k % 2 ? 3.2 : 8) * Math.sin(k * Math.PI / 5), -(k % 2 ? 3.2 : 8) * Math.cos(k * Math.PI / 5)]),
  }[kind];
  return draw("polygon", plot, { points: corners.map(([a, b]) => `${x + a},${y + b}`).join(" "), ...paint });
}
function show() {
  const { up, show: text } = measures[measure.value], most = Number(budget.value), here = usable();
  const fits = (r) => r[size.value] <= most + 1e-9, value = (r) => r[measure.value];
  const within = here.filter(fits).sort((a, b) => (up ? value(b) - value(a) : value(a) - value(b)) || a[size.value] - b[size.value]);
  const front = ((fronts[size.value] || {})[measure.value] || {})[group.value] || [];
  const winner = front.map((label) => here.find((r) => r.label === label)).filter(fits).pop();
  said.textContent = ` ${most.toFixed(0)} ${size.value}`;
  table.replaceChildren(); plot.replaceChildren();
  const head = make("tr", make("thead", table)), body = make("tbody", table);
  for (const name of ["model", measure.value, "95 % interval", sizes[size.value]]) make("th", head, name);
  for (const r of within.slice(0, 8)) {
    const row = make("tr", body);
    make("abbr", make("th", row), r.shown).title = `${r.label}: ${r.meaning}`; make("td", row, text(value(r)));
    make("td", row, `${text(r[measure.value + " low"])} to ${text(r[measure.value + " high"])}`); make("td", row, r[size.value].toFixed(1));
  }
  const overlap = within.filter((r) => up ? r[measure.value + " high"] >= winner[measure.value + " low"] : r[measure.value + " low"] <= winner[measure.value + " high"]).length - 1;
  note.textContent = winner ? `${within.length} of ${here.length} models fit; the intervals of ${overlap} overlap the winner's, which does not make them as good: models are compared in pairs in the tables above.` : "No model fits.";

  const base = here.find((r) => r.label === group.value), bound = up || !base ? Infinity : worst * value(base);
  const shown = here.filter((r) => value(r) <= bound), stars = marks.filter((r) => known(r) && value(r) <= bound), both = [...shown, ...stars];
  if (!both.length) return;
  const xs = both.map((r) => r[size.value]), x0 = Math.min(...xs), x1 = Math.max(...xs), scale = up ? (v) => v : Math.log;
  const ys = both.map((r) => scale(value(r))), y0 = Math.min(...ys), y1 = Math.max(...ys);
  const X = (v) => 75 + 535 * (v - x0) / (x1 - x0 || 1), Y = (v) => 245 - 210 * (scale(v) - y0) / (y1 - y0 || 1);
  const words = (x, y, t, more = {}) => { draw("text", plot, { x, y, "font-size": 11, fill: "currentColor", ...more }).textContent = t; };
  const mark = (r, [colour, kind], full, said) => {
    const point = shape(kind, X(r[size.value]), Y(value(r)), colour, full);
    draw("title", point, {}).textContent = `${r.shown || r.label}: ${text(value(r))}, ${r[size.value].toFixed(1)}${said}`;
    return point;
  };
  const round = (step, n = 40) => [...Array(n).keys()].map((k) => k * step);
  const values = up ? round(y1 - y0 > 0.3 ? 0.1 : 0.05) : [...Array(7).keys()].flatMap((k) => [1, 1.5, 2, 3, 5, 7].map((v) => v * 10 ** k));
  for (const v of values.filter((v) => scale(v) >= y0 - 1e-9 && scale(v) <= y1 + 1e-9)) {
    draw("line", plot, { x1: 60, x2: 625, y1: Y(v), y2: Y(v), stroke: "currentColor", opacity: 0.12 });
    words(52, Y(v) + 4, up ? `${(100 * v).toFixed(0)} %` : v.toLocaleString("en"), { "text-anchor": "end" });
  }
  for (const v of round(x1 - x0 > 100 ? 25 : 10).filter((v) => v >= x0 && v <= x1)) words(X(v), 288, v, { "text-anchor": "middle" });
  words(342, 305, sizes[size.value], { "text-anchor": "middle" });
  draw("line", plot, { x1: X(most), x2: X(most), y1: 10, y2: 275, stroke: "currentColor", "stroke-dasharray": "4 3" });
  if (base) {
    draw("line", plot, { x1: 60, x2: 625, y1: Y(value(base)), y2: Y(value(base)), stroke: "#777777", "stroke-dasharray": "2 3" });
    words(629, Y(value(base)) + 4, "dense", { "font-size": 10 });
  }
  for (const r of shown) mark(r, looks[r.family], r === winner, "").setAttribute("opacity", fits(r) ? 1 : 0.25);
  const taken = both.map((r) => [X(r[size.value]), Y(value(r)), 22, 13]); // where a label may not stand: x, y, and how near
  for (const r of stars) {
    mark(r, file, true, ", a file beside the study, untrained");
    const x = X(r[size.value]), y = Y(value(r)), free = ([dx, dy]) => taken.every(([a, b, w, h]) => Math.abs(a - x - dx) >= w || Math.abs(b - y - dy) >= h);
    const [dx, dy] = [[0, 16], [0, -16], [-25, 0], [25, 0], [-20, 14], [20, 14], [-20, -14], [20, -14]].find(free) || [0, up ? -25 : 25];
    taken.push([x + dx, y + dy, 30, 12]);
    words(x + dx, y + dy + 4, r.label.split(" ").pop(), { "font-size": 10, "text-anchor": "middle" });
  }
  let x = 60;
  const legend = ([colour, kind], name) => { shape(kind, x, 323, colour, true); words(x + 11, 327, name); x += 26 + 6.5 * name.length; };
  for (const [name, look] of Object.entries(looks)) legend(look, name);
  if (stars.length) legend(file, "files of the untrained model beside the study");
  const left = here.length - shown.length;
  words(60, 345, `${up ? "up is better" : "down is better, log scale"}${left ? `; ${left} above ${text(bound)} not drawn` : ""}`);
}
limit(); show();
