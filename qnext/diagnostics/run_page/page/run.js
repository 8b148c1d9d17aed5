// A training run as it goes on: charts, the load of the experts, the health of the layers, samples.

import { chart, short } from "./chart.js";
import { $, h } from "./dom.js";
import { palette } from "./palette.js";
import { Records } from "./records.js";
import { setUpTheme } from "./theme.js";

const EVERY_MS = 2000;
const HOTTEST = 3; // times the mean load: the end of the scale of colours
const SHOWN_SAMPLES = 5;
const HIGH_PEAK = 100; // of an activation over its root mean square

const records = new Records();

function duration(seconds) {
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

function drawState() {
  const step = records.steps.at(-1);
  $("name").textContent = records.run;
  document.title = `${records.run} · qnext`;
  if (!step) return;
  const done = step.progress;
  const left = done > 0 && done < 1 ? (step.elapsed * (1 - done)) / done : 0;
  const skipped = step.num_skipped ? `, ${step.num_skipped} skipped` : "";
  $("state").textContent = `step ${short(step.step)}${skipped} · ${short(step.tokens)} tokens · epoch ${step.epoch} · ${duration(step.elapsed)} so far · ${left ? `${duration(left)} left` : "done"}`;
  $("bar").firstElementChild.style.transform = `scaleX(${done})`;
  $("bar").setAttribute("aria-valuenow", String(Math.round(100 * done)));
}

/** The number of an evaluation that tells most, with its name. */
function measureOf(evaluation) {
  const name = ["bits_per_byte", "cost", "loss"].find((key) => Number.isFinite(evaluation[key])) ?? Object.keys(evaluation).find((key) => Number.isFinite(evaluation[key]));
  return name ? [name.replaceAll("_", " "), evaluation[name]] : null;
}

function drawCharts() {
  const axis = $("axis").value;
  const { steps, evaluations } = records;
  if (!steps.length) return;
  const xAt = new Map(steps.map((step) => [step.step, step[axis]]));
  const of = (read, name = "", among = steps) => ({ name, points: among.map((step) => [step[axis], read(step)]) });
  const span = [steps[0][axis], steps.at(-1)[axis]];
  const marks = steps.filter((step) => step.was_skipped).map((step) => step[axis]);
  const healthy = steps.filter((step) => step.health);
  const routed = steps.filter((step) => step.experts);
  const held = evaluations.filter(({ step, evaluation }) => xAt.has(step) && measureOf(evaluation));
  const lastHeld = held.length ? measureOf(held.at(-1).evaluation)[0] : "";
  const most = (values) => (values?.length ? Math.max(...values) : NaN);
  const least = (values) => (values?.length ? Math.min(...values) : NaN);
  const kinds = Object.entries(healthy.at(-1)?.health.grad_norms ?? {}).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([kind]) => kind);
  const others = Object.keys(steps.at(-1).other_losses ?? {});
  $("charts").replaceChildren(
    ...[
      chart("Loss", [of((step) => step.loss, "main"), of((step) => step.mtp_loss, "MTP")], { span, marks }),
      chart(`Held out, ${lastHeld}`, [{ name: "", points: held.map(({ step, evaluation }) => [xAt.get(step), measureOf(evaluation)[1]]) }], { span }),
      ...others.map((name) => chart(name, [of((step) => step.other_losses?.[name])], { span })),
      chart("Learning rate", [of((step) => step.lr)], { span }),
      chart("Gradient norm", [of((step) => step.grad_norm)], { span, marks, isLog: true }),
      chart("Tokens per second", [of((step) => step.tokens_per_second)], { span }),
      chart("Gradient norm by kind", kinds.map((kind) => of((step) => step.health.grad_norms[kind], kind, healthy)), { span, isLog: true }),
      chart("Largest gradient", [of((step) => step.health.largest_grad, "", healthy)], { span, isLog: true }),
      chart("Largest activation over its rms", [of((step) => most(step.health.activation_peak), "", healthy)], { span }),
      chart("Busiest expert over the mean load", [of((step) => most(step.experts.max_over_mean), "", routed)], { span }),
      chart("Router entropy, lowest layer", [of((step) => least(step.health.router_entropy), "", healthy)], { span }),
      chart("Largest state of Gated DeltaNet", [of((step) => most(step.health.state_norm), "", healthy)], { span }),
      chart("Heads with a half-life above 16 tokens", [of((step) => { const shares = step.health.long_memory; return shares.length ? shares.reduce((a, b) => a + b) / shares.length : NaN; }, "", healthy)], { span }),
    ].filter(Boolean),
  );
}

