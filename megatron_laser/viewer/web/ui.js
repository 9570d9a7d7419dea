// What every view is written with: Preact's elements by htm's templates, and the few controls that several views share.
// Text only ever gets into the page as a text node or an attribute, so nothing in a run's files can become markup.

import htm from "./vendor/htm.js";
import { h } from "./vendor/preact.js";
import { useEffect, useRef, useState } from "./vendor/preact_hooks.js";

export const html = htm.bind(h);

/** A row of buttons of which one is chosen. options: [{value, label, title, count, off}]. */
export function Choice({ label, options, value, onChange }) {
  return html`<div class="choice" role="group" aria-label=${label}>
    ${options.map(
      (option) => html`<button
        type="button"
        key=${option.value}
        aria-pressed=${String(option.value === value)}
        disabled=${Boolean(option.off)}
        title=${option.off || option.title}
        onClick=${() => onChange(option.value)}
      >
        ${option.label}${option.count === undefined ? null : html`<small>${option.count}</small>`}
      </button>`,
    )}
  </div>`;
}

/** A drop-down; the first entry stands for no choice. */
export function Select({ label, none, options, value, onChange }) {
  return html`<label class="field"
    ><span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.currentTarget.value)}>
      ${none === undefined ? null : html`<option value="">${none}</option>`}
      ${options.map(({ value: own, label: text }) => html`<option key=${own} value=${own}>${text}</option>`)}
    </select></label
  >`;
}

/**
 * A text box that reports at most every 120 ms, so that typing is never behind the work that it causes.
 * A value that is set from outside (a link, "clear") shows at once.
 */
export function Search({ label, value, onChange, hint, hidden }) {
  const [own, setOwn] = useState(value);
  const timer = useRef(0);
  const sent = useRef(value);
  useEffect(() => {
    if (value !== sent.current) {
      sent.current = value;
      setOwn(value);
    }
  }, [value]);
  useEffect(() => () => clearTimeout(timer.current), []);
  const input = (event) => {
    const text = event.currentTarget.value;
    setOwn(text);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => {
      sent.current = text;
      onChange(text);
    }, 120);
  };
  return html`<label class="field search"
    ><span class=${hidden ? "hidden" : null}>${label}</span>
    <input
      type="search"
      data-search
      value=${own}
      placeholder=${hint}
      onInput=${input}
      spellcheck=${false}
      autocomplete="off"
  /></label>`;
}

/** Two boxes for a smallest and a largest value, as the text "low..high". */
export function Range({ label, value, onChange, step }) {
  const [low = "", high = ""] = (value || "").split("..");
  const set = (first, second) => onChange(first === "" && second === "" ? "" : `${first}..${second}`);
  const box = (name, own, change) => html`<input
    type="number"
    step=${step || "any"}
    aria-label=${`${label}, ${name}`}
    placeholder=${name === "at least" ? "min" : "max"}
    value=${own}
    onChange=${(event) => change(event.currentTarget.value)}
  />`;
  return html`<div class="field range" role="group" aria-label=${label}>
    <span aria-hidden="true">${label}</span>
    <div>
      ${box("at least", low, (text) => set(text, high))}
      <i aria-hidden="true">–</i>
      ${box("at most", high, (text) => set(low, text))}
    </div>
  </div>`;
}

/** What is shown in place of data: that it is on its way, why it is not there, or that there is none. */
export function Notice({ error, children }) {
  return html`<p class=${error ? "notice bad" : "notice"} role=${error ? "alert" : "status"}>${error || children}</p>`;
}

/** A verdict as a mark and a word, so that it does not hang on the colour. */
export function Verdict({ reward, word }) {
  const [kind, mark, text] = verdictOf(reward);
  return html`<span class=${`verdict ${kind}`} title=${text}
    ><span aria-hidden="true">${mark}</span><span class=${word ? null : "hidden"}>${text}</span></span
  >`;
}

function verdictOf(reward) {
  if (reward === null || reward === undefined) return ["none", "–", "not graded"];
  return reward > 0.5 ? ["right", "✓", "right"] : ["wrong", "✗", "wrong"];
}

/** The width of an element in pixels, kept up to date; 0 before it is known. */
export function useWidth(ref) {
  const [width, setWidth] = useState(0);
  useEffect(() => {
    if (!ref.current) return undefined;
    const observer = new ResizeObserver((entries) => setWidth(Math.floor(entries[0].contentRect.width)));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return width;
}
