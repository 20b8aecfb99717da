// The runs of a page: their cells, the chosen one, and the charts that show it.
const page = JSON.parse(document.getElementById("data").textContent);
const MOST_CURVES = 12, MOST_ROWS = 200, MOST_ACROSS = 24;
const byId = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { run: 0, at: [], colour: -1, dash: -1, bands: true, logTime: false, logValue: [true, true], until: 1, x: 0, y: 0,
  measure: 0, sort: null, up: true, now: null };
let run, views = [null, null], mapView = null;

const three = (value) => value == null ? "–" : value === 0 ? "0" : Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5
  ? String(Number(value.toPrecision(3))) : value.toExponential(1).replace("e+", "e");
const varied = () => run.axes.map((axis, i) => axis.values.length > 1 ? i : -1).filter((i) => i >= 0);
const strides = (one) => { let size = 1; const found = one.axes.map(() => 0);
  for (let i = one.axes.length - 1; i >= 0; i--) { found[i] = size; size *= one.axes[i].values.length; } return found; };
const cellAt = (at, one = run) => at.reduce((sum, i, axis) => sum + i * strides(one)[axis], 0);
const placeOf = (cell, one = run) => strides(one).map((stride, i) => Math.floor(cell / stride) % one.axes[i].values.length);
const cellCount = () => run.axes.reduce((size, axis) => size * axis.values.length, 1);
const nameOf = (at, one = run) => one.axes.map((axis, i) => axis.values.length > 1 ? `${axis.name} ${axis.values[at[i]]}` : "")
  .filter(Boolean).join(", ") || one.name || "the only cell";
const measured = (name, cell, one = run) => { const found = one.measures.find((measure) => measure.name === name);
  return found ? found.values[cell] : null; };

// Curves: in the page, or asked of the program that serves it.
function embedded(one) {
  if (!one.decoded) {
    const bytes = Uint8Array.from(atob(one.curves), (c) => c.charCodeAt(0));
    one.decoded = new Float32Array(bytes.buffer);
  }
  return one.decoded;
}
async function curvesOf(one, cell, quantity) {
  const length = 3 * one.time.length;
  if (one.curves != null) {
    const begin = (cell * one.quantities.length + quantity) * length;
    return embedded(one).subarray(begin, begin + length);
  }
  const key = `${cell} ${quantity}`, places = placeOf(cell, one).map((i) => [i]);
  if (!one.asked.has(key)) {
    const asked = ask("curves", one, places, `&quantity=${encodeURIComponent(one.quantities[quantity].name)}`);
    one.asked.set(key, asked.then(async (answer) => new Float32Array(await answer.arrayBuffer())));
    asked.catch(() => one.asked.delete(key));
  }
  return one.asked.get(key);
}

// What is told of cells: in the page, or asked of the program that serves it, for all combinations of some places.
async function ask(path, one, places, more = "") {
  const answer = await fetch(`${path}?run=${page.runs.indexOf(one)}&at=${places.map((some) => some.join(",")).join(";")}${more}`);
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}
const served = (one = run) => one.lanes != null;
const combined = (places) => places.reduce((found, some) => found.flatMap((at) => some.map((i) => [...at, i])), [[]]);
const seedsOf = (one, cells) => Math.min(one.seeds, Math.max(1, Math.floor(one.lanes / cells)));  // of one answer
function take(one, places, told) {
  for (const [i, at] of combined(places).entries()) {
    const cell = cellAt(at, one);
    if (one.of[cell] > told.seeds) continue;
    one.of[cell] = told.seeds;
    one.endings[cell] = told.endings[i];
    one.floor[cell] = told.floor[i];
    one.measures.forEach((measure, k) => { measure.values[cell] = told.measures[k].values[i]; });
  }
}
async function need(one, places) {
  if (!served(one)) return;
  const cells = combined(places).map((at) => cellAt(at, one)), seeds = seedsOf(one, cells.length);
  if (cells.some((cell) => !(one.of[cell] >= seeds))) take(one, places, await (await ask("cells", one, places)).json());
}
for (const one of page.runs.filter(served)) {
  Object.assign(one, { asked: new Map(), of: {}, endings: {}, floor: {}, measures: one.first.measures.map((measure) => ({ ...measure, values: {} })) });
  take(one, one.axes.map(() => [0]), one.first);
}

