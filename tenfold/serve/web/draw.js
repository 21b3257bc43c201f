// Drawing: elements, numbers for people, charts and bars. Nothing here knows what it shows, and all text that comes from
// elsewhere goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (those that are functions are listeners) and children (strings become text). */
export function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

/** A count or a rate. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  return Number.isInteger(value) || Math.abs(value) >= 100 ? whole.format(value) : tenth.format(value);
}

export function percent(share) {
  return share === null || share === undefined ? "–" : `${number(Math.round(share * 1000) / 10)} %`;
}

/** Seconds as [number, unit], in the unit that fits. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return ["–", ""];
  if (seconds < 0.001) return [whole.format(seconds * 1e6), "µs"];
  if (seconds < 0.01) return [tenth.format(seconds * 1e3), "ms"];
  if (seconds < 1) return [whole.format(seconds * 1e3), "ms"];
  if (seconds < 120) return [tenth.format(seconds), "s"];
  if (seconds < 7200) return [whole.format(seconds / 60), "min"];
  return [tenth.format(seconds / 3600), "h"];
}

export function time(seconds) {
  return duration(seconds).join(" ").trim();
}

/** The least round number that is at least `value`. */
function ceiling(value) {
  if (value <= 4) return 4;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.2, 1.6, 2, 3, 4, 6, 8, 10].map((step) => step * power).find((round) => round >= value);
}

const LEFT = 40;
const RIGHT = 10;
const TOP = 8;
const BOTTOM = 22;
const ROWS = 4;
const STEPS = [15, 30, 60, 120]; // seconds between marks, of which the least is taken that leaves room for them

/** Lines over the last minutes. `update` takes {title, unit, lines: [{name, values}], note}, one value a second, and how
 * many of the last seconds are to be seen. */
