// Axes: from values to pixels, and where the ticks stand.

const EDGE = 20; // pixels between the outermost mark and the frame

/**
 * A scale from `low..high` to pixels `from..to`, logarithmic or linear.
 * `low` and `high` are widened a little so that no mark sits on the frame.
 */
function makeScale(log, low, high, from, to) {
  const share = EDGE / Math.abs(to - from);
  const [first, last] = log ? padded(Math.log10(low), Math.log10(high), share) : linearDomain(low, high, share);
  const place = log ? Math.log10 : (value) => value;
  return {
    log,
    at: (value) => from + ((place(value) - first) / (last - first)) * (to - from),
    shows: (value) => !log || value > 0,
    ticks: log ? logTicks(first, last) : linearTicks(first, last),
    minor: log ? minorTicks(first, last) : [],
  };
}

function padded(low, high, share) {
  const room = high > low ? share * (high - low) : Math.abs(high) * 0.1 || 0.5;
  return [low - room, high + room];
}

/** From zero where the values come near it. */
function linearDomain(low, high, share) {
  const [first, last] = padded(low, high, share);
  return low >= 0 && low < 0.5 * high ? [0, last] : [first, last];
}

function linearTicks(first, last, wanted = 6) {
  const rough = (last - first) / wanted;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough);
  const ticks = [];
  for (let k = Math.ceil(first / step - 1e-9); k * step <= last * (1 + 1e-12); k++) ticks.push(cleaned(k * step));
  return ticks;
}

/** Powers of ten, with 2 and 5 between them where they are few. */
function logTicks(first, last) {
  const span = last - first;
  const factors = span > 3.2 ? [1] : span > 1.1 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 8];
  return decades(first, last, factors);
}

function minorTicks(first, last) {
  return last - first > 5 ? [] : decades(first, last, [2, 3, 4, 5, 6, 7, 8, 9]);
}

function decades(first, last, factors) {
  const ticks = [];
  for (let power = Math.floor(first); power <= Math.ceil(last); power++)
    for (const factor of factors) {
      const value = cleaned(factor * 10 ** power);
      const place = Math.log10(value);
      if (place >= first && place <= last) ticks.push(value);
    }
  return ticks;
}

function cleaned(value) {
  return Number(value.toPrecision(10));
}

/** Those of `values` whose labels do not run into each other, `gap` pixels apart. */
function apart(values, scale, gap) {
  const kept = [];
  for (const value of [...values].sort((a, b) => a - b))
    if (!kept.length || Math.abs(scale.at(value) - scale.at(kept[kept.length - 1])) >= gap) kept.push(value);
  return kept;
}
