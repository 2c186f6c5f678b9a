// View: the cases of a run, the worst first, with what is known of each.

import { finished, get, send, url } from "./api.js";
import { h, say, shown, table } from "./dom.js";
import { Viewer, bothLegends } from "./viewer.js";

const METRICS = [
  ["dice", "Dice", 3],
  ["jaccard", "Jaccard", 3],
  ["hd95_mm", "95HD, mm", 2],
  ["assd_mm", "ASSD, mm", 2],
  ["nsd", "NSD", 3],
];
const COLUMNS = [
  { name: "Case" },
  { name: "Dice", number: true },
  { name: "95HD", number: true },
  { name: "Differ", number: true },
];

export async function view(root, { run, rest, go }) {
  const state = { cases: [], chosen: null, stopped: false };
  const viewer = new Viewer(run.classes);
  const list = h("div", { className: "scroll" });
  const facts = h("div", { className: "facts" });
  const look = h("button", { type: "button", onclick: () => lookAt() }, "Where do decoders differ?");
  const title = h("strong", {}, "");
  let rows;

  root.replaceChildren(
    h("aside", {},
      h("div", { className: "head" },
        h("h2", {}, `${run.method} (${run.preset})`),
        h("p", { className: "hint" }, summary(run))),
      list),
    h("section", {},
      h("div", { className: "bar" },
        title,
        viewer.views(),
        viewer.toggles([
          ["image", "Image"], ["reference", "Reference"], ["prediction", "Prediction"],
          ["disagreement", "Disagreement"],
        ]),
        look),
      viewer.stage,
      bothLegends(run.classes),
      facts));

  async function load() {
    state.cases = await get(url("runs", run.id, "cases"));
    rows = table(COLUMNS, state.cases.map((c) => ({
      key: c.id,
      cells: [
        h("span", {}, c.id, " ", c.role === "test" ? "" : h("span", { className: "tag" }, c.role)),
        shown(c.metrics.dice), shown(c.metrics.hd95_mm, 1), shown(c.uncertainty),
      ],
    })), (id) => go(id));
    list.replaceChildren(rows);
  }

  async function show(id) {
    const found = state.cases.find((c) => c.id === id) ?? state.cases[0];
    if (!found) return;
    state.chosen = found;
    rows.select(found.id);
    title.textContent = found.id;
    facts.replaceChildren(metrics(run, found));
    look.disabled = !run.has_model || !run.has_data || found.uncertainty !== null;
    await viewer.show(layers(run, found));
  }

  async function lookAt() {
    const { id } = state.chosen;
    look.disabled = true;
    const job = await send("POST", url("runs", run.id, "cases", id, "look")).catch((e) => say(e.message));
    if (!job) return;
    const progress = ({ progress }) => say(`Looking at ${id}: ${Math.round(100 * progress)} %`, true);
    await finished(job, progress, state).catch((e) => say(e.message));
    if (state.stopped) return;
    say("");
    await load();
    await show(state.chosen.id);
  }

  await load();
  if (run.missing.length) say(run.missing.join("\n"));
  await show(rest[0]);
  return { show, close: () => { state.stopped = true; viewer.close(); } };
}

function summary(run) {
  const { labeled, unlabeled, test, means } = run;
  const dice = means.dice === null ? "" : ` · mean Dice ${shown(means.dice)}`;
  const seen = run.transductive ? " · test images were trained on" : "";
  return `${labeled} labeled, ${unlabeled} unlabeled, ${test} test${dice}${seen}`;
}

export function layers(run, found) {
  const path = (what) => url("runs", run.id, "cases", found.id, `${what}.nii.gz`);
  const has = {
    image: run.has_data,
    reference: found.has_reference,
    prediction: found.has_prediction,
    disagreement: found.uncertainty !== null,
  };
  return Object.fromEntries(Object.keys(has).filter((key) => has[key]).map((key) => [key, path(key)]));
}

export function metrics(run, found) {
  const columns = [{ name: run.lcc ? "largest component" : "" }]
    .concat(METRICS.map(([, name]) => ({ name, number: true })));
  const row = (name, values) =>
    ({ key: name, cells: [name, ...METRICS.map(([key, , digits]) => shown(values[key], digits))] });
  const rows = Object.entries(found.classes).map(([name, values]) => row(name, values));
  if (rows.length > 1) rows.unshift(row("mean", found.metrics));
  if (!rows.length) return h("p", { className: "hint" }, "This case is not scored.");
  return table(columns, rows);
}
