// A canvas with an image, masks over it, and a brush. All that is NiiVue's is here.

import { DRAG_MODE, NVImage, Niivue, SHOW_RENDER, SLICE_TYPE } from "./vendor/niivue/niivue.min.js";
import { bytes } from "./api.js";
import { choice, h, toggle } from "./dom.js";

const PREDICTION = ["#f28e2b", "#4e9de6", "#b07aa1", "#e15759", "#edc948", "#9c755f", "#ff9da7", "#76b7b2"];
const REFERENCE = ["#3ddc84", "#a6e34b", "#2ec4b6", "#c0f0a0", "#59a14f", "#86bcb6", "#8cd17d", "#00bfa0"];
const IGNORED = "#9aa0a6";
const PALETTES = { prediction: PREDICTION, reference: REFERENCE };

const VIEWS = [
  ["all", "All"],
  ["axial", "Axial"],
  ["coronal", "Coronal"],
  ["sagittal", "Sagittal"],
  ["render", "3D"],
];
const SLICES = {
  all: SLICE_TYPE.MULTIPLANAR,
  axial: SLICE_TYPE.AXIAL,
  coronal: SLICE_TYPE.CORONAL,
  sagittal: SLICE_TYPE.SAGITTAL,
  render: SLICE_TYPE.RENDER,
};

export const color = (kind, index) => PALETTES[kind][(index - 1) % PALETTES[kind].length];

const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// A colormap of class indices; the value after the last class is "ignored".
function classColors(kind, classes) {
  const colors = classes.map((_, i) => (i ? [...channels(color(kind, i)), 255] : [0, 0, 0, 0]));
  colors.push([...channels(IGNORED), 200]);
  const [R, G, B, A] = [0, 1, 2, 3].map((at) => colors.map((c) => c[at]));
  return { R, G, B, A, I: colors.map((_, i) => i), labels: [...classes, "ignored"] };
}

export const bothLegends = (classes) => h("div", { className: "bar" },
  h("span", {}, "Prediction"), legend("prediction", classes),
  h("span", {}, "Reference"), legend("reference", classes));

export function legend(kind, classes, ignored = false) {
  const items = classes.slice(1).map((name, i) => item(color(kind, i + 1), name));
  return h("span", { className: "legend" }, items, ignored ? item(IGNORED, "ignored") : null);
}

function item(hex, name) {
  const swatch = h("span", { className: "swatch" });
  swatch.style.background = hex;
  return h("span", {}, swatch, name);
}

export class Viewer {
  constructor(classes) {
    this.classes = classes;
    this.canvas = h("canvas", { "aria-label": "Scan" });
    this.busy = h("span", { className: "busy", hidden: true }, "Loading…");
    this.stage = h("div", { className: "stage" }, this.canvas, this.busy);
    this.stage.viewer = this;
    this.layers = {};
    this.visible = { image: true, reference: true, prediction: true, disagreement: false };
    this.view = "all";
    this.turn = 0;
    this.ready = this.start();
  }

  async start() {
    this.nv = new Niivue({
      backColor: [0.043, 0.06, 0.08, 1],
      show3Dcrosshair: true,
      crosshairWidth: 0.3,
      crosshairColor: [0.55, 0.8, 1, 0.6],
      isColorbar: false,
      dragAndDropEnabled: false,
      isOrientCube: false,
      multiplanarShowRender: SHOW_RENDER.ALWAYS,
      dragMode: DRAG_MODE.contrast,
      loadingText: "",
      logLevel: "error",
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      isNearestInterpolation: true,
      maxDrawUndoBitmaps: 24,
    });
    await this.nv.attachToCanvas(this.canvas);
    this.nv.setSliceType(SLICES[this.view]);
    this.nv.onLocationChange = ({ vox }) => { this.stage.dataset.at = vox.map(Math.round).join(" "); };
  }

  // layers: {image: path, reference: path, prediction: path, disagreement: path}; image first
  async show(layers) {
    const turn = ++this.turn; // a later call makes this one stop
    await this.ready;
    this.busy.hidden = false;
    try {
      this.clear();
      const kinds = ["image", "disagreement", "reference", "prediction"].filter((kind) => layers[kind]);
      const contents = await Promise.all(kinds.map((kind) => bytes(layers[kind])));
      if (turn !== this.turn) return false;
      for (const [i, kind] of kinds.entries()) await this.add(kind, contents[i], turn);
      if (turn !== this.turn) return false;
      this.setView(this.view);
      return true;
    } finally {
      if (turn === this.turn) this.busy.hidden = true;
    }
  }

