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
  { name: "density", title: "Density", told: share },
  { name: "max", title: "Max", told: number },
  { name: "position_0_share", title: "Position 0", told: share },
  { name: "cosine", title: "Nearest", told: number },
];

const $ = (id) => document.getElementById(id);
const state = { query: "", scope: "any", alive: "all", sort: "id", falling: false, page: 0, found: null, order: [] };
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

// ---- the list

/** Which words hold the query; null: it asks for no word. */
function wordsWith(query) {
  const asked = query.trimEnd().replace(/^"(.*)"$/, "$1");
  const wanted = asked.replaceAll("↵", "\n").replaceAll("⇥", "\t").replaceAll("␣", " ").toLowerCase();
  if (!wanted) return null;
  words.lower ??= Array.from(words.ids, (_, word) => text(word).toLowerCase());
  return Uint8Array.from(words.lower, (word) => word.includes(wanted));
}

function find() {
  const query = state.query, d_sae = index.prefix.length;
  const id = /^\s*\d+\s*$/.test(query) ? Number(query) : null;
  state.found = id === null ? wordsWith(query) : null;
  const lists = ["peaks", "promoted", "suppressed"].filter((name) => state.scope === "any" || state.scope === name);
  const holds = (latent) => lists.some((name) => index[name][latent]?.some((word) => state.found[word]));
  const alive = { all: () => true, live: (f) => index.max[f] !== null, dead: (f) => index.max[f] === null }[state.alive];
  const order = [];
  for (let f = 0; f < d_sae; f++) {
    if (id !== null ? f === id : alive(f) && (!state.found || holds(f))) order.push(f);
  }
  const key = keys[state.sort], sign = state.falling ? -1 : 1;
  order.sort((a, b) => {
    const one = key[a], other = key[b];
    if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other) || a - b;
    return sign * (one - other) || a - b;
  });
  state.order = order;
  state.page = 0;
}

