"use strict";
// Which latents are shown: all, or those that are active on the chosen token, the strongest first.
(() => {
  const list = document.getElementById("latents"), every = document.getElementById("every");
  const buttons = [...document.querySelectorAll("#prompt button")];
  const articles = [...list.querySelectorAll("article")].map((node) => ({ node, values: JSON.parse(node.dataset.values) }));

  function show(token) {
    for (const [i, button] of buttons.entries()) button.setAttribute("aria-pressed", String(i === token));
    const shown = token === null ? articles : articles.filter((one) => one.values[token] > 0);
    const order = token === null ? shown : shown.toSorted((a, b) => b.values[token] - a.values[token]);
    for (const { node } of articles) node.hidden = true;
    for (const { node, values } of order) {
      const here = node.querySelector(".here");
      here.hidden = token === null;
      here.textContent = token === null ? "" : `${values[token].toPrecision(3)} here`;
      node.hidden = false;
      list.append(node);
    }
    every.disabled = token === null;
    document.getElementById("told").textContent =
      token === null ? "" : `${shown.length} of the ${articles.length} latents on this page are active on “${buttons[token].textContent}”`;
  }

  for (const [i, button] of buttons.entries()) {
    button.addEventListener("click", () => show(button.getAttribute("aria-pressed") === "true" ? null : i));
  }
  every.addEventListener("click", () => show(null));
})();
