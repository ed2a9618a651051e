// ---- one latent

async function drawLatent(id) {
  shown = id;
  const data = await chunk(Math.floor(id / index.chunk));
  if (shown !== id) return; // another was asked for meanwhile
  const { at, contexts } = ofLatent(data, id);
  const place = h("div", { id: "contexts" });
  const draw = () => place.replaceChildren(...samples(id, contexts, data.bin_edges[at]));
  const title = h("h2", { id: "title", tabindex: "-1" });
  const name = () => { title.textContent = titleOf(id); view("one", titleOf(id)); };
  $("one").replaceChildren(
    moves(id),
    h("div", { class: "controls" }, title, starButton(id)),
    labelFields(id, name),
    figures(id),
    h("div", { class: "split" },
      h("div", { class: "shown" },
        h("div", { class: "controls" }, h("h3", {}, "Contexts"), valuesButton(draw)),
        place),
      h("div", { class: "facts" },
        activationChart(id, data, at),
        densityChart(id),
        profile(id, data, at),
        logitChart(id, data, at),
        h("div", { class: "pair" },
          effects("Promoted tokens", index.promoted[id], data.promoted_effects[at]),
          effects("Suppressed tokens", index.suppressed[id], data.suppressed_effects[at])),
        family(id),
        labels(data, at),
        neighbours(id, "Nearest by cosine of decoder rows", "Cosine", data.nearest_latents[at], data.nearest_cosines[at]),
        neighbours(id, "Most correlated on held-out rows", "Correlation", data.correlated_latents[at], data.correlations[at]))),
  );
  draw();
  shownNow(name);
}

/** Two latents side by side. */
async function drawTwo(ids) {
  shown = ids[0];
  const hash = location.hash;
  const parts = await Promise.all(ids.map((id) => chunk(Math.floor(id / index.chunk))));
  if (location.hash !== hash) return; // another was asked for meanwhile
  const sides = ids.map((id, i) => ({ id, data: parts[i], ...ofLatent(parts[i], id), place: h("div", {}) }));
  const draw = () => sides.forEach(({ id, data, at, contexts, place }) => place.replaceChildren(...samples(id, contexts, data.bin_edges[at])));
  const cosine = sides[0].data.nearest_latents[sides[0].at].indexOf(ids[1]);
  const correlation = sides[0].data.correlated_latents[sides[0].at].indexOf(ids[1]);
  const told = [
    cosine < 0 ? "" : `cosine of decoder rows ${number(sides[0].data.nearest_cosines[sides[0].at][cosine])}`,
    correlation < 0 ? "" : `correlation ${number(sides[0].data.correlations[sides[0].at][correlation])}`,
  ].filter(Boolean).join(" · ");
  $("one").replaceChildren(
    h("nav", { class: "controls", "aria-label": "Latents" }, h("a", { href: listAddress() }, "All latents"), valuesButton(draw)),
    h("h2", { id: "title", tabindex: "-1" }, `Latents ${ids.join(" and ")}`),
    told ? h("p", {}, told) : null,
    h("div", { class: "two" }, sides.map(({ id, data, at, place }) => h("section", { "aria-label": `Latent ${id}` },
      h("div", { class: "controls" }, h("h3", {}, h("a", { href: `#latent-${id}` }, titleOf(id))), starButton(id)),
      figures(id), activationChart(id, data, at), h("h3", {}, "Contexts"), place,
      h("div", { class: "pair" },
        effects("Promoted tokens", index.promoted[id], data.promoted_effects[at]),
        effects("Suppressed tokens", index.suppressed[id], data.suppressed_effects[at]))))),
  );
  draw();
  shownNow(() => view("one", `Latents ${ids.join(" and ")}`));
}

function shownNow(name) {
  name();
  $("title").focus({ preventScroll: true });
  scrollTo({ top: 0, behavior: "instant" });
}

const titleOf = (id) => `Latent ${id}${labelOf(id) ? `: ${labelOf(id)}` : ""}`;

function valuesButton(draw) {
  const toggle = h("button", { type: "button", id: "values", "aria-pressed": String(values) }, "Show values");
  toggle.addEventListener("click", () => {
    values = !values;
    toggle.setAttribute("aria-pressed", String(values));
    draw();
  });
  return toggle;
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
    h("a", { href: listAddress() }, "All latents"), button("Previous", back), button("Next", on),
    h("button", { type: "button", onclick: openRandom }, "Random"),
    h("span", { class: "soft" }, told));
}