function drawList() {
  const pages = Math.max(1, Math.ceil(state.order.length / PAGE)), low = state.page * PAGE;
  $("count").textContent = `${count(state.order.length)} of ${count(index.prefix.length)} latents`;
  for (const head of $("heads").children) {
    const mine = head.dataset.name === state.sort;
    if (mine) head.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  $("rows").replaceChildren(...state.order.slice(low, low + PAGE).map(row));
  $("page-number").textContent = `Page ${count(state.page + 1)} of ${count(pages)}`;
  $("page-back").disabled = state.page === 0;
  $("page-on").disabled = state.page >= pages - 1;
}

function row(id) {
  // Roles, since on a phone the style lays rows out as grids, which takes those of a table away.
  return h("tr", { role: "row" }, COLUMNS.map(({ name, told }) => {
    if (name === "id") return h("th", { scope: "row", role: "rowheader" }, link(id));
    if (!name) return h("td", { class: "words", role: "cell" }, tokensOf(id));
    const cell = h("td", { class: "number", role: "cell" }, told(index[name][id]));
    if (name === "cosine" && index.nearest[id] !== null) cell.append(h("span", { class: "more" }, " to ", link(index.nearest[id])));
    return cell;
  }));
}

/** Tokens at the peaks; those that a search found first, then what of it is promoted or suppressed. */
function tokensOf(id) {
  if (index.max[id] === null) return [h("span", { class: "soft" }, "never active"), ...alsoFound(id)];
  const hit = (word) => Boolean(state.found?.[word]);
  const peaks = [...index.peaks[id]].sort((a, b) => hit(b) - hit(a)).slice(0, 4);
  return [...peaks.map((word) => chip(word, hit(word))), ...alsoFound(id)];
}

function alsoFound(id) {
  if (!state.found) return [];
  return [["promoted", "promotes "], ["suppressed", "suppresses "]].flatMap(([name, verb]) => {
    const hits = (index[name][id] ?? []).filter((word) => state.found[word]).slice(0, 2);
    return hits.length ? [h("div", { class: "soft" }, verb, hits.map((word) => chip(word, true)))] : [];
  });
}

function sortBy(name, rising) {
  state.falling = state.sort === name ? !state.falling : !rising;
  state.sort = name;
  find();
  drawList();
}

function turn(pages) {
  state.page += pages;
  drawList();
  $("all").scrollIntoView();
  // A button that has just been disabled has lost the focus.
  if (document.activeElement === document.body) $(pages > 0 ? "page-back" : "page-on").focus({ preventScroll: true });
}

// ---- one latent

async function drawLatent(id) {
  shown = id;
  const data = await chunk(Math.floor(id / index.chunk));
  if (shown !== id) return; // another was asked for meanwhile
  const { at, contexts } = ofLatent(data, id);
  const draw = () => $("contexts").replaceChildren(...samples(id, contexts, data.bin_edges[at]));
  const toggle = h("button", { type: "button", id: "values", "aria-pressed": String(values) }, "Show values");
  toggle.addEventListener("click", () => {
    values = !values;
    toggle.setAttribute("aria-pressed", String(values));
    draw();
  });
  $("one").replaceChildren(
    moves(id),
    h("h2", { id: "title", tabindex: "-1" }, `Latent ${id}`),
    figures(id),
    h("div", { class: "split" },
      h("div", { class: "facts" },
        profile(id, data, at),
        h("div", { class: "pair" },
          effects("Promoted tokens", index.promoted[id], data.promoted_effects[at]),
          effects("Suppressed tokens", index.suppressed[id], data.suppressed_effects[at])),
        labels(data, at),
        neighbours("Nearest by cosine of decoder rows", "Cosine", data.nearest_latents[at], data.nearest_cosines[at]),
        neighbours("Most correlated on held-out rows", "Correlation", data.correlated_latents[at], data.correlations[at])),
      h("div", {},
        h("div", { class: "controls" }, h("h3", {}, "Contexts"), toggle),
        h("div", { id: "contexts" }))),
  );
  draw();
  view("one", `Latent ${id}`);
  $("title").focus({ preventScroll: true });
  scrollTo({ top: 0, behavior: "instant" });
}

/** The latents before and after this one in the list as it is filtered and sorted; by number if it is not in there. */
function beside(id) {
  const at = state.order.indexOf(id);
  if (at < 0) return { told: "", back: id > 0 ? id - 1 : null, on: id + 1 < index.prefix.length ? id + 1 : null };
  const told = `${count(at + 1)} of ${count(state.order.length)} in the list`;
  return { told, back: state.order[at - 1] ?? null, on: state.order[at + 1] ?? null };
}

function moves(id) {
  const { told, back, on } = beside(id);
  const button = (label, to) => h("button",
    { type: "button", disabled: to === null, "aria-label": `${label} latent`, onclick: () => open(to) }, label);
  return h("nav", { class: "controls", "aria-label": "Latents" },
    h("a", { href: "#list" }, "All latents"), button("Previous", back), button("Next", on),
    h("span", { class: "soft" }, told));
}

function figures(id) {
  const facts = {
    density: share(index.density[id]), max: number(index.max[id]), mean: number(index.mean[id]),
    "Position 0": share(index.position_0_share[id]), prefix: count(index.prefix[id]),
  };
  return h("dl", { class: "figures" }, Object.entries(facts).map(([name, told]) =>
    h("div", {}, h("dt", {}, name), h("dd", {}, told))));
}

const panel = (title, ...content) => h("section", { "aria-label": title }, h("h3", {}, title), ...content);
const none = (why) => h("p", { class: "soft" }, why);

function positions(stratum) {
  const [start, stop] = stratum.split("-").map(Number);
  return stop - start === 1 ? String(start) : `${start}–${stop - 1}`;
}

function profile(id, data, at) {
  const densities = index.strata.map((name) => data[`density_${name}`][at]), largest = Math.max(...densities);
  const rows = index.strata.map((name, i) => {
    const bar = h("div", { class: "bar", "aria-hidden": "true" });
    bar.style.width = `${largest ? (100 * densities[i]) / largest : 0}%`;
    return h("tr", {}, h("th", { scope: "row" }, positions(name)), h("td", { class: "number" }, share(densities[i])),
      h("td", {}, densities[i] ? bar : ""));
  });
  const head = h("tr", {}, h("th", { scope: "col" }, "Positions"), h("th", { scope: "col", class: "number" }, "Active on"), h("td", {}));
  return panel("Density by position", h("table", { class: "bars" }, h("thead", {}, head), h("tbody", {}, rows)));
}

function effects(title, tokens, logits) {
  if (!tokens) return panel(title, none("Not known: the store has no unembedding, or its targets are not part of the residual stream."));
  const rows = tokens.map((word, i) =>
    h("tr", {}, h("td", {}, chip(word)), h("td", { class: "number" }, `${logits[i] > 0 ? "+" : ""}${number(logits[i])}`)));
  const head = h("tr", {}, h("th", { scope: "col" }, "Token"), h("th", { scope: "col", class: "number" }, "Logit"));
  return panel(title, h("table", {}, h("thead", {}, head), h("tbody", {}, rows)));
}

function labels(data, at) {
  const title = "Labels of tokens", names = data.labels[at];
  if (!names) return panel(title, none("Not measured: python -m train probe RUN, and then the report again."));
  if (!names.length) return panel(title, none("None: it is not active on the rows that labels are chosen on."));
  const of = (name, i) => number(data[`label_${name}`][at][i]);
  const rows = names.map((name, i) => h("tr", {}, h("th", { scope: "row" }, name),
    h("td", { class: "number" }, `${of("f1", i)} (${of("f1_low", i)} to ${of("f1_high", i)})`),
    ...["precision", "recall", "auroc"].map((figure) => h("td", { class: "number" }, of(figure, i)))));
  const heads = ["Label", "F1", "Precision", "Recall", "AUROC"].map((name, i) =>
    h("th", { scope: "col", class: i ? "number" : null }, name));
  const table = h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
  return panel(title, h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Figures of labels" }, table));
}

function neighbours(title, measure, latents, measured) {
  if (!latents.length) return panel(title, none("None."));
  const rows = latents.map((id, i) => h("tr", {}, h("th", { scope: "row" }, link(id)),
    h("td", { class: "number" }, number(measured[i])), h("td", {}, index.peaks[id].slice(0, 4).map((word) => chip(word)))));
  const heads = ["Latent", measure, "Tokens at its peaks"].map((name, i) =>
    h("th", { scope: "col", class: i === 1 ? "number" : null }, name));
  return panel(title, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows)));
}

