// The report's only script: outlines on and off, a case found in all plots, and the 3D surfaces.
"use strict";

for (const box of document.querySelectorAll("[data-hide]")) {
  const apply = () => document.body.classList.toggle(`hide-${box.dataset.hide}`, !box.checked);
  box.addEventListener("change", apply);
  apply(); // browsers keep a box as it was when a page is loaded again
}

for (const dot of document.querySelectorAll(".dot")) {
  const same = [...document.querySelectorAll("[data-case]")].filter((e) => e.dataset.case === dot.dataset.case);
  const plot = dot.closest("figure");
  const told = same.filter((e) => plot.contains(e) && e.matches(".dot")).map((e) => e.textContent);
  const mark = (on) => {
    same.forEach((e) => e.classList.toggle("same", on));
    plot.querySelector("output").textContent = on ? told.join(" · ") : "\u00a0";
  };
  dot.addEventListener("pointerenter", () => mark(true));
  dot.addEventListener("pointerleave", () => mark(false));
}

const VERTEX = `
attribute vec3 point, normal, color;
uniform mat3 turn;
uniform vec2 scale;
varying vec3 shade;
void main() {
  vec3 seen = turn * point;
  float light = abs((turn * normalize(normal)).z);
  shade = color * (0.3 + 0.7 * light);
  gl_Position = vec4(seen.xy * scale, -seen.z * 0.25, 1.0);
}`;
const FRAGMENT = `
precision mediump float;
varying vec3 shade;
void main() { gl_FragColor = vec4(shade, 1.0); }`;
const VIEWS = { front: [0, 0], left: [-Math.PI / 2, 0], back: [Math.PI, 0], top: [0, Math.PI / 2] };

function decode(text, Type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new Type(bytes.buffer);
}

// Area-weighted normals of the vertices.
function normalsOf(points, faces) {
  const normals = new Float32Array(points.length);
  for (let f = 0; f < faces.length; f += 3) {
    const [a, b, c] = [3 * faces[f], 3 * faces[f + 1], 3 * faces[f + 2]];
    const u = [0, 1, 2].map((i) => points[b + i] - points[a + i]);
    const v = [0, 1, 2].map((i) => points[c + i] - points[a + i]);
    const n = [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]];
    for (const corner of [a, b, c]) for (let i = 0; i < 3; i++) normals[corner + i] += n[i];
  }
  return normals;
}

// Blue inside the reference, grey on it, red outside; error is in [-1, 1].
function errorColor(error) {
  const end = error < 0 ? [0.13, 0.4, 0.67] : [0.7, 0.09, 0.17];
  return end.map((c) => 0.94 + (c - 0.94) * Math.min(1, Math.abs(error)));
}

function colorsOf(mesh, count, base, byError) {
  const colors = new Float32Array(3 * count);
  const plain = [1, 3, 5].map((i) => parseInt(base.slice(i, i + 2), 16) / 255);
  for (let i = 0; i < count; i++) {
    const color = byError ? (mesh.errors ? errorColor(mesh.errors[i] / 127) : [0.8, 0.8, 0.8]) : plain;
    colors.set(color, 3 * i);
  }
  return colors;
}

// RAS -> (right, up, towards the viewer), column by column.
function rotation(yaw, pitch) {
  const [c, s, d, t] = [Math.cos(yaw), Math.sin(yaw), Math.cos(pitch), Math.sin(pitch)];
  const rows = [[-c, s, 0], [-t * s, -t * c, d], [d * s, d * c, t]];
  return [0, 1, 2].flatMap((column) => rows.map((row) => row[column]));
}

