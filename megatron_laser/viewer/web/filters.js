// Which responses are shown and in which order: from the index's columns and the words of the address alone.

/** Words of the address that belong to the table; they go along into the view of one response and back. */
export const FILTERS = ["verdict", "source", "outcome", "finish", "step", "score", "length", "find", "sort"];

export const VERDICTS = [
  { value: "", label: "All", title: "all responses" },
  { value: "right", label: "Right", title: "reward above 1/2" },
  { value: "wrong", label: "Wrong", title: "reward of 1/2 or less" },
  { value: "ungraded", label: "Ungraded", title: "without a reward: grading timed out or crashed" },
  { value: "unscored", label: "Unscored", title: "without a score: did not end by itself, or is not scored" },
];

const absent = (value) => value === null || value === undefined;

const VERDICT_TESTS = {
  "": () => true,
  right: (columns, id) => !absent(columns.reward[id]) && columns.reward[id] > 0.5,
  wrong: (columns, id) => !absent(columns.reward[id]) && columns.reward[id] <= 0.5,
  ungraded: (columns, id) => absent(columns.reward[id]),
  unscored: (columns, id) => absent(columns.score[id]),
};

/** "low..high" or one number -> [low, high], infinite where open. */
export function readRange(text) {
  if (!text) return null;
  const parts = text.split("..");
  const low = parts[0] === "" ? -Infinity : Number(parts[0]);
  const high = parts.length === 1 ? low : parts[1] === "" ? Infinity : Number(parts[1]);
  return Number.isNaN(low) || Number.isNaN(high) ? null : [low, high];
}

/** By how much the score misses the reward; null without both. */
export function gap(columns, id) {
  const score = columns.score[id];
  const reward = columns.reward[id];
  return absent(score) || absent(reward) ? null : Math.abs(score - reward);
}

/**
 * Ids that pass all filters but the verdict.
 *
 * index: {count, columns, tables} of api/responses; params: words of the address.
 */
function passing({ count, columns, tables }, params) {
  const tests = [];
  for (const name of ["source", "outcome", "finish"]) {
    if (!params[name]) continue;
    const code = tables[name].indexOf(params[name]);
    tests.push((id) => columns[name][id] === code);
  }
  for (const name of ["step", "score", "length"]) {
    const range = readRange(params[name]);
    if (!range) continue;
    const column = columns[name];
    tests.push((id) => !absent(column[id]) && column[id] >= range[0] && column[id] <= range[1]);
  }
  if (params.find) {
    const wanted = params.find.toLowerCase();
    // Answers repeat: each distinct one is looked at once.
    const fits = tables.answer.map((answer) => answer.toLowerCase().includes(wanted));
    tests.push((id) => !absent(columns.answer[id]) && fits[columns.answer[id]]);
  }
  const ids = [];
  for (let id = 0; id < count; id += 1) {
    if (tests.every((test) => test(id))) ids.push(id);
  }
  return ids;
}

/** {ids, counts}: what is shown, in order, and how many each verdict would show. */
export function select(index, params) {
  const { columns } = index;
  const rest = passing(index, params);
  const counts = {};
  for (const [verdict, test] of Object.entries(VERDICT_TESTS)) {
    counts[verdict] = rest.reduce((sum, id) => sum + (test(columns, id) ? 1 : 0), 0);
  }
  const test = VERDICT_TESTS[params.verdict || ""] || VERDICT_TESTS[""];
  const ids = rest.filter((id) => test(columns, id));
  return { ids: sorted(index, ids, params.sort || ""), counts };
}

/** By a column, "-" before its name for the largest first; what has no value comes last either way. */
function sorted({ columns, tables }, ids, sort) {
  const descending = sort.startsWith("-");
  const name = descending ? sort.slice(1) : sort;
  if (!name) return ids;
  let value;
  if (name === "gap") value = (id) => gap(columns, id);
  else if (tables[name]) {
    const order = new Map(
      [...tables[name].keys()]
        .sort((one, other) => compare(tables[name][one], tables[name][other]))
        .map((code, rank) => [code, rank]),
    );
    value = (id) => (absent(columns[name][id]) ? null : order.get(columns[name][id]));
  } else if (columns[name]) value = (id) => columns[name][id];
  else return ids;
  const keys = new Map(ids.map((id) => [id, value(id)]));
  return [...ids].sort((one, other) => {
    const [left, right] = [keys.get(one), keys.get(other)];
    if (absent(left) || absent(right)) return Number(absent(left)) - Number(absent(right)) || one - other;
    return (descending ? right - left : left - right) || one - other;
  });
}

/** Numbers among texts by their size: "9" before "10". */
function compare(left, right) {
  return left.localeCompare(right, "en", { numeric: true });
}
