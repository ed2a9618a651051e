// The map of decoder directions: a point per latent on a canvas, coloured by what is chosen; a press opens the latent.
"use strict";
{
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const canvas = document.getElementById("map-canvas"), choice = document.getElementById("map-colour");
  const told = document.getElementById("map-told"), legend = document.getElementById("map-legend");
  const FAMILIES = 7, NEAR = 12; // families with a colour of their own; pixels to the nearest point
  const range = (values) => [values.reduce((a, b) => Math.min(a, b)), values.reduce((a, b) => Math.max(a, b))];
  let points = []; // [x, y] in pixels of the page

  /** A colour of each latent, and what the colours mean. */
  function paint(series, soft, heat) {
    if (choice.value === "density") {
      const logs = data.density.map((density) => Math.log10(Math.max(density, 1e-9)));
      const [low, high] = range(logs), of = (share) => `rgba(${heat}, ${(0.15 + 0.85 * share).toFixed(2)})`;
      const words = (log) => `active on 1 in ${Math.round(10 ** -log).toLocaleString("en")}`;
      return { colours: logs.map((log) => of((log - low) / (high - low || 1))),
        entries: [[of(0), words(low)], [of(0.5), words((low + high) / 2)], [of(1), words(high)]] };
    }
    if (choice.value === "group") {
      const groups = [...new Set(data.prefix)].sort((a, b) => a - b), colour = (size) => series[groups.indexOf(size) % series.length];
      return { colours: data.prefix.map(colour),
        entries: groups.map((size, i) => [colour(size), `latents ${(i ? groups[i - 1] : 0).toLocaleString("en")} to ${(size - 1).toLocaleString("en")}`]) };
    }
    const counts = new Map();
    for (const root of data.root) counts.set(root, (counts.get(root) ?? 0) + 1);
    const largest = [...counts].filter(([, n]) => n > 1).sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, FAMILIES).map(([root]) => root);
    const colour = (root) => (largest.includes(root) ? series[largest.indexOf(root) % series.length] : soft);
    return { colours: data.root.map(colour),
      entries: [...largest.map((root) => [colour(root), `tree of latent ${root}: ${counts.get(root)}`]), [soft, "others"]] };
  }

  function drawMap() {
    const style = getComputedStyle(document.documentElement), of = (name) => style.getPropertyValue(name).trim();
    const width = canvas.clientWidth, height = canvas.clientHeight, scale = devicePixelRatio || 1;
    if (!width) return;
    canvas.width = width * scale; canvas.height = height * scale;
    const pen = canvas.getContext("2d"), [x0, x1] = range(data.x), [y0, y1] = range(data.y), edge = 8;
    const { colours, entries } = paint(of("--series").split(/,\s*/), of("--line"), of("--heat"));
    pen.scale(scale, scale);
    pen.fillStyle = of("--card");
    pen.fillRect(0, 0, width, height);
    points = data.x.map((x, i) => [edge + (width - 2 * edge) * (x - x0) / (x1 - x0 || 1), height - edge - (height - 2 * edge) * (data.y[i] - y0) / (y1 - y0 || 1)]);
    const order = points.map((_, i) => i).sort((a, b) => (colours[a] === of("--line") ? 0 : 1) - (colours[b] === of("--line") ? 0 : 1));
    for (const i of order) {
      pen.fillStyle = colours[i];
      pen.beginPath();
      pen.arc(points[i][0], points[i][1], 2.5, 0, 2 * Math.PI);
      pen.fill();
    }
    legend.replaceChildren(...entries.map(([colour, words]) => {
      const item = document.createElement("span"), dot = document.createElement("i");
      dot.style.background = colour;
      item.append(dot, words);
      return item;
    }));
    canvas.classList.add("drawn");
  }

  function nearest(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = null, least = NEAR ** 2;
    points.forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  canvas.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    canvas.style.cursor = i === null ? "default" : "pointer";
    const density = i !== null && data.density[i] > 0 ? `active on 1 in ${Math.round(1 / data.density[i]).toLocaleString("en")} tokens` : "active at position 0 alone";
    told.textContent = i === null ? "A point is a latent: press one to open it." : `Latent ${data.latents[i]}, ${density}`;
  });
  canvas.addEventListener("click", (event) => {
    const i = nearest(event);
    if (i !== null) location.href = `report/latents.html#latent-${data.latents[i]}`;
  });
  choice.addEventListener("change", drawMap);
  addEventListener("themechange", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  new ResizeObserver(drawMap).observe(canvas);
}
