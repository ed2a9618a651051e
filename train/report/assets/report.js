// Draws the plots, in the colours of the page, and again when the system changes between light and dark.
"use strict";
const FIGURES = JSON.parse(document.getElementById("figures").textContent);

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { paper: of("--paper"), ink: of("--ink"), line: of("--line"), series: of("--series").split(/,\s*/) };
}

function layoutOf(layout, found) {
  const axis = (given) => ({ gridcolor: found.line, zerolinecolor: found.line, linecolor: found.line, ...given });
  const axes = Object.fromEntries(
    Object.entries(layout).filter(([name]) => /^[xy]axis/.test(name)).map(([name, given]) => [name, axis(given)])
  );
  return {
    ...layout, ...axes, colorway: found.series, paper_bgcolor: found.paper, plot_bgcolor: found.paper,
    font: { color: found.ink, family: "system-ui, sans-serif", size: 13 }, margin: { l: 60, r: 30, t: 20, b: 50 },
    legend: { orientation: "h", y: 1.02, x: 0, xanchor: "left", yanchor: "bottom" }, hovermode: "closest", autosize: true,
  };
}

// Traces of one series, such as the seeds of an arm, have one colour.
function coloured(trace, found) {
  if (trace.meta?.series === undefined) return trace;
  const color = found.series[trace.meta.series % found.series.length];
  return { ...trace, line: { ...trace.line, color }, marker: { ...trace.marker, color } };
}

// One after the other, with the page free to scroll between.
async function draw() {
  const found = colours();
  const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
  for (const [name, figure] of Object.entries(FIGURES)) {
    const data = figure.data.map((trace) => coloured(trace, found));
    await Plotly.react(document.getElementById("plot-" + name), data, layoutOf(figure.layout, found), options);
    await new Promise((next) => setTimeout(next));
  }
}

// Once drawn the page says so: tests, and printing to a file, wait for it.
draw().then(() => document.documentElement.setAttribute("data-drawn", "true"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