// The cells whose curves are shown: along the axis of the colours and that of the dashes, and of every run if asked.
function some(axis, most) {
  const count = run.axes[axis].values.length, every = Math.ceil(count / most);
  return [...Array(count).keys()].filter((i) => i % every === 0 || i === state.at[axis]);
}
function shown() {
  const found = [];
  if (state.colour === -2) {  // the runs
    for (const one of page.runs) {
      const at = one.axes.map((axis) => {
        const mine = run.axes.findIndex((other) => other.name === axis.name);
        return mine < 0 ? 0 : Math.max(0, axis.values.indexOf(run.axes[mine].values[state.at[mine]]));
      });
      found.push({ one, at, cell: cellAt(at, one), colour: one.name, dash: "", selected: one === run });
    }
    return found;
  }
  for (const i of state.colour >= 0 ? some(state.colour, MOST_CURVES) : [0]) {
    for (const j of state.dash >= 0 ? some(state.dash, MOST_CURVES) : [0]) {
      const at = [...state.at];
      if (state.colour >= 0) at[state.colour] = i;
      if (state.dash >= 0) at[state.dash] = j;
      const label = (axis) => axis >= 0 ? `${run.axes[axis].name} ${run.axes[axis].values[at[axis]]}` : "";
      found.push({ one: run, at, cell: cellAt(at), colour: label(state.colour) || nameOf(at), dash: label(state.dash),
        selected: at.every((value, axis) => value === state.at[axis]) });
    }
  }
  return found;
}
async function rowsOf(panel) {
  const quantity = run.quantities[Number(byId(`quantity-${panel}`).value)], log = state.logValue[panel];
  const end = run.time[run.time.length - 1] * state.until, rows = [];
  const lines = await Promise.all(shown().map(async (line) => {
    const place = line.one.quantities.findIndex((other) => other.name === quantity.name);
    return place < 0 ? null : { ...line, values: await curvesOf(line.one, line.cell, place) };
  }));
  for (const { one, at, cell, colour, dash, selected, values } of lines.filter(Boolean)) {
    const count = one.time.length;
    const told = (value) => Number.isFinite(value) && (!log || value > 0) ? value : null;
    for (let t = 0; t < count && one.time[t] <= end * (1 + 1e-9); t++) {
      if (state.logTime && one.time[t] <= 0) continue;
      const [low, middle, high] = [0, 1, 2].map((i) => told(values[i * count + t]));
      rows.push({ time: one.time[t], low: low ?? (log ? middle : low), middle, high, colour, dash, selected, cell: `${one.name} ${cell}`,
        name: page.runs.length > 1 ? `${one.name}: ${nameOf(at, one)}` : nameOf(at, one) });
    }
  }
  const cell = cellAt(state.at), least = Math.min(...rows.map((row) => row.middle ?? Infinity));
  const begin = state.logTime ? run.time.find((time) => time > 0) : run.time[0];
  const phases = [], ends = ["t_align", "t1", "t_plateau"].map((name) => measured(name, cell));
  if (run.measures.some((measure) => measure.name === "t1")) {
    let left = begin;
    for (const [i, phase] of ["align", "grow", "converge", "slow tail"].entries()) {
      if (i > 0 && ends[i - 1] == null) break;  // the phase before does not end
      const right = Math.min(ends[i] ?? end, end);
      if (right > left) phases.push({ begin: left, end: right, phase });
      left = Math.max(left, right);
    }
  }
  const predicted = measured("t1_predicted", cell), marks = [], floors = [];
  if (predicted != null && predicted <= end && predicted >= begin) marks.push({ time: predicted, what: `T1 predicted, ${three(predicted)}` });
  if (quantity.name === "loss" && run.floor[cell] && log && least <= 3 * run.floor[cell])
    floors.push({ value: run.floor[cell], what: "rounding: below it nothing is told" });
  const now = state.now != null && state.now <= end && state.now >= begin ? [{ time: state.now }] : [];
  return { curves: rows, phases, marks, floors, now };
}

