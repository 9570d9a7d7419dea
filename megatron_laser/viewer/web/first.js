// Before anything is painted, so that a dark page does not flash up white: the theme that theme.js will find.
// No module, since modules wait for the whole page.

try {
  const chosen = window.localStorage.getItem("megatron_laser.theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = ["light", "dark"].includes(chosen) ? chosen : dark ? "dark" : "light";
} catch {
  // A file may not be allowed to remember; the module asks the system again.
}
