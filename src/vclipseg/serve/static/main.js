// Which page is shown, and of which run: both stand in the address after the #.

import { get, url } from "./api.js";
import { h, say } from "./dom.js";
import { compare } from "./compare.js";
import { predict } from "./predict.js";
import { review } from "./review.js";
import { view } from "./view.js";

const PAGES = { view, predict, review, compare };
const NAMES = { view: "View", predict: "Predict", review: "Review", compare: "Compare" };

const tabs = document.getElementById("tabs");
const select = document.getElementById("run");
const root = document.getElementById("page");
let runs = [];
let open = null;
let shownKey = "";

const parts = () => location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);

export const go = (...to) => { location.hash = "#/" + to.map(encodeURIComponent).join("/"); };

function address() {
  const [page, run, ...rest] = parts();
  return { page: page in PAGES ? page : "view", run: runs.find((r) => r.id === run) ?? runs[0], rest };
}

async function route() {
  const { page, run, rest } = address();
  const key = `${page} ${run.id}`;
  for (const link of tabs.children)
    link.toggleAttribute("aria-current", link.dataset.page === page);
  select.value = run.id;
  if (key === shownKey && open?.show) return open.show(...rest);
  shownKey = key;
  say("");
  open?.close?.();
  root.replaceChildren();
  open = null;
  const context = { run, runs, rest, go: (...to) => go(page, run.id, ...to) };
  const opened = await PAGES[page](root, context);
  if (shownKey === key) open = opened;
  else opened?.close?.();
}

const careful = (work) => async (...given) => {
  try {
    await work(...given);
  } catch (error) {
    console.error(error);
    say(error.message);
  }
};

async function start() {
  runs = await get(url("runs"));
  for (const page of Object.keys(PAGES)) {
    const link = h("a", { href: "#", "data-page": page }, NAMES[page]);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      go(page, address().run.id);
    });
    tabs.append(link);
  }
  for (const run of runs) select.append(h("option", { value: run.id }, `${run.id} · ${run.method}`));
  select.addEventListener("change", () => go(address().page, select.value));
  window.addEventListener("hashchange", careful(route));
  window.addEventListener("keydown", careful(async (event) => {
    const typing = event.target.matches?.("input, select, textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !open?.key) return;
    if (await open.key(event)) event.stopPropagation();
  }), { capture: true });
  await route();
}

careful(start)();
