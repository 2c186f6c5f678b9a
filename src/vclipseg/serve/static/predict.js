// Predict: a scan in, a mask out.

import { finished, send, url } from "./api.js";
import { h, say } from "./dom.js";
import { Viewer, legend } from "./viewer.js";

const FORMATS = { nifti: "NIfTI", seg: "DICOM-SEG", rtstruct: "RTSTRUCT" };

export async function predict(root, { run }) {
  const state = { stopped: false };
  const viewer = new Viewer(run.classes);
  const bar = h("progress", { max: "1", value: "0", hidden: true });
  const word = h("p", { className: "hint" });
  const result = h("div", { className: "head", hidden: true });
  const input = h("input", { type: "file", multiple: true, hidden: true });
  const drop = h("div", { className: "drop", tabindex: "0", role: "button" },
    "Drop a scan here, or click to choose one",
    h("p", { className: "hint" }, "NIfTI (.nii, .nii.gz; a file a channel), or a DICOM series as a .zip"));

  drop.addEventListener("click", () => input.click());
  drop.addEventListener("keydown", (event) => event.key === "Enter" && input.click());
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    start(event.dataTransfer.files);
  });
  input.addEventListener("change", () => start(input.files));

  root.replaceChildren(
    h("aside", {},
      h("div", { className: "head" }, h("h2", {}, `Predict with ${run.id}`), drop, input, bar, word),
      result,
      h("p", { className: "hint" },
        "Scans stay on the machine that serves this page and are deleted when it ends. " +
        "Research software, not a medical device.")),
    h("section", {},
      h("div", { className: "bar" }, viewer.views(),
        viewer.toggles([["image", "Image"], ["prediction", "Prediction"]]),
        legend("prediction", run.classes)),
      viewer.stage));

  if (!run.has_model) say(`${run.id} has no finished model yet.`);

  function progress({ state: now, progress: share, message }) {
    bar.hidden = now === "done" || now === "failed";
    bar.value = share ?? 0;
    word.textContent = bar.hidden ? "" : `${message || now} … ${Math.round(100 * share)} %`;
  }

  async function start(files) {
    if (!files.length) return;
    say("");
    result.hidden = true;
    try {
      progress({ state: "running", progress: 0, message: "sending" });
      const form = new FormData();
      for (const file of files) form.append("files", file);
      const scan = await send("POST", url("runs", run.id, "scans"), form);
      const job = await finished(scan.job, progress, state);
      if (job) await show(scan, job.result);
    } catch (error) {
      progress({ state: "failed" });
      say(error.message);
    } finally {
      input.value = "";
    }
  }

  async function show(scan, { volumes_ml: volumes, uncertainty }) {
    const mask = url("scans", scan.id, "masks", run.id);
    result.replaceChildren(
      h("h2", {}, scan.name),
      h("table", { className: "facts" }, h("tbody", {}, Object.entries(volumes).map(([name, ml]) =>
        h("tr", {}, h("td", {}, name), h("td", { className: "number" }, `${ml.toFixed(2)} ml`))))),
      h("p", { className: "hint" }, `Decoders differ by ${(100 * uncertainty).toFixed(1)} % of what was found.`),
      ...Object.entries(FORMATS).filter(([format]) => scan.formats.includes(format)).map(([format, name]) =>
        h("a", { className: "button", id: `download-${format}`, href: `${mask}?format=${format}`, download: "" },
          `Download ${name}`)));
    result.hidden = false;
    await viewer.show({ image: url("scans", scan.id, "image.nii.gz"), prediction: `${mask}.nii.gz` });
    viewer.center(viewer.layers.prediction.img2RAS?.() ?? []);
  }

  return { close: () => { state.stopped = true; viewer.close(); } };
}