function samples(id, contexts, edges) {
  if (!contexts.length) return [none("It is not active on any of the rows that were sampled.")];
  const made = [];
  contexts.forEach((context, i) => {
    if (!i || context.bin !== contexts[i - 1].bin) made.push(h("h4", {}, group(context.bin, edges)));
    made.push(sample(context, index.max[id]));
  });
  return made;
}

function group(bin, edges) {
  if (bin === null) return "Top activations";
  const range = edges ? `, activations ${number(edges[bin])} to ${number(edges[bin + 1])}` : "";
  const end = bin === index.bins - 1 ? " (strongest)" : bin === 0 ? " (weakest)" : "";
  return `Quantile bin ${bin + 1} of ${index.bins}${end}${range}`;
}

function sample(context, max) {
  const tokens = context.tokens.map((word, i) => token(word, context.values[i], i === context.peak, max));
  const where = `position ${count(context.position)} · sequence ${count(context.sequence)} · document ${count(context.document)}`;
  return h("div", { class: "sample" },
    h("div", { class: "number", title: "activation at the peak" }, number(context.activation)),
    h("p", { class: "context", dir: "auto" }, tokens), h("div", { class: "soft" }, where));
}

function token(word, value, peak, max) {
  const told = value === null ? "not in the store" : `activation ${number(value)}`;
  const kind = value === null ? " unknown" : value > 0 ? " on" : "";
  const made = h(peak ? "strong" : "span", { class: `token${kind}${peak ? " peak" : ""}`, title: `${told} · token ${words.ids[word]}` },
    visible(text(word), LONG.context, false));
  // By the object model, which the page's content security policy lets scripts use: it forbids style attributes.
  if (value > 0) made.style.backgroundColor = `rgba(var(--heat), ${(0.08 + 0.42 * Math.min(1, value / max)).toFixed(3)})`;
  if (values && value > 0) made.append(h("span", { class: "value" }, number(value)));
  return made;
}

