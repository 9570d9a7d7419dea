// The tokens of a response and what can be told of each: pure, for the token view and its tests.

/**
 * Texts of tokens from the places where they end.
 *
 * Ends count code points, as Python does, while a string here counts UTF-16 units: an emoji is one of those and two of
 * these. A token may have no text (the stop token, or the first bytes of a letter).
 */
export function tokenTexts(text, ends) {
  const letters = /[\ud800-\udfff]/.test(text) ? Array.from(text) : null;
  let start = 0;
  return ends.map((end) => {
    const own = letters ? letters.slice(start, end).join("") : text.slice(start, end);
    start = end;
    return own;
  });
}

const difference = (left, right) => (left && right ? left.map((value, place) => minus(value, right[place])) : null);
const minus = (left, right) => (typeof left === "number" && typeof right === "number" ? left - right : null);

/**
 * What tokens may be coloured by: [{name, label, unit, values, missing, scale, text}].
 *
 * values: one a token, or null where the run has none, and `missing` says why. scale: "low" where small values stand
 * out, "high" where large ones do, "ratio" where both sides of 1 do.
 */
export function measures(tokens) {
  const { logprob, policy_logprob: policy, entropy } = tokens;
  const logRatio = difference(policy, logprob);
  const without = "not recorded for this response";
  const noPass = `${without}: with policy.old_logprobs: rollout or on_policy the trainer reads none before the update`;
  return [
    {
      name: "logprob",
      label: "Log-prob",
      unit: "nats",
      values: logprob || null,
      scale: "low",
      missing: without,
      text: "of the engine that generated it",
    },
    {
      name: "entropy",
      label: "Entropy",
      unit: "nats",
      values: entropy || null,
      scale: "high",
      missing: noPass,
      text: "of the policy's distribution at this place",
    },
    {
      name: "ratio",
      label: "Ratio",
      unit: "",
      values: logRatio ? logRatio.map((value) => (value === null ? null : Math.exp(value))) : null,
      scale: "ratio",
      missing: noPass,
      text: "importance ratio: the trainer's probability over the engine's",
    },
    {
      name: "policy",
      label: "Policy",
      unit: "nats",
      values: policy || null,
      scale: "low",
      missing: noPass,
      text: "log-prob of the trainer before the update",
    },
  ];
}

/**
 * How strongly each token is coloured: {of(value), low, high}. `of` gives -1..1 for "ratio", else 0..1. The ends of the
 * scale are near the extremes of this response (its 98th percentile), so that an odd token does not turn the rest pale.
 */
export function strength({ values, scale }) {
  const there = values.filter((value) => typeof value === "number" && Number.isFinite(value));
  if (scale === "ratio") {
    const reach = Math.max(
      quantile(
        there.map((value) => Math.abs(Math.log(value))),
        0.98,
      ),
      0.01,
    );
    const of = (value) => (typeof value === "number" ? clamp(Math.log(value) / reach, -1, 1) : 0);
    return { of, low: Math.exp(-reach), high: Math.exp(reach) };
  }
  if (scale === "low") {
    const low = Math.min(quantile(there, 0.02), -0.1);
    return { of: (value) => (typeof value === "number" ? clamp(value / low, 0, 1) : 0), low: 0, high: low };
  }
  const high = Math.max(quantile(there, 0.98), 0.1);
  return { of: (value) => (typeof value === "number" ? clamp(value / high, 0, 1) : 0), low: 0, high };
}

const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

function quantile(values, share) {
  if (!values.length) return 0;
  const order = [...values].sort((left, right) => left - right);
  return order[Math.round(share * (order.length - 1))];
}

/**
 * Scores that were read while it was written, by the token that they stand behind: Map(token -> [{name, score}]).
 * readouts: {name: [[offset in tokens, score], ...]}; an offset of n is behind token n - 1.
 */
export function readoutsAt(readouts) {
  const found = new Map();
  for (const [name, points] of Object.entries(readouts || {})) {
    for (const [offset, score] of points) {
      const token = Math.max(0, offset - 1);
      if (!found.has(token)) found.set(token, []);
      found.get(token).push({ name, score });
    }
  }
  return found;
}
