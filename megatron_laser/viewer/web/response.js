// One response: its text, its tokens, or its whole group, with the numbers of the response beside it.

import { amend, formatAddress, pick } from "./address.js";
import { FILTERS } from "./filters.js";
import { fixed, number, whole } from "./format.js";
import { GroupTable, SideBySide, Votes } from "./group.js";
import { useKeys } from "./keys.js";
import { useSelection } from "./responses.js";
import { RichText } from "./rich_text.js";
import { useAnswer } from "./source.js";
import { Tokens } from "./tokens.js";
import { html, Notice, Verdict } from "./ui.js";

const TABS = [
  ["text", "Text"],
  ["tokens", "Tokens"],
  ["group", "Group"],
];

export function Response({ context, params, run }) {
  const { answers, version } = context;
  const index = useAnswer(answers, version, "responses", { run: run.id }).data;
  const { ids } = useSelection(index, params);
  const id = params.id === undefined ? ids[0] : Number(params.id);
  const { data, error } = useAnswer(answers, version, id === undefined ? null : "response", { run: run.id, id });
  const place = ids.indexOf(id);
  const tab = TABS.some(([name]) => name === params.tab) ? params.tab : "text";
  // A token stands for another place in another response.
  const open = (other) => other !== undefined && amend({ id: other, token: "" });
  const list = formatAddress("responses", { run: run.id, id, ...pick(params, FILTERS) });
  useKeys({
    j: () => open(ids[place + 1]),
    k: () => open(ids[place - 1]),
    v: () => amend({ tab: TABS[(TABS.findIndex(([name]) => name === tab) + 1) % TABS.length][0] }),
    Escape: () => (window.location.hash = list),
  });
  if (!data) {
    const why = index && !ids.length ? "No response fits the filters." : "Reading the response …";
    return html`<${Notice} error=${error}>${why}<//>`;
  }
  const group = html`<${SideBySide} context=${context} run=${run} response=${data} onOpen=${open} />`;
  return html`<section class="main response" aria-label="Response">
    <div class="bar">
      <a href=${list}>All responses</a>
      <span class="steps">
        <button
          type="button"
          disabled=${place <= 0}
          onClick=${() => open(ids[place - 1])}
          title="previous (k)"
          aria-label="previous response"
        >‹</button>
        <span>${place < 0 ? "not in the list" : `${whole(place + 1)} of ${whole(ids.length)}`}</span>
        <button
          type="button"
          disabled=${place < 0 || place + 1 >= ids.length}
          onClick=${() => open(ids[place + 1])}
          title="next (j)"
          aria-label="next response"
        >›</button>
      </span>
      <${Tabs} tab=${tab} />
    </div>
    <${Facts} response=${data} run=${run} />
    <div class=${tab === "group" ? "" : "reading"}>
      <div role="tabpanel" id="panel" aria-labelledby=${`tab-${tab}`}>
        ${tab === "tokens" ? html`<${Tokens} response=${data} params=${params} />` : null}
        ${tab === "text" ? html`<${Texts} response=${data} />` : null}
        ${tab === "group" ? group : null}
      </div>
      <aside class=${tab === "group" ? "below" : "beside"} aria-label="The group and its votes">
        <div>
          <h3>Group of ${data.group.length}</h3>
          <${GroupTable} response=${data} onOpen=${open} />
        </div>
        <${Votes} votes=${data.votes} />
      </aside>
    </div>
  </section>`;
}

function Tabs({ tab }) {
  const keys = (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    const next = TABS[(TABS.findIndex(([name]) => name === tab) + move + TABS.length) % TABS.length][0];
    amend({ tab: next });
    document.getElementById(`tab-${next}`).focus();
    event.preventDefault();
  };
  return html`<div class="choice" role="tablist" aria-label="How the response is shown" onKeyDown=${keys}>
    ${TABS.map(
      ([name, label]) => html`<button
        key=${name}
        id=${`tab-${name}`}
        type="button"
        role="tab"
        aria-selected=${String(name === tab)}
        aria-controls="panel"
        tabindex=${name === tab ? 0 : -1}
        onClick=${() => amend({ tab: name })}
      >
        ${label}
      </button>`,
    )}
  </div>`;
}

function Facts({ response, run }) {
  const step = html`<a href=${formatAddress("step", { run: run.id, step: response.step })}>${response.step}</a>`;
  const fact = (label, value, title) => html`<div title=${title}><dt>${label}</dt><dd>${value}</dd></div>`;
  return html`<dl class="facts">
    ${fact("Verdict", html`<${Verdict} reward=${response.reward} word />`, `reward ${number(response.reward)}`)}
    ${fact("Score", fixed(response.score, 3), "the model's own score of the response")}
    ${fact("Answer", response.answer_given ?? "–", "what the verifier read as the answer")}
    ${fact("Reference", response.answer ?? "–", "the right answer of the data")}
    ${fact("Advantage", fixed(response.advantage, 3), "what the update used")}
    ${fact("Length", `${response.length ?? "–"}`, "tokens")}
    ${fact("Outcome", response.outcome ?? "–", "of the verifier")}
    ${fact("Finish", response.finish_reason ?? "–", "why the response ended")}
    ${fact("log π(z_c)", fixed(response.zc_logprob, 2), "log-prob of the score token behind the response, nats")}
    ${fact("Source", response.source ?? "–", `row ${response.row}, sample ${response.sample}`)}
    ${fact("Step", step, "its metrics and timeline")}
  </dl>`;
}

function Texts({ response }) {
  return html`<div>
    <h3>Problem</h3>
    <${RichText} text=${response.problem} />
    ${
      response.prompt
        ? html`<details class="prompt">
            <summary>The prompt as the model reads it</summary>
            <pre>${response.prompt}</pre>
          </details>`
        : null
    }
    <h3>Response</h3>
    <${RichText} text=${response.response} />
  </div>`;
}
