// One chart: a metric against network calls or time, drawn anew for each change of what it shows.

const REACH_BELOW = 3; // a logarithmic axis goes so many times below the smallest value at most, whatever an interval does
const MARGIN = { top: 14, right: 14, bottom: 46, left: 62 };

/** The visible samplers with the points that the chart can place, in the order of their budgets. */
function seriesOf(view, axis, log) {
  return view.samplers
    .map((sampler, index) => ({ ...sampler, index }))
    .filter((sampler) => !view.hidden.has(sampler.label))
    .map((sampler) => ({ ...sampler, places: placesOf(view, sampler.label, axis, log) }))
    .filter((sampler) => sampler.places.length);
}

function placesOf(view, label, axis, log) {
  return view.points
    .filter((point) => point.role === "sampler" && point.label === label && view.metric.name in point.metrics)
    .map((point) => ({ point, entry: point.metrics[view.metric.name], x: point[axis] }))
    .filter(({ x, entry }) => x !== null && (!log.x || x > 0) && (!log.y || entry.value > 0))
    .sort((a, b) => a.point.budget - b.point.budget);
}

/** Horizontal lines: the models' own values and the floor. */
function linesOf({ models, floor, higher }) {
  // the ground beyond the model's own is shaded where there is one such ground
  const lines = models.map((model) => ({ kind: "model", value: model.value, text: `${model.name}, ${model.text}`, shaded: models.length === 1, higher }));
  return floor === null ? lines : [...lines, { kind: "floor", value: floor, text: `floor, ${short(floor)}` }];
}

/**
 * Draw into `box`: `spec` has the axis ("nfe" or "ms"), its title and the state `log` of both axes;
 * `view` the metric, the samplers and the labels that are hidden.
 */
function drawChart(box, spec, view) {
  box.replaceChildren();
  const series = seriesOf(view, spec.axis, spec.log);
  if (!series.length) {
    box.append(el("p", { class: "empty" }, "Nothing to show: no visible sampler has a value that this axis can place."));
    return;
  }
  const frame = framed(box);
  const lines = linesOf(view.metric).filter((line) => !spec.log.y || line.value > 0);
  const { x, y } = scalesOf(series, lines, spec, frame);
  const root = svg("svg", { viewBox: `0 0 ${frame.width} ${frame.height}`, role: "group", "aria-label": `${view.metric.name} against ${spec.title}` });
  root.append(axisY(y, frame, view.metric), axisX(x, frame, spec, view.budgets));
  root.append(...lines.map((line) => horizontal(line, y, frame)));
  const marks = series.flatMap((sampler) => drawSeries(root, sampler, x, y, frame, view));
  box.append(root);
  makeReadable(box, root, marks, view);
  box.append(...omitted(series, view, spec.axis));
}

/** How many values a logarithmic axis has no place for, in words. */
function omitted(series, view, axis) {
  const drawn = series.flatMap((sampler) => sampler.places).length;
  const all = seriesOf(view, axis, { x: false, y: false }).flatMap((sampler) => sampler.places).length;
  const many = all - drawn === 1 ? "1 value of zero or less has" : `${all - drawn} values of zero or less have`;
  return all > drawn ? [el("p", { class: "omitted" }, `${many} no place on a logarithmic axis.`)] : [];
}

