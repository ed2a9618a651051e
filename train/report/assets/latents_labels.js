// ---- labels, notes and stars: those of the report, and over them those of this browser

const mine = { changed: new Map(), stored: true };

const storageKey = () => `transcoder:labels:${index.run}:${index.step}:${index.store}`;

/** [label, note, star] of a latent. */
const said = (id) => mine.changed.get(id) ?? index.said[id] ?? ["", "", false];
const labelOf = (id) => said(id)[0];

function loadLabels() {
  try {
    for (const [id, one] of JSON.parse(kept.read(storageKey()) ?? "[]")) mine.changed.set(id, one);
  } catch { /* what another page left there is not ours */ }
}

function say(id, one) {
  const before = index.said[id] ?? ["", "", false];
  if (one.every((value, i) => value === before[i])) mine.changed.delete(id);
  else mine.changed.set(id, one);
  mine.stored = kept.write(storageKey(), JSON.stringify([...mine.changed]));
  toldLabels();
}

function toldLabels() {
  const n = mine.changed.size;
  const where = mine.stored ? "in this browser alone" : "on this page alone, until it is closed";
  $("labels-state").textContent = n ? `${count(n)} changed ${n === 1 ? "latent is" : "latents are"} kept ${where}: export them to share.` : "";
}

/** All that is said, the report's as well, in the form that `train report RUN --labels FILE` reads. */
function allLabels() {
  const ids = new Set([...Object.keys(index.said).map(Number), ...mine.changed.keys()]);
  return [...ids].sort((a, b) => a - b).map((latent) => {
    const [label, note, star] = said(latent);
    return { latent, label, note, star };
  });
}

function exported(kind) {
  if (kind === "json") return JSON.stringify({ schema_version: 1, run: index.run, step: index.step, latents: allLabels() }, null, 1);
  const cell = (value) => `"${String(value).replaceAll('"', '""')}"`;
  return ["latent,label,note,star", ...allLabels().map((one) => [one.latent, cell(one.label), cell(one.note), one.star].join(","))].join("\n") + "\n";
}

function save(kind) {
  const url = URL.createObjectURL(new Blob([exported(kind)], { type: kind === "json" ? "application/json" : "text/csv" }));
  const anchor = h("a", { href: url, download: `labels.${kind}` });
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** The rows of a CSV text, quotes as in RFC 4180. */
function csvRows(string) {
  const rows = [[]];
  for (const [, quoted, plain, end] of string.matchAll(/(?:"((?:[^"]|"")*)"|([^",\r\n]*))(,|\r?\n|$)/g)) {
    rows.at(-1).push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end && end !== ",") rows.push([]);
    else if (!end) break;
  }
  return rows.filter((row) => row.length > 1 || row[0]);
}

function parsedLabels(name, string) {
  if (!name.toLowerCase().endsWith(".csv")) return JSON.parse(string).latents;
  const [head, ...rows] = csvRows(string.replace(/^\ufeff/, ""));
  return rows.map((row) => Object.fromEntries(head.map((column, i) => [column, row[i] ?? ""])));
}

async function importLabels(file) {
  try {
    const found = parsedLabels(file.name, await file.text());
    const rows = found.map((one) => [Number(one.latent), [String(one.label ?? ""), String(one.note ?? ""), [true, "true", "1"].includes(one.star)]]);
    if (!rows.every(([id]) => Number.isInteger(id) && id >= 0 && id < index.prefix.length)) throw new Error("it names latents that are not here");
    for (const [id, one] of rows) say(id, one);
    find();
    drawList();
    $("labels-state").textContent = `${count(rows.length)} latents imported from ${file.name}. ${$("labels-state").textContent}`;
  } catch (error) {
    $("labels-state").textContent = `${file.name} cannot be read as labels (${error.message}).`;
  }
}

function starButton(id) {
  const button = h("button", { type: "button", class: "star plain", "aria-label": `Star latent ${id}` });
  const show = () => {
    button.textContent = said(id)[2] ? "★" : "☆";
    button.setAttribute("aria-pressed", String(said(id)[2]));
  };
  button.addEventListener("click", () => {
    const [label, note, star] = said(id);
    say(id, [label, note, !star]);
    show();
  });
  show();
  return button;
}

/** Fields for what people say of a latent; `named` is told when the label changes. */
function labelFields(id, named) {
  const [label, note] = said(id);
  const name = h("input", { type: "text", value: label, maxlength: "500", placeholder: "what it stands for" });
  const more = h("textarea", { rows: "2", maxlength: "10000", placeholder: "notes" });
  more.value = note;
  const changed = () => { say(id, [name.value.trim(), more.value.trim(), said(id)[2]]); named(); };
  name.addEventListener("change", changed);
  more.addEventListener("change", changed);
  return h("div", { class: "controls said" },
    h("label", { class: "grows" }, "Label ", name), h("label", { class: "grows" }, "Notes ", more));
}
