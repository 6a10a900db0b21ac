// How a sampler looks: a colour and a marker of its own, the same in every chart and in the legend.

const COLOURS = 8; // as custom properties --series-0 ... of the style sheet
const MARKERS = [
  "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z", // circle
  "M-3.6-3.6H3.6V3.6H-3.6Z", // square
  "M0-5L5 0L0 5L-5 0Z", // diamond
  "M0-4.8L4.6 3.6H-4.6Z", // triangle
  "M0 4.8L4.6-3.6H-4.6Z", // triangle, upside down
  "M-1.6-4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z", // plus
  "M0-5.4L1.3-1.8L5.1-1.7L2.1.7L3.2 4.4L0 2.2L-3.2 4.4L-2.1.7L-5.1-1.7L-1.3-1.8Z", // star
  "M0-2L2.4-4.6L4.6-2.4L2 0L4.6 2.4L2.4 4.6L0 2L-2.4 4.6L-4.6 2.4L-2 0L-4.6-2.4L-2.4-4.6Z", // cross
];
const UNTRAINED = "M-5-5L5 5M5-5L-5 5";

/** Class and marker of the sampler at a place; only after 64 of them a pair comes again. */
function lookOf(index) {
  const round = Math.floor(index / COLOURS);
  return { colour: `series-${index % COLOURS}`, marker: MARKERS[(index + round) % MARKERS.length] };
}

function swatch(index, student) {
  const { colour, marker } = lookOf(index);
  return svg(
    "svg",
    { class: `swatch ${colour}${student ? " student" : ""}`, viewBox: "-17 -8 34 16", width: 34, height: 16, "aria-hidden": "true" },
    svg("path", { class: "line", d: "M-16 0H16" }),
    svg("path", { class: "marker", d: marker }),
  );
}
