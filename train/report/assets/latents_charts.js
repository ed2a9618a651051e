// ---- small plots of one latent, of bars that are plain elements

/** Bars with a scale below. `bars` are [{ size, told, mark }]: size from 0 to 1; `told` is shown on hover. */
function chart(title, bars, ticks, told) {
  const made = bars.map(({ size, told: words, mark }) => {
    const bar = h("div", { class: `column${mark ? ` ${mark}` : ""}`, title: words });
    bar.style.height = `${(100 * size).toFixed(1)}%`;
    return bar;
  });
  return h("figure", { class: "small" }, h("figcaption", {}, title),
    h("div", { class: "columns", role: "img", "aria-label": `${title}: ${told}` }, made),
    h("div", { class: "scale", "aria-hidden": "true" }, ticks.map((tick) => h("span", {}, tick))));
}

/** Heights of counts on a logarithmic scale, so that a bar of one is seen beside one of thousands. */
function logHeights(counts) {
  const most = Math.log1p(Math.max(...counts));
  return counts.map((n) => (n ? Math.max(0.03, Math.log1p(n) / most) : 0));
}

function evenBars(counts, low, high, words, mark) {
  const width = (high - low) / counts.length, sizes = logHeights(counts);
  return counts.map((n, i) => {
    const from = low + i * width, to = from + width;
    return { size: sizes[i], told: `${number(from)} to ${number(to)}: ${count(n)} ${words}`, mark: mark?.(from, to) };
  });
}

/** Activations on the rows that were sampled; a bar is shaded as the contexts of its quantile bin are. */
function activationChart(id, data, at) {
  const counts = data.histogram[at], low = data.min[at], high = index.max[id], edges = data.bin_edges[at];
  if (!counts) {
    const why = index.max[id] === null ? "It is never active." : "These samples have none: python -m train samples RUN, and then the report again.";
    return panel("Activations", none(why));
  }
  const group = (from, to) => {
    if (!edges) return "top";
    const middle = (from + to) / 2;
    return middle > edges[index.bins] ? "top" : `bin-${Math.max(0, edges.findLastIndex((edge, i) => i < index.bins && edge <= middle))}`;
  };
  const total = counts.reduce((a, b) => a + b, 0);
  return panel("Activations", chart("rows by activation, log scale", evenBars(counts, low, high, "rows", group),
    [low, (low + high) / 2, high].map(number),
    `${count(total)} rows between ${number(low)} and ${number(high)}`));
}

function logitChart(id, data, at) {
  const counts = data.logit_histogram[at];
  if (!counts) return null;
  const low = data.suppressed_effects[at][0], high = data.promoted_effects[at][0];
  return panel("Logits", chart("tokens of the vocabulary by logit, log scale",
    evenBars(counts, low, high, "tokens", (from, to) => (to <= 0 ? "below" : null)),
    [low, (low + high) / 2, high].map(number),
    `${count(counts.reduce((a, b) => a + b, 0))} tokens between ${number(low)} and ${number(high)}`));
}

const DENSITY_BARS = 4; // of a power of ten

/** All latents by density, and where this one is among them. */
function densityChart(id) {
  if (!(index.density[id] > 0)) return null;
  const place = (density) => Math.floor(Math.log10(density) * DENSITY_BARS);
  densityChart.all ??= index.density.filter((density) => density > 0);
  const all = densityChart.all, bins = all.map(place);
  const low = bins.reduce((a, b) => Math.min(a, b)), high = bins.reduce((a, b) => Math.max(a, b));
  const counts = new Array(high - low + 1).fill(0);
  for (const bin of bins) counts[bin - low] += 1;
  const most = Math.max(...counts), mine = place(index.density[id]) - low;
  const edge = (i) => 10 ** ((low + i) / DENSITY_BARS);
  const bars = counts.map((n, i) => ({
    size: n ? Math.max(0.03, n / most) : 0, mark: i === mine ? "mine" : null,
    told: `1 in ${oneIn(edge(i + 1))} to ${oneIn(edge(i))}: ${count(n)} latents`,
  }));
  const rarer = all.filter((density) => density < index.density[id]).length;
  return panel("Among all latents", chart("latents by density, log scale; this one's bar is marked", bars,
    [0, counts.length / 2, counts.length].map((i) => `1 in ${oneIn(Math.min(1, edge(i)))}`),
    `${count(rarer)} of ${count(all.length)} active latents are rarer`),
    h("p", { class: "soft" }, `${count(rarer)} of ${count(all.length)} active latents are rarer than this one.`));
}

function oneIn(density) {
  const n = 1 / density;
  return n < 10 ? String(Number(n.toPrecision(2))) : count(Math.round(Number(n.toPrecision(3))));
}

/** A share of tokens as people say it. */
function rarity(density) {
  if (density === null || Number.isNaN(density)) return "–";
  return density > 0 ? `1 in ${oneIn(density)}` : "never";
}
