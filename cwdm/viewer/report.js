"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data"), look = read("look");
const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const PLANES = { axial: 2, coronal: 1, sagittal: 0 };
const SIDES = { axial: ["R", "A"], coronal: ["R", "S"], sagittal: ["A", "S"] };
const NOTCH = 40;  // px of the wheel that make a slice; a touchpad sends few at a time
const NUMBER = { psnr: (v) => `${v.toFixed(1)} dB`, ssim: (v) => v.toFixed(3), mae: (v) => `${(100 * v).toFixed(1)} %` };

// Tables: a press on a head sorts by its column, another turns it round.

function sortBy(head, direction) {
  const table = head.closest("table"), column = head.cellIndex, body = table.tBodies[0];
  for (const each of head.parentNode.cells) each.setAttribute("aria-sort", each === head ? direction : "none");
  const key = (row) => row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
  const sign = direction === "ascending" ? 1 : -1;
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");  // what is not there comes last
    return sign * (x - y || x.localeCompare(y, undefined, { numeric: true }) || 0);
  });
  body.append(...rows);
}

for (const button of all(".sortable th button")) {
  const head = button.parentNode;
  button.addEventListener("click", () =>
    sortBy(head, head.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending"));
}

// Distribution: a row per method, a dot per case, the mean with its interval.

const SVG = "http://www.w3.org/2000/svg";
function shape(name, attributes, parent, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

function ticks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((m) => m * power >= rough) * power, found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step / 1e3; v += step) found.push(v);
  return found;
}

function plot() {
  const [modality, region, figure] = ["modality", "region", "figure"].map((id) => one(`#${id}`).value);
  for (const row of one("#summary").tBodies[0].rows)
    row.hidden = row.dataset.modality !== modality || row.dataset.region !== region;
  draw(one("#plot"), modality, region, figure);
}

function draw(svg, modality, region, figure) {
  const better = figure === "mae" ? 1 : -1, ranks = { model: 0, floor: 1, "spoilt truth": 2 };
  const rows = data.series.filter((s) => s.modality === modality && s.region === region)
    .sort((a, b) => ranks[a.kind] - ranks[b.kind] || better * (a[`${figure}_mean`][0] - b[`${figure}_mean`][0]));
  svg.replaceChildren();
  const values = rows.flatMap((s) => s[figure]).filter((v) => v !== null);
  const left = 190, right = 1150, line = 30, height = rows.length * line + 44;
  svg.setAttribute("viewBox", `0 0 1200 ${height}`);
  svg.setAttribute("aria-label", `${figure.toUpperCase()} of ${modality} in the region ${region}: ` + rows
    .map((s) => `${s.name} ${s[`${figure}_mean`][0] === null ? "-" : NUMBER[figure](s[`${figure}_mean`][0])}`).join(", "));
  if (!values.length) {
    shape("text", { x: 20, y: 24 }, svg, "This region is in no case of this modality.");
    return;
  }
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const room = (high - low || 1) * 0.04;
  [low, high] = [low - room, high + room];
  const x = (v) => left + ((v - low) / (high - low)) * (right - left);
  for (const tick of ticks(low, high)) {
    shape("line", { x1: x(tick), x2: x(tick), y1: 6, y2: height - 34, class: "grid" }, svg);
    shape("text", { x: x(tick), y: height - 16, class: "tick", "text-anchor": "middle" }, svg,
      figure === "mae" ? `${+(100 * tick).toFixed(2)} %` : +tick.toFixed(3));
  }
  rows.forEach((series, index) => {
    const y = 6 + line * (index + 0.5);
    const group = shape("g", { class: series.kind.replace(" ", "-") }, svg);
    shape("text", { x: left - 16, y: y + 4, "text-anchor": "end" }, group, series.name);
    series[figure].forEach((value, number) => {
      if (value === null) return;
      shape("circle", { cx: x(value), cy: y, r: 4.5, role: "img", tabindex: -1, "data-case": number,
        "aria-label": `${data.cases[number]}, ${series.name}: ${NUMBER[figure](value)}` }, group);
    });
    const [mean, from, to] = series[`${figure}_mean`];
    if (mean === null) return;
    const marks = from === null ? "" : `M${x(from)} ${y}H${x(to)}M${x(from)} ${y - 4}v8M${x(to)} ${y - 4}v8`;
    shape("path", { d: `M${x(mean)} ${y - 9}v18${marks}`, class: "mean", "pointer-events": "none" }, group);
  });
  one("circle", svg)?.setAttribute("tabindex", 0);
}

function point(circle) {
  for (const each of all("#plot circle"))
    each.classList.toggle("same", circle !== null && each.dataset.case === circle.dataset.case);
  if (circle) one("#dot").textContent = circle.getAttribute("aria-label");
}

if (one("#plot")) {
  const svg = one("#plot");
  for (const id of ["modality", "region", "figure"]) one(`#${id}`).addEventListener("change", plot);
  svg.addEventListener("pointerover", (event) => point(event.target.closest("circle")));
  svg.addEventListener("focusin", (event) => point(event.target.closest("circle")));
  const lead = (circle) => {
    const place = address(data.cases[circle.dataset.case], one("#modality").value);
    if (document.getElementById(decodeURIComponent(place.slice(1)))) go(place);
  };
  svg.addEventListener("click", (event) => { const dot = event.target.closest("circle"); if (dot) lead(dot); });
  svg.addEventListener("keydown", (event) => {  // one stop of Tab, arrows from dot to dot
    const dots = all("circle", svg), at = dots.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (at < 0 || (!step && event.key !== "Enter")) return;
    event.preventDefault();
    event.stopPropagation();
    if (!step) return lead(dots[at]);
    const next = dots[(at + step + dots.length) % dots.length];
    dots[at].setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
  plot();
  for (const paper of all(".paper svg")) draw(paper, paper.dataset.modality, "brain", "psnr");
}

// Volumes: mosaics of axial slices, unpacked for the case that is open.

const address = (name, modality) => `#case/${encodeURIComponent(name)}/${modality}`;
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

async function unpack(mosaic, [nx, ny, nz], columns) {
  const picture = await createImageBitmap(new Blob([bytes(mosaic)], { type: "image/webp" }));
  const canvas = new OffscreenCanvas(picture.width, picture.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  picture.close();
  const voxels = new Uint8Array(nx * ny * nz);  // X runs fastest, as in NIfTI
  for (let z = 0; z < nz; z++) {
    const tile = context.getImageData((z % columns) * nx, Math.floor(z / columns) * ny, nx, ny).data;
    for (let i = 0, at = z * nx * ny; i < nx * ny; i++) voxels[at + i] = tile[4 * i];
  }
  return voxels;
}

const inner = { number: null, volumes: {} };  // the open case
async function load(number, box, keys) {
  if (inner.number !== number) Object.assign(inner, { number, volumes: {} });
  const volumes = inner.volumes;
  for (const key of keys) {
    const source = document.getElementById(`volume-${number}-${key}`);
    if (source && !volumes[key]) volumes[key] = await unpack(source.textContent, box.shape, box.columns);
  }
  if (volumes.labels && !volumes.labels.done) {
    volumes.labels.forEach((v, i, labels) => { labels[i] = Math.round(v / look.step); });
    volumes.labels.done = true;
  }
  return volumes;
}

const INSIDE = { WT: (v) => v > 0, TC: (v) => v === 1 || v === 3, ET: (v) => v === 3 };

class Page {
  constructor(section) {
    this.section = section;
    this.number = +section.dataset.case;
    this.view = JSON.parse(one(".view", section).textContent);
    this.box = read(`box-${this.number}`);
    this.figures = all(".panel", section);
    this.plane = "axial";
    this.at = [...this.view.start];
  }

  get axis() { return PLANES[this.plane]; }

  async open() {
    const keys = this.figures.map((figure) => figure.dataset.volume);
    if (!document.getElementById(`volume-${this.number}-${keys[0]}`)) return;
    const volumes = await load(this.number, this.box, [...keys, "labels"]);
    if (inner.volumes !== volumes || current !== this) return;  // another case was opened meanwhile
    this.volumes = { ...volumes };
    if (this.view.truth) this.volumes.error = this.error();
    if (!this.section.classList.contains("live")) this.equip();
    this.draw();
  }

  close() { this.volumes = null; }

  /** |synthetic - truth| as a share of the scale, from the volumes as they are shown. */
  error() {
    const a = this.volumes[this.view.synthetic], b = this.volumes[this.view.truth];
    const factor = this.view.width / this.view.error, error = new Uint8Array(a.length);
    for (let i = 0; i < a.length; i++) error[i] = Math.min(255, Math.abs(a[i] - b[i]) * factor);
    return error;
  }

  equip() {
    const section = this.section, panels = one(".panels", section), slider = one(".slice", section);
    section.classList.add("live");
    for (const figure of this.figures) {
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      one("img", figure).replaceWith(canvas);
      canvas.addEventListener("click", (event) => this.aim(event));
    }
    let turned = 0;
    panels.addEventListener("wheel", (event) => {
      event.preventDefault();
      turned += event.deltaMode ? NOTCH * Math.sign(event.deltaY) : event.deltaY;
      const steps = Math.trunc(turned / NOTCH);
      turned -= steps * NOTCH;
      if (steps) this.move(-Math.sign(steps));
    }, { passive: false });
    slider.addEventListener("input", () => { this.at[this.axis] = +slider.value; this.draw(); });
    for (const input of all(".planes input", section))
      input.addEventListener("change", () => this.turn(input.value));
    for (const input of all(".outlines input", section)) input.addEventListener("change", () => this.draw());
    for (const button of all("[data-region]", section))
      button.addEventListener("click", () => {
        const { first, last } = this.view.regions[button.dataset.region];
        this.at = first.map((low, axis) => Math.round((low + last[axis]) / 2));
        this.draw();
        panels.focus();
      });
    one(".open", section).addEventListener("click", () => view3d(this));
  }

  turn(plane) {
    this.plane = plane;
    one(`.planes input[value=${plane}]`, this.section).checked = true;
    this.draw();
  }

  move(step) {
    const last = this.box.shape[this.axis] - 1;
    this.at[this.axis] = Math.max(0, Math.min(last, this.at[this.axis] + step));
    this.draw();
  }

  /** Axes across and up the picture, both turned round: the patient's right, or front, is on the left. */
  get across() { return this.plane === "sagittal" ? [1, 2] : [0, this.plane === "axial" ? 1 : 2]; }

  size() {
    const [u, v] = this.across, { shape, spacing } = this.box;
    return [shape[u], shape[v], shape[u] * spacing[u], shape[v] * spacing[v]];
  }

  aim(event) {
    const canvas = event.currentTarget, [u, v] = this.across, { shape } = this.box;
    const place = canvas.getBoundingClientRect();
    const share = [(event.clientX - place.left) / place.width, (event.clientY - place.top) / place.height];
    [u, v].forEach((axis, i) => {
      this.at[axis] = Math.max(0, Math.min(shape[axis] - 1, Math.floor((1 - share[i]) * shape[axis])));
    });
    this.draw();
  }

  /** Index of the voxel shown at column i and row j. */
  index(i, j) {
    const [u, v] = this.across, [nx, ny] = this.box.shape, at = [...this.at];
    at[u] = this.box.shape[u] - 1 - i;
    at[v] = this.box.shape[v] - 1 - j;
    return at[0] + nx * (at[1] + ny * at[2]);
  }

  draw() {
    const [columns, rows, width, height] = this.size(), { volumes } = this;
    if (!volumes) return;
    one(".panels", this.section).style.setProperty("--aspect", width / height);
    const order = new Int32Array(columns * rows);
    for (let j = 0, n = 0; j < rows; j++) for (let i = 0; i < columns; i++) order[n++] = this.index(i, j);
    const flat = new OffscreenCanvas(columns, rows), context = flat.getContext("2d");
    const outlines = this.outlines(order, columns, rows);
    const slices = this.box.shape[this.axis], place = `${this.plane} slice ${this.at[this.axis] + 1} of ${slices}`;
    for (const figure of this.figures) {
      const voxels = volumes[figure.dataset.volume], pixels = context.createImageData(columns, rows);
      const hot = figure.matches(".error, .deviation");
      for (let n = 0; n < order.length; n++) {
        const value = voxels[order[n]], color = hot ? look.heat[value] : [value, value, value];
        pixels.data.set([...color, 255], 4 * n);
      }
      context.putImageData(pixels, 0, 0);
      const canvas = one("canvas", figure);
      canvas.width = Math.round(Math.max(canvas.clientWidth, 160) * devicePixelRatio);
      canvas.height = Math.round(canvas.width * height / width);
      this.paint(canvas, flat, columns, rows, outlines, figure.matches(".synthetic, .deviation"));
      const [title, kind] = [one("figcaption b", figure), one("figcaption span", figure)];
      canvas.setAttribute("aria-label", `${title.textContent}, ${kind.textContent}, ${place}`);
    }
    const slider = one(".slice", this.section);
    slider.max = slices - 1;
    slider.value = this.at[this.axis];
    slider.setAttribute("aria-valuetext", place);
    one(".where", this.section).textContent = `slice ${this.at[this.axis] + 1} of ${slices}`;
    one(".here", this.section).textContent = this.said();
  }

  /** Edges between pixels inside and outside of each region, in pixels of the slice. */
  outlines(order, columns, rows) {
    const labels = this.volumes.labels;
    if (!labels) return [];
    return all(".outlines input:checked", this.section).map(({ value: region }) => {
      const path = new Path2D(), inside = INSIDE[region];
      const is = (i, j) => i >= 0 && j >= 0 && i < columns && j < rows && inside(labels[order[j * columns + i]]);
      for (let j = 0; j <= rows; j++)
        for (let i = 0; i <= columns; i++) {
          const here = is(i, j);
          if (here !== is(i - 1, j)) { path.moveTo(i, j); path.lineTo(i, j + 1); }
          if (here !== is(i, j - 1)) { path.moveTo(i, j); path.lineTo(i + 1, j); }
        }
      return [region, path];
    });
  }

  paint(canvas, flat, columns, rows, outlines, doubtful) {
    const pen = canvas.getContext("2d"), [sx, sy] = [canvas.width / columns, canvas.height / rows];
    pen.imageSmoothingQuality = "high";
    pen.drawImage(flat, 0, 0, canvas.width, canvas.height);
    pen.setTransform(sx, 0, 0, sy, 0, 0);
    pen.lineWidth = 1.3 * devicePixelRatio / sx;
    for (const [region, path] of outlines) {
      pen.strokeStyle = look.outlines[region];
      pen.stroke(path);
    }
    const [u, v] = this.across, { shape } = this.box;
    if (doubtful)
      for (const { first, last } of this.view.regions) {
        if (this.at[this.axis] < first[this.axis] || this.at[this.axis] > last[this.axis]) continue;
        pen.strokeStyle = "#ffffffcc";
        pen.setLineDash([3, 3]);
        pen.strokeRect(shape[u] - 1 - last[u], shape[v] - 1 - last[v], last[u] - first[u] + 1, last[v] - first[v] + 1);
        pen.setLineDash([]);
      }
    pen.setTransform(1, 0, 0, 1, 0, 0);
    const [cx, cy] = [(shape[u] - this.at[u] - 0.5) * sx, (shape[v] - this.at[v] - 0.5) * sy];
    pen.strokeStyle = "#6cd6c4cc";
    pen.lineWidth = 1.2 * devicePixelRatio;
    pen.beginPath();  // a crosshair that leaves its middle open
    const arm = canvas.width / 40;
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      pen.moveTo(cx + arm * dx, cy + arm * dy);
      pen.lineTo(cx + 3 * arm * dx, cy + 3 * arm * dy);
    }
    pen.stroke();
    pen.fillStyle = "#a2aab4";
    pen.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    pen.fillText(SIDES[this.plane][0], 5, canvas.height / 2);
    pen.textBaseline = "top";
    pen.textAlign = "center";
    pen.fillText(SIDES[this.plane][1], canvas.width / 2, 5);
  }

  /** What the pictures hold at the crosshair, in % of the range. */
  said() {
    const [nx, ny] = this.box.shape, n = this.at[0] + nx * (this.at[1] + ny * this.at[2]), { volumes, view } = this;
    const world = this.box.affine.slice(0, 3).map((row) =>
      (row[0] * this.at[0] + row[1] * this.at[1] + row[2] * this.at[2] + row[3]).toFixed(0));
    const parts = [`At the crosshair (${world.join(", ")} mm)`];
    if (view.truth) {
      const error = (volumes[view.synthetic][n] - volumes[view.truth][n]) / 255 * view.width;
      parts.push(`synthetic - truth ${error > 0 ? "+" : ""}${(100 * error).toFixed(0)} % of the range`);
    }
    const spread = this.figures.find((figure) => figure.matches(".deviation"));
    if (spread) parts.push(`deviation ${(volumes[spread.dataset.volume][n] / 2.55 * view.deviation).toFixed(1)} %`);
    const label = volumes.labels ? ["", "necrosis or other core", "edema", "enhancing tumor"][volumes.labels[n]] : "";
    if (label) parts.push(label);
    return parts.join("; ") + ".";
  }
}

// One page at a time, by the address.

const pages = new Map();
let current = null;

function route() {
  const section = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const target = section?.matches(".page") ? section : null;
  if (one("#viewer").open) one("#viewer").close();
  if (current && current.section !== target) current.close();
  if (!target) {
    if (!current) return;
    const left = `#${current.section.id}`;  // back to the link one came by
    all("#images tbody a").find((link) => decodeURIComponent(link.hash) === left)?.focus();
    current = null;
    Object.assign(inner, { number: null, volumes: {} });
    return;
  }
  window.scrollTo(0, 0);
  if (current?.section === target) return;
  if (!pages.has(target)) pages.set(target, new Page(target));
  current = pages.get(target);
  one("h2", target).focus({ preventScroll: true });
  current.open();
}

/** Changes the address and routes at once: the browser may tell of a change only after the next keys. */
function go(place) {
  location.hash = place;
  route();
}

/** The images in the order of their table. */
function step(by) {
  const links = all("#images tbody a"), here = decodeURIComponent(location.hash);
  const at = links.findIndex((link) => decodeURIComponent(link.hash) === here);
  const next = links[(at + by + links.length + (at < 0 && by < 0)) % links.length];
  if (next) go(next.hash);
}

for (const button of all("[data-step]")) button.addEventListener("click", () => step(+button.dataset.step));
window.addEventListener("hashchange", route);
window.addEventListener("resize", () => current?.draw());
route();

// 3D: NiiVue is unpacked when it is first asked for, and gets volumes as NIfTI files.

let niivue = null;
async function start() {
  if (niivue) return;
  const packed = new Blob([bytes(one("#niivue").textContent)]);
  const text = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).blob();
  const script = document.createElement("script");
  script.src = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  await new Promise((done, fail) => { script.onload = done; script.onerror = fail; document.head.append(script); });
  URL.revokeObjectURL(script.src);
  niivue = window.niivue;
}

function nifti(voxels, { shape, spacing, affine }) {
  const file = new Uint8Array(352 + voxels.length), header = new DataView(file.buffer);
  header.setInt32(0, 348, true);
  [3, ...shape, 1, 1, 1, 1].forEach((n, i) => header.setInt16(40 + 2 * i, n, true));
  header.setInt16(70, 2, true);  // uint8
  header.setInt16(72, 8, true);
  [1, ...spacing].forEach((mm, i) => header.setFloat32(76 + 4 * i, mm, true));
  header.setFloat32(108, 352, true);
  header.setFloat32(112, 1, true);
  header.setUint8(123, 2);  // mm
  header.setInt16(254, 1, true);  // sform
  affine.slice(0, 3).flat().forEach((a, i) => header.setFloat32(280 + 4 * i, a, true));
  [0x6e, 0x2b, 0x31, 0].forEach((byte, i) => header.setUint8(344 + i, byte));
  file.set(voxels, 352);
  return file.buffer;
}

let scene = null;
async function view3d(page) {
  const dialog = one("#viewer"), note = one("#viewer-note"), base = one("#base"), over = one("#over");
  const name = (figure) => all("figcaption > *", figure).map((part) => part.textContent).join(", ");
  const still = page.figures.filter((figure) => !figure.matches(".error, .deviation"));
  const hot = page.figures.filter((figure) => figure.matches(".error, .deviation"));
  base.replaceChildren(...still.map((figure) => new Option(name(figure), figure.dataset.volume)));
  base.value = page.view.synthetic;
  over.replaceChildren(
    ...(page.volumes.labels ? [new Option("Segmentation", "labels")] : []),
    ...hot.map((figure) => new Option(name(figure), figure.dataset.volume)),
    new Option("nothing", ""),
  );
  one("#viewer-title").textContent = one("h2", page.section).textContent;
  note.textContent = "Starting ...";
  dialog.showModal();
  try {
    await start();
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    one("#stage").replaceChildren(canvas);
    const viewer = new niivue.Niivue({
      backColor: [0, 0, 0, 1], crosshairColor: [0.42, 0.84, 0.77, 0.8], isRadiologicalConvention: true,
      crosshairWidthUnit: "mm", crosshairWidth: 0.8, loadingText: "", dragAndDropEnabled: false, logLevel: "error", show3Dcrosshair: true,
    });
    await viewer.attachToCanvas(canvas);
    viewer.setMultiplanarLayout(2);
    viewer.opts.multiplanarShowRender = niivue.SHOW_RENDER?.ALWAYS ?? 1;
    viewer.addColormap("heat", ramp());
    scene = { viewer, page, canvas };
    await show();
    note.textContent = "Drag to move the crosshair or turn the head, wheel for slices. The patient's right is on the left.";
  } catch (error) {
    note.textContent = `The 3D viewer cannot start here (${error.message}). It needs WebGL 2.`;
  }
}

/** Inferno as NiiVue wants it, transparent where there is nothing. */
function ramp() {
  const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255], channel = (c) => stops.map((s) => look.heat[s][c]);
  return { R: channel(0), G: channel(1), B: channel(2), A: stops.map((s) => Math.min(255, 2 * s)), I: stops };
}

async function show() {
  const { viewer, page, canvas } = scene, base = one("#base"), over = one("#over");
  while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[0]);
  const add = async (key, colormap, opacity) => {
    const volume = await niivue.NVImage.new(nifti(page.volumes[key], page.box), `${key}.nii`, colormap, opacity,
      null, 0, key === "labels" ? 3 : 255, true);
    if (key === "labels") {
      const [ncr, ed, et] = ["TC", "WT", "ET"].map((region) => look.outlines[region].match(/\d+/g).map(Number));
      const channel = (c) => [0, ncr[c], ed[c], et[c]];
      volume.setColormapLabel({ R: channel(0), G: channel(1), B: channel(2), A: [0, 255, 255, 255],
        I: [0, 1, 2, 3], labels: ["", "necrosis or other core", "edema", "enhancing tumor"] });
    }
    viewer.addVolume(volume);
  };
  await add(base.value, "gray", 1);
  if (over.value) await add(over.value, "heat", +one("#opacity").value);
  const [nx, ny, nz] = page.box.shape;
  viewer.scene.crosshairPos = page.at.map((at, axis) => (at + 0.5) / [nx, ny, nz][axis]);
  viewer.updateGLVolume();
  const said = (select) => select.selectedOptions[0].textContent;
  canvas.setAttribute("aria-label",
    `${one("#viewer-title").textContent} in three planes and in space: ${said(base)}; over it: ${said(over)}`);
}

