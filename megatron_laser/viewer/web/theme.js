// Light, dark, or as the system has it; remembered where the browser allows it (a file that was opened may not).

import { useEffect, useState } from "./vendor/preact_hooks.js";

const NAME = "megatron_laser.theme";
const CHOICES = ["system", "light", "dark"];

function remembered() {
  try {
    const found = window.localStorage.getItem(NAME);
    return CHOICES.includes(found) ? found : "system";
  } catch {
    return "system";
  }
}

/** {choice, shown, next}: what was chosen, "light" or "dark" as it is shown, and a function for the next choice. */
export function useTheme() {
  const query = useState(() => window.matchMedia("(prefers-color-scheme: dark)"))[0];
  const [choice, setChoice] = useState(remembered);
  const [dark, setDark] = useState(query.matches);
  useEffect(() => {
    const change = (event) => setDark(event.matches);
    query.addEventListener("change", change);
    return () => query.removeEventListener("change", change);
  }, []);
  const shown = choice === "system" ? (dark ? "dark" : "light") : choice;
  document.documentElement.dataset.theme = shown; // before the views draw: charts read their colours from the sheet
  const next = () => {
    const chosen = CHOICES[(CHOICES.indexOf(choice) + 1) % CHOICES.length];
    setChoice(chosen);
    try {
      window.localStorage.setItem(NAME, chosen);
    } catch {
      // Not remembered, then.
    }
  };
  return { choice, shown, next };
}
