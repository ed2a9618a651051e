// ---- the text of contexts: longer ones, and search for words in all of them

const BEYOND = 96; // tokens that a longer context has on each side
const SNIPPET = 7; // tokens around what was found that the list shows

let corpus = null; // a promise; loaded when it is first asked for

function loadText() {
  corpus ??= new Promise((resolve, reject) => {
    const script = h("script", { src: "latents/text.js" });
    script.onerror = () => { corpus = null; reject(new Error("cannot read latents/text.js")); };
    transcoderCache.text = (packed) => unpack(packed).then((found) => resolve(ready(found)), reject);
    document.head.append(script);
  });
  return corpus;
}

/** Adds the tokens that no context shows, and where the contexts of each sequence and each latent are. */
function ready(found) {
  const known = words.ids.length;
  words.ids = words.ids.concat(found.ids);
  if (found.texts) words.texts = words.texts.concat(found.texts);
  words.lower = null;
  found.known = known;
  found.starts = [0];
  for (const n of found.contexts) found.starts.push(found.starts.at(-1) + n);
  found.latent = new Uint32Array(found.sequence.length);
  found.contexts.forEach((n, id) => found.latent.fill(id, found.starts[id], found.starts[id] + n));
  found.inside = found.breaks.map(() => []);
  found.sequence.forEach((sequence, i) => { if (sequence >= 0) found.inside[sequence].push(i); });
  return found;
}

/** Each sequence in small letters, and which token each character is of. */
function letters(found) {
  if (found.letters) return found.letters;
  const lower = words.ids.map((_, word) => text(word).slice(0, 1000).toLowerCase());
  return (found.letters = found.breaks.map((_, s) => {
    const low = s * found.width, parts = [], ends = new Uint32Array(found.width);
    let length = 0;
    for (let i = 0; i < found.width; i++) {
      const part = lower[found.tokens[low + i]];
      parts.push(part);
      length += part.length;
      ends[i] = length;
    }
    return { text: parts.join(""), ends };
  }));
}

/** What is asked for: words, and phrases in quotes. All of them must be in one context. */
function termsOf(query) {
  const found = query.toLowerCase().replaceAll("↵", "\n").replaceAll("⇥", "\t").replaceAll("␣", " ");
  return Array.from(found.matchAll(/"([^"]+)"|(\S+)/g), (match) => match[1] ?? match[2]);
}

function tokenAt(ends, character) {
  let low = 0, high = ends.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > character) high = middle; else low = middle + 1;
  }
  return low;
}

/** The contexts that hold all of `terms`: a map from latents to [{ context, places }], places being [first, last] token. */
function searchText(found, terms) {
  const hits = new Map();
  if (!terms.length) return hits;
  letters(found).forEach(({ text: whole, ends }, s) => {
    if (!terms.every((term) => whole.includes(term))) return;
    const places = terms.map((term) => {
      const made = [];
      for (let at = whole.indexOf(term); at >= 0; at = whole.indexOf(term, at + 1)) {
        made.push([tokenAt(ends, at), tokenAt(ends, at + term.length - 1)]);
      }
      return made;
    });
    for (const i of found.inside[s]) {
      const low = found.first[i], high = low + found.length[i];
      const match = places.map((of) => of.find(([from, to]) => from >= low && to < high));
      if (!match.every(Boolean)) continue;
      const latent = found.latent[i];
      if (!hits.has(latent)) hits.set(latent, []);
      hits.get(latent).push({ context: i, places: match, atPeak: match.some(([from, to]) => from <= found.peak[i] + low && found.peak[i] + low <= to) });
    }
  });
  return hits;
}

/** How well contexts fit a search: those in which the latent is strongest on what was asked for count twice. */
const weigh = (hits) => hits?.reduce((sum, { atPeak }) => sum + (atPeak ? 2 : 1), 0) ?? 0;

/** The tokens around what was found in a context, for the list. */
function snippet(found, { context, places }) {
  const row = found.sequence[context] * found.width, first = found.first[context];
  const from = Math.min(...places.map(([a]) => a)), to = Math.max(...places.map(([, b]) => b));
  const low = Math.max(first, from - SNIPPET), high = Math.min(first + found.length[context], to + 1 + SNIPPET);
  const tokens = [];
  for (let i = low; i < high; i++) {
    const string = visible(text(found.tokens[row + i]), LONG.chip, false);
    tokens.push(places.some(([a, b]) => a <= i && i <= b) ? h("mark", {}, string) : string);
  }
  return h("div", { class: "snippet soft", dir: "auto" }, tokens);
}

/** The sequence around a context, as far as its document goes: tokens and where the context begins among them. */
function around(found, context) {
  const s = found.sequence[context], row = s * found.width, first = found.first[context], length = found.length[context];
  const breaks = [0, ...found.breaks[s], found.width];
  const inside = breaks.findLastIndex((edge) => edge <= first), after = breaks.findIndex((edge) => edge >= first + length);
  const low = Math.max(breaks[inside], first - BEYOND), high = Math.min(breaks[after], first + length + BEYOND);
  return { before: found.tokens.slice(row + low, row + first), after: found.tokens.slice(row + first + length, row + high) };
}

/** Breaks the lines of all text in `paragraph` after each ↵, or takes these breaks out again. */
function breakLines(paragraph, broken) {
  const walk = document.createTreeWalker(paragraph, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const plain = walk.currentNode.data.replaceAll("↵\n", "↵");
    walk.currentNode.data = broken ? plain.replaceAll("↵", "↵\n") : plain;
  }
}

/** A button that shows more of the sequence around the `nth` context of a latent, on its own lines, and less again. */
function longer(id, nth, paragraph) {
  const told = h("span", { role: "status" });
  const button = h("button", { type: "button", class: "plain", "aria-expanded": "false" }, "more text");
  const beyond = (tokens) => tokens.map((word) =>
    h("span", { class: "token beyond", "data-token": words.ids[word], title: "beyond what is kept: not known whether it is active here" }, visible(text(word), LONG.context, false)));
  let extra = [];
  button.addEventListener("click", async () => {
    const open = button.getAttribute("aria-expanded") === "true";
    let found = null;
    if (!open) {
      button.disabled = true; // a second click would add the tokens twice
      try {
        found = await loadText();
      } catch (error) {
        told.textContent = ` · more text cannot be shown: ${error.message}`;
        return;
      } finally {
        button.disabled = false;
        button.focus(); // a disabled button loses it
      }
    }
    for (const one of extra) one.remove();
    extra = [];
    if (found) {
      const context = found.starts[id] + nth;
      if (found.sequence[context] < 0) { button.textContent = "its sequence is not kept here"; button.disabled = true; return; }
      const { before, after } = around(found, context);
      extra = [...beyond(before), ...beyond(after)];
      paragraph.prepend(...extra.slice(0, before.length));
      paragraph.append(...extra.slice(before.length));
      told.textContent = ` · in grey: ${count(before.length)} tokens before and ${count(after.length)} after; what the latent does there is not kept`;
    } else told.textContent = "";
    breakLines(paragraph, !open);
    button.setAttribute("aria-expanded", String(!open));
    button.textContent = open ? "more text" : "less text";
  });
  return [button, told];
}
