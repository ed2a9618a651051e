// ---- the list

const DUPLICATE = { cosine: 0.7, correlation: 0.8 };
const SHOWN = {
  all: () => true,
  live: (f) => index.max[f] !== null,
  dead: (f) => index.max[f] === null,
  starred: (f) => said(f)[2],
  labelled: (f) => Boolean(said(f)[0] || said(f)[1]),
  duplicates: (f) => index.cosine[f] > DUPLICATE.cosine || index.correlation[f] > DUPLICATE.correlation,
  refining: (f) => index.refines[f] !== null,
};
const CONTROLS = { query: "", scope: "any", show: "all", group: "", at: "" }; // and what each is at first
const LIST_NAMES = { query: "q", scope: "in", show: "show", group: "group", at: "at", sort: "sort", falling: "falling", page: "page" };

/** Which words hold the query; null: it asks for no word. */
function wordsWith(query) {
  const asked = query.trimEnd().replace(/^"(.*)"$/, "$1");
  const wanted = asked.replaceAll("↵", "\n").replaceAll("⇥", "\t").replaceAll("␣", " ").toLowerCase();
  if (!wanted) return null;
  words.lower ??= Array.from(words.ids, (_, word) => text(word).toLowerCase());
  return Uint8Array.from(words.lower, (word) => word.includes(wanted));
}

/** A test of latents by what is typed, and whether it is a number of one. */
function asked() {
  const query = state.query, inContexts = state.scope === "contexts";
  const id = /^\s*\d+\s*$/.test(query) && !inContexts ? Number(query) : null;
  state.found = id === null && !inContexts ? wordsWith(query) : null;
  if (id !== null) return (f) => f === id;
  if (inContexts) return termsOf(query).length ? (f) => state.hits.has(f) : () => true;
  const lists = ["peaks", "promoted", "suppressed"].filter((name) => state.scope === "any" || state.scope === name);
  const named = query.trim().toLowerCase();
  return (f) => !state.found || lists.some((name) => index[name][f]?.some((word) => state.found[word])) ||
    (state.scope === "any" || state.scope === "labels") && said(f).slice(0, 2).some((one) => one.toLowerCase().includes(named));
}

function find() {
  const typed = asked(), shows = SHOWN[state.show] ?? SHOWN.all, group = Number(state.group), at = index.strata.indexOf(state.at);
  const order = [];
  for (let f = 0; f < index.prefix.length; f++) {
    if (typed(f) && shows(f) && (!group || index.prefix[f] === group) && (at < 0 || (index.max[f] !== null && index.stratum[f] === at))) order.push(f);
  }
  const hits = state.scope === "contexts" && state.hits.size > 0;
  if (state.sort === "hits" && !hits) Object.assign(state, { sort: "id", falling: false });
  const sign = state.falling ? -1 : 1;
  const key = state.sort === "hits" ? (f) => weigh(state.hits.get(f)) : (f) => keys[state.sort][f];
  order.sort((a, b) => {
    const one = key(a), other = key(b);
    if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other) || a - b;
    return sign * (one - other) || a - b;
  });
  state.order = order;
  state.page = Math.min(state.page, Math.max(0, Math.ceil(order.length / PAGE) - 1));
}

function drawList() {
  const pages = Math.max(1, Math.ceil(state.order.length / PAGE)), low = state.page * PAGE;
  const contexts = [...state.hits.values()].reduce((sum, one) => sum + one.length, 0);
  $("count").textContent = `${count(state.order.length)} of ${count(index.prefix.length)} latents` +
    (contexts ? `, in ${count(contexts)} of their contexts` : "");
  for (const head of $("heads").children) {
    const here = head.dataset.name === state.sort;
    if (here) head.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
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
    if (name === "id") return h("th", { scope: "row", role: "rowheader" }, link(id), said(id)[2] ? h("span", { class: "soft" }, " ★") : null);
    if (!name) return h("td", { class: "words", role: "cell" }, labelOf(id) ? h("div", { class: "label" }, labelOf(id)) : null, tokensOf(id));
    const cell = h("td", { class: "number", role: "cell", title: name === "density" ? `${share(index.density[id])} of tokens` : null }, told(index[name][id]));
    if (name === "cosine" && index.nearest[id] !== null) cell.append(h("span", { class: "more" }, " to ", link(index.nearest[id])));
    return cell;
  }));
}

