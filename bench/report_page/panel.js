// The charts with what steers them: reading a mark, the legend, the switches of the axes, the metric.

const REACH = 40; // pixels around the pointer in which a mark is found
const AXES = [
  { axis: "nfe", title: "network calls per sample (NFE)", name: "NFE" },
  { axis: "ms", title: "time per sample (ms)", name: "time" },
];

/** Pointer and arrow keys lead to a mark, whose values then stand beside it. */
function makeReadable(box, root, marks, view) {
  const tip = el("div", { class: "tip", role: "status", hidden: true });
  box.append(tip);
  const show = (mark) => showTip(box, root, tip, mark, view);
  root.addEventListener("pointermove", (event) => show(nearest(root, marks, event)));
  root.addEventListener("pointerdown", (event) => show(nearest(root, marks, event)));
  root.addEventListener("pointerleave", () => show(null));
  marks[0].node.setAttribute("tabindex", 0);
  for (const mark of marks) {
    mark.node.addEventListener("focus", () => show(mark));
    mark.node.addEventListener("blur", () => show(null));
  }
  root.addEventListener("keydown", (event) => walk(event, marks));
}

function nearest(root, marks, event) {
  const frame = root.getBoundingClientRect();
  const zoom = root.viewBox.baseVal.width / frame.width;
  const [x, y] = [(event.clientX - frame.left) * zoom, (event.clientY - frame.top) * zoom];
  const far = (mark) => Math.hypot(mark.px - x, mark.py - y);
  const best = marks.reduce((a, b) => (far(b) < far(a) ? b : a));
  return far(best) <= REACH ? best : null;
}

function showTip(box, root, tip, mark, view) {
  tip.hidden = mark === null;
  root.classList.toggle("reading", mark !== null);
  for (const node of root.querySelectorAll(".read")) node.classList.remove("read");
  if (mark === null) return;
  mark.group.classList.add("read");
  mark.node.classList.add("read");
  tip.replaceChildren(...tipLines(mark, view));
  const x = Math.min(Math.max(mark.px, tip.offsetWidth / 2 + 4), box.clientWidth - tip.offsetWidth / 2 - 4);
  const above = mark.py - tip.offsetHeight - 12 > 0;
  tip.style.left = `${x - tip.offsetWidth / 2}px`;
  tip.style.top = `${above ? mark.py - tip.offsetHeight - 12 : mark.py + 14}px`;
}

function tipLines({ point, entry }, view) {
  const calls = `NFE ${short(point.nfe)}${point.nfe === point.budget ? "" : ` of ${point.budget}`}`;
  const rest = [point.ms === null ? null : `${short(point.ms)} ms a sample`, point.seeds > 1 ? `${point.seeds} seeds` : null];
  return [
    el("strong", {}, point.label),
    el("span", {}, calls),
    el("span", { class: "value" }, `${view.metric.name} ${entry.text}`),
    el("span", {}, rest.filter(Boolean).join(", ")),
    ...remarks("span", point, view.metric),
  ];
}

/** What a reader must know of a point's value, in words, each in an element of its own. */
function remarks(tag, point, metric) {
  const entry = point.metrics[metric.name];
  const merits = { best: "best of its budget", tied: "tied with the best of its budget" };
  const cautions = [
    entry?.beyond && beyondText(metric),
    point.untrained && "student not trained for this number of calls",
    entry?.tuned && `\u00a7 ${entry.tuned}`,
  ];
  return [
    entry?.mark ? el(tag, { class: "merit" }, merits[entry.mark]) : null,
    ...cautions.map((text) => (text ? el(tag, { class: "caution" }, text) : null)),
  ].filter(Boolean);
}

/** Left and right along a sampler, up and down to the nearest mark of the next one. */
function walk(event, marks) {
  const here = marks.find((mark) => mark.node === document.activeElement);
  const next = here && stepFrom(here, event.key, marks);
  if (!next) return;
  event.preventDefault();
  here.node.setAttribute("tabindex", -1);
  next.node.setAttribute("tabindex", 0);
  next.node.focus();
}

function stepFrom(here, key, marks) {
  const mine = marks.filter((mark) => mark.group === here.group);
  const along = { ArrowLeft: -1, ArrowRight: 1 }[key];
  if (along) return mine[mine.indexOf(here) + along];
  const across = { ArrowUp: -1, ArrowDown: 1 }[key];
  if (!across) return null;
  const groups = [...new Set(marks.map((mark) => mark.group))];
  const other = groups[(groups.indexOf(here.group) + across + groups.length) % groups.length];
  const there = marks.filter((mark) => mark.group === other);
  return there.reduce((a, b) => (Math.abs(b.px - here.px) < Math.abs(a.px - here.px) ? b : a));
}

/** Fill the section of the curves; `onMetric` hears of each metric that is chosen. */
function startPanel(data, onMetric) {
  const samplers = data.samplers.filter((sampler) => sampler.measured);
  const view = { ...data, samplers, metric: data.metrics[0], hidden: new Set() };
  const charts = AXES.map((axis) => startChart({ ...axis, log: firstLog(view, axis.axis) }, view));
  const redraw = () => charts.forEach((draw) => draw());
  startLegend(view, redraw);
  startMetric(view, charts, (metric) => onMetric(metric));
  byId("dashed").hidden = !data.samplers.some((sampler) => sampler.student);
  byId("curves").hidden = !samplers.length;
  new ResizeObserver(redraw).observe(byId("curves"));
  redraw();
}

/** Logarithmic where every value allows it and a metric is a distance. */
function firstLog(view, axis) {
  const measured = view.points.filter((point) => view.metric.name in point.metrics);
  return {
    x: measured.every((point) => point[axis] === null || point[axis] > 0),
    y: !view.metric.higher && measured.every((point) => point.metrics[view.metric.name].value > 0),
  };
}

function startChart(spec, view) {
  const canvas = el("div", { class: "canvas" });
  const draw = () => drawChart(canvas, spec, view);
  const switches = ["x", "y"].map((side) => {
    const text = side === "x" ? `log ${spec.name}` : "log value";
    return toggle(text, spec.log[side], (on) => ((spec.log[side] = on), draw()), { class: "switch", "data-axis": side });
  });
  const caption = el("figcaption", {}, el("span", {}, `against ${spec.name}`), el("span", { class: "switches" }, switches));
  byId(`chart-${spec.axis}`).append(caption, canvas);
  draw.reset = () => {
    spec.log = { x: spec.log.x, y: firstLog(view, spec.axis).y };
    switches[1].setAttribute("aria-pressed", String(spec.log.y));
    draw();
  };
  return draw;
}

function startLegend(view, redraw) {
  const buttons = view.samplers.map((sampler, index) =>
    toggle(
      [swatch(index, sampler.student), el("span", {}, sampler.label)].flat(),
      true,
      (on) => {
        view.hidden[on ? "delete" : "add"](sampler.label);
        redraw();
      },
      { class: "entry", "data-label": sampler.label },
    ),
  );
  byId("legend").append(...buttons);
}

function startMetric(view, charts, onMetric) {
  const select = byId("metric");
  select.append(...view.metrics.map(({ name }, k) => el("option", { value: k }, name)));
  select.disabled = view.metrics.length === 1;
  select.addEventListener("change", () => {
    view.metric = view.metrics[Number(select.value)];
    charts.forEach((draw) => draw.reset());
    onMetric(view.metric);
  });
  onMetric(view.metric);
}
