// Compare: two runs on the same case, side by side, turning and scrolling together.

import { get, url } from "./api.js";
import { h, say, shown, table } from "./dom.js";
import { Viewer, bothLegends } from "./viewer.js";
import { layers, metrics } from "./view.js";

const COLUMNS = [{ name: "Case" }, { name: "left", number: true }, { name: "right", number: true },
  { name: "gain", number: true }];

export async function compare(root, { run, runs, rest, go }) {
  const others = runs.filter((r) => r.id !== run.id);
  if (!others.length) {
    root.replaceChildren(h("p", { className: "hint" },
      "Only one run is served. Serve a folder of runs to compare two: vclipseg serve runs"));
    return {};
  }
  const state = { other: null, cases: [] };
  const list = h("div", { className: "scroll" });
  const sides = h("div", { className: "sides" });
  const select = h("select", { "aria-label": "The other run" },
    others.map((r) => h("option", { value: r.id }, `${r.id} · ${r.method}`)));
  select.addEventListener("change", () => go(select.value));
  root.replaceChildren(
    h("aside", {},
      h("div", { className: "head" }, h("h2", {}, `${run.id}, and on the right`), select,
        h("p", { className: "hint" }, "Dice of each case; where the right loses most comes first.")),
      list),
    sides);
  let viewers = [];
  let rows;

  async function load(other) {
    state.other = other;
    select.value = other.id;
    const [left, right] = await Promise.all([run, other].map((r) => get(url("runs", r.id, "cases"))));
    const byId = new Map(right.map((c) => [c.id, c]));
    const shownIn = (c) => byId.has(c.id) && (c.has_prediction || byId.get(c.id).has_prediction);
    state.cases = left.filter(shownIn)
      .map((c) => ({ id: c.id, left: c, right: byId.get(c.id), gain: gain(c, byId.get(c.id)) }))
      .sort((a, b) => (a.gain ?? 9) - (b.gain ?? 9));
    rows = table(COLUMNS, state.cases.map((c) => ({
      key: c.id,
      cells: [c.id, shown(c.left.metrics.dice), shown(c.right.metrics.dice), signed(c.gain)],
    })), (id) => go(other.id, id));
    list.replaceChildren(rows);
    viewers.forEach((viewer) => viewer.close());
    viewers = [run, other].map((r) => new Viewer(r.classes));
    await Promise.all(viewers.map((viewer) => viewer.ready));
    const [first, second] = viewers.map((viewer) => viewer.nv);
    first.broadcastTo([second], { "2d": true, "3d": true });
    second.broadcastTo([first], { "2d": true, "3d": true });
  }

  async function show(otherId, caseId) {
    const other = others.find((r) => r.id === otherId) ?? others[0];
    if (other !== state.other) await load(other);
    const found = state.cases.find((c) => c.id === caseId) ?? state.cases[0];
    if (!found) {
      sides.replaceChildren();
      return say("The two runs have no case in common.");
    }
    say("");
    rows.select(found.id);
    const pairs = [[run, found.left], [other, found.right]];
    sides.replaceChildren(...pairs.map(([side, c], i) => h("section", {},
      h("div", { className: "bar" }, h("strong", {}, side.id), viewers[i].views(),
        viewers[i].toggles([["image", "Image"], ["reference", "Reference"], ["prediction", "Prediction"]])),
      viewers[i].stage,
      bothLegends(side.classes),
      h("div", { className: "facts" }, metrics(side, c)))));
    await Promise.all(viewers.map((viewer, i) => {
      const { disagreement, ...shownLayers } = layers(...pairs[i]);
      return viewer.show(shownLayers);
    }));
  }

  await show(...rest);
  return { show, close: () => viewers.forEach((viewer) => viewer.close()) };
}

const gain = (left, right) =>
  left.metrics.dice == null || right.metrics.dice == null
    ? null : right.metrics.dice - left.metrics.dice;

const signed = (value) => (value === null ? "–" : (value >= 0 ? "+" : "") + value.toFixed(3));
