// Numbers as the page shows them.

const THIN = "\u2009";

/** At most `digits` significant ones: 0.0123, 12.3, 1 234, 1.2e-7; "–" for what is missing. */
export function number(value, digits = 4) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value)) return whole(value);
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e9) return value.toExponential(2).replace(/\.?0+e/, "e");
  if (size >= 10 ** digits) return whole(Math.round(value));
  return String(Number(value.toPrecision(digits)));
}

/** With thin spaces between thousands. */
export function whole(value) {
  return String(value).replace(/\B(?=(\d{3})+$)/g, THIN);
}

/** Always so many places after the point, so that a column lines up. */
export function fixed(value, places = 3) {
  return typeof value === "number" && Number.isFinite(value) ? value.toFixed(places) : "–";
}

export function seconds(value) {
  if (value >= 100) return `${whole(Math.round(value))} s`;
  return `${value.toFixed(value < 1 ? 2 : 1)} s`;
}

/** A value of settings or metrics that may be anything. */
export function anything(value) {
  if (typeof value === "number") return number(value, 6);
  if (value === null || value === undefined) return "–";
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return value.map(anything).join(", ");
  return JSON.stringify(value);
}

/** A time of an event as the reader's clock has it. */
export function clock(text) {
  const time = new Date(text);
  if (Number.isNaN(time.getTime())) return String(text || "");
  const two = (part) => String(part).padStart(2, "0");
  const day = `${time.getFullYear()}-${two(time.getMonth() + 1)}-${two(time.getDate())}`;
  return `${day} ${two(time.getHours())}:${two(time.getMinutes())}:${two(time.getSeconds())}`;
}