function theme() {
  const of = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const [ink, edge, extent] = [of("--ink"), of("--edge"), dark.matches ? [0.98, 0.3] : [0, 0.82]];
  const text = { labelColor: ink, titleColor: ink, labelFontSize: 12, titleFontSize: 12 };
  return { background: null, font: "system-ui, sans-serif", view: { stroke: null }, range: { ordinal: { scheme: "viridis", extent } },
    axis: { ...text, gridColor: edge, gridOpacity: 0.6, domainColor: edge, tickColor: edge, labelOverlap: true },
    legend: { ...text, labelLimit: 260, symbolStrokeWidth: 2.5, titleLimit: 200, layout: { bottom: { direction: "vertical", anchor: "start", margin: 4 } } }, rule: { color: ink }, text: { color: ink, fontSize: 12 } };
}
// warnings are of data that is empty, as it is meant
const OPTIONS = () => ({ renderer: "svg", logLevel: 1, config: theme(), actions: { export: true, source: false, compiled: false, editor: false } });
function withAxes(spec, panel) {
  const made = structuredClone(spec), log = state.logValue[panel];
  const visit = (node) => {
    for (const layer of node.layer ?? []) visit(layer);
    const { x, y } = node.encoding ?? {};
    if (x?.scale) { x.scale.type = state.logTime ? "log" : "linear"; x.axis.title = run.clock; if (state.logTime) x.axis.format = "~e"; }
    if (y?.scale) { y.scale.type = log ? "log" : "linear"; y.axis.format = log ? "~e" : "~g"; if (log) y.scale.nice = false; }
    if (node.encoding?.y2 && node.mark?.type === "area" && !state.bands) node.mark.opacity = 0;
    if (node.encoding?.strokeDash && state.dash < 0) delete node.encoding.strokeDash;
  };
  visit(made);
  return made;
}
async function drawCurves(panel) {
  const quantity = run.quantities[Number(byId(`quantity-${panel}`).value)];
  const spec = withAxes(page.charts.curves, panel), data = await rowsOf(panel);
  spec.description = `${quantity.label} over ${run.clock}, a line for each cell`;
  spec.datasets = data;
  views[panel]?.finalize();
  const narrow = byId(`chart-${panel}`).clientWidth < 500;
  const options = OPTIONS();
  if (narrow) options.config.legend.columns = 2;
  const visit = (node) => { for (const layer of node.layer ?? []) visit(layer);
    for (const channel of ["color", "strokeDash"]) { const one = node.encoding?.[channel];
      if (one?.legend) { if (narrow) one.legend.columns = 2; if (one.field !== "phase") one.legend.title = null; } } };
  visit(spec);
  views[panel] = (await vegaEmbed(`#chart-${panel}`, spec, options)).view;
}
async function moveCurves() {
  const { at } = state;
  await Promise.all([0, 1].map(async (panel) => {
    const data = await rowsOf(panel);
    if (at !== state.at) return;  // another cell has been chosen meanwhile
    for (const [name, rows] of Object.entries(data)) views[panel].data(name, rows);
    await views[panel].runAsync();
  }));
}
// The places of the map's cells along each axis: a run that is served shows some values of a long one.
const mapPlaces = () => run.axes.map((axis, i) => i === state.x || i === state.y ? some(i, served() ? MOST_ACROSS : axis.values.length) : [state.at[i]]);
function mapRows() {
  const measure = run.measures[state.measure], rows = [];
  for (const at of combined(mapPlaces())) {
    const cell = cellAt(at), value = measure.values[cell], [i, j] = [at[state.x], at[state.y]];
    rows.push({ x: run.axes[state.x].values[i], y: state.y === state.x ? "" : run.axes[state.y].values[j], cell, name: nameOf(at),
      value: measure.log ? (value > 0 ? Math.log10(value) : null) : value, told: three(value), selected: cell === cellAt(state.at) });
  }
  return rows.sort((one, other) => one.selected - other.selected);  // the chosen one is drawn last, over its neighbours
}
async function drawMap() {
  byId("map").hidden = cellCount() < 2;
  if (cellCount() < 2) return;
  const spec = structuredClone(page.charts.map), measure = run.measures[state.measure], { encoding } = spec;
  const title = (axis) => `${run.axes[axis].about} (${run.axes[axis].name})`;
  encoding.x.title = title(state.x);
  const places = mapPlaces(), values = (axis) => places[axis].map((i) => run.axes[axis].values[i]);
  encoding.x.sort = values(state.x);
  encoding.y.sort = values(state.y);
  encoding.y.title = state.y === state.x ? null : title(state.y);
  encoding.color.condition.legend.title = measure.log ? `log10 ${measure.label}` : measure.label;
  encoding.color.condition.legend.titleLimit = 140;
  if (byId("chart-map").clientWidth < 500) encoding.color.condition.legend = { ...encoding.color.condition.legend, orient: "bottom", titleLimit: 300 };
  spec.description = `${measure.label} over ${title(state.x)} and ${title(state.y)}; the table has the same numbers`;
  spec.height = (places[state.y].length > 12 ? 20 : 38) * (state.y === state.x ? 1 : places[state.y].length);
  spec.datasets = { cells: mapRows() };
  mapView?.finalize();
  mapView = (await vegaEmbed("#chart-map", spec, OPTIONS())).view;
  mapView.addEventListener("click", (event, item) => { if (item?.datum?.cell != null) choose(placeOf(item.datum.cell)); });
  await fillMap();
}
// Row by row, so that it is seen to come, and so that what is chosen meanwhile does not wait for all of it.
let filling = 0;
async function fillMap() {
  if (!served()) return;
  const mine = ++filling, one = run, places = mapPlaces(), rows = state.y === state.x ? [null] : places[state.y];
  byId("map-told").hidden = false;
  for (const [k, row] of rows.entries()) {
    const part = places.map((some, i) => row != null && i === state.y ? [row] : some);
    byId("map-told").textContent = `Reading, ${k} of ${rows.length} rows.`;
    await need(one, part);
    if (mine !== filling) return;
    if (mapView) await mapView.data("cells", mapRows()).runAsync();
  }
  drawTable();
  const seeds = Math.min(...combined(places).map((at) => one.of[cellAt(at)])), cells = combined(places).length;
  byId("map-told").textContent = `${cells === cellCount() ? "All" : `${cells} of ${cellCount()}`} cells` + (seeds < one.seeds ? `, medians over the first ${seeds} of ${one.seeds} seeds.` : ".");
}

