// The response token by token: each coloured by one of its numbers, the scores at their places, and all numbers of the
// one that is pointed at or reached with the arrow keys.

import { amend } from "./address.js";
import { fixed, number } from "./format.js";
import { measures, readoutsAt, strength, tokenTexts } from "./token_values.js";
import { Choice, html, Notice } from "./ui.js";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact_hooks.js";

const NONE = { logprob: null, policy_logprob: null, entropy: null };

export function Tokens({ response, params }) {
  const { tokens, readouts } = response;
  if (!tokens) {
    return html`<${Notice}>No numbers of single tokens: the run was made with logging.rollouts_tokens off.<//>`;
  }
  const texts = useMemo(() => tokenTexts(response.response || "", tokens.ends), [response]);
  const all = useMemo(() => measures(tokens || NONE), [response]);
  const scores = useMemo(() => readoutsAt(readouts), [response]);
  const shown =
    all.find((measure) => measure.name === params.colour && measure.values) || all.find((measure) => measure.values);
  const scale = useMemo(() => (shown ? strength(shown) : null), [response, shown && shown.name]);
  const [pointed, setPointed] = useState(null);
  const asked = Number(params.token ?? NaN);
  const held = Number.isInteger(asked) && asked >= 0 ? Math.min(asked, texts.length - 1) : null;
  const current = pointed ?? held;
  return html`<div class="tokens">
    <div class="bar">
      <${Choice}
        label="Colour by"
        options=${all.map(optionOf)}
        value=${shown ? shown.name : ""}
        onChange=${(colour) => amend({ colour })}
      />
      ${shown ? html`<${Legend} measure=${shown} scale=${scale} scores=${scores.size > 0} />` : null}
    </div>
    <${Numbers} place=${current} texts=${texts} all=${all} scores=${scores} />
    <${Flow} texts=${texts} measure=${shown} scale=${scale} scores=${scores} held=${held} onPoint=${setPointed} />
  </div>`;
}

function optionOf({ name, label, values, text, missing }) {
  return { value: name, label, title: text, off: values ? "" : missing };
}

function Legend({ measure, scale, scores }) {
  const ends = [scale.low, scale.high].map((value) => number(value, 3));
  return html`<div class="legend">
    <span>${ends[0]}</span>
    <i class=${`ramp ${measure.scale}`} aria-hidden="true"></i>
    <span>${ends[1]} ${measure.unit}</span>
    ${
      scores
        ? html`<span
      class="chip"
      title="a score that was read at this place"
    >.73</span><span>score read here</span>`
        : null
    }
  </div>`;
}

/** All numbers of a token. It keeps its height, so that pointing at tokens moves nothing. */
function Numbers({ place, texts, all, scores }) {
  const none = place === null || place === undefined;
  const at = (measure) => (none || !measure.values ? null : measure.values[place]);
  const logprob = at(all[0]);
  const points = none ? [] : scores.get(place) || [];
  return html`<dl class="numbers" role="status" aria-live="polite">
    <div class="wide">
      <dt>${none ? "Token" : `Token ${place + 1} of ${texts.length}`}</dt>
      <dd><code>${none ? "point, or arrow keys" : JSON.stringify(texts[place])}</code></dd>
    </div>
    ${all.map(
      (measure) => html`<div key=${measure.name} title=${measure.text}>
        <dt>${measure.label}</dt>
        <dd>${fixed(at(measure), measure.name === "ratio" ? 4 : 3)}</dd>
      </div>`,
    )}
    <div title="of the engine">
      <dt>Prob.</dt>
      <dd>${logprob === null || logprob === undefined ? "–" : number(Math.exp(logprob), 3)}</dd>
    </div>
    <div class="wide">
      <dt>Scores here</dt>
      <dd>${points.length ? points.map(({ name, score }) => `${name} ${fixed(score, 3)}`).join(", ") : "–"}</dd>
    </div>
  </dl>`;
}

/**
 * The text itself. Built by hand and not by templates: a response may have 30,000 tokens, of which a change of colour
 * or of the marked one should touch no more than it has to.
 */
