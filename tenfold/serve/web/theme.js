// Sets the colours that were chosen here before. Loaded before the page is drawn, so that it never flashes.
"use strict";
{
  let chosen = null;
  try {
    chosen = localStorage.getItem("tenfold-theme");
  } catch {
    // Storage is blocked; the system's choice counts.
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