function figures(id) {
  const facts = {
    "active on": index.density[id] > 0 ? `${rarity(index.density[id])} tokens` : "no token", density: share(index.density[id]), max: number(index.max[id]), mean: number(index.mean[id]),
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

/** A table of latents that stand to this one in some way, each with a link to both side by side. */
function related(id, measure, latents, measured) {
  const beside = (other) => h("a", { href: `#latent-${id},${other}`, "aria-label": `Latents ${id} and ${other} side by side` }, "⇄");
  const rows = latents.map((other, i) => h("tr", {}, h("th", { scope: "row" }, link(other), " ", beside(other)),
    h("td", { class: "number" }, measured[i]), h("td", {}, nameOf(other))));
  const heads = ["Latent", measure, "Label, or tokens at its peaks"].map((name, i) =>
    h("th", { scope: "col", class: i === 1 ? "number" : null }, name));
  return h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, rows));
}

const nameOf = (id) => labelOf(id) ? h("span", { class: "label" }, labelOf(id)) : index.peaks[id].slice(0, 4).map((word) => chip(word));

function neighbours(id, title, measure, latents, measured) {
  return panel(title, latents.length ? related(id, measure, latents, measured.map(number)) : none("None."));
}

/** Which earlier latent this one refines, and which later ones refine it. */
function family(id) {
  if (!family.of) {
    family.of = new Map();
    index.refines.forEach((parent, f) => {
      if (parent === null) return;
      if (!family.of.has(parent)) family.of.set(parent, []);
      family.of.get(parent).push(f);
    });
    for (const one of family.of.values()) one.sort((a, b) => index.density[b] - index.density[a]);
  }
  const parent = index.refines[id], children = family.of.get(id) ?? [], most = 12;
  if (parent === null && !children.length) return panel("Refinements", none("It refines no earlier latent, and no later one refines it."));
  const tables = [];
  if (parent !== null) tables.push(h("h4", {}, "Refines"), related(id, "Active on", [parent], [share(index.refines_share[id])]));
  if (children.length) {
    tables.push(h("h4", {}, `Refined by ${count(children.length)}${children.length > most ? `, the ${most} most frequent` : ""}`),
      related(id, "Overlap", children.slice(0, most), children.slice(0, most).map((f) => share(index.refines_share[f]))));
  }
  return panel("Refinements", tables);
}

function samples(id, contexts, edges) {
  if (!contexts.length) return [none("It is not active on any of the rows that were sampled.")];
  const made = [];
  contexts.forEach((context, i) => {
    if (!i || context.bin !== contexts[i - 1].bin) made.push(h("h4", {}, group(context.bin, edges)));
    made.push(sample(id, i, context, index.max[id]));
  });
  return made;
}

function group(bin, edges) {
  if (bin === null) return "Top activations";
  const range = edges ? `, activations ${number(edges[bin])} to ${number(edges[bin + 1])}` : "";
  const end = bin === index.bins - 1 ? " (strongest)" : bin === 0 ? " (weakest)" : "";
  return `Quantile bin ${bin + 1} of ${index.bins}${end}${range}`;
}

function sample(id, nth, context, max) {
  const tokens = context.tokens.map((word, i) => token(word, context.values[i], i === context.peak, max));
  const where = `position ${count(context.position)} · sequence ${count(context.sequence)} · document ${count(context.document)}`;
  const paragraph = h("p", { class: "context", dir: "auto" }, tokens);
  const found = state.hits.get(id)?.some(({ context: i }) => i === state.corpus.starts[id] + nth);
  return h("div", { class: `sample${found ? " found" : ""}`, title: found ? "holds what was searched for" : null },
    h("div", { class: "number", title: "activation at the peak" }, number(context.activation)),
    paragraph, h("div", { class: "soft" }, where, " · ", longer(id, nth, paragraph)));
}

function token(word, value, peak, max) {
  const told = value === null ? "not in the store" : `activation ${number(value)}`;
  const kind = value === null ? " unknown" : value > 0 ? " on" : "";
  const made = h(peak ? "strong" : "span", { class: `token${kind}${peak ? " peak" : ""}`, "data-token": words.ids[word], title: `${told} · token ${words.ids[word]}` },
    visible(text(word), LONG.context, false));
  // By the object model, which the page's content security policy lets scripts use: it forbids style attributes.
  if (value > 0) made.style.backgroundColor = `rgba(var(--heat), ${(0.08 + 0.42 * Math.min(1, value / max)).toFixed(3)})`;
  if (values && value > 0) made.append(h("span", { class: "value" }, number(value)));
  return made;
}

