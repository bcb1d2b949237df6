// A size budget and a measure; the models within the budget, best first, and all of them in a plot. `rows` is given.
const script = document.currentScript;
const all = script ? script.previousElementSibling : document.querySelector(".explorer:empty");
const measures = { "perplexity": { up: false, show: (x) => (x < 1e4 ? x.toPrecision(4) : Math.round(x).toLocaleString("en")) }, "open book": { up: true, show: (x) => (100 * x).toFixed(1) + " %" } };
const sizes = { "MB": "MB on disk", "M": "million parameters that are not zero" };
const looks = { "pruned": ["#777777", "circle"], "+ LoRA": ["#0072B2", "square"], "+ GPTQ": ["#D55E00", "triangle"], "+ EoRA": ["#009E73", "diamond"] };
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
const box = make("label", controls, "At most ");
const budget = make("input", box);
budget.type = "range"; budget.step = "any"; budget.setAttribute("aria-label", "size budget");
const said = make("output", box);
budget.addEventListener("input", () => show());
const plot = draw("svg", all, { viewBox: "0 0 640 300", role: "img", "aria-label": "every model: the measure over its size; the budget is a dashed line", style: "width: 100%; max-width: 800px" });
const table = make("table", all); table.className = "dataframe";
const note = make("p", all);

const usable = () => rows.filter((r) => r[size.value] != null && r[measure.value] != null);
function limit() {
  const sizes = usable().map((r) => r[size.value]);
  budget.min = Math.min(...sizes); budget.max = Math.max(...sizes); budget.value = budget.max;
}
function shape(kind, x, y, colour, full) {
  const paint = { fill: full ? colour : "none", stroke: colour };
  if (kind === "circle") return draw("circle", plot, { cx: x, cy: y, r: 4.5, ...paint });
  const corners = { square: [[-4, -4], [4, -4], [4, 4], [-4, 4]], triangle: [[0, -5.5], [5, 4], [-5, 4]], diamond: [[0, -6], [5, 0], [0, 6], [-5, 0]] }[kind];
  return draw("polygon", plot, { points: corners.map(([a, b]) => `${x + a},${y + b}`).join(" "), ...paint });
}
function show() {
  const { up, show: text } = measures[measure.value], most = Number(budget.value), here = usable();
  const within = here.filter((r) => r[size.value] <= most + 1e-9).sort((a, b) => (up ? b[measure.value] - a[measure.value] : a[measure.value] - b[measure.value]) || a[size.value] - b[size.value]);
  said.textContent = ` ${most.toFixed(0)} ${size.value}`;
  table.replaceChildren(); plot.replaceChildren();
  const head = make("tr", make("thead", table)), body = make("tbody", table);
  for (const name of ["model", measure.value, "95 % interval", sizes[size.value]]) make("th", head, name);
  for (const r of within.slice(0, 8)) {
    const row = make("tr", body);
    make("th", row, r.label); make("td", row, text(r[measure.value]));
    make("td", row, `${text(r[measure.value + " low"])} to ${text(r[measure.value + " high"])}`); make("td", row, r[size.value].toFixed(1));
  }
  const overlap = within.filter((r) => up ? r[measure.value + " high"] >= within[0][measure.value + " low"] : r[measure.value + " low"] <= within[0][measure.value + " high"]).length - 1;
  note.textContent = within.length ? `${within.length} of ${here.length} models fit; the intervals of ${overlap} overlap the winner's, which does not make them as good: models are compared in pairs in the tables above.` : "No model fits.";
  const xs = here.map((r) => r[size.value]), x0 = Math.min(...xs), x1 = Math.max(...xs), scale = up ? (v) => v : Math.log;
  const ys = here.map((r) => scale(r[measure.value])), y0 = Math.min(...ys), y1 = Math.max(...ys);
  const X = (v) => 60 + 560 * (v - x0) / (x1 - x0 || 1), Y = (v) => (up ? 255 - 235 * (scale(v) - y0) / (y1 - y0 || 1) : 255 - 235 * (scale(v) - y0) / (y1 - y0 || 1));
  const words = (x, y, t, more = {}) => { draw("text", plot, { x, y, "font-size": 11, fill: "currentColor", ...more }).textContent = t; };
  draw("line", plot, { x1: X(most), x2: X(most), y1: 10, y2: 262, stroke: "currentColor", "stroke-dasharray": "4 3" });
  for (const r of here) {
    const [colour, kind] = looks[r.family], point = shape(kind, X(r[size.value]), Y(r[measure.value]), colour, within.length && r.label === within[0].label);
    point.setAttribute("opacity", r[size.value] <= most + 1e-9 ? 1 : 0.25);
    draw("title", point, {}).textContent = `${r.label}: ${text(r[measure.value])}, ${r[size.value].toFixed(1)}`;
  }
  words(60, 278, x0.toFixed(0)); words(620, 278, `${x1.toFixed(0)}`, { "text-anchor": "end" }); words(340, 278, sizes[size.value], { "text-anchor": "middle" });
  words(55, 259, text(Math.min(...here.map((r) => r[measure.value]))), { "text-anchor": "end" }); words(55, 24, text(Math.max(...here.map((r) => r[measure.value]))), { "text-anchor": "end" });
  let x = 60;
  for (const [name, [colour, kind]] of Object.entries(looks)) { shape(kind, x, 293, colour, true); words(x + 9, 297, name); x += 90; }
  words(620, 297, up ? "up is better" : "down is better, log scale", { "text-anchor": "end" });
}
limit(); show();
