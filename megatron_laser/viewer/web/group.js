// The responses to one prompt beside each other, and what they vote for.

import { fixed, number } from "./format.js";
import { RichText } from "./rich_text.js";
import { useAnswer } from "./source.js";
import { html, Notice, Verdict } from "./ui.js";

/** A short table of the group; the response that is open is marked. */
export function GroupTable({ response, onOpen }) {
  return html`<table class="plain group" aria-label="The group">
    <thead>
      <tr>
        <th class="mark">✓</th><th class="num">Score</th><th class="num">Length</th><th>Answer</th><th>Finish</th>
      </tr>
    </thead>
    <tbody>
      ${response.group.map(
        (member) => html`<tr key=${member.id} aria-current=${member.id === response.id ? "true" : null}>
          <td class="mark"><${Verdict} reward=${member.reward} /></td>
          <td class="num">${fixed(member.score, 2)}</td>
          <td class="num">${member.length ?? "–"}</td>
          <td class="answer">
            ${
              member.id === response.id
                ? html`<b>${member.answer ?? "–"}</b>`
                : html`<button
                  type="button"
                  class="link"
                  onClick=${() => onOpen(member.id)}
                >${member.answer ?? "none"}</button>`
            }
          </td>
          <td>${member.finish_reason ?? "–"}</td>
        </tr>`,
      )}
    </tbody>
  </table>`;
}

export function Votes({ votes }) {
  if (!votes) return null;
  return html`<div class="votes">
    <${Vote} title="Majority" vote=${votes.majority} />
    ${
      votes.weighted
        ? html`<${Vote} title="Weighted by score" vote=${votes.weighted} />`
        : html`<p class="hint">No weighted vote: nothing has a score.</p>`
    }
  </div>`;
}

function Vote({ title, vote }) {
  const most = Math.max(...vote.counts.map(([, weight]) => weight), 1e-9);
  const reward = vote.right === null ? null : Number(vote.right);
  return html`<section>
    <h4>${title} <${Verdict} reward=${reward} word /></h4>
    ${vote.counts.length ? null : html`<p class="hint">nobody votes</p>`}
    <ul>
      ${vote.counts.map(
        ([answer, weight]) => html`<li key=${answer} aria-current=${answer === vote.answer ? "true" : null}>
          <span class="text" title=${answer}>${answer}</span>
          <i style=${{ width: `${(40 * weight) / most}%` }} aria-hidden="true"></i>
          <span>${number(weight, 3)}</span>
        </li>`,
      )}
    </ul>
  </section>`;
}

/** Whole responses in columns, to be read beside each other. */
export function SideBySide({ context, run, response, onOpen }) {
  return html`<div class="columns" tabindex="0" role="list" aria-label="Responses of the group beside each other">
    ${response.group.map(
      (
        member,
      ) => html`<article key=${member.id} role="listitem" aria-current=${member.id === response.id ? "true" : null}>
        <header>
          <${Verdict} reward=${member.reward} word />
          <span>score <b>${fixed(member.score, 2)}</b></span>
          <span>${member.length ?? "–"} tokens</span>
          <button type="button" class="link" onClick=${() => onOpen(member.id)} disabled=${member.id === response.id}>
            ${member.id === response.id ? "this one" : "open this"}
          </button>
        </header>
        <${MemberText} context=${context} run=${run} id=${member.id} />
      </article>`,
    )}
  </div>`;
}

function MemberText({ context, run, id }) {
  const { data, error } = useAnswer(context.answers, context.version, "response", { run: run.id, id });
  return data ? html`<${RichText} text=${data.response} />` : html`<${Notice} error=${error}>…<//>`;
}