// The controls, from what varies in the run.
const option = (value, text, chosen) => made("option", { value, selected: value === chosen }, text);
const select = (label, options, chosen, then, id) => {
  const element = made("select", { id, onchange: () => then(Number(element.value)) }, ...options.map(([value, text]) => option(value, text, chosen)));
  return made("label", {}, label, " ", element);
};
const check = (label, chosen, then, id) => {
  const box = made("input", { type: "checkbox", id, checked: chosen, onchange: () => then(box.checked) });
  return made("label", {}, box, label);
};
function controls() {
  const form = byId("controls");
  form.replaceChildren();
  if (page.runs.length > 1)
    form.append(select("run", page.runs.map((one, i) => [i, one.name]), state.run, (i) => begin(i), "run"));
  for (const i of varied()) {
    const { name, about, values } = run.axes[i], id = `axis-${name}`;
    if (values.every((value) => !isNaN(Number(value))) && values.length > 2) {
      const output = made("output", { for: id }, values[state.at[i]]);
      const slider = made("input", { type: "range", id, min: 0, max: values.length - 1, step: 1, value: state.at[i], title: about,
        "aria-valuetext": values[state.at[i]], oninput: () => choose(state.at.map((old, k) => k === i ? Number(slider.value) : old)) });
      form.append(made("label", { title: about }, name, " ", slider, output));
    } else {
      form.append(select(name, values.map((value, k) => [k, value]), state.at[i],
        (k) => choose(state.at.map((old, axis) => axis === i ? k : old)), id));
    }
  }
  const axes = varied().map((i) => [i, run.axes[i].name]), none = [-1, "none"];
  const runs = page.runs.length > 1 ? [[-2, "run"]] : [];
  if (axes.length || runs.length)
    form.append(select("colours", [none, ...runs, ...axes], state.colour, (i) => { state.colour = i; if (i === state.dash || i === -2) state.dash = -1; redraw(); }, "colour-by"));
  if (axes.length > 1)
    form.append(select("dashes", [none, ...axes], state.dash, (i) => { state.dash = i; if (i === state.colour || state.colour === -2) state.colour = -1; redraw(); }, "dash-by"));
  form.append(check("bands", state.bands, (on) => { state.bands = on; redrawCurves(); }, "bands"));
  form.append(check("log time", state.logTime, (on) => { state.logTime = on; redrawCurves(); }, "log-time"));
  for (const panel of [0, 1])
    form.append(check(`log values, ${["first", "second"][panel]} panel`, state.logValue[panel], (on) => { state.logValue[panel] = on; redrawCurves(); }, `log-value-${panel}`));
  const output = made("output", { for: "until" }, three(run.time[run.time.length - 1] * state.until));
  const until = made("input", { type: "range", id: "until", min: 1, max: 40, step: 1, value: Math.round(40 * state.until), oninput: () => {
    state.until = Number(until.value) / 40;
    output.textContent = three(run.time[run.time.length - 1] * state.until);
    until.setAttribute("aria-valuetext", output.textContent);
    moveCurves();
  } });
  form.append(made("label", {}, "shown until ", until, output));
  const map = byId("map-controls");
  map.replaceChildren(select("quantity", run.measures.map((measure, i) => [i, measure.label]), state.measure, (i) => { state.measure = i; drawMap(); }, "measure"));
  if (axes.length > 1) {
    map.append(select("across", axes, state.x, (i) => { if (i === state.y) state.y = state.x; state.x = i; redraw(); }, "map-x"));
    map.append(select("up", axes, state.y, (i) => { if (i === state.x) state.x = state.y; state.y = i; redraw(); }, "map-y"));
  }
}
function moveControls() {
  for (const i of varied()) {
    const element = byId(`axis-${run.axes[i].name}`);
    element.value = state.at[i];
    const output = document.querySelector(`output[for="${element.id}"]`);
    if (output) { output.textContent = run.axes[i].values[state.at[i]]; element.setAttribute("aria-valuetext", output.textContent); }
  }
}

