// The page's address behind the #: which view, and what it shows. Everything that a reader sets up is in it, so a link
// shows somebody else the same, and the browser's back button undoes.

/** "#/responses?run=0&sort=-score" -> {view: "responses", params: {run: "0", sort: "-score"}}. */
export function parseAddress(hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  return { view: path || "curves", params: Object.fromEntries(new URLSearchParams(query)) };
}

/** The other way round; what is empty is left out. */
export function formatAddress(view, params) {
  const kept = Object.entries(params).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  const query = new URLSearchParams(kept.map(([name, value]) => [name, String(value)])).toString();
  // Slashes, commas and colons mean nothing in a fragment, and names of metrics are easier to read with them.
  const readable = query.replaceAll("%2F", "/").replaceAll("%2C", ",").replaceAll("%3A", ":");
  return `#/${view}${readable ? `?${readable}` : ""}`;
}

/** Go to another view; the back button comes back. */
export function go(view, params = {}) {
  window.location.hash = formatAddress(view, params);
}

/** Change what the view shows, without an entry in the history: filters, a token, a step nearby. */
export function amend(changes) {
  const { view, params } = parseAddress(window.location.hash);
  const wanted = formatAddress(view, { ...params, ...changes });
  if (wanted === window.location.hash) return;
  window.history.replaceState(null, "", wanted);
  window.dispatchEvent(new HashChangeEvent("hashchange"));
}

/** Only those of these names: what a link to another view takes along. */
export function pick(params, names) {
  return Object.fromEntries(names.filter((name) => params[name]).map((name) => [name, params[name]]));
}