function drawExperts() {
  const step = records.last("experts");
  const load = step?.experts.load;
  $("experts").hidden = !load;
  if (!load) return;
  const [height, width] = [load.length, Math.max(...load.map((row) => row.length))];
  const canvas = $("load");
  [canvas.width, canvas.height] = [width, height];
  canvas.style.height = `${Math.max(60, Math.min(480, 18 * height))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const colours = palette().delta.cell;
  load.forEach((row, y) => {
    const mean = row.reduce((a, b) => a + b, 0) / row.length || 1;
    row.forEach((count, x) => { pixels[y * width + x] = colours[Math.min(255, Math.round((255 * count) / (HOTTEST * mean)))]; });
  });
  context.putImageData(image, 0, 0);
  const dead = step.experts.num_dead.reduce((a, b) => a + b, 0);
  const note = `step ${short(step.step)}: a row for each of ${height} routers, a column for each of ${width} experts; ${dead} of ${height * width} without a token, the busiest ${short(Math.max(...step.experts.max_over_mean))} times the mean of its layer`;
  $("experts-note").textContent = note;
  canvas.setAttribute("aria-label", note);
}

function drawLayers() {
  const step = records.last("health");
  $("health").hidden = !step;
  if (!step) return;
  const { health } = step;
  const experts = records.last("experts")?.experts;
  $("health-note").textContent = `step ${short(step.step)}: the largest gradient, ${short(health.largest_grad)}, is of ${health.largest_grad_of}`;
  const names = ["layer", "activations, rms", "largest over rms", "router entropy", "dead experts", "state", "mean decay", "long memory"];
  let router = 0;
  const hasRouters = health.router_entropy.length === health.activation_rms.length;
  const rows = health.activation_rms.map((rms, layer) => {
    const delta = health.delta_layers.indexOf(layer);
    const decay = delta < 0 ? null : health.decay[delta].reduce((a, b) => a + b, 0) / health.decay[delta].length;
    const dead = hasRouters ? experts?.num_dead[router] : undefined;
    const entropy = hasRouters ? health.router_entropy[router++] : undefined;
    const cell = (value, isAlarm = false) => h("td", { text: short(value), class: isAlarm ? "alarm" : "" });
    return h("tr", {}, h("td", { text: String(layer) }), cell(rms), cell(health.activation_peak[layer], health.activation_peak[layer] > HIGH_PEAK), cell(entropy), cell(dead, dead > 0), cell(health.state_norm[delta]), cell(decay), cell(health.long_memory[delta]));
  });
  $("layers").replaceChildren(h("tr", {}, ...names.map((text) => h("th", { scope: "col", text }))), ...rows);
}

function drawSamples() {
  const shown = records.samples.slice(-SHOWN_SAMPLES).reverse();
  $("samples").hidden = !shown.length;
  $("texts").replaceChildren(...shown.flatMap(({ step, sample }) => [h("p", { text: `step ${short(step)}` }), h("pre", { text: sample })]));
}

function draw() {
  drawState();
  drawCharts();
  drawExperts();
  drawLayers();
  drawSamples();
}

async function look() {
  try {
    if ((await records.update()) || !("ready" in document.documentElement.dataset)) draw();
    document.documentElement.dataset.ready = "";
  } catch {
    const step = records.steps.at(-1);
    $("state").textContent = `${step ? `step ${short(step.step)} · ` : ""}the run has ended or does not answer`;
  }
  setTimeout(look, EVERY_MS);
}

setUpTheme($("theme"));
addEventListener("themechange", draw);
$("axis").addEventListener("change", draw);
look();
