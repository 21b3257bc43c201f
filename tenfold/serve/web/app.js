// The status page: asks /status every second and shows what it says. Charts and bars are whatever the server lists.

import { Bar, Chart, duration, el, number, percent, table, time } from "/web/draw.js";
import { Playground, problem } from "/web/playground.js";

const EVERY = 1000; // milliseconds between questions
const PATIENCE = 5000; // for one answer

const at = (id) => document.getElementById(id);

/** The last values of a line, added up or averaged over some seconds. */
const mean = (values, seconds) => values.slice(-seconds).reduce((sum, value) => sum + value, 0) / seconds;
const line = (model, name) => model.charts.flatMap((chart) => chart.lines).find((found) => found.name === name).values;
const total = (counts) => Object.values(counts).reduce((sum, count) => sum + count, 0);

// Title, [number, unit], and a line below it.
const TILES = [
  ["Throughput", (m) => [number(Math.round(mean(line(m, "generated"), 5) * 10) / 10), "tok/s"],
    (m) => `peak ${number(Math.max(...line(m, "generated")))} in 5 min`],
  ["Time to first token", (m) => duration(m.latency.ttft.p50), (m) => spread(m.latency.ttft)],
  ["Time per token", (m) => duration(m.latency.tpot.p50), (m) => spread(m.latency.tpot)],
  ["Running", (m) => [number(m.stats?.running ?? null), ""], (m) => `${number(m.stats?.waiting ?? null)} waiting`],
  ["Prefix cache hits", (m) => percent(m.prefix_hit_rate).split(" "),
    (m) => `${number(m.stats?.prefix_hit_tokens ?? null)} of ${number(m.stats?.prompt_tokens ?? null)} tokens`],
];

const COUNTS = [
  ["answered", (m) => m.requests.ok ?? 0],
  ["cancelled", (m) => m.requests.cancelled ?? 0],
  ["failed", (m) => total(m.requests) - (m.requests.ok ?? 0) - (m.requests.cancelled ?? 0)],
  ["turned away", (m, server) => total(server.rejections)],
  ["preemptions", (m) => m.stats?.preemptions ?? 0],
  ["engine restarts", (m) => m.restarts],
];

const PERCENTILES = [
  ["", (row) => row.name, ""],
  ["p50", (row) => time(row.p50), "num"],
  ["p90", (row) => time(row.p90), "num"],
  ["p99", (row) => time(row.p99), "num"],
  ["requests", (row) => number(row.count), "num"],
];

const CHOICES = [
  ["Operation", (c) => c.operation ?? "", ""],
  ["Shape", (c) => c.shape ?? "", "num"],
  ["Format", (c) => c.format ?? "", ""],
  ["Batch", (c) => (c.upTo ? `${number(c.batch)}–${number(c.upTo)}` : number(c.batch)), "num right"],
  ["Budget", (c) => number(c.budget), "num right"],
  ["Runs", (c) => c.arm ?? "", "strong"],
  ["Time", (c) => (c.microseconds == null ? "" : time(c.microseconds / 1e6)), "num right"],
  ["Why", (c) => c.why ?? c.source ?? "", "why"],
];

const FACTS = {
  family: "Family", device: "Device", kernels: "Kernels", max_model_len: "Context",
  dtype: "Compute type", kv_cache: "KV cache", kv_dtype: "KV type", weights: "Weights", pages: "KV pages", page_size: "Tokens a page",
  max_batch: "Batch", max_step_tokens: "Tokens a step", prefix_cache: "Prefix cache", schedule: "Schedule", threads: "Threads",
  vocab_size: "Vocabulary",
};

function spread(latency) {
  if (!latency.count) return "no requests in 5 min";
  return ["p90", "p99"].map((name) => `${name} ${time(latency[name])}`.replaceAll(" ", "\u00a0")).join(" · ");
}

// The key stays in this tab and is sent to this server only.

let key = stored("tenfold-key");

function stored(name) {
  try {
    return sessionStorage.getItem(name) ?? "";
  } catch {
    return "";
  }
}

function setKey(value) {
  key = value;
  try {
    if (value) sessionStorage.setItem("tenfold-key", value);
    else sessionStorage.removeItem("tenfold-key");
  } catch {
    // Storage is blocked; the key lasts as long as the page.
  }
}

