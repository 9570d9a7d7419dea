// Who waited for whom in a step, from the spans of its timeline. Pure.

const LEAST = 0.02; // of the step's length: shorter gaps are not named
const CLOSE = 0.02; // of the step's length: ends that near to each other count as one

/**
 * Rows of a timeline: [{who, lanes: [[span, ...], ...], gaps: [{start, end, after}], busy, waited}], and its extent.
 *
 * spans: [{who, phase, start, end}] in seconds from the step's start. "total" is the step itself, no work. Spans of one
 * row that overlap (answers are graded while others are still generated) lie in lanes below each other. A gap's `after`
 * is the other row whose work ended last within the gap, with its phase: the one that was waited for; null where none
 * did, and `last` says that the gap is the end of the step.
 */
export function timeline(spans) {
  const work = spans.filter(({ phase }) => phase !== "total");
  const extent = Math.max(...spans.map(({ end }) => end), 0);
  const names = [...new Set(work.map(({ who }) => who))].sort(byKind);
  const rows = names.map((who) => {
    const own = work
      .filter((span) => span.who === who)
      .sort((left, right) => left.start - right.start || right.end - left.end);
    const gaps = gapsOf(own, extent).map((gap) => ({
      ...gap,
      last: gap.end === extent,
      after: endedBy(gap, who, work, extent),
    }));
    const waited = gaps.reduce((sum, { start, end }) => sum + end - start, 0);
    return {
      who,
      lanes: lanesOf(own),
      gaps: gaps.filter(({ start, end }) => end - start >= LEAST * extent),
      busy: extent - waited,
      waited,
    };
  });
  return { rows, extent };
}

/** Ranks first, by number, then servers. */
function byKind(left, right) {
  const kind = (who) => (who.startsWith("rank") ? 0 : 1);
  return kind(left) - kind(right) || left.localeCompare(right, "en", { numeric: true });
}

function lanesOf(spans) {
  const lanes = [];
  for (const span of spans) {
    const lane = lanes.find((own) => own[own.length - 1].end <= span.start + 1e-6);
    if (lane) lane.push(span);
    else lanes.push([span]);
  }
  return lanes;
}

function gapsOf(spans, extent) {
  const gaps = [];
  let busyUntil = 0;
  for (const { start, end } of spans) {
    if (start > busyUntil) gaps.push({ start: busyUntil, end: start });
    busyUntil = Math.max(busyUntil, end);
  }
  if (extent > busyUntil) gaps.push({ start: busyUntil, end: extent });
  return gaps;
}

/** The other row's span that ended last within a gap. A little after it counts too: clocks of ranks differ. */
function endedBy(gap, who, work, extent) {
  if (gap.end >= extent - 1e-6) return null; // it waits for nothing in this step
  const ended = work.filter(
    (span) => span.who !== who && span.end > gap.start + 1e-6 && span.end <= gap.end + 0.005 * extent,
  );
  if (!ended.length) return null;
  const last = ended.reduce((best, span) => (span.end > best.end ? span : best));
  return { who: last.who, phase: last.phase };
}

/**
 * The longest waits: [{who: [names], seconds, after, last}]. Those of several rows that begin and end together are one,
 * of the longest's seconds: seven ranks that wait for rank 0 are one thing to know.
 */
export function longestWaits({ rows, extent }, most = 6) {
  const near = (one, other) => Math.abs(one - other) <= CLOSE * extent;
  const found = [];
  for (const { who, gaps } of rows) {
    for (const { start, end, after, last } of gaps) {
      const name = after && `${after.who} ${after.phase}`;
      const same = found.find(
        (wait) => wait.name === name && near(wait.start, start) && near(wait.end, end) && !wait.who.includes(who),
      );
      if (same) {
        same.who.push(who);
        same.seconds = Math.max(same.seconds, end - start);
      } else found.push({ who: [who], start, end, seconds: end - start, after, last, name });
    }
  }
  return found.sort((left, right) => right.seconds - left.seconds).slice(0, most);
}

/** About `count` round numbers from 0 to `extent`. */
export function ticks(extent, count) {
  if (!(extent > 0)) return [0];
  const rough = extent / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(extent / step + 1e-9) + 1 }, (_, place) =>
    Number((place * step).toPrecision(12)),
  );
}
