// The browser of latents. Data come as scripts (see browser.py): each calls a function of `transcoderCache`.
// Whatever is of a corpus reaches the page as text nodes and titles alone, never as HTML.
"use strict";

const PAGE = 50; // latents of a page of the list
const LONG = { chip: 24, context: 60 }; // characters of a token that are shown
const HELD_CHUNKS = 6;
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;
const SIGNS = { "\n": "↵", "\r": "␍", "\t": "⇥" };
const COLUMNS = [
  { name: "id", title: "Latent", rising: true },
  { title: "Tokens at its peaks" },
  { name: "density", title: "Density", told: rarity },
  { name: "max", title: "Max", told: number },
  { name: "position_0_share", title: "Position 0", told: share },
  { name: "cosine", title: "Nearest", told: number },
];

const $ = (id) => document.getElementById(id);
const state = {
  query: "", scope: "any", show: "all", group: "", at: "", sort: "id", falling: false, page: 0,
  found: null, // which words hold the query
  hits: new Map(), // the contexts that do, by latent
  corpus: null, // the text of contexts, once it is loaded
  order: [],
};
let index, words, keys; // keys: of each column that sorts, a number per latent, NaN where there is none
let values = false; // whether they are printed beside tokens
let shown = null; // the latent that is shown
let listScroll = 0;

// ---- data

