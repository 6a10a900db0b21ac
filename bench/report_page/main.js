// Where the page starts.

const NAMED = 8; // rows that the warning names
const data = JSON.parse(byId("data").textContent);

/** Light and dark: the system's choice until the button is pressed. */
function startTheme() {
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const name = () => (button.lastElementChild.textContent = dark() ? "Light" : "Dark");
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  button.hidden = false;
  name();
}

/** The table and the warning of the metric that the charts show. */
function showMetric(metric) {
  for (const table of document.querySelectorAll(".matrix")) table.hidden = table.dataset.metric !== metric.name;
  const beyond = data.points.filter((point) => point.metrics[metric.name]?.beyond);
  const warning = byId("warning");
  warning.hidden = !beyond.length;
  if (!beyond.length) return;
  const many = beyond.length === 1 ? "One row lies" : `${beyond.length} rows lie`;
  const own = metric.models.length === 1 ? `, ${metric.models[0].text}` : "";
  warning.textContent = `${many} ${beyondText(metric, own)} (${listed(beyond)}).`;
}

function listed(points) {
  const names = points.slice(0, NAMED).map((point) => `${point.label} at ${point.budget}`);
  const rest = points.length - names.length;
  return names.join(", ") + (rest > 0 ? ` and ${rest} more` : "");
}

function startProvenance() {
  byId("provenance-tree").append(fieldList(data.provenance));
  byId("provenance").hidden = false;
}

startTheme();
startPanel(data, showMetric);
startSamples(data);
startTable(data);
startProvenance();
