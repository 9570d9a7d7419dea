// One step: its timeline (who worked and who waited for whom) and all of its metrics.

import { amend, formatAddress } from "./address.js";
import { anything, seconds } from "./format.js";
import { useKeys } from "./keys.js";
import { grouped, search } from "./metric_groups.js";
import { useAnswer } from "./source.js";
import { html, Notice, Search, useWidth } from "./ui.js";
import { useMemo, useRef } from "./vendor/preact_hooks.js";
import { longestWaits, ticks, timeline } from "./waits.js";

const LANE = 20;
const PAD = 5;
const PHASES = ["generate", "generate_ahead", "grade", "logprob", "train", "sync", "checkpoint", "evaluate", "drift"];

export function Step({ context, params, run }) {
  const { answers, version } = context;
  const events = useAnswer(answers, version, "events", { run: run.id });
  const steps = events.data ? events.data.timeline_steps || [] : [];
  const step = params.step === undefined ? (steps[steps.length - 1] ?? run.steps) : Number(params.step);
  const known = run.metrics.length > 0 && (events.data !== undefined || params.step !== undefined);
  const { data, error } = useAnswer(answers, version, known ? "step" : null, { run: run.id, step });
  const before = steps.filter((own) => own < step).pop();
  const after = steps.find((own) => own > step);
  const open = (other) => other !== undefined && amend({ step: other });
  useKeys({
    ArrowLeft: () => open(before),
    ArrowRight: () => open(after),
    k: () => open(before),
    j: () => open(after),
  });
  return html`<section class="main" aria-label="Step">
    <div class="bar">
      <span class="steps">
        <button
          type="button"
          disabled=${before === undefined}
          onClick=${() => open(before)}
          title="the one before that has a timeline (←)"
          aria-label="previous step with a timeline"
        >‹</button>
        <label class="field inline"
          ><span>Step</span>
          <input
            type="number"
            min="1"
            max=${run.steps}
            value=${step}
            onChange=${(event) => open(Number(event.currentTarget.value))}
        /></label>
        <button
          type="button"
          disabled=${after === undefined}
          onClick=${() => open(after)}
          title="the next one that has a timeline (→)"
          aria-label="next step with a timeline"
        >›</button>
      </span>
      <a href=${formatAddress("responses", { run: run.id, step })}>Responses of this step</a>
      <span class="hint">${steps.length ? `${steps.length} steps have a timeline` : "this run has no timeline"}</span>
    </div>
    ${
      data
        ? html`<${Timeline} spans=${data.spans} />
          <${Metrics} metrics=${data.metrics} find=${params.find || ""} />`
        : html`<${Notice} error=${error}>${run.metrics.length ? "Reading the step …" : "There is no step yet."}<//>`
    }
  </section>`;
}

function Timeline({ spans }) {
  const box = useRef(null);
  const width = useWidth(box);
  const lines = useMemo(() => timeline(spans), [spans]);
  if (!spans.length) return html`<${Notice}>This step has no timeline.<//>`;
  return html`<h3>Timeline</h3>
    <${PhaseLegend} rows=${lines.rows} />
    <div class="timeline" ref=${box}>${width ? html`<${Drawing} lines=${lines} width=${width} />` : null}</div>
    <${Waits} lines=${lines} />`;
}

function phaseClass(phase) {
  const place = PHASES.indexOf(phase);
  return `phase-${place < 0 ? "other" : phase}`;
}

function PhaseLegend({ rows }) {
  const phases = [...new Set(rows.flatMap(({ lanes }) => lanes.flat().map(({ phase }) => phase)))];
  return html`<div class="legend">
    ${phases.map(
      (phase) => html`<span key=${phase}><i
      class=${`swatch ${phaseClass(phase)}`}
      aria-hidden="true"
    ></i>${phase}</span>`,
    )}
    <span><i class="swatch waiting" aria-hidden="true"></i>waiting</span>
  </div>`;
}

