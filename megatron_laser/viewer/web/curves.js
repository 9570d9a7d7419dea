// Curves: metrics of all chosen runs over their steps, one chart a metric.

import { amend, go } from "./address.js";
import { Chart } from "./chart.js";
import { firstMetrics, grouped, search } from "./metric_groups.js";
import { join } from "./smoothing.js";
import { useAnswer } from "./source.js";
import { html, Notice, Search } from "./ui.js";
import { useEffect, useMemo, useState } from "./vendor/preact_hooks.js";

const SLOTS = 8; // colours of runs

export function Curves({ context, params }) {
  const { runs } = context;
  const names = useMemo(() => [...new Set(runs.flatMap((run) => run.metrics))], [runs]);
  const shownRuns = chosenRuns(runs, params.runs);
  const shownNames = params.names ? params.names.split(",").filter(Boolean) : firstMetrics(names);
  const found = params.find ? search(names, params.find) : null;
  // While something is searched for, it is what is shown: looking at a metric should not need two clicks.
  const drawn = found ? found.slice(0, 60) : shownNames;
  const weight = Number(params.smooth || 0);
  return html`<div class="split">
    <aside class="side" aria-label="Runs and metrics">
      <details class="fold" open=${window.innerWidth > 700}>
        <summary>Runs and metrics</summary>
        <${RunList} runs=${runs} shown=${shownRuns} />
        <${Search}
          label="Find metrics"
          hidden
          hint="find metrics  /"
          value=${params.find || ""}
          onChange=${(find) => amend({ find })}
        />
        <${MetricList}
          names=${found || names}
          shown=${shownNames}
          all=${names}
          open=${Boolean(found)}
          chosen=${params.names}
        />
      </details>
    </aside>
    <section class="main" aria-label="Curves">
      <div class="bar">
        <label class="field inline"
          ><span>Smoothing</span>
          <input
            type="range"
            min="0"
            max="0.98"
            step="0.02"
            value=${weight}
            aria-valuetext=${weight ? `weight ${weight}` : "off"}
            onInput=${(event) => amend({ smooth: Number(event.currentTarget.value) || "" })} />
          <output>${weight ? weight.toFixed(2) : "off"}</output></label
        >
        <span class="hint">Drag to zoom, double-click for all. A click or Enter opens the step.</span>
      </div>
      ${found && !found.length ? html`<${Notice}>No metric has “${params.find}” in its name.<//>` : null}
      <${Charts} context=${context} runs=${shownRuns} names=${drawn} weight=${weight} />
    </section>
  </div>`;
}

function chosenRuns(runs, text) {
  const wanted = text ? new Set(text.split(",")) : null;
  return runs
    .map((run, place) => ({ ...run, label: run.name, slot: place % SLOTS }))
    .filter((run) => (wanted ? wanted.has(run.id) : true));
}

function RunList({ runs, shown }) {
  if (runs.length < 2) return null;
  const on = new Set(shown.map((run) => run.id));
  const toggle = (id) => {
    const wanted = runs.map((run) => run.id).filter((own) => (own === id ? !on.has(own) : on.has(own)));
    amend({ runs: wanted.length === runs.length || !wanted.length ? "" : wanted.join(",") });
  };
  return html`<fieldset class="list">
    <legend>Runs</legend>
    ${runs.map(
      (run, place) => html`<label key=${run.id} class="tick" title=${run.folder}
        ><input type="checkbox" checked=${on.has(run.id)} onChange=${() => toggle(run.id)} /><span
          class=${`swatch run-${place % SLOTS}`}
          aria-hidden="true"
        ></span
        ><span class="grow">${run.name}</span></label
      >`,
    )}
  </fieldset>`;
}

function MetricList({ names, shown, all, open, chosen }) {
  const on = new Set(shown);
  const set = (wanted) => amend({ names: wanted.join(",") });
  const toggle = (name) => set(on.has(name) ? shown.filter((own) => own !== name) : [...shown, name]);
  return html`<div class="metrics">
    <p class="hint">
      ${shown.length} of ${all.length} shown${" "}
      ${
        chosen
          ? html`<button
        type="button"
        class="link"
        onClick=${() => amend({ names: "" })}
      >first choice</button>`
          : null
      }
    </p>
    ${grouped(names).map(
      ([group, members]) => html`<details key=${group} open=${open || members.some((name) => on.has(name))}>
        <summary>${group} <small>${members.filter((name) => on.has(name)).length}/${members.length}</small></summary>
        ${members.map(
          (name) => html`<label key=${name} class="tick"
            ><input
              type="checkbox"
              checked=${on.has(name)}
              onChange=${() => toggle(name)}
            /><span class="grow" title=${name}
              >${name}</span
            ></label
          >`,
        )}
      </details>`,
    )}
  </div>`;
}

function Charts({ context, runs, names, weight }) {
  const curves = useCurves(context, runs, names);
  const marks = useAlarmSteps(context, runs);
  const step = (number) => go("step", { run: nearestRun(runs, curves.byRun, number), step: number });
  if (curves.error) return html`<${Notice} error=${curves.error} />`;
  return html`<div class="charts">
    ${names.map(
      (name) => html`<${Chart}
        key=${name}
        name=${name}
        runs=${runs}
        data=${curves.of(name)}
        weight=${weight}
        marks=${marks}
        theme=${context.theme}
        onStep=${step}
      />`,
    )}
  </div>`;
}

/** Of several runs, the first that has the step. */
function nearestRun(runs, byRun, step) {
  const there = runs.find((run) => (byRun.get(run.id) || { steps: [] }).steps.includes(step));
  return (there || runs[0]).id;
}

/** Curves of all names of all runs; what is there already stays while others are fetched. */
function useCurves({ answers, version }, runs, names) {
  const [state, setState] = useState({ byRun: new Map(), error: null });
  const key = `${runs.map((run) => run.id).join()}|${names.join()}`;
  useEffect(() => {
    let wanted = true;
    Promise.all(
      runs.map(async (run) => {
        const own = names.filter((name) => run.metrics.includes(name));
        const { data } = await answers.load("curves", { run: run.id, names: own.join(",") }, version);
        return [run.id, data];
      }),
    ).then(
      (found) => wanted && setState({ byRun: new Map(found), error: null }),
      (error) => wanted && setState((old) => ({ ...old, error: old.byRun.size ? null : error.message })),
    );
    return () => {
      wanted = false;
    };
  }, [answers, version, key]);
  // One array for each name as long as nothing is new: charts compare by identity.
  const joined = useMemo(() => new Map(), [state.byRun, key]);
  const of = (name) => {
    if (!joined.has(name)) {
      const each = runs.map((run) => {
        const found = state.byRun.get(run.id) || { steps: [], values: {} };
        return { steps: found.steps, values: found.values[name] || found.steps.map(() => null) };
      });
      joined.set(name, join(each));
    }
    return joined.get(name);
  };
  return { of, byRun: state.byRun, error: state.error };
}

/** Where alarms of the one run that is shown began; with several, lines would not say whose they are. */
function useAlarmSteps({ answers, version }, runs) {
  const { data } = useAnswer(answers, version, runs.length === 1 ? "events" : null, { run: (runs[0] || {}).id });
  return useMemo(
    () => (runs.length === 1 && data ? data.alarms.map(({ step }) => ({ step })) : []),
    [data, runs.length],
  );
}
