// Elements and text. Text goes in as text nodes and attributes alone: nothing is ever parsed as markup.

const SVG = document.getElementById("icon").namespaceURI;

/** An element; `attributes` whose value is null or false are left out, those that start with "on" are listeners. */
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

function byId(id) {
  return document.getElementById(id);
}

/** A button that is either pressed or not; `change` gets the new state. */
function toggle(text, pressed, change, attributes = {}) {
  const button = el("button", { type: "button", "aria-pressed": String(pressed), ...attributes }, text);
  button.addEventListener("click", () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    change(now);
  });
  return button;
}

/** A check box with its label. */
function checkBox(text, checked, change) {
  const input = el("input", { type: "checkbox" });
  input.checked = checked;
  input.addEventListener("change", () => change(input.checked));
  return el("label", { class: "field check" }, input, text);
}

/** What is said of a value that is better than the model's own; `own` follows the word. */
function beyondText(metric, own = "") {
  return `${metric.higher ? "above" : "below"} the model's own value${own}: here the model, not the sampler, is ranked`;
}

/** A number as a reader wants it: four digits, an exponent only where it is very small. */
function short(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return String(value);
  const size = Math.abs(value);
  return size >= 1e4 ? value.toFixed(0) : size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(Number(value.toPrecision(4)));
}
