// Keys of the whole page and of its views, and the list of them that "?" shows.

import { html } from "./ui.js";
import { useEffect, useRef } from "./vendor/preact_hooks.js";

const KEYS = [
  [
    "Everywhere",
    [
      ["1 – 6", "curves, responses, one response, step, events, runs"],
      ["/", "search or filter by text"],
      ["d", "light, dark, or as the system has it"],
      ["?", "this list"],
    ],
  ],
  [
    "Curves",
    [
      ["Tab", "from chart to chart"],
      ["← →", "read single steps; PgUp, PgDn: ten"],
      ["Enter", "open the step that is read"],
    ],
  ],
  [
    "Responses",
    [
      ["↑ ↓", "move; PgUp, PgDn, Home, End too"],
      ["Enter", "open the response"],
    ],
  ],
  [
    "One response",
    [
      ["j k", "next, previous of the filtered list"],
      ["v", "text, tokens, group"],
      ["← → ↑ ↓", "in the tokens: from one to the next"],
      ["Esc", "back to the list"],
    ],
  ],
  ["Step", [["← →", "the steps before and after with a timeline"]]],
];

const typing = (target) => target.closest("input:not([type=checkbox]):not([type=range]), select, textarea") !== null;

/** Keys that a view answers to while it is shown: {key: work}. Elements that use arrow keys themselves come first. */
export function useKeys(bindings) {
  const current = useRef(bindings);
  current.current = bindings;
  useEffect(() => {
    const listen = (event) => {
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
      if (typing(event.target) && event.key !== "Escape") return;
      if (document.querySelector("dialog[open]")) return;
      if (event.key.startsWith("Arrow") && event.target.closest("[data-keep-keys], [role=tablist], input, .plot"))
        return;
      if (event.key === "Escape" && typing(event.target)) {
        event.target.blur(); // once to leave a box, once more for the view
        return;
      }
      const work = current.current[event.key];
      if (!work) return;
      event.preventDefault();
      work();
    };
    document.addEventListener("keydown", listen);
    return () => document.removeEventListener("keydown", listen);
  }, []);
}

/** Put the cursor into the view's search box, unfolding what hides it. */
export function focusSearch() {
  const box = [...document.querySelectorAll("[data-search]")].pop();
  if (!box) return;
  for (let fold = box.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  box.focus();
  box.select();
}

export function Help({ open, onClose }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open]);
  return html`<dialog ref=${dialog} onClose=${onClose} aria-labelledby="keys">
    <header><h2 id="keys">Keys</h2><button type="button" onClick=${onClose} aria-label="close">✕</button></header>
    ${KEYS.map(
      ([place, keys]) => html`<section key=${place}>
        <h3>${place}</h3>
        <dl>${keys.map(([key, text]) => html`<div key=${key}><dt><kbd>${key}</kbd></dt><dd>${text}</dd></div>`)}</dl>
      </section>`,
    )}
  </dialog>`;
}
