// Exponential averages of curves.

/**
 * The average that gives a value `weight` of the one before it, without the pull of a starting value: early points are
 * divided by the weights that they have. Holes stay holes.
 */
export function smooth(values, weight) {
  if (!(weight > 0)) return values;
  let total = 0;
  let weights = 0;
  return values.map((value) => {
    if (value === null || value === undefined) return value;
    total = total * weight + value * (1 - weight);
    weights = weights * weight + (1 - weight);
    return total / weights;
  });
}

/**
 * Curves of several runs over the steps of all of them: [steps, values of the first, ...]; null where a run has none.
 * curves: [{steps, values}].
 */
export function join(curves) {
  const first = curves[0] ? curves[0].steps : [];
  const same = curves.every(
    ({ steps }) => steps.length === first.length && steps.every((step, place) => step === first[place]),
  );
  if (same) return [first, ...curves.map(({ values }) => values)];
  const all = [...new Set(curves.flatMap(({ steps }) => steps))].sort((left, right) => left - right);
  const place = new Map(all.map((step, index) => [step, index]));
  const columns = curves.map(({ steps, values }) => {
    const column = new Array(all.length).fill(null);
    steps.forEach((step, index) => {
      column[place.get(step)] = values[index] ?? null;
    });
    return column;
  });
  return [all, ...columns];
}
