// The pictures of a budget side by side.

const SHOWN_AT_FIRST = 8;

/** Fill the section of the samples; it stays hidden where there are no pictures. */
function startSamples(data) {
  const pictured = data.points.filter((point) => point.picture || point.path);
  const budgets = data.budgets.filter((budget) => pictured.some((point) => point.role === "sampler" && point.budget === budget));
  if (!budgets.length) return;
  const labels = data.samplers.map(({ label }) => label).filter((label) => pictured.some((point) => isOf(point, label)));
  const teacher = pictured.find((point) => point.role === "teacher");
  const state = { budget: budgets[Math.floor(budgets.length / 2)], off: new Set(labels.slice(SHOWN_AT_FIRST)), teacher: Boolean(teacher), paths: true };
  const draw = () => drawPictures(data, pictured, labels, teacher, state);
  startSlider(budgets, state, draw);
  startChecks(labels, teacher, pictured.some((point) => point.path), state, draw);
  if (data.left_out) byId("left-out").textContent = ` ${data.left_out} pictures are too large to be kept in this page; they lie in the folder samples of the run.`;
  byId("samples").hidden = false;
  draw();
}

function isOf(point, label) {
  return point.role === "sampler" && point.label === label;
}

function startSlider(budgets, state, draw) {
  const slider = byId("budget");
  slider.max = budgets.length - 1;
  slider.value = budgets.indexOf(state.budget);
  const moved = () => {
    state.budget = budgets[Number(slider.value)];
    byId("budget-value").textContent = state.budget;
    slider.setAttribute("aria-valuetext", `${state.budget} network calls`);
  };
  slider.addEventListener("input", () => {
    moved();
    draw();
  });
  moved();
}

function startChecks(labels, teacher, paths, state, draw) {
  const boxes = labels.map((label) =>
    checkBox(label, !state.off.has(label), (on) => {
      state.off[on ? "delete" : "add"](label);
      draw();
    }),
  );
  if (teacher) boxes.push(checkBox("the model itself", true, (on) => ((state.teacher = on), draw())));
  if (paths) boxes.push(checkBox("ways from noise", true, (on) => ((state.paths = on), draw())));
  byId("shown").append(...boxes);
}

function drawPictures(data, pictured, labels, teacher, state) {
  const points = labels
    .filter((label) => !state.off.has(label))
    .map((label) => pictured.find((point) => isOf(point, label) && point.budget === state.budget))
    .filter(Boolean);
  if (teacher && state.teacher) points.push(teacher);
  byId("pictures").replaceChildren(...points.map((point) => picture(point, data.metrics[0], state)));
}

function picture(point, metric, state) {
  const entry = point.metrics[metric.name];
  const name = point.role === "teacher" ? "the model itself" : point.label;
  const words = `${name} at NFE ${point.budget}`;
  return el(
    "figure",
    { "data-label": point.label, "data-role": point.role },
    el("figcaption", {}, el("strong", {}, name), el("span", {}, `NFE ${short(point.nfe ?? point.budget)}${entry ? ` \u00b7 ${entry.text}` : ""}`)),
    point.picture ? el("img", { src: point.picture, alt: `samples of ${words}`, class: "tiles" }) : null,
    point.path && state.paths ? el("div", { class: "strip", tabindex: 0, role: "region", "aria-label": `from noise to sample, ${words}` }, el("img", { src: point.path, alt: `from noise to sample, ${words}` })) : null,
  );
}