export class Chart {
  constructor(height = 200) {
    this.height = height;
    this.cursor = null; // seconds before now, while somebody points there
    this.heading = el("h2");
    this.legend = el("div", { class: "legend num" });
    this.plot = svg("svg", { class: "plot", role: "img", tabindex: "0", height });
    this.note = el("p", { class: "muted small", hidden: true });
    this.node = el("section", { class: "panel chart" }, el("header", {}, this.heading, this.legend), this.plot, this.note);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.moveTo(null));
    this.plot.addEventListener("blur", () => this.moveTo(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  update(data, seconds) {
    this.data = { ...data, lines: data.lines.map((line) => ({ ...line, values: line.values.slice(-seconds) })) };
    this.note.textContent = data.note;
    this.note.hidden = !data.note;
    this.draw();
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    this.moveTo(Math.round((1 - Math.min(1, Math.max(0, share))) * (this.length() - 1)));
  }

  key(event) {
    const step = { ArrowLeft: 1, ArrowRight: -1, PageUp: 30, PageDown: -30 }[event.key];
    if (step === undefined) return;
    event.preventDefault();
    this.moveTo(Math.min(this.length() - 1, Math.max(0, (this.cursor ?? 0) + step)));
  }

  moveTo(seconds) {
    this.cursor = seconds;
    this.draw();
  }

  length() {
    return this.data ? this.data.lines[0].values.length : 0;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!this.data || !width) return;
    const { title, unit, lines } = this.data;
    const top = ceiling(Math.max(1, ...lines.flatMap((line) => line.values)));
    const right = width - RIGHT;
    const bottom = this.height - BOTTOM;
    const x = (i) => LEFT + ((right - LEFT) * i) / (this.length() - 1);
    const y = (value) => bottom - ((bottom - TOP) * value) / top;
    this.heading.textContent = title;
    this.plot.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.plot.replaceChildren(
      ...this.grid(top, right, y),
      ...this.axis(bottom, right, x),
      ...lines.toReversed().flatMap((line, i) => this.line(line, lines.length - 1 - i, x, y, bottom)),
      ...this.pointer(lines, x, y, bottom),
    );
    this.describe(title, unit, lines);
  }

  grid(top, right, y) {
    const marks = [];
    for (let row = 0; row <= ROWS; row++) {
      const value = (top * row) / ROWS;
      marks.push(svg("line", { class: row ? "grid" : "base", x1: LEFT, x2: right, y1: y(value), y2: y(value) }));
      if (row % 2 === 0) marks.push(svg("text", { x: LEFT - 8, y: y(value) + 4, "text-anchor": "end" }, number(value)));
    }
    return marks;
  }

  axis(bottom, right, x) {
    const marks = [svg("text", { x: right, y: bottom + 16, "text-anchor": "end" }, "now")];
    const seconds = this.length() - 1;
    const fits = (step) => ((right - LEFT) * step) / seconds >= 64 && seconds / step <= 6;
    const step = STEPS.find(fits) ?? STEPS.at(-1);
    for (let past = step; x(seconds - past) > LEFT + 20; past += step) {
      const said = step < 60 ? `−${past} s` : `−${past / 60} min`;
      marks.push(svg("text", { x: x(seconds - past), y: bottom + 16, "text-anchor": "middle" }, said));
    }
    return marks;
  }

  line(line, index, x, y, bottom) {
    const points = line.values.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`);
    const path = svg("path", { class: `line line-${index}`, d: `M${points.join("L")}` });
    if (index) return [path];
    const area = `M${x(0)},${bottom}L${points.join("L")}L${x(line.values.length - 1)},${bottom}Z`;
    return [svg("path", { class: "area", d: area }), path];
  }

  pointer(lines, x, y, bottom) {
    if (this.cursor === null) return [];
    const i = this.length() - 1 - this.cursor;
    return [
      svg("line", { class: "cursor", x1: x(i), x2: x(i), y1: TOP, y2: bottom }),
      ...lines.map((line, index) => svg("circle", { class: `dot dot-${index}`, cx: x(i), cy: y(line.values[i]), r: 3.5 })),
    ];
  }

  describe(title, unit, lines) {
    const i = this.length() - 1 - (this.cursor ?? 0);
    const when = this.cursor ? el("span", { class: "muted" }, `${this.cursor} s ago`) : null;
    const entries = lines.map((line, index) =>
      el("span", { class: `entry key-${index}` }, `${line.name} `, el("b", {}, number(line.values[i]))),
    );
    this.legend.replaceChildren(...[when, ...entries].filter(Boolean), ...(unit ? [el("span", { class: "muted" }, unit)] : []));
    const said = lines.map((line) => `${line.name} ${number(line.values[i])}, highest ${number(Math.max(...line.values))}`);
    this.plot.setAttribute("aria-label", `${title}${unit ? `, ${unit}` : ""}: ${said.join("; ")}. Arrow keys move back in time.`);
  }
}

/** A bar of parts that make a whole. `update` takes {title, unit, parts: [{name, value}]}. */
export class Bar {
  constructor() {
    this.heading = el("h2");
    this.total = el("span", { class: "muted num" });
    this.track = el("div", { class: "bar", role: "img" });
    this.legend = el("dl", { class: "parts num" });
    this.node = el("section", { class: "panel" }, el("header", {}, this.heading, this.total), this.track, this.legend);
  }

  update({ title, unit, parts }) {
    const sum = parts.reduce((all, part) => all + part.value, 0);
    this.heading.textContent = title;
    this.total.textContent = `${number(sum)} ${unit}`;
    this.track.setAttribute("aria-label", parts.map((part) => `${part.name} ${number(part.value)}`).join(", "));
    while (this.track.children.length < parts.length) {
      this.track.append(el("span", { class: `part part-${this.track.children.length}` }));
    }
    parts.forEach((part, i) => (this.track.children[i].style.flexGrow = sum ? part.value / sum : 0));
    this.legend.replaceChildren(
      ...parts.map((part, i) =>
        el("div", { class: `of part-key-${i}` }, el("dt", {}, part.name), el("dd", {}, number(part.value)),
          el("dd", { class: "muted" }, sum ? percent(part.value / sum) : "")),
      ),
    );
  }
}

/** Rows of a table. columns: [title, function from an item to a text, class]. */
export function table(node, columns, items) {
  const head = el("tr", {}, ...columns.map(([title, , kind]) => el("th", { scope: "col", class: kind }, title)));
  const rows = items.map((item) => el("tr", {}, ...columns.map(([, text, kind]) => el("td", { class: kind }, text(item)))));
  node.replaceChildren(el("thead", {}, head), el("tbody", {}, ...rows));
}
