// The runs and their settings: what is different between them first.

import { amend, formatAddress } from "./address.js";
import { anything, whole } from "./format.js";
import { search } from "./metric_groups.js";
import { Choice, html, Notice, Search } from "./ui.js";

export function Runs({ context, params }) {
  const { runs } = context;
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const differing = names.filter(
    (name) => new Set(runs.map((run) => JSON.stringify(run.settings[name] ?? null))).size > 1,
  );
  const all = runs.length === 1 || params.settings === "all";
  const shown = search(all ? names : differing, params.find || "");
  return html`<section class="main" aria-label="Runs">
    <h3>Runs</h3>
    <div class="scroll" tabindex="0" role="region" aria-label="Runs">
      <table class="plain">
        <thead>
          <tr>
            <th>Name</th><th>State</th><th class="num">Step</th>
            <th class="num">Responses</th><th>Tokens</th><th>Folder</th>
          </tr>
        </thead>
        <tbody>
          ${runs.map(
            (run) => html`<tr key=${run.id}>
              <td><a href=${formatAddress("curves", { runs: run.id })}>${run.name}</a></td>
              <td><span class=${`state ${run.state}`}>${run.state}</span></td>
              <td class="num">${whole(run.steps)}${run.total_steps ? ` / ${whole(run.total_steps)}` : ""}</td>
              <td class="num">
                <a href=${formatAddress("responses", { run: run.id })}>${whole(run.num_responses)}</a>
              </td>
              <td>${run.has_tokens ? "yes" : "no"}</td>
              <td class="what">${run.folder}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    <h3>Settings</h3>
    <div class="bar">
      ${
        runs.length > 1
          ? html`<${Choice}
            label="Settings"
            options=${[
              { value: "", label: "Different ones", count: differing.length },
              { value: "all", label: "All", count: names.length },
            ]}
            value=${all ? "all" : ""}
            onChange=${(settings) => amend({ settings })}
          />`
          : null
      }
      <${Search}
        label="Find"
        hidden
        hint="find settings  /"
        value=${params.find || ""}
        onChange=${(find) => amend({ find })}
      />
    </div>
    ${
      shown.length
        ? html`<${Settings}
      names=${shown}
      runs=${runs}
    />`
        : html`<${Notice}>${all ? "No setting of that name." : "The runs have the same settings."}<//>`
    }
  </section>`;
}

function Settings({ names, runs }) {
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Settings">
    <table class="plain settings">
      <thead><tr><th>Setting</th>${runs.map((run) => html`<th key=${run.id}>${run.name}</th>`)}</tr></thead>
      <tbody>
        ${names.map(
          (name) =>
            html`<tr key=${name}><td><code>${name}</code></td>${runs.map(
              (run) => html`<td
          key=${run.id}
          class="what"
        >${anything(run.settings[name])}</td>`,
            )}</tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}