function startViewer(data) {
  const root = document.getElementById("viewer");
  const canvas = root.querySelector("canvas");
  const gl = canvas.getContext("webgl", { antialias: true, preserveDrawingBuffer: true });
  if (!gl) return; // the still pictures stay
  const program = gl.createProgram();
  for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, source);
    gl.compileShader(shader);
    gl.attachShader(program, shader);
  }
  gl.linkProgram(program);
  if (!gl.getProgramParameter(program, gl.LINK_STATUS)) return;
  gl.useProgram(program);
  gl.enable(gl.DEPTH_TEST);
  const place = { turn: gl.getUniformLocation(program, "turn"), scale: gl.getUniformLocation(program, "scale") };
  const camera = { yaw: data.yaw, pitch: data.pitch, zoom: 1 };
  let panels = [];
  let byError = false;

  function buffer(target, numbers) {
    const made = gl.createBuffer();
    gl.bindBuffer(target, made);
    gl.bufferData(target, numbers, gl.STATIC_DRAW);
    return made;
  }

  function upload(mesh) {
    if (!mesh.normals) {
      mesh.points = Float32Array.from(decode(mesh.points, Int16Array), (x) => x / 32767);
      mesh.faces = decode(mesh.faces, Uint16Array);
      mesh.errors = mesh.errors && decode(mesh.errors, Int8Array);
      mesh.normals = normalsOf(mesh.points, mesh.faces);
    }
    const base = data.colors[(mesh.class - 1) % data.colors.length];
    const colors = colorsOf(mesh, mesh.points.length / 3, base, byError);
    return {
      count: mesh.faces.length,
      faces: buffer(gl.ELEMENT_ARRAY_BUFFER, mesh.faces),
      attributes: {
        point: buffer(gl.ARRAY_BUFFER, mesh.points),
        normal: buffer(gl.ARRAY_BUFFER, mesh.normals),
        color: buffer(gl.ARRAY_BUFFER, colors),
      },
    };
  }

  function show() {
    for (const mesh of panels.flatMap((panel) => panel.meshes)) {
      for (const old of [mesh.faces, ...Object.values(mesh.attributes)]) gl.deleteBuffer(old);
    }
    const chosen = root.querySelector("input[name=scene]:checked") || root.querySelector("input[name=scene]");
    const scene = data.scenes[Number(chosen.value)];
    panels = scene.panels.map((panel) => ({ title: panel.title, meshes: panel.meshes.map(upload) }));
    const names = root.querySelector(".panel-names");
    names.replaceChildren(...panels.map((panel) => {
      const name = document.createElement("span");
      name.textContent = panel.title + (panel.meshes.length ? "" : " (empty)");
      return name;
    }));
    root.querySelector(".error-scale").hidden = !byError;
    root.querySelector(".low").textContent = `${data.limit} mm`;
    root.querySelector(".high").textContent = `${data.limit} mm`;
    draw();
  }

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    const width = canvas.clientWidth;
    const height = Math.min(460, Math.max(200, (0.8 * width) / Math.max(panels.length, 1)));
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    gl.clearColor(0, 0, 0, 0);
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT | gl.DEPTH_BUFFER_BIT);
    const part = canvas.width / panels.length;
    const side = 0.97 * camera.zoom * Math.min(part, 1.25 * canvas.height);
    gl.enable(gl.SCISSOR_TEST);
    gl.uniformMatrix3fv(place.turn, false, rotation(camera.yaw, camera.pitch));
    gl.uniform2f(place.scale, side / part, side / canvas.height);
    panels.forEach((panel, index) => {
      gl.viewport(index * part, 0, part, canvas.height);
      gl.scissor(index * part, 0, part, canvas.height);
      panel.meshes.forEach(drawMesh);
    });
    gl.disable(gl.SCISSOR_TEST);
  }

  function drawMesh(mesh) {
    for (const [name, numbers] of Object.entries(mesh.attributes)) {
      const location = gl.getAttribLocation(program, name);
      gl.bindBuffer(gl.ARRAY_BUFFER, numbers);
      gl.enableVertexAttribArray(location);
      gl.vertexAttribPointer(location, 3, gl.FLOAT, false, 0, 0);
    }
    gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, mesh.faces);
    gl.drawElements(gl.TRIANGLES, mesh.count, gl.UNSIGNED_SHORT, 0);
  }

  function move(yaw, pitch, zoom = 1) {
    camera.yaw += yaw;
    camera.pitch = Math.max(-Math.PI / 2, Math.min(Math.PI / 2, camera.pitch + pitch));
    camera.zoom = Math.max(0.5, Math.min(8, camera.zoom * zoom));
    requestAnimationFrame(draw);
  }

  function reset([yaw, pitch]) {
    Object.assign(camera, { yaw, pitch, zoom: 1 });
    requestAnimationFrame(draw);
  }

  canvas.addEventListener("pointerdown", (event) => canvas.setPointerCapture(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (event.buttons) move(event.movementX * 0.01, event.movementY * 0.01);
  });
  canvas.addEventListener("dblclick", () => reset([data.yaw, data.pitch]));
  let scrolled = 0; // a page scrolled past the canvas goes on scrolling
  window.addEventListener("wheel", (event) => { if (event.target !== canvas) scrolled = event.timeStamp; }, { passive: true });
  canvas.addEventListener("wheel", (event) => {
    if (event.timeStamp - scrolled < 400) { scrolled = event.timeStamp; return; }
    event.preventDefault();
    move(0, 0, Math.exp(-event.deltaY * 0.001));
  }, { passive: false });
  const keys = {
    ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1],
    "+": [0, 0, 1.15], "=": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
  };
  canvas.addEventListener("keydown", (event) => {
    if (!keys[event.key]) return;
    event.preventDefault();
    move(...keys[event.key]);
  });
  for (const button of root.querySelectorAll("[data-view]")) {
    button.addEventListener("click", () => reset(VIEWS[button.dataset.view]));
  }
  for (const choice of root.querySelectorAll("input[name=scene]")) choice.addEventListener("change", show);
  const errors = root.querySelector("#errors");
  errors.addEventListener("change", () => { byError = errors.checked; show(); });
  window.addEventListener("resize", () => requestAnimationFrame(draw));
  root.hidden = false;
  document.documentElement.classList.add("webgl");
  byError = errors.checked;
  show();
}

const stored = document.getElementById("surface-data");
if (stored) startViewer(JSON.parse(stored.textContent));
