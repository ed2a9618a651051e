// Draws the plots in the colours of the page: each when it comes into view, and again when the colours change.
"use strict";
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const DASHES = { dash: "6 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 4", longdashdot: "11 3 2 3" };
const CHARACTER = 7.5; // pixels, of an axis title
const plotOf = (name) => document.getElementById("plot-" + name);

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { paper: of("--paper"), ink: of("--ink"), line: of("--line"), series: of("--series").split(/,\s*/) };
}

/** A title in lines that fit beside or below an axis. */
function wrapped(title, pixels) {
  const most = Math.max(12, Math.floor(pixels / CHARACTER)), lines = [""];
  for (const word of title.split(" ")) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (longer.length > most && lines.at(-1)) lines.push(word); else lines[lines.length - 1] = longer;
  }
  return lines.join("<br>");
}

function layoutOf(layout, found, width) {
  const axis = (name, given) => ({
    gridcolor: found.line, zerolinecolor: found.line, linecolor: found.line, ...given,
    title: { ...given.title, text: wrapped(given.title?.text ?? "", name.startsWith("x") ? width - 90 : 260) },
  });
  const axes = Object.fromEntries(
    Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name)).map(([name, given]) => [name, axis(name, given)])
  );
  return {
    ...layout, ...axes, colorway: found.series, paper_bgcolor: found.paper, plot_bgcolor: found.paper, showlegend: false,
    font: { color: found.ink, family: "system-ui, sans-serif", size: 13 }, margin: { l: 60, r: 20, t: 15, b: 50 },
    hovermode: "closest", autosize: true,
  };
}

/** The colour of a series: that of the arm in `meta`, where several series are of one. */
const colourOf = (trace, i, found) => trace.line?.color ?? found.series[(trace.meta?.series ?? i) % found.series.length];

/** The legend is a list below the plot, where it covers nothing; a press hides or shows its series. */
function legend(name, figure, found) {
  const plot = plotOf(name), place = document.getElementById("legend-" + name);
  if (!place || figure.layout.showlegend === false) return;
  const shown = figure.data.map((trace, i) => [trace, i]).filter(([trace]) => trace.showlegend !== false);
  place.replaceChildren(...shown.map(([trace, i]) => {
    const button = document.createElement("button"), line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
    line.setAttribute("width", "28"); line.setAttribute("height", "8"); line.setAttribute("aria-hidden", "true");
    for (const [key, value] of Object.entries({ x1: 0, x2: 28, y1: 4, y2: 4, "stroke-width": 3,
      stroke: colourOf(trace, i, found), "stroke-dasharray": DASHES[trace.line?.dash] ?? "" })) stroke.setAttribute(key, value);
    line.append(stroke);
    button.type = "button";
    const label = document.createElement("span");
    // Names were escaped where the page was made, since Plotly takes them for markup.
    label.textContent = new DOMParser().parseFromString(trace.name, "text/html").documentElement.textContent;
    button.append(line, label);
    button.setAttribute("aria-pressed", String(plot.data[i].visible !== "legendonly"));
    button.addEventListener("click", () => {
      const hidden = plot.data[i].visible === "legendonly";
      const same = figure.data.map((one, j) => j).filter((j) => j === i || (trace.legendgroup && figure.data[j].legendgroup === trace.legendgroup));
      Plotly.restyle(plot, { visible: hidden ? true : "legendonly" }, same);
      button.setAttribute("aria-pressed", String(hidden));
    });
    return button;
  }));
}

const drawn = new Set();

async function draw(name) {
  drawn.add(name);
  const found = colours(), figure = FIGURES[name], plot = plotOf(name);
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  const data = figure.data.map((trace, i) => trace.type === "bar" ? trace : {
    ...trace, line: { ...trace.line, color: colourOf(trace, i, found) }, marker: { ...trace.marker, color: colourOf(trace, i, found) },
  });
  await Plotly.react(plot, data, layoutOf(figure.layout, found, plot.clientWidth), options);
  legend(name, figure, found);
  plot.classList.add("drawn");
}

/** Draws what is not drawn yet, such as before printing. */
async function drawAll() {
  for (const name of Object.keys(FIGURES)) if (!drawn.has(name)) await draw(name);
}

// Those in view at first are drawn one after the other, and then the page says so; the others as they come near.
const near = new IntersectionObserver(async (entries) => {
  for (const { target, isIntersecting } of entries) {
    const name = target.id.slice("plot-".length);
    if (!isIntersecting || drawn.has(name)) continue;
    near.unobserve(target);
    await draw(name);
    await new Promise((next) => setTimeout(next));
  }
  document.documentElement.setAttribute("data-drawn", "true");
}, { rootMargin: "100px" });
for (const name of Object.keys(FIGURES)) near.observe(plotOf(name));

addEventListener("beforeprint", drawAll);
const redraw = () => { for (const name of drawn) draw(name); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
addEventListener("themechange", redraw);