  clear() {
    if (this.nv.drawBitmap) this.nv.closeDrawing();
    for (const volume of [...this.nv.volumes].reverse()) this.nv.removeVolume(volume);
    this.layers = {};
    this.stage.dataset.loaded = "";
  }

  async add(kind, content, turn) {
    const look = kind === "image" ? { colormap: "gray" } : { colormap: "warm", opacity: 0 };
    const volume = await NVImage.loadFromUrl({ url: content, name: `${kind}.nii.gz`, ...look });
    if (turn !== this.turn) return;
    if (kind in PALETTES) volume.setColormapLabel(classColors(kind, this.classes));
    if (kind === "disagreement") Object.assign(volume, { cal_min: 1, cal_max: 60 });
    this.nv.addVolume(volume);
    this.layers[kind] = volume;
    this.refresh(kind);
    this.stage.dataset.loaded = Object.keys(this.layers).join(" ");
  }

  toggle(kind, on) {
    this.visible[kind] = on;
    this.refresh(kind);
  }

  refresh(kind) {
    const volume = this.layers[kind];
    if (!volume) return;
    const full = { image: this.view === "render" ? 0.15 : 1, disagreement: 0.8 }[kind] ?? 0.55;
    this.nv.setOpacity(this.nv.volumes.indexOf(volume), this.visible[kind] ? full : 0);
  }

  setView(view) {
    this.view = view;
    this.nv.setSliceType(SLICES[view]);
    this.refresh("image");
    this.nv.drawScene();
  }

  // the cross-hair on the middle of a mask or drawing
  center(values) {
    const [nx, ny] = this.nv.back.dimsRAS.slice(1);
    let [x, y, z, count] = [0, 0, 0, 0];
    for (let i = 0; i < values.length; i++) {
      if (!values[i]) continue;
      x += i % nx; y += Math.floor(i / nx) % ny; z += Math.floor(i / (nx * ny)); count++;
    }
    if (!count) return;
    this.nv.scene.crosshairPos = this.nv.vox2frac([x, y, z].map((sum) => Math.round(sum / count)));
    this.nv.drawScene();
  }

  // ---- brush

  // whether it is drawn: not if something else is shown meanwhile
  async draw(content) {
    const turn = this.turn;
    const mask = await NVImage.loadFromUrl({ url: content, name: "mask.nii.gz" });
    if (turn !== this.turn) return false;
    mask.img = Uint8Array.from(mask.img);
    if (!this.nv.loadDrawing(mask)) throw new Error("The mask does not fit the image.");
    this.nv.setDrawColormap(classColors("prediction", this.classes));
    this.nv.setDrawOpacity(0.55);
    this.brush(null);
    return true;
  }

  // value: class index, or null for no brush
  brush(value, size = 3, filled = false) {
    this.nv.setDrawingEnabled(value !== null);
    if (value === null) return;
    this.nv.opts.penSize = size;
    this.nv.setPenValue(value, filled);
  }

  undo() {
    this.nv.drawUndo();
  }

  onDrawn(callback) {
    this.nv.onDrawingChanged = (action) => action !== "load" && action !== "close" && callback();
  }

  drawing() {
    return this.nv.drawBitmap;
  }

  async drawingFile() {
    const content = await this.nv.saveImage({ filename: "", isSaveDrawing: true, volumeByIndex: 0 });
    return new Blob([content], { type: "application/octet-stream" });
  }

  close() {
    this.turn++;
    this.nv?.gl?.getExtension("WEBGL_lose_context")?.loseContext();
  }

  // ---- controls

  views() {
    return choice(VIEWS, this.view, (view) => this.setView(view));
  }

  toggles(kinds) {
    return h("span", { className: "group" }, kinds.map(([kind, label]) =>
      toggle(label, this.visible[kind], (on) => this.toggle(kind, on), { "data-layer": kind })));
  }
}
