// One metric of several runs over the steps, drawn by uPlot. All charts of the page share a cursor and a zoom.

import { number } from "./format.js";
import { smooth } from "./smoothing.js";
import { html, useWidth } from "./ui.js";
import { useEffect, useLayoutEffect, useMemo, useRef, useState } from "./vendor/preact_hooks.js";

const HEIGHT = 168;
const SYNC = "steps";

/** A colour of the style sheet as the canvas needs it: written out. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function alpha(hex, share) {
  return `${hex}${Math.round(share * 255)
    .toString(16)
    .padStart(2, "0")}`;
}

/**
 * runs: [{id, label, slot}]; data: [steps, values of the first run, ...]; weight: of smoothing; marks: [{step}], drawn
 * as lines; onStep(step): of a click or Enter. theme: redraws when it changes.
 */
export function Chart({ name, runs, data, weight, marks, onStep, theme }) {
  const box = useRef(null);
  const plot = useRef(null);
  const readings = useRef([]);
  const markedSteps = useRef(marks);
  markedSteps.current = marks;
  const step = useRef(onStep);
  step.current = onStep;
  const width = useWidth(box);
  const seen = useSeen(box);
  const columns = useMemo(() => {
    const [steps, ...values] = data;
    // With smoothing, what was measured stays visible behind the average.
    const shown = values.flatMap((column) => (weight > 0 ? [column, smooth(column, weight)] : [column]));
    return [steps, ...shown];
  }, [data, weight]);
  const current = useRef(columns);
  current.current = columns;

  const show = (place) => {
    const [steps, ...values] = current.current;
    const each = weight > 0 ? 2 : 1;
    runs.forEach((run, index) => {
      const column = values[index * each + each - 1] || [];
      const at = place === null ? lastOf(column) : place;
      if (readings.current[index]) readings.current[index].textContent = at < 0 ? "–" : number(column[at]);
    });
    if (readings.current.step) {
      readings.current.step.textContent = place === null ? "last" : `step ${steps[place]}`;
    }
  };

  useEffect(() => {
    if (!seen || !width) return undefined;
    const own = new window.uPlot(
      options(name, runs, weight, width, theme, markedSteps, show),
      current.current,
      box.current,
    );
    plot.current = own;
    let pressed = 0;
    own.over.addEventListener("mousedown", (event) => (pressed = event.clientX));
    own.over.addEventListener("click", (event) => {
      if (Math.abs(event.clientX - pressed) > 3) return; // the end of a zoom
      if (own.cursor.idx !== null && own.cursor.idx !== undefined) step.current(current.current[0][own.cursor.idx]);
    });
    show(null);
    return () => {
      plot.current = null;
      own.destroy();
    };
  }, [seen, width > 0, runs.map(({ id, slot }) => `${id}:${slot}`).join(), weight > 0, theme]);

  useEffect(() => {
    if (plot.current && width) plot.current.setSize({ width, height: HEIGHT });
  }, [width]);

  useLayoutEffect(() => {
    const own = plot.current;
    if (!own || own.data === columns) return;
    const steps = own.data[0];
    const { min, max } = own.scales.x;
    const zoomed = steps.length > 0 && (min > steps[0] || max < steps[steps.length - 1]);
    own.setData(columns, !zoomed); // a reader who has zoomed in stays there while the run goes on
    if (zoomed) own.redraw();
    if (own.cursor.idx === null || own.cursor.idx === undefined) show(null);
  }, [columns]);

  const keys = (event) => {
    const own = plot.current;
    if (!own) return;
    const steps = current.current[0];
    const at = own.cursor.idx ?? steps.length;
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (move !== undefined) {
      const next = Math.max(0, Math.min(steps.length - 1, at + move));
      own.setCursor({ left: own.valToPos(steps[next], "x"), top: 10 }, true, true);
      event.preventDefault();
    } else if (event.key === "Enter" && at < steps.length) {
      step.current(steps[at]);
      event.preventDefault();
    }
  };

  return html`<figure class="chart">
    <figcaption>
      <b title=${name}>${name}</b>
      <span class="readings">
        <i ref=${(node) => (readings.current.step = node)}>last</i>
        ${runs.map(
          (run, index) =>
            html`<span key=${run.id} class=${`reading run-${run.slot}`} title=${run.label}
              ><span ref=${(node) => (readings.current[index] = node)}>–</span></span
            >`,
        )}
      </span>
    </figcaption>
    <div
      class="plot"
      ref=${box}
      tabindex="0"
      role="img"
      aria-label=${summary(name, runs, data)}
      onKeyDown=${keys}
      onBlur=${() => plot.current && plot.current.setCursor({ left: -10, top: -10 }, true, true)}
    ></div>
  </figure>`;
}