// The table of cells, and the sentence on the chosen one.
const columns = () => [...varied().map((i) => ({ label: run.axes[i].name, of: (cell) => run.axes[i].values[placeOf(cell)[i]], axis: run.axes[i].name })),
  ...run.measures.map((measure) => ({ label: measure.label, number: true, of: (cell) => measure.values[cell] })),
  { label: "then", of: (cell) => run.endings[cell] ?? "" }];
function drawTable() {
  const cells = served() ? combined(mapPlaces()).map((at) => cellAt(at)) : [...Array(cellCount()).keys()], listed = columns();
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (cell) => listed.map(({ label, of, number }) => `${label}=${number ? three(of(cell)) : of(cell)}`.toLowerCase());
  const fits = (parts, word) => { const [name, value] = word.split("=");  // alpha=1e-4 is alpha=0.0001
    return parts.some((part) => part.includes(word) || (value && part.startsWith(`${name}=`) && Number(part.slice(name.length + 1)) === Number(value))); };
  let rows = words.length ? cells.filter((cell) => { const parts = text(cell); return words.every((word) => fits(parts, word)); }) : cells;
  if (state.sort != null) {
    const { of } = listed[state.sort];
    rows.sort((a, b) => { const [one, other] = [of(a), of(b)];
      if (one == null || other == null) return (one == null) - (other == null);
      return (state.up ? 1 : -1) * (typeof one === "number" ? one - other : inOrder(String(one), String(other))); });
  }
  byId("count").textContent = rows.length > MOST_ROWS ? `the first ${MOST_ROWS} of ${rows.length} cells` : `${rows.length} of ${cells.length} cells`;
  const head = made("tr", {}, made("th", { scope: "col" }, "cell"), ...listed.map(({ label }, i) => made("th",
    { scope: "col", "aria-sort": state.sort === i ? (state.up ? "ascending" : "descending") : null },
    made("button", { type: "button", onclick: () => { state.up = state.sort === i ? !state.up : true; state.sort = i; drawTable(); byId("table").tHead.rows[0].cells[i + 1].firstChild.focus(); } },
      label, state.sort === i ? (state.up ? " ▲" : " ▼") : ""))));
  byId("table").tHead.replaceChildren(head);
  const chosen = cellAt(state.at);
  byId("table").tBodies[0].replaceChildren(...rows.slice(0, MOST_ROWS).map((cell) => made("tr", { "aria-selected": cell === chosen ? "true" : "false", "data-cell": cell },
    made("td", {}, made("button", { type: "button", "aria-label": `show ${nameOf(placeOf(cell))}`, onclick: () => choose(placeOf(cell)) }, "show")),
    ...listed.map(({ of, number }) => made("td", {}, number ? three(of(cell)) : String(of(cell)))))));
}
function markRow() {
  const chosen = String(cellAt(state.at));
  for (const row of byId("table").tBodies[0].rows) row.setAttribute("aria-selected", row.dataset.cell === chosen ? "true" : "false");
}
function tell() {
  const cell = cellAt(state.at);
  const parts = run.measures.map((measure) => measure.values[cell] == null ? "" : `${measure.label}: ${three(measure.values[cell])}`).filter(Boolean);
  const same = run.axes.filter((axis) => axis.values.length === 1).map((axis) => `${axis.name} ${axis.values[0]}`).join(", ");
  byId("told").replaceChildren(made("strong", {}, nameOf(state.at)), `${same ? ` (${same})` : ""}: ${[...parts, run.endings[cell]].filter(Boolean).join("; ")}.`);
}