function Flow({ texts, measure, scale, scores, held, onPoint }) {
  const box = useRef(null);
  const marked = useRef(null);
  useLayoutEffect(() => {
    box.current.replaceChildren(build(texts, scores));
    marked.current = null;
  }, [texts, scores]);
  useLayoutEffect(() => {
    if (measure) paint(box.current, measure, scale);
  }, [texts, scores, measure, scale]);
  useLayoutEffect(() => {
    const node = held === null ? null : box.current.querySelector(`[data-token="${held}"]`);
    if (marked.current) marked.current.setAttribute("aria-selected", "false");
    if (node) node.setAttribute("aria-selected", "true");
    if (node && marked.current) node.scrollIntoView({ block: "nearest" });
    marked.current = node;
  }, [texts, scores, held]);
  useEffect(() => onPoint(null), [texts]);
  const tokenOf = (event) => {
    const node = event.target.closest("[data-token]");
    return node ? Number(node.dataset.token) : null;
  };
  const keys = (event) => {
    const last = texts.length - 1;
    const start = held ?? -1;
    const moves = {
      ArrowRight: () => start + 1,
      ArrowLeft: () => Math.max(0, start - 1),
      ArrowDown: () => besides(box.current, Math.max(0, start), 1),
      ArrowUp: () => besides(box.current, Math.max(0, start), -1),
      Home: () => 0,
      End: () => last,
    };
    const move = moves[event.key];
    if (!move) return;
    amend({ token: Math.max(0, Math.min(last, move())) });
    onPoint(null);
    event.preventDefault();
  };
  return html`<div
    class="flow"
    ref=${box}
    role="listbox"
    tabindex="0"
    data-keep-keys
    aria-label="Tokens of the response: arrow keys move from one to the next"
    aria-activedescendant=${held === null ? null : `token-${held}`}
    onKeyDown=${keys}
    onMouseOver=${(event) => onPoint(tokenOf(event))}
    onMouseLeave=${() => onPoint(null)}
    onClick=${(event) => {
      const token = tokenOf(event);
      if (token !== null) amend({ token });
    }}
  ></div>`;
}

function build(texts, scores) {
  const all = document.createDocumentFragment();
  texts.forEach((text, place) => {
    const node = document.createElement("span");
    node.dataset.token = place;
    node.id = `token-${place}`;
    node.setAttribute("role", "option");
    node.setAttribute("aria-selected", "false");
    if (text === "") {
      node.className = "empty";
      node.textContent = place === texts.length - 1 ? "∎" : "·";
      node.setAttribute("aria-label", "a token without text");
    } else {
      node.textContent = text.replaceAll("\n", "↵\n");
    }
    all.append(node);
    for (const { name, score } of scores.get(place) || []) {
      const chip = document.createElement("span");
      chip.className = "chip";
      chip.textContent = fixed(score, 2).replace(/^(-?)0\./, "$1.");
      chip.title = `${name}: ${fixed(score, 4)} behind token ${place + 1}`;
      all.append(chip);
    }
  });
  return all;
}

function paint(box, { values, scale: kind }, scale) {
  for (const node of box.querySelectorAll("[data-token]")) {
    const share = scale.of(values[node.dataset.token]);
    const name = kind === "ratio" ? (share < 0 ? "less" : "more") : kind;
    const size = Math.abs(share);
    // The share of colour in the ground; style.css says which colour, for light and dark.
    node.style.background =
      size < 0.04 ? "" : `color-mix(in srgb, var(--tint-${name}) ${Math.round(size * 100)}%, transparent)`;
  }
}

/** The token on the next line up or down that is nearest to this one. */
function besides(box, place, direction) {
  const nodes = box.querySelectorAll("[data-token]");
  const from = nodes[place].getClientRects()[0];
  let best = place;
  let distance = Infinity;
  let line = null;
  for (let next = place + direction; next >= 0 && next < nodes.length; next += direction) {
    const own = nodes[next].getClientRects()[0];
    if (!own || Math.abs(own.top - from.top) < from.height / 2) continue;
    if (line === null) line = own.top;
    if (Math.abs(own.top - line) > own.height / 2) break; // a line further
    const apart = Math.abs(own.left - from.left);
    if (apart < distance) [best, distance] = [next, apart];
  }
  return best;
}