function options(name, runs, weight, width, theme, marks, show) {
  const muted = colour("--muted");
  const axis = {
    stroke: muted,
    font: "11px system-ui, sans-serif",
    grid: { stroke: colour("--grid"), width: 1 },
    ticks: { stroke: colour("--grid"), width: 1, size: 4 },
  };
  const line = (run, share, thick) => ({
    label: run.label,
    stroke: alpha(colour(`--run-${run.slot}`), share),
    width: thick,
    spanGaps: true, // evaluations have a value in some steps only
    points: { size: 4 },
  });
  const series = runs.flatMap((run) =>
    weight > 0 ? [{ ...line(run, 0.28, 1), points: { show: false } }, line(run, 1, 1.6)] : [line(run, 1, 1.4)],
  );
  return {
    width,
    height: HEIGHT,
    legend: { show: false },
    padding: [8, null, 0, 0],
    cursor: { sync: { key: SYNC }, points: { size: 6 }, drag: { x: true, y: false } },
    scales: { x: { time: false } },
    axes: [
      {
        ...axis,
        size: 24,
        space: 60,
        values: (_, splits) => splits.map((split) => (Number.isInteger(split) ? split : "")),
      },
      { ...axis, size: 50, space: 32, values: (_, splits) => splits.map((split) => number(split)) },
    ],
    series: [{}, ...series],
    hooks: {
      setCursor: [(own) => show(own.cursor.idx ?? null)],
      draw: [(own) => drawMarks(own, marks.current, colour("--bad"))],
    },
  };
}

/** A thin line where an alarm began. */
function drawMarks(own, marks, stroke) {
  const { ctx, bbox } = own;
  ctx.save();
  ctx.strokeStyle = stroke;
  ctx.setLineDash([3, 3]);
  for (const { step } of marks) {
    if (step < own.scales.x.min || step > own.scales.x.max) continue;
    const left = Math.round(own.valToPos(step, "x", true)) + 0.5;
    ctx.beginPath();
    ctx.moveTo(left, bbox.top);
    ctx.lineTo(left, bbox.top + bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

function lastOf(column) {
  for (let place = column.length - 1; place >= 0; place -= 1) {
    if (column[place] !== null && column[place] !== undefined) return place;
  }
  return -1;
}

/** What a reader who does not see the curve is told of it. */
function summary(name, runs, [steps, ...values]) {
  const parts = runs.map((run, index) => {
    const column = values[index] || [];
    const last = lastOf(column);
    const first = column.findIndex((value) => value !== null && value !== undefined);
    if (last < 0) return `${run.label}: none`;
    const at = (place) => `${number(column[place])} at step ${steps[place]}`;
    return `${run.label}: from ${at(first)} to ${at(last)}`;
  });
  return `${name}; ${parts.join("; ")}. Arrow keys read single steps.`;
}

/** Whether an element has come near the visible part: of a hundred charts only those are drawn. */
function useSeen(ref) {
  const [seen, setSeen] = useState(false);
  useEffect(() => {
    const observer = new IntersectionObserver(
      (entries) => entries.some((entry) => entry.isIntersecting) && setSeen(true),
      {
        rootMargin: "300px",
      },
    );
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return seen;
}
