// The table of all rows: sorting, filters, and everything that made a row behind a click.

function columnsOf(data) {
  const metrics = data.metrics.map(metricColumn);
  return [
    { title: "sampler", value: (point) => point.label, first: true },
    { title: "NFE", value: (point) => point.budget, number: true },
    ...metrics,
    { title: "calls", value: (point) => point.nfe, number: true },
    { title: "ms a sample", value: (point) => point.ms, number: true },
    { title: "seconds", value: (point) => point.seconds, number: true },
    { title: "peak MB", value: (point) => point.peak_memory_mb, number: true },
    { title: "seeds", value: (point) => point.seeds, number: true, cell: seedsCell },
  ];
}

function metricColumn(metric) {
  return {
    title: metric.name.replaceAll("_", " "),
    number: true,
    value: (point) => point.metrics[metric.name]?.value ?? null,
    cell: (point) => metricCell(point, metric),
  };
}

function metricCell(point, metric) {
  const entry = point.metrics[metric.name];
  if (!entry) return metric.primary ? el("span", { class: `state ${point.status}` }, point.status) : "";
  return [
    entry.beyond ? el("span", { class: "badge warn", title: beyondText(metric) }, "\u2021 model ranked") : null,
    entry.tuned ? el("span", { class: "badge warn", title: entry.tuned }, "\u00a7 tuned") : null,
    entry.mark ? el("span", { class: `badge ${entry.mark}` }, entry.mark) : null,
    el("span", { class: entry.mark === "best" ? "value strong" : "value" }, entry.text),
  ];
}

function seedsCell(point) {
  return point.rows.length === point.seeds ? String(point.seeds) : `${point.seeds} of ${point.rows.length}`;
}

/** Fill the section of the rows. */
function startTable(data) {
  const state = { columns: columnsOf(data), sort: null, down: false, open: new Set() };
  const inputs = startFilters(data, () => draw());
  const draw = () => {
    const points = sorted(data.points.filter((point) => passes(point, data, inputs)), state);
    byId("table").replaceChildren(tableHead(state, draw), el("tbody", {}, points.flatMap((point) => tableRows(point, data, state))));
    byId("count").textContent = `${points.length} of ${data.points.length}`;
  };
  byId("rows").hidden = false;
  draw();
}

function startFilters(data, draw) {
  const inputs = { query: byId("query"), label: byId("by-label"), budget: byId("by-budget"), best: byId("only-best") };
  const option = (value) => el("option", { value }, String(value));
  inputs.label.append(el("option", { value: "" }, "all"), ...[...new Set(data.points.map((point) => point.label))].map(option));
  inputs.budget.append(el("option", { value: "" }, "all"), ...[...new Set(data.points.map((point) => point.budget))].sort((a, b) => a - b).map(option));
  for (const input of Object.values(inputs)) input.addEventListener("input", draw);
  return inputs;
}

function passes(point, data, { query, label, budget, best }) {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = words.length ? haystack(point, data) : "";
  return (
    words.every((word) => text.includes(word)) &&
    (!label.value || point.label === label.value) &&
    (!budget.value || String(point.budget) === budget.value) &&
    (!best.checked || Boolean(point.metrics[data.metrics[0].name]?.mark))
  );
}

/** All of a row's text, in small letters. */
function haystack(point, data) {
  point.haystack ??= JSON.stringify([point.label, point.role, point.status, point.reason, point.rows.map((k) => data.rows[k])]).toLowerCase();
  return point.haystack;
}

/** By a column, what has no value last either way; in the order of the run without one. */
function sorted(points, { sort, down }) {
  if (!sort) return points;
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
  return [...points].sort((p, q) => {
    const [a, b] = [sort.value(p), sort.value(q)];
    return a === null || b === null ? (a === null) - (b === null) : order(a, b);
  });
}

function tableHead(state, draw) {
  const cells = state.columns.map((column) => {
    const mine = state.sort === column;
    const press = () => {
      Object.assign(state, { sort: column, down: mine && !state.down });
      draw();
      byId("table").querySelectorAll("th button")[state.columns.indexOf(column)].focus();
    };
    const arrow = el("span", { class: "arrow", "aria-hidden": "true" }, mine ? (state.down ? "\u25be" : "\u25b4") : "\u00a0");
    return el(
      "th",
      { scope: "col", class: column.number ? "number" : null, "aria-sort": mine ? (state.down ? "descending" : "ascending") : "none" },
      el("button", { type: "button", onclick: press }, column.title, arrow),
    );
  });
  return el("thead", {}, el("tr", {}, cells));
}

/** A point's line, and below it, once opened, what made it. */
function tableRows(point, data, state) {
  const below = el("tr", { class: "details" }, el("td", { colspan: state.columns.length }));
  const open = (now) => {
    state.open[now ? "add" : "delete"](point);
    opener.setAttribute("aria-expanded", String(now));
    below.hidden = !now;
    below.firstChild.replaceChildren(...(now ? details(point, data) : []));
  };
  const opener = el("button", { type: "button", class: "opener", onclick: () => open(below.hidden) }, point.label);
  const line = el("tr", { class: `point ${point.status}${point.reason ? " explained" : ""}` }, state.columns.map((column) => tableCell(point, column, opener)));
  open(state.open.has(point));
  return [line, below];
}

function tableCell(point, column, opener) {
  if (column.first) {
    const role = point.role === "teacher" ? "model itself" : point.student ? "student" : null;
    return el("th", { scope: "row" }, opener, role ? el("span", { class: "badge" }, role) : null, reasonOf(point));
  }
  return el("td", { class: column.number ? "number" : null }, column.cell ? column.cell(point) : short(column.value(point)));
}

function reasonOf(point) {
  return point.reason ? el("span", { class: "reason" }, point.reason) : null;
}

function details(point, data) {
  const rows = point.rows.map((k) => data.rows[k]);
  const everything = rows.length === 1 ? [fieldList(rows[0])] : [seedTable(rows), ...rows.map(seedDetails)];
  return [...remarks("p", point, data.metrics[0]), ...everything];
}

function seedTable(rows) {
  const names = ["seed", "value", "low", "high", "standard_error", "images_per_second", "status", "reason"];
  const shown = names.filter((name) => rows.some((row) => row[name] !== null && row[name] !== undefined));
  const head = el("tr", {}, shown.map((name) => el("th", { scope: "col" }, name.replaceAll("_", " "))));
  const lines = rows.map((row) => el("tr", {}, shown.map((name) => el("td", {}, short(row[name])))));
  return el("div", { class: "scroll" }, el("table", { class: "seeds" }, el("thead", {}, head), el("tbody", {}, lines)));
}

function seedDetails(row) {
  return el("details", {}, el("summary", {}, `everything of seed ${short(row.seed)}`), fieldList(row));
}

/** Every field of a row, nested ones with their path. */
function fieldList(value) {
  return el("dl", { class: "fields" }, flat(value).map(([name, text]) => el("div", {}, el("dt", {}, name), el("dd", {}, text))));
}

function flat(value, path = "") {
  const inner = value !== null && typeof value === "object" ? Object.entries(value) : null;
  if (inner === null) return [[path, value === null || value === "" ? "\u2013" : String(value)]];
  if (!inner.length) return [[path, "none"]];
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return [[path, value.join(", ")]];
  return inner.flatMap(([name, item]) => flat(item, path ? `${path}.${name}` : name));
}
