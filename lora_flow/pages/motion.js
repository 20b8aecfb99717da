// The chosen cell as it moves: medians of the angle to the task, of the size of Z, and of the loss, at one time.
let motion = null, played = 0;
async function loadMotion() {
  const one = run, at = state.at, cell = cellAt(at);
  const middle = async (name) => {
    const place = one.quantities.findIndex((quantity) => quantity.name === name);
    return place < 0 ? null : (await curvesOf(one, cell, place)).subarray(one.time.length, 2 * one.time.length);
  };
  const [loss, ...found] = await Promise.all(["loss", "alignment_error", "norm_z1", "alignment_error_2", "norm_z2"].map(middle));
  if (at !== state.at) return;
  const layers = [found.slice(0, 2), found.slice(2)].filter(([error, size]) => error && size && error.some(Number.isFinite));
  motion = { loss, layers, sizes: layers.flatMap(([, size]) => [...size]).filter((size) => size > 0).map(Math.log10) };
  byId("moment").max = one.time.length - 1;
  byId("compass").hidden = !layers.length;
  drawMoment();
}
function drawn(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}
// An arrow for each layer at its angle to the task, the second one's down; longer by the logarithm of the size of Z.
function drawCompass(i) {
  const least = Math.min(...motion.sizes), most = Math.max(...motion.sizes), down = motion.layers.length > 1;
  const arc = `M 0 -1 A 1 1 0 0 1 ${down ? "0 1" : "1 0"}`, parts = [drawn("path", { d: arc, class: "arc" }), drawn("line", { x1: 0, y1: 0, x2: 1.05, y2: 0, class: "task" }), drawn("text", { x: 1.09, y: 0.04 }, "task")];
  for (const [layer, [error, size]] of motion.layers.entries()) {
    if (!Number.isFinite(error[i]) || !(size[i] > 0)) continue;
    const angle = Math.acos(Math.min(1, Math.max(0, 1 - error[i]))), length = 0.15 + 0.85 * (most > least ? (Math.log10(size[i]) - least) / (most - least) : 1);
    const [x, y] = [length * Math.cos(angle), (layer ? 1 : -1) * length * Math.sin(angle)];
    parts.push(drawn("line", { x1: 0, y1: 0, x2: x, y2: y, class: `layer-${layer + 1}` }), drawn("circle", { cx: x, cy: y, r: 0.045, class: `layer-${layer + 1}` }));
    parts.push(drawn("text", { x: 0.02, y: layer ? 1.13 : -1.06, class: `layer-${layer + 1}` }, `Z${down ? layer + 1 : ""}`));
  }
  byId("compass").setAttribute("viewBox", down ? "-0.1 -1.2 1.6 2.4" : "-0.1 -1.2 1.6 1.4");
  byId("compass").replaceChildren(...parts);
}
function drawMoment() {
  const i = Number(byId("moment").value), time = run.time[i];
  if (motion.layers.length) drawCompass(i);
  const of = motion.layers.map(([error, size], layer) => { const z = `Z${motion.layers.length > 1 ? layer + 1 : ""}`;
    return `${z}: 1 - cos ${three(error[i])}, norm ${three(size[i])}`; });
  byId("moment-told").textContent = [`${run.clock.split(" ").at(-1)} = ${three(time)}`, motion.loss ? `loss ${three(motion.loss[i])}` : "", ...of].filter(Boolean).join("; ");
  byId("moment").setAttribute("aria-valuetext", byId("moment-told").textContent);
  if (state.now == null) return;
  state.now = time;
  for (const view of views.filter(Boolean)) view.data("now", time > 0 || !state.logTime ? [{ time }] : []).runAsync();
}
function pause() {
  cancelAnimationFrame(played);
  played = 0;
  byId("play").textContent = "Play";
}
function play() {
  if (played) return pause();
  const slider = byId("moment"), last = Number(slider.max), from = Number(slider.value) < last ? Number(slider.value) : 0, began = performance.now();
  byId("play").textContent = "Pause";
  const step = (when) => {
    const i = Math.min(last, Math.floor(from + (when - began) / 8000 * last));
    if (i !== Number(slider.value) || state.now == null) { slider.value = i; state.now = run.time[i]; drawMoment(); }
    if (i < last) played = requestAnimationFrame(step); else pause();
  };
  played = requestAnimationFrame(step);
}
byId("play").addEventListener("click", play);
byId("moment").addEventListener("input", () => { pause(); state.now = run.time[Number(byId("moment").value)]; drawMoment(); });