async function unpack(packed) {
  const text = atob(packed), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const arrived = {};
const first = new Promise((resolve) => {
  const part = (name) => (packed) => {
    arrived[name] = unpack(packed);
    if (arrived.index && arrived.tokens) resolve(Promise.all([arrived.index, arrived.tokens]));
  };
  globalThis.transcoderCache = {
    index: part("index"),
    tokens: part("tokens"),
    chunk: (n, packed) => unpack(packed).then(waiting.get(n).resolve, waiting.get(n).reject),
  };
});

const waiting = new Map(); // by chunk: what to do with what its script brings
const chunks = new Map(); // promises, the newest last

function chunk(n) {
  const held = chunks.get(n) ?? new Promise((resolve, reject) => {
    const script = h("script", { src: `latents/${String(n).padStart(3, "0")}.js` });
    const failed = () => { chunks.delete(n); reject(new Error(`cannot read ${script.getAttribute("src")}`)); };
    waiting.set(n, { resolve, reject: failed });
    script.onerror = failed;
    script.onload = () => script.remove();
    document.head.append(script);
  });
  chunks.delete(n);
  chunks.set(n, held);
  if (chunks.size > HELD_CHUNKS) chunks.delete(chunks.keys().next().value);
  return held;
}

/** The part of its chunk that is of one latent. */
function ofLatent(data, id) {
  const at = id % index.chunk;
  const before = data.contexts.slice(0, at).reduce((a, b) => a + b, 0);
  let token = data.length.slice(0, before).reduce((a, b) => a + b, 0);
  const contexts = [];
  for (let i = before; i < before + data.contexts[at]; i++) {
    const end = token + data.length[i];
    contexts.push({
      bin: data.bin[i], activation: data.activation[i], position: data.position[i],
      sequence: data.sequence[i], document: data.document[i], peak: data.peak[i],
      tokens: data.tokens.slice(token, end), values: data.values.slice(token, end),
    });
    token = end;
  }
  return { at, contexts };
}

// ---- text

/** An element; strings become text nodes, whatever they hold. */
function h(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function number(value) {
  if (value === null || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  const told = !size ? "0" : size < 1e-4 ? value.toExponential(2) : size < 1000 ? value.toPrecision(3) : count(value);
  return told.replaceAll("-", "−");
}

function share(value) {
  return value === null || Number.isNaN(value) ? "–" : value === 1 ? "100%" : `${number(value * 100)}%`;
}

const count = (n) => n.toLocaleString("en");
const text = (word) => words.texts?.[word] ?? `#${words.ids[word]}`;

/** A token as it is shown: what is not seen by a sign, at most `long` characters. */
function visible(string, long, edges) {
  let told = string.slice(0, 1000);
  if (edges) {
    told = told.replace(/^ +| +$|(?<=\n) +/g, (run) => (run.length < 4 ? "␣".repeat(run.length) : `␣×${run.length}`));
  }
  told = told.replace(UNSEEN, (c) => SIGNS[c] ?? `[U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
  const characters = Array.from(told);
  if (characters.length <= long && string.length <= 1000) return told;
  return `${characters.slice(0, long).join("")}… (${count(string.length)} characters)`;
}

const chip = (word, found) =>
  h("span", { class: `token chip${found ? " found" : ""}`, title: `token ${words.ids[word]}` },
    visible(text(word), LONG.chip, true));

const link = (id) => h("a", { href: `#latent-${id}` }, String(id));

// ---- moving about

function open(id) {
  if (id !== null) location.hash = `latent-${id}`;
}

/** Any active latent of the list as it is filtered. */
function openRandom() {
  const among = state.order.filter((f) => index.max[f] !== null && f !== shown);
  open(among.length ? among[Math.floor(Math.random() * among.length)] : null);
}

function view(name, title) {
  $("all").hidden = name !== "all";
  $("one").hidden = name !== "one";
  $("state").textContent = "";
  document.title = `${title} · ${$("run").textContent}`;
}

async function route() {
  const asked = /^#latent-(\d+)(?:,(\d+))?$/.exec(location.hash);
  const ids = asked ? asked.slice(1).filter((one) => one !== undefined).map(Number) : [];
  if (!$("all").hidden) listScroll = scrollY;
  if (ids.length && ids.every((id) => id < index.prefix.length)) {
    const drawn = ids.length === 1 ? drawLatent(ids[0]) : drawTwo(ids);
    drawn.catch((error) => { $("state").textContent = `Latent ${ids.join(" and ")}: ${error.message}.`; });
    return;
  }
  const last = shown;
  shown = null;
  view("all", "Latents");
  if (asked) $("state").textContent = `There is no latent ${Math.max(...ids)}: they end at ${index.prefix.length - 1}.`;
  await readAddress();
  if (shown !== null) return; // a latent was asked for meanwhile
  if (last !== null) drawList(); // what people say of it may have changed
  scrollTo({ top: listScroll, behavior: "instant" });
  if (last !== null) $("rows").querySelector(`th a[href="#latent-${last}"]`)?.focus({ preventScroll: true });
}

function pressed(event) {
  if (!$("shortcuts").checked) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea")) return;
  const next = shown !== null && beside(shown), key = event.key;
  const act = {
    "/": () => { if (shown !== null) location.hash = listAddress(); setTimeout(() => $("query").focus()); },
    r: openRandom,
    ...(next && {
      j: () => open(next.on), ArrowRight: () => open(next.on), k: () => open(next.back), ArrowLeft: () => open(next.back),
      v: () => $("values").click(), u: () => { location.hash = listAddress(); }, Escape: () => { location.hash = listAddress(); },
      s: () => $("one").querySelector(".star").click(),
    }),
  }[key];
  if (!act) return;
  event.preventDefault();
  act();
}

function listen() {
  let timer;
  $("query").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(changed, 120); });
  $("query").addEventListener("keydown", async (event) => {
    if (event.key !== "Enter") return;
    clearTimeout(timer);
    await changed();
    open(state.order[0] ?? null);
  });
  for (const name of ["scope", "show", "group", "at"]) $(name).addEventListener("change", changed);
  $("random").addEventListener("click", openRandom);
  $("labels-json").addEventListener("click", () => save("json"));
  $("labels-csv").addEventListener("click", () => save("csv"));
  $("labels-file").addEventListener("change", async (event) => {
    for (const file of event.target.files) await importLabels(file);
    event.target.value = "";
  });
  $("page-back").addEventListener("click", () => turn(-1));
  $("page-on").addEventListener("click", () => turn(1));
  addEventListener("hashchange", route);
  addEventListener("keydown", pressed);
}

async function start() {
  if (!globalThis.DecompressionStream) {
    $("state").textContent =
      "This browser cannot unpack the page's data. Use Chrome or Edge 97, Firefox 113 or Safari 16.4, or a later one.";
    return;
  }
  try {
    [index, words] = await first;
  } catch (error) {
    $("state").textContent = `The page's data cannot be read (${error.message}). Make the report again.`;
    return;
  }
  const column = (name) => Float64Array.from(index[name], (value) => value ?? NaN);
  keys = { id: Float64Array.from(index.prefix, (_, id) => id) };
  for (const { name } of COLUMNS) if (name && name !== "id") keys[name] = column(name);
  $("heads").append(...COLUMNS.map(({ name, title, rising }) =>
    h("th", { scope: "col", role: "columnheader", class: !name ? "words" : name === "id" ? null : "number", "data-name": name },
      name ? h("button", { type: "button", onclick: () => sortBy(name, rising) }, title) : title)));
  const option = (value, told) => h("option", { value }, told);
  const groups = [...new Set(index.prefix)].sort((a, b) => a - b);
  $("group").append(...groups.map((size, i) => option(String(size), `${i ? count(groups[i - 1]) : 0} to ${count(size - 1)}`)));
  $("at").append(...index.strata.map((name) => option(name, positions(name))));
  loadLabels();
  toldLabels();
  listen();
  find();
  drawList();
  await route();
}

addEventListener("DOMContentLoaded", start);
// Scripts that are missing call nothing: they are noticed by their error.
for (const script of document.querySelectorAll("script[src]")) {
  script.addEventListener("error", () => { $("state").textContent = `${script.getAttribute("src")} is missing. Copy the folder report/ whole.`; });
}
