// The switch between light, dark and the system's choice. It is remembered where the browser lets pages from disk do so.
"use strict";

const THEMES = { auto: "as the system", light: "light", dark: "dark" };

const kept = {
  read(name) {
    try { return localStorage.getItem(name); } catch { return null; }
  },
  /** Whether it could be kept. */
  write(name, value) {
    try { localStorage.setItem(name, value); return true; } catch { return false; }
  },
};

function setTheme(theme) {
  if (theme === "auto") document.documentElement.removeAttribute("data-theme");
  else document.documentElement.setAttribute("data-theme", theme);
  const button = document.getElementById("theme");
  if (button) button.textContent = `Theme: ${THEMES[theme]}`;
  dispatchEvent(new Event("themechange"));
}

{
  let theme = kept.read("transcoder:theme");
  if (!(theme in THEMES)) theme = "auto";
  setTheme(theme);
  document.getElementById("theme")?.addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    kept.write("transcoder:theme", theme);
    setTheme(theme);
  });
}