/** Tokens at the peaks; those that a search found first, then what of it is promoted, suppressed, or in contexts. */
function tokensOf(id) {
  if (index.max[id] === null) return [h("span", { class: "soft" }, "never active"), ...alsoFound(id)];
  const hit = (word) => Boolean(state.found?.[word]);
  const peaks = [...index.peaks[id]].sort((a, b) => hit(b) - hit(a)).slice(0, 4);
  return [...peaks.map((word) => chip(word, hit(word))), ...alsoFound(id)];
}

function alsoFound(id) {
  const hits = state.hits.get(id);
  if (hits) return [h("div", { class: "soft" }, `in ${hits.length} of its ${state.corpus.contexts[id]} contexts:`), snippet(state.corpus, hits.find(({ atPeak }) => atPeak) ?? hits[0])];
  if (!state.found) return [];
  return [["promoted", "promotes "], ["suppressed", "suppresses "]].flatMap(([name, verb]) => {
    const found = (index[name][id] ?? []).filter((word) => state.found[word]).slice(0, 2);
    return found.length ? [h("div", { class: "soft" }, verb, found.map((word) => chip(word, true)))] : [];
  });
}

function sortBy(name, rising) {
  state.falling = state.sort === name ? !state.falling : !rising;
  state.sort = name;
  state.page = 0;
  find();
  drawList();
  keepAddress();
}

function turn(pages) {
  state.page += pages;
  drawList();
  keepAddress();
  $("all").scrollIntoView();
  // A button that has just been disabled has lost the focus.
  if (document.activeElement === document.body) $(pages > 0 ? "page-back" : "page-on").focus({ preventScroll: true });
}

/** Reads the controls and finds again; a search in contexts first loads their text. */
async function changed() {
  Object.assign(state, Object.fromEntries(Object.keys(CONTROLS).map((name) => [name, $(name).value])), { page: 0 });
  await searched();
  find();
  drawList();
  keepAddress();
}

/** Looks for the query in contexts, if it is asked for there; the latents with the most such contexts come first. */
async function searched() {
  const terms = state.scope === "contexts" ? termsOf(state.query) : [];
  if (!terms.length) { state.hits = new Map(); return; }
  const query = state.query;
  $("count").textContent = "Searching…";
  try {
    state.corpus = await loadText();
  } catch (error) {
    $("state").textContent = `${error.message}. Copy the folder report/ whole.`;
    return;
  }
  if (state.query !== query) return; // typed on meanwhile
  state.hits = searchText(state.corpus, terms);
  Object.assign(state, { sort: "hits", falling: true });
}

// ---- the list's address: what is asked for stands in it, so that it can be sent

function listAddress() {
  const asked = new URLSearchParams();
  const first = { ...CONTROLS, sort: "id", falling: false, page: 0 };
  for (const [name, short] of Object.entries(LIST_NAMES)) {
    if (state[name] !== first[name]) asked.set(short, name === "falling" ? "1" : String(state[name]));
  }
  const told = asked.toString();
  return told ? `#list?${told}` : "#list";
}

function keepAddress() {
  if (!location.hash.startsWith("#latent-")) history.replaceState(null, "", listAddress());
}

/** Puts what the address asks for into the controls; an address without any leaves the list as it is. */
async function readAddress() {
  const told = /^#list\?(.*)$/.exec(location.hash);
  if (!told || location.hash === listAddress()) return;
  const asked = new URLSearchParams(told[1]);
  for (const [name, first] of Object.entries(CONTROLS)) {
    $(name).value = asked.get(LIST_NAMES[name]) ?? first;
    if ($(name).selectedIndex === -1) $(name).value = first; // no such choice here
    state[name] = $(name).value;
  }
  await searched();
  const sort = asked.get("sort"), page = Number(asked.get("page"));
  if (sort in keys || sort === "hits") Object.assign(state, { sort, falling: asked.get("falling") === "1" });
  find();
  state.page = Number.isInteger(page) && page > 0 ? Math.min(page, Math.max(0, Math.ceil(state.order.length / PAGE) - 1)) : 0;
  drawList();
}