/** fetch with the key, where one was given; otherwise with what the browser knows. */
function request(path, options = {}) {
  if (!key) return fetch(path, options);
  return fetch(path, { ...options, credentials: "omit", headers: { ...options.headers, authorization: `Bearer ${key}` } });
}

// Panels

const playground = new Playground(request);
const widgets = new Map(); // title -> Chart or Bar
let lasting = new Map(); // model -> what stays the same while its engine runs
let shown = "";
let server = null;

function widget(kind, title, where, ...args) {
  if (!widgets.has(title)) {
    const made = new kind(...args);
    widgets.set(title, made);
    at(where).append(made.node);
  }
  return widgets.get(title);
}

const tiles = TILES.map(([title]) => {
  const value = el("span", { class: "value num" }, "–");
  const unit = el("span", { class: "unit" });
  const note = el("p", { class: "note num" });
  at("tiles").append(el("div", { class: "tile" }, el("h2", {}, title), el("p", { class: "figure" }, value, unit), note));
  return { value, unit, note };
});

const panels = {};
for (const [name, title] of [["latency", "Latency, last 5 minutes"], ["counts", "Since the start"], ["facts", "Model"],
  ["memory", "Memory plan"], ["timeline", "Start-up"]]) {
  const body = el(name === "latency" ? "table" : "div", { class: name });
  const node = el("section", { class: `panel is-${name}` }, el("header", {}, el("h2", {}, title)), body);
  panels[name] = { node, body };
}
at("pair").append(panels.latency.node);
at("stacks").append(el("div", {}, panels.counts.node, panels.memory.node), el("div", {}, panels.facts.node));
at("stacks").after(panels.timeline.node);

function show() {
  const model = server.models.find((found) => found.name === shown) ?? server.models[0];
  shown = model.name;
  head(model);
  tiles.forEach((tile, i) => {
    const [, figure, note] = TILES[i];
    [tile.value.textContent, tile.unit.textContent = ""] = figure(model);
    tile.note.textContent = note(model);
  });
  const seconds = Math.ceil(Math.max(60, server.uptime_seconds)); // of what was before there is nothing to see
  model.charts.forEach((chart, i) => widget(Chart, chart.title, "charts", i ? 130 : 210).update(chart, seconds));
  const titles = new Set([...model.charts, ...model.bars].map(({ title }) => title));
  for (const [title, { node }] of widgets) node.hidden = widgets.size > titles.size && !titles.has(title);
  model.bars.forEach((bar) => widget(Bar, bar.title, "pair").update(bar));
  table(panels.latency.body, PERCENTILES, [
    { name: "First token", ...model.latency.ttft },
    { name: "Per token", ...model.latency.tpot },
  ]);
  pairs(panels.counts.body, COUNTS.map(([name, count]) => [name, number(count(model, server))]));
}

function head(model) {
  at("version").textContent = server.version;
  at("uptime").textContent = `up ${time(Math.round(server.uptime_seconds)).replace(".0 s", " s")}`;
  const state = server.draining ? "draining" : model.state;
  if (at("state").textContent !== state) at("state").textContent = state;
  at("state").dataset.state = state;
  const names = server.models.map((found) => found.name);
  at("name").textContent = names.length > 1 ? "" : model.name;
  at("shown").parentElement.hidden = names.length < 2;
  if (at("shown").childElementCount !== names.length) {
    at("shown").replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    at("shown").value = shown;
    playground.models(server.models);
  }
  document.title = `${model.name} · ${state} · Tenfold`;
}

/** What does not change from second to second. */
function showLasting() {
  const model = lasting.get(shown);
  if (!model) return;
  const facts = Object.keys(FACTS).filter((name) => model.facts[name] || model.facts[name] === false);
  pairs(panels.facts.body, facts.map((name) => [FACTS[name], plain(model.facts[name]), model.facts[`${name}_reason`]]));
  pairs(panels.memory.body, model.memory.split("\n").filter(Boolean).map((row) => row.trim().split(/\s{2,}/)));
  phases(model.timeline);
  at("choices").hidden = !model.choices.length;
  choices();
}

function plain(value) {
  if (typeof value === "boolean") return value ? "on" : "off";
  return typeof value === "number" ? number(value) : value;
}

