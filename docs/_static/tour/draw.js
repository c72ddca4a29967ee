"use strict";

// Pure functions from the state of a widget and its data to an SVG and a sentence. The
// browser calls them when a control moves, and the build calls them for the figure that
// is shown without JavaScript. They draw numbers that Python computed; see tour/widgets.
const Tour = (() => {
  const format = (x) => {
    const size = Math.abs(x);
    if (size !== 0 && (size < 0.01 || size >= 10000)) return x.toExponential(1);
    return String(Number(x.toPrecision(3)));
  };

  const escape = (text) =>
    text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

  const round = (x) => Math.round(x * 10) / 10;

  // Returns a function from numbers to pixels.
  function scale([low, high], [from, to], log = false) {
    const at = log ? Math.log10 : (x) => x;
    return (x) => from + ((at(x) - at(low)) / (at(high) - at(low))) * (to - from);
  }

  // Returns about five round numbers in a range.
  function ticks([low, high], log) {
    const found = [];
    if (log) {
      const every = Math.ceil((Math.log10(high) - Math.log10(low)) / 5);
      for (let e = Math.ceil(Math.log10(low)); e <= Math.log10(high); e += every) {
        found.push(10 ** e);
      }
      return found;
    }
    const rough = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
    for (let x = Math.ceil(low / step) * step; x <= high + 1e-9; x += step) found.push(x);
    return found;
  }

  const line = (x1, y1, x2, y2, kind) =>
    `<line class="${kind}" x1="${round(x1)}" y1="${round(y1)}" x2="${round(x2)}" y2="${round(y2)}"/>`;

  const label = (x, y, text, anchor = "middle", kind = "") =>
    `<text class="${kind}" x="${round(x)}" y="${round(y)}" text-anchor="${anchor}">${escape(text)}</text>`;

  const dot = (x, y, kind, radius = 5) =>
    `<circle class="${kind}" cx="${round(x)}" cy="${round(y)}" r="${radius}"/>`;

  function path(points, kind) {
    const text = points.map(([x, y], i) => `${i ? "L" : "M"}${round(x)} ${round(y)}`);
    return points.length ? `<path class="${kind}" d="${text.join("")}"/>` : "";
  }

  // Returns a frame with axes, and its scales.
  function frame(box, xs, ys, { xlabel = "", ylabel = "", xlog = false, ylog = false, bare = false } = {}) {
    const { left, top, width, height } = box;
    const x = scale(xs, [left, left + width], xlog);
    const y = scale(ys, [top + height, top], ylog);
    let body = `<rect class="frame" x="${left}" y="${top}" width="${width}" height="${height}"/>`;
    for (const tick of bare ? [] : ticks(xs, xlog)) {
      body += line(x(tick), top, x(tick), top + height, "grid");
      body += label(x(tick), top + height + 15, format(tick));
    }
    for (const tick of ticks(ys, ylog)) {
      body += line(left, y(tick), left + width, y(tick), "grid");
      body += label(left - 5, y(tick) + 4, format(tick), "end");
    }
    body += label(left + width / 2, top + height + 31, xlabel);
    body += label(left, top - 7, ylabel, "start");
    return { x, y, body };
  }

  // Returns the names of series in their colors.
  function legend(names, left, top) {
    let body = "";
    let x = left;
    names.forEach((name, i) => {
      body += `<rect class="fill s${i}" x="${round(x)}" y="${top - 9}" width="10" height="10"/>`;
      body += label(x + 14, top, name, "start", "small");
      x += 30 + 7 * name.length;
    });
    return body;
  }

  const svg = (width, height, body, about) =>
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(about)}">${body}</svg>`;

  // Returns the place of a state in the lists of the data: its choices, in order.
  const key = (state, data) =>
    data.controls.filter((c) => !c.step).map((c) => state[c.name]).join(",");

  const kinds = {};

  // Paths of several optimizers over the level sets of a quadratic function.
  kinds.paths = (state, data, width) => {
    const box = { left: 40, top: 30, width: width - 50, height: Math.min(330, width * 0.62) };
    const [left, right, low, high] = data.domain;
    const { x, y, body } = frame(box, [left, right], [low, high], data);
    const [a, b] = data.curvatures;
    let out = body + `<clipPath id="${data.name}-clip"><rect x="${box.left}" y="${box.top}" width="${box.width}" height="${box.height}"/></clipPath>`;
    out += `<g clip-path="url(#${data.name}-clip)">`;
    for (const level of data.levels) {
      const rx = Math.abs(x(Math.sqrt((2 * level) / a)) - x(0));
      const ry = Math.abs(y(Math.sqrt((2 * level) / b)) - y(0));
      out += `<ellipse class="level" cx="${round(x(0))}" cy="${round(y(0))}" rx="${round(rx)}" ry="${round(ry)}"/>`;
    }
    out += dot(x(0), y(0), "goal", 6);
    const said = [];
    data.paths[key(state, data)].forEach(([xs, ys], i) => {
      // A path ends with its first point outside; its numbers are hundredths.
      const points = xs.map((value, k) => [value / 100, ys[k] / 100]).slice(0, state.step + 1);
      const [endX, endY] = points[points.length - 1];
      const gone = endX < left || endX > right || endY < low || endY > high;
      out += path(points.map(([u, v]) => [x(u), y(v)]), `line s${i}`);
      const [u, v] = points[points.length - 1];
      out += dot(x(u), y(v), `fill s${i}`);
      const loss = format((a * u * u + b * v * v) / 2);
      said.push(gone ? `${data.series[i]} left the picture` : `${data.series[i]}: loss ${loss}`);
    });
    out += "</g>" + legend(data.series, 8, 16);
    const height = box.top + box.height + 38;
    return { body: out, height, status: `Step ${state.step}. ${said.join(", ")}.` };
  };

  // Curves over steps.
  kinds.curves = (state, data, width) => {
    const box = { left: 50, top: 44, width: width - 60, height: Math.min(290, width * 0.55) };
    // Some widgets let the reader choose the series, each of which has its own values.
    const chosen = (data.chosen || []).map((name) => state[name]);
    const rest = data.controls.filter((c) => !(data.chosen || []).includes(c.name));
    const at = rest.map((c) => state[c.name]).join(",");
    const found = data.chosen ? chosen.map((i) => data.values[`${i},${at}`]) : data.values[at];
    const series = data.chosen ? chosen.map((i) => data.series[i]) : data.series;
    const xs = [data.x[0], data.x[data.x.length - 1]];
    const { x, y, body } = frame(box, xs, data.range, data);
    let out = body;
    const said = [];
    found.forEach((values, i) => {
      const inside = values.map((v) => Math.min(Math.max(v, data.range[0]), data.range[1]));
      out += path(inside.map((v, k) => [x(data.x[k]), y(v)]), `line s${i}`);
      said.push(`${series[i]} ${format(values[values.length - 1])}`);
    });
    out += legend(series, 8, 16);
    const height = box.top + box.height + 38;
    return { body: out, height, status: `At the end: ${said.join(", ")}.` };
  };

  // Bars side by side.
  kinds.bars = (state, data, width) => {
    const box = { left: 50, top: 44, width: width - 60, height: Math.min(270, width * 0.5) };
    const found = data.values[key(state, data)];
    const count = data.labels.length;
    const { y, body } = frame(box, [0, count], data.range, { ...data, bare: true });
    let out = body;
    const floor = data.range[0];
    const slot = box.width / count;
    const each = (slot * 0.8) / found.length;
    found.forEach((values, i) => {
      values.forEach((value, k) => {
        const top = y(Math.min(Math.max(value, floor), data.range[1]));
        const left = box.left + k * slot + slot * 0.1 + i * each;
        out += `<rect class="fill s${i}" x="${round(left)}" y="${round(top)}" width="${round(each * 0.92)}" height="${round(y(floor) - top)}"/>`;
      });
    });
    data.labels.forEach((text, k) => {
      out += label(box.left + (k + 0.5) * slot, box.top + box.height + 15, text);
    });
    out += legend(data.series, 8, 16);
    const said = found.map((values, i) => `${data.series[i]} ${values.map(format).join(", ")}`);
    return { body: out, height: box.top + box.height + 38, status: `${said.join("; ")}.` };
  };

  // Matrices as squares in two colors, by sign.
  kinds.maps = (state, data, width) => {
    const found = data.values[key(state, data)];
    const across = width < 500 ? 2 : found.length;
    const side = Math.min((width - 10 * (across - 1)) / across, 190);
    let out = "";
    const said = [];
    found.forEach(({ entries, note }, i) => {
      const left = (i % across) * (side + 10);
      const top = 20 + Math.floor(i / across) * (side + 42);
      out += label(left + side / 2, top - 6, data.series[i], "middle", "strong");
      const size = side / entries.length;
      const largest = Math.max(...entries.flat().map(Math.abs)) || 1;
      entries.forEach((row, r) => {
        row.forEach((value, c) => {
          const kind = value < 0 ? "minus" : "plus";
          const strength = round((Math.abs(value) / largest) * 10) / 10;
          out += `<rect class="${kind}" x="${round(left + c * size)}" y="${round(top + r * size)}" width="${round(size)}" height="${round(size)}" opacity="${strength}"/>`;
        });
      });
      out += `<rect class="frame" x="${round(left)}" y="${top}" width="${round(side)}" height="${round(side)}"/>`;
      out += label(left + side / 2, top + side + 15, note);
      said.push(`${data.series[i]}: ${note}`);
    });
    const height = 20 + Math.ceil(found.length / across) * (side + 42);
    return { body: out, height, status: `${said.join("; ")}.` };
  };

  // Points, a line through the origin and the batch of a step; and the loss by slope.
  kinds.fit = (state, data, width) => {
    const half = width < 500 ? width : width / 2;
    const size = { width: half - 55, height: 210 };
    const [xs, ys] = data.points;
    const slope = data.slopes[key(state, data)][state.step];
    const loss = (w) => xs.reduce((sum, x, i) => sum + (w * x - ys[i]) ** 2, 0) / xs.length;
    const first = { left: 40, top: 30, ...size };
    const left = frame(first, [-3.2, 3.2], [-4.5, 4.5], { xlabel: "x", ylabel: "y" });
    let out = left.body + `<clipPath id="${data.name}-clip"><rect x="${first.left}" y="${first.top}" width="${first.width}" height="${first.height}"/></clipPath>`;
    out += `<g clip-path="url(#${data.name}-clip)">`;
    out += path([-3.2, 3.2].map((x) => [left.x(x), left.y(slope * x)]), "line s1");
    const batch = new Set(data.orders[state.step].slice(0, data.sizes[state.size]));
    xs.forEach((x, i) => {
      if (batch.has(i)) out += line(left.x(x), left.y(ys[i]), left.x(x), left.y(slope * x), "line s0");
      out += dot(left.x(x), left.y(ys[i]), batch.has(i) ? "fill s0" : "goal", 4);
    });
    out += "</g>";
    const second = width < 500 ? { left: 40, top: 300, ...size } : { left: half + 45, top: 30, ...size };
    const right = frame(second, [-1.2, 2.8], [0, 12], { xlabel: "slope w", ylabel: "loss" });
    const parabola = Array.from({ length: 81 }, (_, i) => -1.2 + i * 0.05);
    const seen = parabola.filter((w) => loss(w) <= 12);
    out += right.body + path(seen.map((w) => [right.x(w), right.y(loss(w))]), "level");
    const best = xs.reduce((sum, x, i) => sum + x * ys[i], 0) / xs.reduce((sum, x) => sum + x * x, 0);
    out += dot(right.x(best), right.y(loss(best)), "goal", 6);
    const inside = slope > -1.2 && slope < 2.8 && loss(slope) < 12;
    if (inside) out += dot(right.x(slope), right.y(loss(slope)), "fill s1");
    const height = second.top + size.height + 38;
    const said = inside ? `loss ${format(loss(slope))}` : "outside of the picture";
    return { body: out, height, status: `Step ${state.step}. Slope ${format(slope)}, ${said}.` };
  };

  // A step from a point of the unit circle, and the way back to the circle.
  kinds.circle = (state, data, width) => {
    const size = Math.min(width, 380);
    const box = { left: (width - size) / 2 + 30, top: 20, width: size - 40, height: size - 40 };
    const { x, y, body } = frame(box, [-0.6, 1.8], [-1.2, 1.2]);
    const { tip, end, turn, asked } = data.values[key(state, data)];
    let out = body;
    const angles = Array.from({ length: 121 }, (_, i) => (i * Math.PI) / 60);
    const inside = (u) => Math.cos(u) >= -0.6;
    for (const part of [angles.filter((u) => inside(u) && u <= Math.PI), angles.filter((u) => inside(u) && u > Math.PI)]) {
      out += path(part.map((u) => [x(Math.cos(u)), y(Math.sin(u))]), "level");
    }
    out += path([[x(0), y(0)], [x(1), y(0)]], "level");
    out += path([[x(1), y(0)], [x(tip[0]), y(tip[1])]], "line s0");
    out += path([[x(tip[0]), y(tip[1])], [x(end[0]), y(end[1])]], "line s2 dashed");
    out += dot(x(1), y(0), "goal") + dot(x(tip[0]), y(tip[1]), "fill s0") + dot(x(end[0]), y(end[1]), "fill s1");
    out += legend(data.series, 8, 12);
    const status = `A step of ${format(asked)} turns the weight by ${format(turn)}.`;
    return { body: out, height: box.top + box.height + 25, status };
  };

  // Draws a widget: {svg, status}.
  function draw(state, data, width) {
    const { body, height, status } = kinds[data.kind](state, data, width);
    return { svg: svg(width, round(height), body, `${data.title}. ${status}`), status };
  }

  // Returns the state that a widget begins with: an index for each control.
  const initial = (data) => Object.fromEntries(data.controls.map((c) => [c.name, c.value]));

  return { draw, initial, kinds, format, frame, label, line, dot, path, round };
})();