// ---- moving about

function open(id) {
  if (id !== null) location.hash = `latent-${id}`;
}

function view(name, title) {
  $("all").hidden = name !== "all";
  $("one").hidden = name !== "one";
  $("state").textContent = "";
  document.title = `${title} · ${$("run").textContent}`;
}

function route() {
  const asked = /^#latent-(\d+)$/.exec(location.hash);
  if (!$("all").hidden) listScroll = scrollY;
  if (asked && Number(asked[1]) < index.prefix.length) {
    drawLatent(Number(asked[1])).catch((error) => { $("state").textContent = `Latent ${asked[1]}: ${error.message}.`; });
    return;
  }
  const last = shown;
  shown = null;
  view("all", "Latents");
  if (asked) $("state").textContent = `There is no latent ${asked[1]}: they end at ${index.prefix.length - 1}.`;
  scrollTo({ top: listScroll, behavior: "instant" });
  if (last !== null) $("rows").querySelector(`th a[href="#latent-${last}"]`)?.focus({ preventScroll: true });
}

function pressed(event) {
  if (!$("shortcuts").checked) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest?.("input, select, textarea")) return;
  const next = shown !== null && beside(shown), key = event.key;
  const act = {
    "/": () => { if (shown !== null) location.hash = "list"; setTimeout(() => $("query").focus()); },
    ...(next && {
      j: () => open(next.on), ArrowRight: () => open(next.on), k: () => open(next.back), ArrowLeft: () => open(next.back),
      v: () => $("values").click(), u: () => { location.hash = "list"; }, Escape: () => { location.hash = "list"; },
    }),
  }[key];
  if (!act) return;
  event.preventDefault();
  act();
}

function listen() {
  let timer;
  const changed = () => {
    Object.assign(state, { query: $("query").value, scope: $("scope").value, alive: $("alive").value });
    find();
    drawList();
  };
  $("query").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(changed, 120); });
  $("query").addEventListener("keydown", (event) => {
    if (event.key !== "Enter") return;
    clearTimeout(timer);
    changed();
    open(state.order[0] ?? null);
  });
  for (const name of ["scope", "alive"]) $(name).addEventListener("change", changed);
  $("page-back").addEventListener("click", () => turn(-1));
  $("page-on").addEventListener("click", () => turn(1));
  addEventListener("hashchange", route);
  addEventListener("keydown", pressed);
}

async function start() {
  if (!globalThis.DecompressionStream) {
    $("state").textContent =
      "This browser cannot unpack the page's data. Use Chrome or Edge 80, Firefox 113 or Safari 16.4, or a later one.";
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
  Object.assign(state, { query: $("query").value, scope: $("scope").value, alive: $("alive").value });
  find();
  drawList();
  listen();
  route();
}

addEventListener("DOMContentLoaded", start);
// Scripts that are missing call nothing: they are noticed by their error.
for (const script of document.querySelectorAll("script[src]")) {
  script.addEventListener("error", () => { $("state").textContent = `${script.getAttribute("src")} is missing. Copy the folder report/ whole.`; });
}