function framed(box) {
  const width = Math.max(300, Math.round(box.clientWidth));
  const height = Math.round(Math.min(440, Math.max(300, width * 0.68)));
  return { width, height, left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
}

function scalesOf(series, lines, spec, frame) {
  const places = series.flatMap((sampler) => sampler.places);
  const xs = places.map((place) => place.x);
  const values = places.map(({ entry }) => entry.value).concat(lines.map((line) => line.value));
  const edge = spec.log.y ? Math.min(...values) / REACH_BELOW : -Infinity;
  const ends = places.flatMap(({ entry }) => [entry.low, entry.high]).filter((end) => end !== null);
  const ys = values.concat(ends.map((end) => Math.max(end, edge)));
  return {
    x: makeScale(spec.log.x, Math.min(...xs), Math.max(...xs), frame.left, frame.right),
    y: makeScale(spec.log.y, Math.min(...ys), Math.max(...ys), frame.bottom, frame.top),
  };
}

function axisY(y, frame, metric) {
  const middle = (frame.top + frame.bottom) / 2;
  const way = metric.higher ? "larger is better" : "smaller is better";
  return svg(
    "g",
    { class: "axis y" },
    y.minor.map((value) => svg("line", { class: "minor", x1: frame.left, x2: frame.right, y1: y.at(value), y2: y.at(value) })),
    apart(y.ticks, y, 16).map((value) => [
      svg("line", { class: "grid", x1: frame.left, x2: frame.right, y1: y.at(value), y2: y.at(value) }),
      svg("text", { x: frame.left - 8, y: y.at(value) + 4, "text-anchor": "end" }, short(value)),
    ]),
    svg("text", { class: "title", transform: `translate(14 ${middle}) rotate(-90)`, "text-anchor": "middle" }, `${metric.name} (${way})`),
  );
}

function axisX(x, frame, spec, budgets) {
  const ticks = spec.axis === "nfe" && budgets.length <= 10 ? budgets.filter((value) => value > 0) : x.ticks;
  const inside = ticks.filter((value) => x.at(value) >= frame.left - 1 && x.at(value) <= frame.right + 1);
  return svg(
    "g",
    { class: "axis x" },
    svg("line", { class: "base", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom }),
    apart(inside, x, 30).map((value) => [
      svg("line", { class: "base", x1: x.at(value), x2: x.at(value), y1: frame.bottom, y2: frame.bottom + 5 }),
      svg("text", { x: x.at(value), y: frame.bottom + 19, "text-anchor": "middle" }, short(value)),
    ]),
    svg("text", { class: "title", x: (frame.left + frame.right) / 2, y: frame.bottom + 39, "text-anchor": "middle" }, spec.title),
  );
}

/** A line across the chart with its text, and the ground beyond it. */
function horizontal(line, y, frame) {
  const at = y.at(line.value);
  const place = line.kind === "model" ? { x: frame.left + 6 } : { x: frame.right - 6, "text-anchor": "end" };
  const [top, bottom] = line.higher ? [frame.top, at] : [at, frame.bottom];
  return svg(
    "g",
    { class: `reference ${line.kind}` },
    line.shaded ? svg("rect", { x: frame.left, y: top, width: frame.right - frame.left, height: Math.max(0, bottom - top) }) : null,
    svg("line", { x1: frame.left, x2: frame.right, y1: at, y2: at }),
    svg("text", { ...place, y: at > frame.bottom - 15 ? at - 5 : at + 13 }, line.text),
  );
}

/** Line, error bars and markers of a sampler; returns its marks with their places in pixels. */
function drawSeries(root, sampler, x, y, frame, view) {
  const { colour, marker } = lookOf(sampler.index);
  const group = svg("g", { class: `series ${colour}${sampler.student ? " student" : ""}`, "data-label": sampler.label });
  const marks = sampler.places.map(({ point, entry, x: value }) => ({ point, entry, group, px: x.at(value), py: y.at(entry.value) }));
  group.append(svg("path", { class: "line", d: marks.map(({ px, py }, k) => `${k ? "L" : "M"}${px.toFixed(2)} ${py.toFixed(2)}`).join("") }));
  for (const mark of marks) {
    if (mark.entry.low !== null) group.append(svg("path", { class: "error", d: errorBar(mark, y, frame) }));
    mark.node = svg(
      "g",
      { class: "point", transform: `translate(${mark.px.toFixed(2)} ${mark.py.toFixed(2)})`, tabindex: -1, role: "img", "aria-label": spoken(mark, view) },
      svg("path", { class: "marker", d: marker }),
      mark.point.untrained ? svg("path", { class: "untrained", d: UNTRAINED }) : null,
    );
    group.append(mark.node);
  }
  root.append(group);
  return marks;
}

/** A bar with a cap at either end; one that goes beyond the frame is cut there and has no cap, since it does not end. */
function errorBar({ px, entry }, y, frame) {
  const cut = !y.shows(entry.low) || y.at(entry.low) > frame.bottom;
  const [low, high] = [cut ? frame.bottom : y.at(entry.low), y.at(entry.high)].map((at) => at.toFixed(2));
  const cap = (at) => `M${(px - 3).toFixed(2)} ${at}H${(px + 3).toFixed(2)}`;
  return `${cut ? "" : cap(low)}${cap(high)}M${px.toFixed(2)} ${low}V${high}`;
}

function spoken({ point, entry }, view) {
  return `${point.label}, NFE ${short(point.nfe)}, ${view.metric.name} ${entry.text}`;
}
