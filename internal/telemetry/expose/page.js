// Asks for this page again every five seconds and puts the new main part in
// place. It stands still while nobody looks and when asked to.
"use strict";
const button = document.getElementById("pause");
let paused = false;

async function refresh() {
  if (paused || document.hidden) return;
  const note = document.getElementById("note");
  try {
    const response = await fetch("/", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    if (!response.ok) throw new Error("status " + response.status);
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    document.querySelector("main").replaceWith(page.querySelector("main"));
    note.textContent = "";
  } catch {
    note.textContent = "No answer since " + (note.dataset.since ||= new Date().toLocaleTimeString()) + ".";
    return;
  }
  delete note.dataset.since;
}

button.hidden = false;
button.addEventListener("click", () => {
  paused = !paused;
  button.setAttribute("aria-pressed", String(paused));
  refresh();
});
setInterval(refresh, 5000);