for (const id of ["base", "over"]) one(`#${id}`).addEventListener("change", show);
one("#opacity").addEventListener("input", () => {
  if (scene?.viewer.volumes.length > 1) scene.viewer.setOpacity(1, +one("#opacity").value);
});
one("#close").addEventListener("click", () => one("#viewer").close());
one("#viewer").addEventListener("close", () => {
  if (!scene) return;
  scene.viewer.gl.getExtension("WEBGL_lose_context")?.loseContext();
  scene.viewer.cleanup();
  scene = null;
  one("#stage").replaceChildren();
});

// Light and dark, and keys.

function theme() {
  const root = document.documentElement;
  const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem("cwdm-theme", root.dataset.theme); } catch {}
}

one("#theme").addEventListener("click", theme);
one("#keys").addEventListener("click", () => one("#help").showModal());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || one("dialog[open]")) return;
  if (event.target.matches("select, input[type=range], input[type=radio]") && event.key.startsWith("Arrow")) return;
  const live = current?.volumes ? current : null;
  const inside = live && event.target.closest?.(".panels");
  const actions = {
    "?": () => one("#help").showModal(), d: theme, j: () => step(1), k: () => step(-1),
    ...(current && { Escape: () => go("#top") }),
    ...(live && {
      ArrowLeft: () => live.move(-1), ArrowRight: () => live.move(1),
      PageDown: () => live.move(-10), PageUp: () => live.move(10),
      a: () => live.turn("axial"), c: () => live.turn("coronal"), s: () => live.turn("sagittal"),
      o: () => {
        const boxes = all(".outlines input", live.section), on = boxes.some((box) => box.checked);
        for (const box of boxes) box.checked = !on;
        live.draw();
      },
      v: () => view3d(live),
    }),
    ...(inside && {
      ArrowDown: () => live.move(-1), ArrowUp: () => live.move(1),
      Home: () => live.move(-1e4), End: () => live.move(1e4),
    }),
  };
  const action = actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
