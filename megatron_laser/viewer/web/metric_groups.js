// Which metrics belong together, and which ones a reader sees first.

// In this order, as far as a run has them. Of an entry with several, the first that is there.
const FIRST = [
  ["accuracy_tried", "reward_mean"],
  ["self_reward_auroc"],
  ["self_reward_f1"],
  ["response_length_mean"],
  ["entropy"],
  ["policy_loss"],
  ["self_reward_loss", "score_loss"],
  ["grad_norm"],
  ["eval/accuracy"],
];

// Names without a slash go by their beginning; the rest is "other".
const BEGINNINGS = [
  ["self-reward", /^(self_reward|score|readout|ref_|zc_|votes?_|weighted|majority)/],
  ["reward", /^(reward|accuracy|outcome|solved|groups?_|advantage|no_answer)/],
  ["length", /^(response_length|length|truncated|eos|stopped|cut)/],
  ["losses", /(loss|entropy|kl|clip|logprob|ratio)/],
  ["optimizer", /^(grad|lr|bad_steps|param|weight_decay|update)/],
  ["tokens", /^(tokens|prompts|responses|samples|padding)/],
];

/** The group of a metric: what is before its first slash, or a topic. */
export function groupOf(name) {
  const slash = name.indexOf("/");
  if (slash > 0) return name.slice(0, slash);
  return (BEGINNINGS.find(([, pattern]) => pattern.test(name)) || ["other"])[0];
}

/** [[group, names], ...]: topics first, in the order above, then prefixes by name. */
export function grouped(names) {
  const groups = new Map();
  for (const name of names) {
    const group = groupOf(name);
    if (!groups.has(group)) groups.set(group, []);
    groups.get(group).push(name);
  }
  const topics = ["reward", "self-reward", "length", "losses", "optimizer", "tokens", "other"];
  const rank = (group) => (topics.includes(group) ? topics.indexOf(group) : topics.length);
  return [...groups].sort(([left], [right]) => rank(left) - rank(right) || left.localeCompare(right));
}

/** What is shown before anybody has chosen. */
export function firstMetrics(names) {
  const there = new Set(names);
  const found = FIRST.map((some) => some.find((name) => there.has(name))).filter(Boolean);
  return found.length ? found : names.slice(0, 8);
}

/** Names that contain all words of a search, in any order. */
export function search(names, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
}
