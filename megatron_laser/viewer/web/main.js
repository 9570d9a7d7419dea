// The page: reads the runs, follows the address, draws the view that it names, and looks for news while a run goes on.

import { formatAddress, go, parseAddress, pick } from "./address.js";
import { Curves } from "./curves.js";
import { Events } from "./events.js";
import { FILTERS } from "./filters.js";
import { whole } from "./format.js";
import { focusSearch, Help, useKeys } from "./keys.js";
import { Response } from "./response.js";
import { Responses } from "./responses.js";
import { Runs } from "./runs.js";
import { Answers, openSource } from "./source.js";
import { Step } from "./step.js";
import { useTheme } from "./theme.js";
import { html, Notice } from "./ui.js";
import { render } from "./vendor/preact.js";
import { useEffect, useMemo, useState } from "./vendor/preact_hooks.js";

const EVERY = 2000; // ms between looks for news while a run goes on
const SELDOM = 15000; // ms: an ended run may be resumed

const VIEWS = [
  { name: "curves", label: "Curves", view: Curves },
  { name: "responses", label: "Responses", view: Responses, one: true },
  { name: "response", label: "Response", view: Response, one: true },
  { name: "step", label: "Step", view: Step, one: true },
  { name: "events", label: "Events", view: Events, one: true },
  { name: "runs", label: "Runs", view: Runs },
];

function useAddress() {
  const [address, setAddress] = useState(() => parseAddress(window.location.hash));
  useEffect(() => {
    const follow = () => setAddress(parseAddress(window.location.hash));
    window.addEventListener("hashchange", follow);
    return () => window.removeEventListener("hashchange", follow);
  }, []);
  return address;
}

/** The list of runs, kept up to date; `problem` says why it is not, while the rest stays as it was. */
function useRuns(source, first) {
  const [listed, setListed] = useState(first);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    if (!source.live) return undefined;
    let timer = 0;
    let known = listed;
    const look = async () => {
      try {
        // A page in the background asks nothing.
        if (!document.hidden) {
          const { version } = await source.get("version");
          if (version !== known.version) {
            known = await source.get("runs");
            setListed(known);
          }
          setProblem(null);
        }
      } catch (error) {
        setProblem(error.message);
      }
      const busy = known.live || known.runs.some((run) => run.indexed === false);
      timer = setTimeout(look, busy ? EVERY : SELDOM);
    };
    timer = setTimeout(look, 500);
    const back = () => {
      if (document.hidden) return;
      clearTimeout(timer);
      look();
    };
    document.addEventListener("visibilitychange", back);
    return () => {
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", back);
    };
  }, [source]);
  return { ...listed, problem };
}

function App({ source, first }) {
  const address = useAddress();
  const theme = useTheme();
  const { runs, version, live, problem } = useRuns(source, first);
  const answers = useMemo(() => new Answers(source), [source]);
  const [help, setHelp] = useState(false);
  const shown = VIEWS.find(({ name }) => name === address.view) || VIEWS[0];
  const { params } = address;
  const run = runs.find(({ id }) => id === params.run) || runs[0];
  const context = useMemo(
    () => ({ answers, version, runs, theme: theme.shown }),
    [answers, version, runs, theme.shown],
  );
  const open = (name) => (window.location.hash = addressOf(name, address, run));
  useKeys({
    ...Object.fromEntries(VIEWS.map(({ name }, place) => [String(place + 1), () => open(name)])),
    "/": focusSearch,
    "?": () => setHelp(true),
    d: theme.next,
  });
  useEffect(() => {
    document.title = `${shown.label} · ${shown.one ? run.name : runs.map(({ name }) => name).join(", ")}`;
  }, [shown, run.name, runs.length]);
  return html`<a class="skip" href="#content" onClick=${skip}>Skip to the content</a>
    <header class="top">
      <h1 class="hidden">Runs of megatron_laser</h1>
      <nav aria-label="Views">
        ${VIEWS.map(
          ({ name, label }) =>
            html`<a
              key=${name}
              href=${addressOf(name, address, run)}
              aria-current=${name === shown.name ? "page" : null}
            >${label}</a>`,
        )}
      </nav>
      ${
        shown.one && runs.length > 1
          ? html`<select
            aria-label="Run"
            value=${run.id}
            onChange=${(event) => go(shown.name, { run: event.currentTarget.value })}
          >
            ${runs.map(({ id, name }) => html`<option key=${id} value=${id}>${name}</option>`)}
          </select>`
          : null
      }
      <${State} runs=${shown.one ? [run] : runs} live=${live} problem=${problem} file=${!source.live} />
      <button
        type="button"
        class="plainly"
        onClick=${theme.next}
        title="light, dark, or as the system has it (d)"
      ><span class="roomy">Theme: </span>${theme.choice}</button>
      <button type="button" class="plainly" onClick=${() => setHelp(true)} title="keys (?)" aria-label="keys">?</button>
    </header>
    <main id="content" tabindex="-1"><${shown.view}
      key=${shown.one ? run.id : ""}
      context=${context}
      params=${params}
      run=${run}
    /></main>
    <${Help} open=${help} onClose=${() => setHelp(false)} />`;
}

/** A link of the head: it keeps the run, and between the table and one response also the filters. */
function addressOf(name, { view, params }, run) {
  const table = ["responses", "response"];
  const kept = table.includes(name) && table.includes(view) ? pick(params, [...FILTERS, "id"]) : {};
  const own = VIEWS.find((entry) => entry.name === name).one ? { run: run.id } : {};
  return formatAddress(name, { ...own, ...kept });
}

/** To the content without the address changing, which is the view's. */
function skip(event) {
  event.preventDefault();
  document.getElementById("content").focus();
}

function State({ runs, live, problem, file }) {
  const [run] = runs;
  const steps =
    runs.length === 1
      ? ` · step ${whole(run.steps)}${run.total_steps ? ` of ${whole(run.total_steps)}` : ""}`
      : ` · ${runs.length} runs`;
  const state = runs.length === 1 ? run.state : live ? "running" : "ended";
  if (problem) return html`<span class="live bad" role="alert">${problem}</span>`;
  return html`<span class="live" role="status"><i
    class=${`dot ${state}`}
    aria-hidden="true"
  ></i>${file ? "exported" : state}${steps}</span>`;
}

async function start() {
  const app = document.getElementById("app");
  try {
    const source = await openSource();
    const first = await source.get("runs");
    app.replaceChildren();
    render(html`<${App} source=${source} first=${first} />`, app);
    performance.mark("drawn");
  } catch (error) {
    app.replaceChildren();
    render(html`<${Notice} error=${error.message} />`, app);
    if (!error.status && error.status !== 0) throw error; // a fault of the page: the console has where
  }
}

start();
