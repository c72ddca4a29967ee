"use strict";

// Functions that return parts of an SVG as text.
const Svg = (() => {
  const format = (x) => {
    const size = Math.abs(x);
    if (size !== 0 && (size < 0.001 || size >= 10000)) return x.toExponential(1);
    return String(Number(x.toPrecision(3)));
  };

  // Returns a tick of a logarithmic axis, such as 10⁻⁴.
  const power = (exponent) => {
    if (exponent >= -1 && exponent <= 2) return String(Number((10 ** exponent).toPrecision(1)));
    const digits = [...String(exponent)].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
    return `10${digits.join("")}`;
  };

  const escape = (text) =>
    text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

  const round = (x) => Math.round(x * 10) / 10;

  const attributes = (values) =>
    Object.entries(values).map(([name, value]) => ` ${name}="${value}"`).join("");

  const shape = (tag, values) => `<${tag}${attributes(values)}/>`;

  const rect = (x, y, width, height, kind) =>
    shape("rect", { class: kind, x: round(x), y: round(y), width: round(width), height: round(height) });

  const label = (x, y, text, anchor = "middle", kind = "") => {
    const values = { class: kind, x: round(x), y: round(y), "text-anchor": anchor };
    return text ? `<text${attributes(values)}>${escape(text)}</text>` : "";
  };

  const dot = (x, y, kind, radius = 5) =>
    shape("circle", { class: kind, cx: round(x), cy: round(y), r: radius });

  const line = (points, kind) => {
    const text = points.map(([x, y], i) => `${i ? "L" : "M"}${round(x)} ${round(y)}`);
    return points.length ? shape("path", { class: kind, d: text.join("") }) : "";
  };

  const squares = (corners, size, kind, opacity) => {
    const side = round(size);
    const text = corners.map(([x, y]) => `M${round(x)} ${round(y)}h${side}v${side}h${-side}z`);
    return shape("path", { class: kind, opacity, d: text.join("") });
  };

  const ellipse = (x, y, rx, ry, kind) =>
    shape("ellipse", { class: kind, cx: round(x), cy: round(y), rx: round(rx), ry: round(ry) });

  // Returns a group that shows nothing outside of a box.
  const clipped = (name, { left, top, width, height }, body) =>
    `<clipPath id="${name}">${rect(left, top, width, height, "")}</clipPath>` +
    `<g clip-path="url(#${name})">${body}</g>`;

  // Returns a function from numbers to pixels.
  const scale = ([low, high], [from, to], log) => {
    const at = log ? Math.log10 : (x) => x;
    return (x) => from + ((at(x) - at(low)) / (at(high) - at(low))) * (to - from);
  };

  // Returns about five round numbers in a range, with their texts.
  const ticks = ([low, high], log) => {
    const found = [];
    if (log) {
      const every = Math.ceil((Math.log10(high) - Math.log10(low)) / 5);
      for (let e = Math.ceil(Math.log10(low)); e <= Math.log10(high); e += every) {
        found.push([10 ** e, power(e)]);
      }
      return found;
    }
    const rough = (high - low) / 5;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * unit).find((s) => s >= rough);
    for (let x = Math.ceil(low / step) * step; x <= high + 1e-9; x += step) found.push([x, format(x)]);
    return found;
  };

  // Returns a frame with axes, and its scales.
  const frame = (box, xs, ys, { xlabel, ylabel, xlog, ylog, bare } = {}) => {
    const { left, top, width, height } = box;
    const x = scale(xs, [left, left + width], xlog);
    const y = scale(ys, [top + height, top], ylog);
    let body = rect(left, top, width, height, "frame");
    for (const [tick, text] of bare ? [] : ticks(xs, xlog)) {
      body += line([[x(tick), top], [x(tick), top + height]], "grid");
      body += label(x(tick), top + height + 15, text);
    }
    for (const [tick, text] of ticks(ys, ylog)) {
      body += line([[left, y(tick)], [left + width, y(tick)]], "grid");
      body += label(left - 5, y(tick) + 4, text, "end");
    }
    body += label(left + width / 2, top + height + 31, xlabel);
    body += label(left, top - 7, ylabel, "start");
    return { x, y, box, body };
  };

  // Series beyond the sixth have the same colors; they are hollow, and their lines dashed.
  const fill = (i) => `${i < 6 ? "fill" : "hollow"} s${i % 6}`;
  const stroke = (i) => `line s${i % 6}${i < 6 ? "" : " dashed"}`;

  // Returns the names of series in their colors, over as many rows as they need, and the
  // height of these.
  const legend = (names, width, colors = names.map((_, i) => i)) => {
    let body = "";
    let [x, y] = [8, 16];
    names.forEach((name, i) => {
      const length = 30 + 7 * name.length;
      if (x > 8 && x + length > width) [x, y] = [8, y + 18];
      body += rect(x, y - 9, 10, 10, fill(colors[i])) + label(x + 14, y, name, "start", "small");
      x += length;
    });
    return { body, height: y };
  };

  const svg = (width, height, body, about) => {
    const values = { viewBox: `0 0 ${width} ${round(height)}`, role: "img", "aria-label": escape(about) };
    return `<svg${attributes(values)}>${body}</svg>`;
  };

  return { format, rect, label, dot, line, squares, ellipse, clipped, frame, fill, stroke, legend, svg };
})();
