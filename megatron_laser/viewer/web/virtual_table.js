// A table of which only the rows in sight exist: ten thousand rows scroll like ten.

import { html } from "./ui.js";
import { useEffect, useLayoutEffect, useRef, useState } from "./vendor/preact_hooks.js";

const ROW = 28; // px, as in views.css
const SPARE = 12; // rows above and below that exist already

/**
 * columns: [{name, label, title, kind, cell(id)}], kind a class; ids: in order; choice: what filters and sorts them, as
 * one text; selected: an id or null; sort: "name" or "-name"; onSort(text); onSelect(id): the marked row has moved;
 * onOpen(id): Enter or a click.
 */
export function VirtualTable({ label, columns, ids, choice, selected, sort, onSort, onSelect, onOpen }) {
  const body = useRef(null);
  const [view, setView] = useState({ top: 0, height: 600 });
  const place = selected === null ? -1 : ids.indexOf(selected);
  useEffect(() => {
    const node = body.current;
    const measure = () => setView({ top: node.scrollTop, height: node.clientHeight });
    const observer = new ResizeObserver(measure);
    observer.observe(node);
    node.addEventListener("scroll", measure, { passive: true });
    return () => {
      observer.disconnect();
      node.removeEventListener("scroll", measure);
    };
  }, []);
  const [first, last] = window_(view, ids.length);
  useLayoutEffect(() => {
    if (place >= 0) reveal(body.current, place);
  }, [selected, choice]);
  // Rows that come in while a run goes on push nothing away: the one at the upper edge stays there.
  const before = useRef({ ids, choice });
  useLayoutEffect(() => {
    const { ids: old, choice: own } = before.current;
    before.current = { ids, choice };
    const upper = Math.floor(body.current.scrollTop / ROW);
    if (old === ids || own !== choice || upper === 0) return;
    const now = ids.indexOf(old[upper]);
    if (now >= 0 && now !== upper) body.current.scrollTop += (now - upper) * ROW;
  }, [ids, choice]);
  const keys = (event) => {
    if (event.target.closest("button")) return; // the heads have keys of their own
    const page = Math.max(1, Math.floor(view.height / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    const move = moves[event.key];
    if (move !== undefined && ids.length) {
      const start = place < 0 ? (move > 0 ? -1 : 0) : place;
      onSelect(ids[Math.max(0, Math.min(ids.length - 1, start + move))]);
      event.preventDefault();
    } else if (event.key === "Enter" && place >= 0) {
      onOpen(ids[place]);
      event.preventDefault();
    }
  };
  return html`<div
    class="table"
    role="grid"
    tabindex="0"
    data-keep-keys
    aria-label=${`${label}: arrow keys move, Enter opens`}
    aria-rowcount=${ids.length + 1}
    aria-activedescendant=${place >= 0 ? `row-${selected}` : null}
    onKeyDown=${keys}
  >
    <div class="row head" role="row" aria-rowindex="1">
      ${columns.map((column) => html`<${Head} key=${column.name} column=${column} sort=${sort} onSort=${onSort} />`)}
    </div>
    <div class="body" ref=${body} role="rowgroup" tabindex="-1">
      <div class="space" role="presentation" style=${{ height: `${ids.length * ROW}px` }}>
        ${ids.slice(first, last).map((id, offset) => {
          const own = first + offset;
          return html`<div
            key=${id}
            id=${`row-${id}`}
            class="row"
            role="row"
            aria-rowindex=${own + 2}
            aria-selected=${String(id === selected)}
            style=${{ top: `${own * ROW}px` }}
            onClick=${() => onOpen(id)}
          >
            ${columns.map(
              (column) => html`<span
              key=${column.name}
              role="gridcell"
              class=${column.kind}
            >${column.cell(id)}</span>`,
            )}
          </div>`;
        })}
      </div>
    </div>
  </div>`;
}

function Head({ column, sort, onSort }) {
  const { name, label, title, kind, first } = column;
  const on = sort === name ? "ascending" : sort === `-${name}` ? "descending" : "none";
  // The first click sorts as one mostly wants it, the second the other way, the third not at all.
  const begin = first || name;
  const other = begin.startsWith("-") ? name : `-${name}`;
  const next = sort === begin ? other : sort === other ? "" : begin;
  return html`<span role="columnheader" class=${kind} aria-sort=${on}>
    <button type="button" title=${title} onClick=${() => onSort(next)}>
      ${label}<i aria-hidden="true">${{ ascending: "▲", descending: "▼", none: "" }[on]}</i>
    </button>
  </span>`;
}

function window_({ top, height }, count) {
  const first = Math.max(0, Math.floor(top / ROW) - SPARE);
  return [first, Math.min(count, Math.ceil((top + height) / ROW) + SPARE)];
}

/** Scroll no further than it takes to see a row. */
function reveal(node, place) {
  const top = place * ROW;
  if (top < node.scrollTop) node.scrollTop = top;
  else if (top + ROW > node.scrollTop + node.clientHeight) node.scrollTop = top + ROW - node.clientHeight;
}
