// The table of a run's responses with its filters.

import { amend, go, pick } from "./address.js";
import { FILTERS, gap, select, VERDICTS } from "./filters.js";
import { fixed, whole } from "./format.js";
import { useAnswer } from "./source.js";
import { Choice, html, Notice, Range, Search, Select, Verdict } from "./ui.js";
import { useEffect, useMemo, useState } from "./vendor/preact_hooks.js";
import { VirtualTable } from "./virtual_table.js";

export function Responses({ context, params, run }) {
  const { data: index, error } = useAnswer(context.answers, context.version, "responses", { run: run.id });
  const shown = useSelection(index, params);
  const wide = useWide();
  if (!index) return html`<${Notice} error=${error}>Reading the responses …<//>`;
  if (!index.count) {
    const none = "No responses: this run has no rollouts/ (logging.rollouts_every).";
    return html`<${Notice}>${index.complete === false ? "Reading the responses …" : none}<//>`;
  }
  const filtered = FILTERS.some((name) => name !== "sort" && params[name]);
  const selected = params.id === undefined ? null : Number(params.id);
  const open = (id) => {
    amend({ id }); // so that the back button comes back to this row
    go("response", { run: run.id, id, ...pick(params, FILTERS) });
  };
  return html`<section class="main tall" aria-label="Responses">
    <${Filters} index=${index} params=${params} counts=${shown.counts} />
    <p class="hint" role="status" aria-live="polite">
      ${whole(shown.ids.length)} of ${whole(index.count)} responses${index.complete === false ? ", reading on " : " "}
      ${
        filtered
          ? html`<button
        type="button"
        class="link"
        onClick=${() => amend(cleared())}
      >clear filters</button>`
          : null
      }
    </p>
    <${VirtualTable}
      label="Responses"
      columns=${columnsOf(index).filter((column) => wide || !column.kind.includes("extra"))}
      ids=${shown.ids}
      choice=${JSON.stringify(pick(params, FILTERS))}
      selected=${selected}
      sort=${params.sort || ""}
      onSort=${(sort) => amend({ sort })}
      onSelect=${(id) => amend({ id })}
      onOpen=${open}
    />
  </section>`;
}

/** {ids, counts} of the filters in an address; computed anew only when one of them, or the index, has changed. */
export function useSelection(index, params) {
  const key = JSON.stringify(pick(params, FILTERS));
  return useMemo(() => (index ? select(index, params) : { ids: [], counts: {} }), [index, key]);
}

function cleared() {
  return Object.fromEntries(FILTERS.filter((name) => name !== "sort").map((name) => [name, ""]));
}

function Filters({ index, params, counts }) {
  const set = (name) => (value) => amend({ [name]: value });
  const tables = index.tables;
  const menu = (name, label) =>
    tables[name].length > 1
      ? html`<${Select}
        label=${label}
        none="any"
        options=${entries(tables[name])}
        value=${params[name] || ""}
        onChange=${set(name)}
      />`
      : null;
  return html`<div class="bar filters" role="search" aria-label="Filters">
    <${Choice}
      label="Verdict"
      options=${VERDICTS.map((verdict) => ({ ...verdict, count: whole(counts[verdict.value] || 0) }))}
      value=${params.verdict || ""}
      onChange=${set("verdict")}
    />
    <${Search}
      label="Text in the answer"
      hidden
      hint="text in the answer  /"
      value=${params.find || ""}
      onChange=${set("find")}
    />
    <details class="fold more" open=${window.innerWidth > 700}>
      <summary>More filters</summary>
      <div class="bar">
        <${Range} label="Score" step="0.1" value=${params.score} onChange=${set("score")} />
        <${Range} label="Length" step="1" value=${params.length} onChange=${set("length")} />
        <${Range} label="Step" step="1" value=${rangeText(params.step)} onChange=${set("step")} />
        ${menu("source", "Source")} ${menu("outcome", "Outcome")} ${menu("finish", "Finish")}
      </div>
    </details>
  </div>`;
}

/** A link names one step as "40"; the boxes want both ends. */
function rangeText(text) {
  return text && !text.includes("..") ? `${text}..${text}` : text;
}

function entries(table) {
  return [...table].sort().map((value) => ({ value, label: value }));
}

function columnsOf({ columns, tables }) {
  const text = (name) => (id) => (columns[name][id] === null ? "–" : tables[name][columns[name][id]]);
  const number = (name, places) => (id) => fixed(columns[name][id], places);
  return [
    { name: "step", label: "Step", title: "the training step", kind: "num", cell: (id) => columns.step[id] },
    {
      name: "row",
      label: "Row",
      title: "the problem's row in the data, and the sample",
      kind: "num extra",
      cell: (id) => `${columns.row[id]}·${columns.sample[id]}`,
    },
    { name: "source", label: "Source", title: "the source of the problem", kind: "text extra", cell: text("source") },
    {
      name: "reward",
      label: "✓",
      title: "right or wrong: the verifier's reward",
      kind: "mark",
      first: "-reward",
      cell: (id) => html`<${Verdict} reward=${columns.reward[id]} />`,
    },
    {
      name: "score",
      label: "Score",
      title: "the model's own score",
      kind: "num",
      first: "-score",
      cell: (id) => html`<${Score} value=${columns.score[id]} />`,
    },
    {
      name: "gap",
      label: "Gap",
      title: "by how much the score misses the reward",
      kind: "num",
      first: "-gap",
      cell: (id) => fixed(gap(columns, id), 2),
    },
    {
      name: "advantage",
      label: "Advantage",
      title: "what the update used",
      kind: "num extra",
      first: "-advantage",
      cell: number("advantage", 2),
    },
    {
      name: "length",
      label: "Length",
      title: "tokens",
      kind: "num",
      first: "-length",
      cell: (id) => columns.length[id] ?? "–",
    },
    { name: "outcome", label: "Outcome", title: "of the verifier", kind: "text extra", cell: text("outcome") },
    { name: "finish", label: "Finish", title: "why the response ended", kind: "text extra", cell: text("finish") },
    {
      name: "answer",
      label: "Answer",
      title: "what the verifier read as the answer",
      kind: "text answer",
      cell: text("answer"),
    },
  ];
}

/** The number, with a bar behind it from 0 to 1. */
function Score({ value }) {
  if (typeof value !== "number") return "–";
  const share = Math.max(0, Math.min(1, value));
  return html`<span class="score"><i
    style=${{ width: `${Math.round(share * 100)}%` }}
    aria-hidden="true"
  ></i><span>${value.toFixed(2)}</span></span>`;
}

function useWide() {
  const [wide, setWide] = useState(window.innerWidth > 800);
  useEffect(() => {
    const look = () => setWide(window.innerWidth > 800);
    window.addEventListener("resize", look);
    return () => window.removeEventListener("resize", look);
  }, []);
  return wide;
}