function Drawing({ lines: { rows, extent }, width }) {
  const left = Math.min(150, Math.max(60, 12 + 6.5 * Math.max(...rows.map(({ who }) => who.length))));
  const scale = (width - left - 12) / (extent || 1);
  const x = (time) => left + time * scale;
  let top = 22;
  const placed = rows.map((row) => {
    const height = row.lanes.length * LANE + PAD;
    const found = { ...row, top, height };
    top += height;
    return found;
  });
  const marks = ticks(extent, width / 90);
  return html`<svg
    width=${width}
    height=${top + 4}
    role="img"
    aria-label="Timeline; the table below says the same in numbers"
  >
    <defs>
      <pattern id="hatch" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
        <rect class="hatch" width="2" height="6" />
      </pattern>
    </defs>
    ${marks.map(
      (time) => html`<g key=${time}>
        <line class="grid" x1=${x(time)} x2=${x(time)} y1="16" y2=${top} />
        <text
          class="axis"
          x=${x(time)}
          y="11"
          text-anchor=${time === 0 ? "start" : "middle"}
        >${time === 0 ? "0 s" : time}</text>
      </g>`,
    )}
    ${placed.map(
      (row) => html`<g key=${row.who}>
        <text class="who" x="0" y=${row.top + LANE / 2 + 4}>${shorten(row.who, left)}<title>${row.who}</title></text>
        ${row.gaps.map((gap) => html`<${Gap} gap=${gap} row=${row} x=${x} />`)}
        ${row.lanes.map((lane, number) =>
          lane.map(
            (span) => html`<${Span}
          span=${span}
          top=${row.top + number * LANE}
          x=${x}
        />`,
          ),
        )}
      </g>`,
    )}
  </svg>`;
}

function shorten(text, room) {
  const most = Math.floor((room - 8) / 6.5);
  return text.length <= most ? text : `…${text.slice(1 - most)}`;
}

function Span({ span, top, x }) {
  const width = Math.max(1, x(span.end) - x(span.start));
  const long = `${span.phase} ${seconds(span.end - span.start)}`;
  const words = width > 7 * long.length ? long : width > 7 * span.phase.length ? span.phase : "";
  return html`<g class=${phaseClass(span.phase)}>
    <rect x=${x(span.start)} y=${top} width=${width} height=${LANE - 3} rx="2" />
    <text x=${x(span.start) + 5} y=${top + LANE / 2 + 3}>${words}</text>
    <title>${`${span.who}: ${long}, from ${seconds(span.start)} to ${seconds(span.end)}`}</title>
  </g>`;
}

function Gap({ gap, row, x }) {
  const width = x(gap.end) - x(gap.start);
  const words = seconds(gap.end - gap.start);
  const why = gap.after ? `for ${gap.after.who} (${gap.after.phase})` : "";
  return html`<g class="gap">
    <rect x=${x(gap.start)} y=${row.top} width=${width} height=${LANE - 3} rx="2" fill="url(#hatch)" />
    ${
      width > 8 * words.length + 8
        ? html`<text
      x=${x(gap.start) + width / 2}
      y=${row.top + LANE / 2 + 3}
      text-anchor="middle"
    >${words}</text>`
        : null
    }
    <title>${`${row.who} waits ${words} ${why}`}</title>
  </g>`;
}

function Waits({ lines }) {
  const waits = longestWaits(lines);
  return html`<div class="pair">
    <table class="plain">
      <caption>Longest waits</caption>
      <thead><tr><th>Who</th><th class="num">Waited</th><th>For</th></tr></thead>
      <tbody>
        ${waits.map(
          ({ who, seconds: time, after, last }, place) => html`<tr key=${place}>
            <td title=${who.join(", ")}>${who[0]}${who.length > 1 ? ` and ${who.length - 1} more` : ""}</td>
            <td class="num">${seconds(time)}</td>
            <td>${after ? `${after.who}, ${after.phase}` : last ? "the end of the step" : "nothing recorded"}</td>
          </tr>`,
        )}
      </tbody>
    </table>
    <table class="plain">
      <caption>Time of each</caption>
      <thead>
        <tr><th>Who</th><th class="num">At work</th><th class="num">Waiting</th><th class="num">Share</th></tr>
      </thead>
      <tbody>
        ${lines.rows.map(
          ({ who, busy, waited }) => html`<tr key=${who}>
            <td>${who}</td><td class="num">${seconds(busy)}</td><td class="num">${seconds(waited)}</td>
            <td class="num">${lines.extent ? `${Math.round((100 * waited) / lines.extent)} %` : "–"}</td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

function Metrics({ metrics, find }) {
  const names = search(Object.keys(metrics), find);
  return html`<h3>Metrics of the step</h3>
    <div class="bar"><${Search}
      label="Find"
      hidden
      hint="find metrics  /"
      value=${find}
      onChange=${(text) => amend({ find: text })}
    /></div>
    <div class="groups">
      ${grouped(names).map(
        ([group, members]) => html`<section key=${group}>
          <h4>${group}</h4>
          <dl class="values">
            ${members.map((name) => html`<${Value} key=${name} name=${name} text=${anything(metrics[name])} />`)}
          </dl>
        </section>`,
      )}
    </div>`;
}

function Value({ name, text }) {
  return html`<div><dt title=${name}>${name}</dt><dd title=${text}>${text}</dd></div>`;
}