async function choose(at) {
  const before = mapPlaces().join(";");
  state.at = at;
  moveControls();
  if (served()) {
    await new Promise((done) => setTimeout(done, 50));  // of all that a slider passes, the one that it stays at is asked for
    if (state.at === at) await need(run, at.map((i) => [i]));
  }
  if (state.at !== at) return;
  tell(); markRow();
  if (mapView) mapView.data("cells", mapRows()).runAsync();
  const others = mapPlaces().join(";") !== before;
  if (served() && others) drawTable();
  await Promise.all([moveCurves(), loadMotion()]);
  if (served() && others) await drawMap();
}
const redrawCurves = () => Promise.all([drawCurves(0), drawCurves(1)]);
async function redraw() {
  controls();
  await need(run, state.at.map((i) => [i]));
  tell(); drawTable();
  await Promise.all([redrawCurves(), loadMotion()]);
  await drawMap();
}
async function begin(number) {
  const before = run;
  state.run = number;
  run = page.runs[number];
  const kept = (axis) => before ? before.axes.findIndex((other) => other.name === axis.name) : -1;
  state.at = run.axes.map((axis) => { const i = kept(axis); return i < 0 ? 0 : Math.max(0, axis.values.indexOf(before.axes[i].values[state.at[i]])); });
  const axes = varied(), alpha = axes.find((i) => run.axes[i].name === "alpha"), others = axes.filter((i) => i !== (alpha ?? axes[0]));
  state.colour = page.runs.length > 1 ? -2 : alpha ?? axes[0] ?? -1;
  state.dash = page.runs.length > 1 ? -1 : others.find((i) => run.axes[i].values.length <= 4) ?? -1;
  state.x = alpha ?? axes[0] ?? 0;
  state.y = others.at(-1) ?? state.x;
  state.measure = Math.min(state.measure, run.measures.length - 1);
  state.sort = state.now = null;
  byId("moment").value = 0;
  const options = run.quantities.map((one, i) => [i, one.label]);
  for (const panel of [0, 1]) {
    const element = byId(`quantity-${panel}`), preferred = ["loss", "alignment_error"][panel];
    const place = run.quantities.findIndex((one) => one.name === preferred);
    element.replaceChildren(...options.map(([value, text]) => made("option", { value, selected: value === (place < 0 ? panel % run.quantities.length : place), title: run.quantities[value].about }, text)));
    element.onchange = () => drawCurves(panel);
  }
  byId("thinned").hidden = !run.thinned.length;
  byId("thinned").textContent = run.thinned.length ? `The run is large: this page has ${run.thinned.join(", ")}. The tables of the report are of all.` : "";
  await redraw();
}
byId("filter").addEventListener("input", drawTable);
for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
dark.addEventListener("change", () => { redrawCurves(); drawMap(); });
addEventListener("unhandledrejection", (event) => { byId("told").textContent = event.reason?.message ?? String(event.reason); });
begin(0).then(() => document.body.dataset.ready = "true");
