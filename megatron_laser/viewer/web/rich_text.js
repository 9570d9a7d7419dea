// Prompts and responses as models write them: paragraphs, code, a little markdown, and LaTeX between its delimiters.
// First cut into pieces (pure, tested), then made into elements; what is not understood is shown as it was written.

import { html } from "./ui.js";
import { useLayoutEffect, useMemo, useRef } from "./vendor/preact_hooks.js";

const OPENINGS = [
  { open: "$$", close: "$$", display: true },
  { open: "\\[", close: "\\]", display: true },
  { open: "\\(", close: "\\)", display: false },
  { open: "$", close: "$", display: false },
];
const ENVIRONMENT = /^\\begin\{((?:align|equation|gather|multline|alignat)\*?|[bpvV]?matrix|cases|array)\}/;

/** Text -> [{kind: "text" | "math" | "code" | "block", text, display}]; the pieces together are the text. */
export function pieces(text) {
  const found = [];
  let plain = 0;
  let at = 0;
  const take = (piece, end) => {
    if (at > plain) found.push({ kind: "text", text: text.slice(plain, at) });
    found.push(piece);
    at = end;
    plain = end;
  };
  while (at < text.length) {
    const letter = text[at];
    if (letter === "`") {
      const code = codeAt(text, at);
      if (code) {
        take(code.piece, code.end);
        continue;
      }
    } else if (letter === "$" || letter === "\\") {
      const math = mathAt(text, at);
      if (math) {
        take(math.piece, math.end);
        continue;
      }
      if (letter === "\\") at += 1; // an escaped dollar opens nothing
    }
    at += 1;
  }
  if (text.length > plain) found.push({ kind: "text", text: text.slice(plain) });
  return found;
}

function codeAt(text, at) {
  const ticks = /^`+/.exec(text.slice(at, at + 8))[0];
  const end = text.indexOf(ticks, at + ticks.length);
  if (end < 0) return null;
  const inside = text.slice(at + ticks.length, end);
  if (ticks.length >= 3)
    return { piece: { kind: "block", text: inside.replace(/^\w*\n/, "") }, end: end + ticks.length };
  if (inside.includes("\n") || !inside) return null;
  return { piece: { kind: "code", text: inside }, end: end + ticks.length };
}

function mathAt(text, at) {
  const rest = text.slice(at, at + 24);
  const environment = ENVIRONMENT.exec(rest);
  if (environment) {
    const close = `\\end{${environment[1]}}`;
    const end = text.indexOf(close, at);
    return end < 0
      ? null
      : { piece: { kind: "math", display: true, text: text.slice(at, end + close.length) }, end: end + close.length };
  }
  if (rest.startsWith("\\boxed{")) {
    const end = closingBrace(text, at + 6);
    return end < 0 ? null : { piece: { kind: "math", display: false, text: text.slice(at, end + 1) }, end: end + 1 };
  }
  for (const { open, close, display } of OPENINGS) {
    if (!rest.startsWith(open)) continue;
    const start = at + open.length;
    const end = closing(text, start, close);
    if (end < 0) return null;
    const inside = text.slice(start, end);
    if (!inside.trim() || (!display && inside.includes("\n\n"))) return null;
    // "$5 and $6" is money: a formula between single dollars touches them, and no digit follows (as pandoc has it).
    // Nor does one reach into code.
    const money = /^\s|\s$|`/.test(inside) || /\d/.test(text[end + 1] || "");
    if (open === "$" && money) return null;
    return { piece: { kind: "math", display, text: inside }, end: end + close.length };
  }
  return null;
}

/** Where `close` stands, not counting escaped ones; -1 without. */
function closing(text, start, close) {
  for (let at = start; at < text.length; at += 1) {
    if (text.startsWith(close, at)) return at;
    if (text[at] === "\\") at += 1;
  }
  return -1;
}

function closingBrace(text, open) {
  let depth = 0;
  for (let at = open; at < text.length && at < open + 2000; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "{") depth += 1;
    else if (text[at] === "}") {
      depth -= 1;
      if (depth === 0) return at;
    }
  }
  return -1;
}

/** A formula; one that Temml cannot read is shown as its source. */
function Formula({ text, display }) {
  const place = useRef(null);
  useLayoutEffect(() => {
    try {
      // It builds nodes, no markup. trust stays off: no links, no classes, no images from what a model has written.
      window.temml.render(text, place.current, {
        displayMode: display,
        throwOnError: true,
        maxExpand: 200,
        maxSize: [20, 400],
      });
    } catch {
      place.current.replaceChildren(text);
      place.current.classList.add("unread");
    }
  }, [text, display]);
  return html`<span ref=${place} class=${display ? "formula display" : "formula"}></span>`;
}

/** Bold, italics and headings within plain text; line breaks stay (the style sheet keeps them). */
function marked(text) {
  return text.split(/(\*\*[^*\n]+\*\*|^#{1,6} .*$)/m).map((part) => {
    if (part.startsWith("**") && part.endsWith("**") && part.length > 4)
      return html`<strong>${part.slice(2, -2)}</strong>`;
    if (/^#{1,6} /.test(part)) return html`<strong class="heading">${part.replace(/^#+ /, "")}</strong>`;
    return part;
  });
}

export function RichText({ text }) {
  const parts = useMemo(() => pieces(text || ""), [text]);
  return html`<div class="rich">
    ${parts.map((piece) => {
      if (piece.kind === "math") return html`<${Formula} text=${piece.text} display=${piece.display} />`;
      if (piece.kind === "code") return html`<code>${piece.text}</code>`;
      if (piece.kind === "block") return html`<pre><code>${piece.text}</code></pre>`;
      return marked(piece.text);
    })}
  </div>`;
}
