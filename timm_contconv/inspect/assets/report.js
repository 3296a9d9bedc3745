// Draws the figures, sorts tables, and fills the gallery of kernels from compact arrays.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const range = (count) => Array.from({ length: count }, (_, index) => index);
const options = { actions: false, renderer: "canvas", logLevel: 1 }; // 1: errors alone

// ---- figures

// A specification that fits into `width` pixels: single charts stretch, grids of small ones get fewer columns.
function fitted(spec, width) {
  const gap = spec.spacing ?? 10;
  if (spec.spec) return { ...spec, columns: Math.max(1, Math.floor((width + gap) / (spec.spec.width + gap))) };
  if (spec.usermeta?.isPicture) return { ...spec, ...shrunk(spec, width) };
  return { ...spec, width: "container", autosize: { type: "fit-x", contains: "padding" } };
}

// Pictures keep their proportions, and shrink where there is less room; 60 pixels are for the axes.
function shrunk(spec, width) {
  const factor = Math.min(1, (width - 60) / spec.width);
  return { width: spec.width * factor, height: spec.height * factor };
}

async function drawFigures() {
  const specs = read("specs");
  for (const place of document.querySelectorAll("[data-figure]")) {
    const spec = specs[Number(place.dataset.figure)];
    const draw = () => window.vegaEmbed(place, fitted(spec, place.clientWidth), options);
    await draw();
    let width = place.clientWidth;
    new ResizeObserver(() => {
      if (Math.abs(place.clientWidth - width) < 8) return;
      width = place.clientWidth;
      draw();
    }).observe(place);
  }
}

// ---- tables

function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const ascending = heading.getAttribute("aria-sort") === "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const isNumber = heading.classList.contains("number");
      const key = (row) => row.cells[column].dataset.value;
      const compare = isNumber
        ? (a, b) => (key(a) === "" ? -Infinity : Number(key(a))) - (key(b) === "" ? -Infinity : Number(key(b))) || 0
        : (a, b) => key(a).localeCompare(key(b), "en", { numeric: true });
      const rows = [...table.tBodies[0].rows].sort(compare);
      table.tBodies[0].append(...(ascending ? rows : rows.reverse()));
    });
  });
}

// ---- compact arrays

