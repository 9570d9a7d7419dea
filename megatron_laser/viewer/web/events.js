// What happened in a run: alarms in words with the place to look, servers that came and went, checkpoints.

import { amend, formatAddress } from "./address.js";
import { clock, number } from "./format.js";
import { useAnswer } from "./source.js";
import { Choice, html, Notice } from "./ui.js";

export function Events({ context, params, run }) {
  const { data, error } = useAnswer(context.answers, context.version, "events", { run: run.id });
  if (!data) return html`<${Notice} error=${error}>Reading the events …<//>`;
  const all = withCheckpoints(data);
  const kinds = [...new Set(all.map(({ kind }) => kind))].sort();
  const shown = all.filter(({ kind }) => !params.kind || kind === params.kind);
  const options = [{ value: "", label: "All", count: all.length }].concat(
    kinds.map((kind) => ({ value: kind, label: kind, count: all.filter((event) => event.kind === kind).length })),
  );
  return html`<section class="main" aria-label="Events">
    <${Alarms} alarms=${data.alarms} run=${run} />
    <h3>Events</h3>
    <div class="bar"><${Choice}
      label="Kind"
      options=${options}
      value=${params.kind || ""}
      onChange=${(kind) => amend({ kind })}
    /></div>
    ${shown.length ? null : html`<${Notice}>Nothing has happened yet.<//>`}
    ${shown.length ? html`<${EventTable} events=${shown} run=${run} />` : null}
  </section>`;
}

/** Newest first. A checkpoint on the disk that no event tells of (an older run) has a line as well. */
function withCheckpoints({ events, checkpoints }) {
  const told = new Set(events.filter(({ kind }) => kind === "checkpoint").map(({ step }) => step));
  const found = checkpoints
    .filter((step) => !told.has(step))
    .map((step) => ({ step, kind: "checkpoint", text: `checkpoint of step ${step}`, time: "" }));
  const order = [...events, ...found].map((event, place) => ({ ...event, place }));
  return order.sort((left, right) => (right.step ?? 0) - (left.step ?? 0) || right.place - left.place);
}

function stepLink(run, step, word = "step ") {
  if (step === null || step === undefined) return "–";
  return html`<a href=${formatAddress("step", { run: run.id, step })}>${word}${step}</a>`;
}

/** To the curves of the metrics that an alarm's place names. */
function curvesLink(run, place) {
  const words = new Set(place.split(/[\s,;]+/));
  const names = run.metrics.filter((name) => words.has(name));
  return names.length
    ? html`<a href=${formatAddress("curves", { runs: run.id, names: names.join(",") })}>show the curves</a>`
    : null;
}

function Alarms({ alarms, run }) {
  const order = [...alarms].sort(
    (left, right) => Number(left.last_step !== null) - Number(right.last_step !== null) || right.step - left.step,
  );
  const on = alarms.filter(({ last_step: last }) => last === null).length;
  return html`<h3>Alarms</h3>
    <p class="hint">${alarms.length ? `${on || "none"} on now, ${alarms.length - on} over` : "No alarm was raised."}</p>
    <ul class="alarms">
      ${order.map(
        (alarm) => html`<li key=${`${alarm.name}-${alarm.step}`} class=${alarm.last_step === null ? "on" : ""}>
          <header>
            <b>${alarm.name.replaceAll("_", " ")}</b>
            <span>${alarm.last_step === null ? "on" : "over"}</span>
            ${stepLink(run, alarm.step)}
            ${(alarm.last_step ?? alarm.step) === alarm.step ? null : html`to ${stepLink(run, alarm.last_step)}`}
            <small>${number(alarm.value)}, limit ${number(alarm.threshold)}</small>
          </header>
          <p>${alarm.message}</p>
          <p class="hint">Look at: ${alarm.place} ${curvesLink(run, alarm.place)}</p>
        </li>`,
      )}
    </ul>`;
}

function EventTable({ events, run }) {
  return html`<table class="plain events">
    <thead><tr><th class="num">Step</th><th>Kind</th><th>What</th><th class="when">When</th></tr></thead>
    <tbody>
      ${events.map(
        ({ step, kind, text, time, place }) => html`<tr key=${place}>
          <td class="num">${stepLink(run, step, "")}</td>
          <td><span class=${`kind ${kind}`}>${kind}</span></td>
          <td class="what">${text}</td>
          <td class="when">${clock(time)}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}