/** Rows of a name, a value and perhaps a remark. */
function pairs(node, rows) {
  node.replaceChildren(el("dl", {}, ...rows.map(([name, value = "", remark]) =>
    el("div", {}, el("dt", {}, name), el("dd", { class: "num" }, value), remark ? el("dd", { class: "remark num" }, remark) : null))));
}

/** Phases one after the other, as wide as they were long. */
function phases(timeline) {
  const sum = timeline.reduce((all, phase) => all + phase.seconds, 0);
  const bar = el("div", { class: "bar", role: "img", "aria-label": timeline.map((p) => `${p.phase} ${time(p.seconds)}`).join(", ") });
  timeline.forEach(({ seconds }, i) => {
    bar.append(el("span", { class: `part phase-${i % 6}` }));
    bar.lastChild.style.flexGrow = seconds / sum;
  });
  const names = timeline.map(({ phase, seconds }, i) =>
    el("div", { class: `of phase-key-${i % 6}` }, el("dt", {}, phase), el("dd", {}, time(seconds))));
  names.push(el("div", { class: "of all" }, el("dt", {}, "total"), el("dd", {}, time(sum))));
  panels.timeline.node.hidden = !timeline.length;
  panels.timeline.body.replaceChildren(bar, el("dl", { class: "parts num" }, ...names));
}

const told = (choice) => CHOICES.map(([, cell]) => cell(choice));

function choices() {
  const all = lasting.get(shown)?.choices ?? [];
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = all.filter((choice) => {
    const text = told(choice).join(" ").toLowerCase();
    return words.every((word) => text.includes(word));
  });
  at("choices-count").textContent = words.length ? `${found.length} of ${all.length}` : `${all.length} choices`;
  table(at("choices-table"), CHOICES.filter(([, cell]) => all.some((choice) => cell(choice) !== "")), joined(found));
}

/** Choices one after the other that differ in their batch only, as one. */
function joined(found) {
  const rows = [];
  let last = "";
  for (const choice of found) {
    const same = told({ ...choice, batch: 0 }).join("\n");
    if (same === last) rows.at(-1).upTo = choice.batch;
    else rows.push({ ...choice });
    last = same;
  }
  return rows;
}

// Asking

function notice(sentence) {
  at("notice").textContent = sentence;
  at("notice").hidden = !sentence;
}

/** Whether something that stays the same is missing, or an engine was started anew. */
function isOld(status) {
  return status.models.some((model) => lasting.get(model.name)?.restarts !== model.restarts || lasting.get(model.name)?.state !== model.state);
}

async function ask() {
  const response = await request(server ? "/status?brief=1" : "/status", { signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Error(await problem(response));
  const status = await response.json();
  const first = !server;
  server = status;
  if (first) keep(status);
  show();
  if (first) showLasting();
  else if (isOld(status)) await renew();
}

function keep(status) {
  lasting = new Map(status.models.map((model) => [model.name, model]));
}

async function renew() {
  const response = await request("/status", { signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) return;
  keep(await response.json());
  showLasting();
}

async function turn() {
  try {
    if (!document.hidden) {
      await ask();
      notice("");
    }
  } catch (error) {
    const lost = error instanceof TypeError || error.name === "TimeoutError";
    notice(lost ? "The server does not answer. This page keeps trying." : error.message);
    at("state").textContent = lost ? "offline" : "no access";
    at("state").dataset.state = "failed";
  }
  setTimeout(turn, EVERY);
}

// Controls

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function labelTheme() {
  at("theme").textContent = dark() ? "Light" : "Dark";
  at("theme").setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`);
}

at("theme").addEventListener("click", () => {
  const next = dark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  try {
    localStorage.setItem("tenfold-theme", next);
  } catch {
    // Storage is blocked; the choice lasts as long as the page.
  }
  labelTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", labelTheme);

at("key-open").addEventListener("click", () => openKey(at("key-form").hidden));

function openKey(open) {
  at("key-form").hidden = !open;
  at("key-open").setAttribute("aria-expanded", open);
  if (open) at("key").focus();
}

at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value.trim());
  at("key").value = "";
  openKey(false);
});

at("key-forget").addEventListener("click", () => {
  setKey("");
  openKey(false);
});

at("shown").addEventListener("change", () => {
  shown = at("shown").value;
  show();
  showLasting();
});

at("search").addEventListener("input", choices);

labelTheme();
turn();