async function unpacked(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// The index-th slice along the first dimension, as floats; an array of one slice is the same for all.
function slice(buffer, array, index) {
  const [count, ...inner] = array.shape;
  const size = inner.reduce((a, b) => a * b, 1);
  const Type = array.bits === 8 ? Int8Array : Int16Array;
  const at = index % count;
  const numbers = new Type(buffer, array.at + (at * size * array.bits) / 8, size);
  const scale = array.scales[at % array.scales.length];
  return Float64Array.from(numbers, (number) => number * scale);
}

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

// ---- one kernel: the same drawing as figures/kernels.py

const CORNERS = { ellipse: 24, diamond: 4, box: 4, point: 0 };
const LARGEST_DOT = 0.0012 * 250 ** 2;
const [MOST_OUTLINES, FAINTEST] = [16, 0.2];
const OVERLAP = 1.1;

// size x size squares from (left, top) on. Neighbours overlap, so that no seams are seen.
function squares(size, left, top, step, value) {
  const [right, bottom] = [left + size * step, top + size * step];
  return range(size * size).map((index) => {
    const [x, y] = [left + (index % size) * step, top + Math.floor(index / size) * step];
    const [x2, y2] = [Math.min(x + OVERLAP * step, right), Math.min(y + OVERLAP * step, bottom)];
    return { x, y, x2, y2, v: value(index) };
  });
}

function pixelRows(kernel, { window: { row, column, size }, spacing }) {
  const limit = largest(kernel) || 1;
  const [left, top] = [column * spacing - 0.5, row * spacing - 0.5];
  return squares(size, left, top, spacing, (index) => kernel[index] / limit);
}

function elementsOf(buffer, elements, index) {
  const position = slice(buffer, elements.position, index);
  const reach = elements.reach && slice(buffer, elements.reach, index);
  const angle = elements.angle && slice(buffer, elements.angle, index);
  const weight = elements.weight && slice(buffer, elements.weight, index);
  const most = weight ? largest(weight) || 1 : 1;
  return range(position.length / 2).map((number) => ({
    y: position[2 * number],
    x: position[2 * number + 1],
    ry: reach?.[2 * number],
    rx: reach?.[2 * number + 1],
    angle: angle?.[number] ?? 0,
    strength: weight ? Math.abs(weight[number]) / most : null,
  }));
}

const dotRows = (elements) =>
  elements.map(({ x, y, strength }) => ({ x, y, s: strength === null ? LARGEST_DOT / 3 : LARGEST_DOT * strength }));

function outlineRows(elements, form) {
  const corners = CORNERS[form];
  if (!corners || elements[0]?.rx === undefined) return [];
  const [turn, stretch] = form === "box" ? [Math.PI / 4, Math.SQRT2] : [0, 1];
  const heaviest = elements
    .map((element, e) => ({ ...element, e, strength: element.strength ?? 1 }))
    .sort((a, b) => b.strength - a.strength)
    .slice(0, MOST_OUTLINES);
  return heaviest.flatMap(({ x, y, rx, ry, angle, strength, e }) =>
    range(corners + 1).map((o) => {
      const around = turn + (2 * Math.PI * o) / corners;
      const [u, v] = [stretch * ry * Math.sin(around), stretch * rx * Math.cos(around)];
      const [cosine, sine] = [Math.cos(angle), Math.sin(angle)];
      const a = FAINTEST + (1 - FAINTEST) * strength;
      return { x: x + sine * u + cosine * v, y: y + cosine * u - sine * v, e, o, a };
    }),
  );
}

// ---- its spectrum: |Fourier transform| at POINTS x POINTS frequencies up to half a cycle per sample

const POINTS = 33;

function magnitudes(kernel, size) {
  const frequencies = range(POINTS).map((index) => index / (POINTS - 1) - 0.5);
  const wave = (f, position) => [Math.cos(2 * Math.PI * f * position), -Math.sin(2 * Math.PI * f * position)];
  const waves = frequencies.map((f) => range(size).map((position) => wave(f, position)));
  const lines = range(size).map((r) =>
    waves.map((line) => {
      let [re, im] = [0, 0];
      for (let c = 0; c < size; c++) {
        re += kernel[r * size + c] * line[c][0];
        im += kernel[r * size + c] * line[c][1];
      }
      return [re, im];
    }),
  );
  return waves.map((line) =>
    range(POINTS).map((u) => {
      let [re, im] = [0, 0];
      for (let r = 0; r < size; r++) {
        const [a, b] = lines[r][u];
        re += a * line[r][0] - b * line[r][1];
        im += a * line[r][1] + b * line[r][0];
      }
      return Math.hypot(re, im);
    }),
  );
}

function spectrumRows(kernel, { window: { size }, spacing }) {
  const table = magnitudes(kernel, size);
  const most = Math.max(...table.map((line) => Math.max(...line))) || 1;
  const step = 1 / (POINTS - 1) / spacing;
  const corner = (-POINTS / 2) * step;
  return squares(POINTS, corner, corner, step, (index) => table[Math.floor(index / POINTS)][index % POINTS] / most);
}

const circleRows = (radius) =>
  range(65).map((o) => ({ x: radius * Math.cos((Math.PI * o) / 32), y: radius * Math.sin((Math.PI * o) / 32), o }));
const nyquistRows = [[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]].map(([x, y], o) => ({ x, y, o }));

// ---- the gallery

const short = (number) => Number(number.toPrecision(2)).toString();

class Gallery {
  constructor(entries, buffer, views) {
    Object.assign(this, { entries, buffer, views });
    this.layer = document.getElementById("layer");
    this.channel = document.getElementById("channel");
    this.layer.addEventListener("change", () => this.chooseLayer());
    this.channel.addEventListener("input", () => this.draw());
    this.layer.form.addEventListener("submit", (event) => event.preventDefault());
  }

  chooseLayer() {
    const count = this.entries[this.layer.value].channels.length;
    this.channel.max = count - 1;
    this.channel.value = Math.min(this.channel.value, count - 1);
    return this.draw();
  }

  async draw() {
    const entry = this.entries[this.layer.value];
    const index = Number(this.channel.value);
    const number = entry.channels[index];
    const choice = entry.channels.length < entry.total ? ` (${entry.channels.length} of them, evenly chosen)` : "";
    document.getElementById("which").textContent = `channel ${number} of ${entry.total}${choice}; ${entry.summary}`;
    this.channel.setAttribute("aria-valuetext", `channel ${number}`);
    const kernel = slice(this.buffer, entry.now.values, index);
    const elements = entry.elements ? elementsOf(this.buffer, entry.elements, index) : [];
    const rows = { pixels: pixelRows(kernel, entry.now), dots: dotRows(elements), outlines: outlineRows(elements, entry.elements?.form) };
    await this.show("now", rows, this.describe("now", entry.now, kernel, entry.kernelSize));
    await this.drawStart(entry, index);
    const isInside = entry.highest !== null && entry.highest <= 0.5 / entry.now.spacing;
    const place = isInside ? "red" : "beyond the picture";
    const highest = entry.highest === null ? "" : `; ${place}: f⁺ = ${short(entry.highest)} cycles per pixel`;
    await this.show(
      "spectrum",
      { pixels: spectrumRows(kernel, entry.now), circle: isInside ? circleRows(entry.highest) : [], nyquist: nyquistRows },
      `its spectrum, relative to the largest; dashed: Nyquist${highest}`,
    );
  }

  async drawStart(entry, index) {
    if (!this.views.start) return;
    const kernel = entry.start ? slice(this.buffer, entry.start.values, index) : new Float64Array();
    const rows = { pixels: entry.start ? pixelRows(kernel, entry.start) : [], dots: [], outlines: [] };
    const text = entry.start ? this.describe("what it started from", entry.start, kernel) : "its start is not known";
    await this.show("start", rows, text);
  }

  describe(when, { window: { size }, spacing }, kernel, full) {
    const side = short(size * spacing);
    const whole = full ? ` of a ${full} kernel` : "";
    return `${when}: ${side}×${side} pixels${whole}; largest value ${short(largest(kernel))}`;
  }

  async show(name, rows, text) {
    const view = this.views[name];
    Object.entries(rows).forEach(([key, values]) => view.data(key, values));
    document.getElementById(`${name}-text`).textContent = text;
    await view.resize().runAsync();
  }
}

async function openGallery() {
  const panels = read("panels");
  const buffer = await unpacked(document.getElementById("arrays").textContent);
  const views = {};
  for (const [name, panel] of [["now", "kernel"], ["start", "kernel"], ["spectrum", "spectrum"]]) {
    const place = document.getElementById(name);
    if (place) views[name] = (await window.vegaEmbed(place, panels[panel], options)).view;
  }
  const gallery = new Gallery(read("entries"), buffer, views);
  await gallery.chooseLayer();
  window.gallery = gallery;
}

document.querySelectorAll("table.sortable").forEach(makeSortable);
await openGallery();
await drawFigures();
document.documentElement.dataset.ready = "yes";
