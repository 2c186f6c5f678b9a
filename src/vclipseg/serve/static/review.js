// Review: cases that nobody annotated, where the model is least sure first; accept, fix or ignore.

import { bytes, get, send, sleep, url } from "./api.js";
import { choice, h, say, shown, table } from "./dom.js";
import { Viewer, legend } from "./viewer.js";

const COLUMNS = [{ name: "#", number: true }, { name: "Case" }, { name: "Differ", number: true }];
const STRATEGIES = {
  uncertain: "where decoders differ most",
  combined: "annotate next: all three",
  novel: "novel ones first",
  class_rare: "rare classes first",
  random: "at random",
  first: "as listed",
};

export async function review(root, { run, rest, go }) {
  const viewer = new Viewer(run.classes);
  const state = { queue: null, chosen: null, changed: false, brush: null, size: 3, stopped: false,
    watching: false };
  const ignored = run.classes.length;
  const list = h("div", { className: "scroll" });
  const title = h("strong");
  const count = h("p", { className: "hint" });
  const strategies = h("select", { "aria-label": "Order" },
    Object.entries(STRATEGIES).map(([value, label]) => h("option", { value }, label)));
  const lookAll = h("button", { type: "button", onclick: guarded(lookAtAll) }, "Look at all cases");
  const brushes = choice([
    ["off", "Move"],
    ...run.classes.map((name, i) => [i, i ? `${i} ${name}` : "0 erase"]),
    [ignored, "V unknown"],
  ], "off", setBrush);
  const size = h("span", { className: "hint" });
  const button = (label, key, action, main = false) => h("button",
    { type: "button", className: main ? "main" : "", "data-action": label.toLowerCase(), onclick: guarded(action) },
    label, h("kbd", {}, key));

  root.replaceChildren(
    h("aside", {},
      h("div", { className: "head" }, h("h2", {}, "Cases nobody annotated"), strategies, count, lookAll),
      list),
    h("section", {},
      h("div", { className: "bar" }, title, viewer.views(),
        viewer.toggles([["image", "Image"], ["disagreement", "Disagreement"]]),
        button("Accept", "A", accept, true), button("Save", "S", save), button("Ignore", "I", ignore),
        button("Reopen", "R", reopen), button("Next", "N", next)),
      h("div", { className: "bar" }, brushes, size, button("Undo", "Z", () => viewer.undo()),
        legend("prediction", run.classes, true)),
      viewer.stage,
      h("div", { className: "keys" },
        "F fix (brush on or off) · 0–9 class · V voxels nobody knows · [ ] brush size · ",
        "hold the right button to change the contrast · what is accepted or saved is a label in the next training")));
  strategies.addEventListener("change", guarded(load));
  await viewer.ready;
  viewer.onDrawn(() => { state.changed = true; });

  function guarded(action) {
    return async () => {
      try {
        await action();
      } catch (error) {
        console.error(error);
        say(error.message);
      }
    };
  }

  async function load() {
    const address = `${url("runs", run.id, "queue")}?strategy=${encodeURIComponent(strategies.value)}`;
    state.queue = await get(address);
    const { looked_at: looked, total, looking, cases } = state.queue;
    const done = cases.filter((c) => c.decision).length;
    count.textContent = `${done} of ${total} decided, ${looked} looked at`;
    lookAll.disabled = looking || looked === total || !run.has_model;
    lookAll.textContent = looking ? "Looking …" : "Look at all cases";
    const rows = table(COLUMNS, cases.map((c) => ({
      key: c.id,
      cells: [
        c.place === null ? "–" : String(c.place),
        h("span", {}, c.id, " ",
          c.decision ? h("span", { className: `tag ${c.decision}` }, c.decision) : null,
          c.reasons.map((reason) => h("span", { className: "tag why" }, reason))),
        shown(c.uncertainty),
      ],
    })), (id) => go(id));
    list.replaceChildren(rows);
    state.rows = rows;
    if (state.chosen) rows.select(state.chosen.id);
  }

  async function show(id) {
    const { cases } = state.queue;
    const found = cases.find((c) => c.id === id) ?? cases.find((c) => !c.decision) ?? cases[0];
    if (!found) return say("There is no unlabeled case in this run.");
    if (state.changed && !confirm("The mask is changed and not saved. Leave it?")) return;
    Object.assign(state, { chosen: found, changed: false, shown: null });
    state.rows.select(found.id);
    title.textContent = found.id;
    brushes.press("off");
    setBrush("off");
    const path = (what) => url("runs", run.id, "cases", found.id, `${what}.nii.gz`);
    const layers = { image: path("image") };
    if (found.uncertainty !== null) layers.disagreement = path("disagreement");
    if (!(await viewer.show(layers))) return;
    await showMask(found);
  }

  async function showMask(found) {
    const reviewed = found.decision === "accepted" || found.decision === "fixed";
    if (found.uncertainty === null && !reviewed) {
      say(`${found.id} has not been looked at yet.`, true);
      guarded(lookAtAll)(); // goes on while the page is used
      return;
    }
    const content = await bytes(url("runs", run.id, "reviews", found.id, "mask.nii.gz"));
    if (state.chosen.id !== found.id || !(await viewer.draw(content))) return;
    state.shown = found.id;
    viewer.center(viewer.drawing());
    viewer.stage.dataset.loaded += " mask";
  }

  async function lookAtAll() {
    if (state.watching) return;
    state.watching = true;
    try {
      await watchLooks();
    } finally {
      state.watching = false;
    }
  }

  async function watchLooks() {
    await send("POST", url("runs", run.id, "queue", "look"));
    let looked = state.queue.looked_at;
    do {
      await load();
      if (state.queue.looked_at !== looked) {
        looked = state.queue.looked_at;
        const now = state.queue.cases.find((c) => c.id === state.chosen?.id);
        if (now && now.uncertainty !== null && state.chosen.uncertainty === null) {
          say("");
          await show(now.id);
        }
      }
      await sleep(800);
    } while (state.queue.looking && !state.stopped);
    await load();
  }

  function setBrush(value) {
    state.brush = value === "off" ? null : Number(value);
    viewer.brush(state.brush, state.size);
    size.textContent = `brush ${state.size} voxels`;
  }

  async function decide({ id, revision }, decision, mask) {
    const form = new FormData();
    if (mask) form.append("mask", mask, "mask.nii");
    const query = `?decision=${decision}&after=${revision}`;
    const body = mask ? form : undefined;
    await send("PUT", url("runs", run.id, "reviews", id) + query, body);
    if (state.chosen.id === id) state.changed = false;
    say(`${id}: ${decision}`, true);
    await load();
    if (state.chosen.id === id) state.chosen = state.queue.cases.find((c) => c.id === id);
  }

  // the mask of the chosen case is there to be judged
  function seen() {
    if (state.shown === state.chosen.id) return true;
    say("Its mask is not shown yet.", true);
    return false;
  }

  async function accept() {
    if (!seen()) return;
    if (state.changed) return save();
    await decide(state.chosen, "accepted");
    await next();
  }

  async function save() {
    if (!seen()) return;
    const { chosen } = state;
    const mask = await viewer.drawingFile();
    if (state.chosen === chosen && seen()) await decide(chosen, "fixed", mask);
  }

  async function ignore() {
    await decide(state.chosen, "ignored");
    await next();
  }

  async function reopen() {
    const { id, revision } = state.chosen;
    await send("DELETE", `${url("runs", run.id, "reviews", id)}?after=${revision}`);
    await load();
    state.changed = false;
    await show(id);
  }

  async function next() {
    const { cases } = state.queue;
    const from = cases.findIndex((c) => c.id === state.chosen.id);
    const order = [...cases.slice(from + 1), ...cases.slice(0, from)];
    const found = order.find((c) => !c.decision);
    if (found) go(found.id);
    else say("Every case is decided. Train again: the reviewed masks are labels now.", true);
  }

  const KEYS = { a: accept, s: save, i: ignore, r: reopen, n: next, z: () => viewer.undo() };

  async function key(event) {
    const pressed = event.key.toLowerCase();
    if (pressed in KEYS && !event.repeat) await KEYS[pressed]();
    else if (pressed === "[" || pressed === "]") resize(pressed === "]" ? 2 : -2);
    else if (pressed === "f") press(state.brush === null ? Math.min(1, ignored - 1) : "off");
    else if (pressed === "v") press(ignored);
    else if (/^\d$/.test(pressed) && Number(pressed) < ignored) press(Number(pressed));
    else return false;
    return true;
  }

  function press(value) {
    brushes.press(value);
    setBrush(value);
  }

  function resize(by) {
    state.size = Math.max(1, Math.min(31, state.size + by));
    setBrush(state.brush ?? "off");
  }

  await load();
  await show(rest[0]);
  return { show, key, close: () => { state.stopped = true; viewer.close(); } };
}
