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

  // Returns the names of series in their colors, over as many rows as they need, and the
  // height of these. From the seventh color on they are hollow, and their lines dashed.
  function legend(names, width, colors = names.map((_, i) => i)) {
    let body = "";
    let [x, y] = [8, 16];
    names.forEach((name, i) => {
      const length = 30 + 7 * name.length;
      if (x > 8 && x + length > width) [x, y] = [8, y + 18];
      body += `<rect class="${colors[i] < 6 ? "fill" : "hollow"} s${colors[i] % 6}" x="${round(x)}" y="${y - 9}" width="10" height="10"/>`;
      body += label(x + 14, y, name, "start", "small");
      x += length;
    });
    return { body, height: y };
  }

  // Returns a group that shows nothing outside of a box.
  const clipped = (name, { left, top, width, height }, body) =>
    `<clipPath id="${name}"><rect x="${left}" y="${top}" width="${width}" height="${height}"/></clipPath>` +
    `<g clip-path="url(#${name})">${body}</g>`;

  const svg = (width, height, body, about) =>
    `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(about)}">${body}</svg>`;

  // Returns the place of a state in the results of the data: its choices, in order.
  const key = (state, data, by = null) =>
    data.controls
      .filter((c) => !c.step && !c.many && (!by || by.includes(c.name)))
      .map((c) => state[c.name])
      .join(",");

  // Returns the place in a list of points of the one that is nearest to x and y.
  const nearest = (points, x, y) => {
    const far = points.map(([u, v]) => Math.hypot(u - x, v - y));
    return far.indexOf(Math.min(...far));
  };

  const kinds = {};

  // Paths of several optimizers over the level sets of a quadratic function.
  kinds.paths = {
    box: (data, width) => {
      const { body, height } = legend(data.series, width);
      const box = { left: 40, top: height + 14, width: width - 50, height: Math.min(330, width * 0.62) };
      const [left, right, low, high] = data.domain;
      const found = frame(box, [left, right], [low, high], data);
      return { ...found, box, body: body + found.body };
    },
    draw: (state, data, width) => {
      const [left, right, low, high] = data.domain;
      const { x, y, box, body } = kinds.paths.box(data, width);
      const [a, b] = data.curvatures[state.curvature || 0];
      let out = "";
      for (const level of data.levels) {
        const rx = Math.abs(x(Math.sqrt((2 * level) / a)) - x(0));
        const ry = Math.abs(y(Math.sqrt((2 * level) / b)) - y(0));
        out += `<ellipse class="level" cx="${round(x(0))}" cy="${round(y(0))}" rx="${round(rx)}" ry="${round(ry)}"/>`;
      }
      out += dot(x(0), y(0), "goal", 6);
      const said = [];
      data.paths.forEach((found, i) => {
        // A path ends with its first point outside; its numbers are hundredths.
        const [xs, ys] = found[key(state, data, data.by[i])];
        const points = xs.map((value, k) => [value / 100, ys[k] / 100]).slice(0, state.step + 1);
        out += path(points.map(([u, v]) => [x(u), y(v)]), `line s${i}`);
        const [u, v] = points[points.length - 1];
        out += dot(x(u), y(v), `fill s${i}`);
        const gone = u < left || u > right || v < low || v > high;
        const loss = format((a * u * u + b * v * v) / 2);
        said.push(gone ? `${data.series[i]} left the picture` : `${data.series[i]}: loss ${loss}`);
      });
      if (data.starts) {
        const [u, v] = data.starts[state.start];
        out += dot(x(u), y(v), "handle", 9);
      }
      return {
        body: body + clipped(`${data.name}-clip`, box, out),
        height: box.top + box.height + 38,
        status: `Step ${state.step}. ${said.join(", ")}.`,
      };
    },
    drag: (state, data, width, px, py) => {
      const { x, y } = kinds.paths.box(data, width);
      return { start: nearest(data.starts.map(([u, v]) => [x(u), y(v)]), px, py) };
    },
  };

  // Curves over steps. Where the data lets the reader choose the series, only those.
  kinds.curves = {
    draw: (state, data, width) => {
      const chosen = state.series || data.series.map((_, i) => i);
      const names = chosen.map((i) => data.series[i]);
      const top = legend(names, width, chosen);
      const box = { left: 50, top: top.height + 28, width: width - 68, height: Math.min(290, width * 0.55) };
      const { x, y, body } = frame(box, [data.x[0], data.x[data.x.length - 1]], data.range, data);
      let out = top.body + body;
      const said = chosen.map((i) => {
        const values = data.values[key(state, data)][i];
        const inside = values.map((v) => Math.min(Math.max(v, data.range[0]), data.range[1]));
        out += path(inside.map((v, k) => [x(data.x[k]), y(v)]), `line s${i % 6}${i < 6 ? "" : " dashed"}`);
        return `${data.series[i]} ${format(values[values.length - 1])}`;
      });
      const status = said.length ? `At the end: ${said.join(", ")}.` : "Nothing is chosen.";
      return { body: out, height: box.top + box.height + 38, status };
    },
  };

  // Bars side by side.
  kinds.bars = { draw: (state, data, width) => {
    const top = legend(data.series, width);
    const box = { left: 50, top: top.height + 28, width: width - 68, height: Math.min(270, width * 0.5) };
    const found = data.values[key(state, data)];
    const count = data.labels.length;
    const { y, body } = frame(box, [0, count], data.range, { ...data, bare: true });
    let out = body;
    const floor = data.range[0];
    const slot = box.width / count;
    const each = (slot * 0.8) / found.length;
    found.forEach((values, i) => {
      values.forEach((value, k) => {
        const high = y(Math.min(Math.max(value, floor), data.range[1]));
        const left = box.left + k * slot + slot * 0.1 + i * each;
        out += `<rect class="fill s${i}" x="${round(left)}" y="${round(high)}" width="${round(each * 0.92)}" height="${round(y(floor) - high)}"/>`;
      });
    });
    data.labels.forEach((text, k) => {
      out += label(box.left + (k + 0.5) * slot, box.top + box.height + 15, text);
    });
    out += top.body;
    const said = found.map((values, i) => `${data.series[i]} ${values.map(format).join(", ")}`);
    return { body: out, height: box.top + box.height + 38, status: `${said.join("; ")}.` };
  } };

  // Matrices as squares in two colors, by sign.
  kinds.maps = { draw: (state, data, width) => {
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
  } };

  // Points, a line through the origin and the batch of a step; and the loss by slope.
  kinds.fit = { draw: (state, data, width) => {
    const half = width < 500 ? width : width / 2;
    const size = { width: half - 55, height: 210 };
    const [xs, ys] = data.points;
    const slope = data.slopes[key(state, data)][state.step];
    const loss = (w) => xs.reduce((sum, x, i) => sum + (w * x - ys[i]) ** 2, 0) / xs.length;
    const first = { left: 40, top: 30, ...size };
    const left = frame(first, [-3.2, 3.2], [-4.5, 4.5], { xlabel: "x", ylabel: "y" });
    let inner = path([-3.2, 3.2].map((x) => [left.x(x), left.y(slope * x)]), "line s1");
    const batch = new Set(data.orders[state.step].slice(0, data.sizes[state.size]));
    xs.forEach((x, i) => {
      if (batch.has(i)) inner += line(left.x(x), left.y(ys[i]), left.x(x), left.y(slope * x), "line s0");
      inner += dot(left.x(x), left.y(ys[i]), batch.has(i) ? "fill s0" : "goal", 4);
    });
    let out = left.body + clipped(`${data.name}-clip`, first, inner);
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
  } };

  // Two parabolas with the same slope at 0, and where a step from there ends on each.
  kinds.slopes = { draw: (state, data, width) => {
    const { body, height } = legend(data.series, width);
    const box = { left: 40, top: height + 28, width: width - 50, height: Math.min(290, width * 0.55) };
    const plot = frame(box, [-3.2, 0.6], [-1.2, 2.2], { xlabel: "w", ylabel: "loss" });
    const { x, y } = plot;
    const xs = Array.from({ length: 77 }, (_, i) => -3.2 + i * 0.05);
    let out = path([[-0.5, -0.5], [0.5, 0.5]].map(([u, v]) => [x(u), y(v)]), "level dashed");
    const said = data.values[key(state, data)].map(({ end, goal }, i) => {
      const curve = xs.map((u) => [x(u), y(u + (data.curvatures[i] * u * u) / 2)]);
      out += path(curve, `line s${i}`) + dot(x(goal[0]), y(goal[1]), "goal", 6);
      out += path([[x(0), y(0)], [x(end[0]), y(end[1])]], `line s${i} dashed`);
      out += dot(x(end[0]), y(end[1]), `fill s${i}`);
      const change = end[1] < 0 ? "lower" : "higher";
      return `${data.series[i]}: loss ${format(end[1])}, ${change} than before`;
    });
    out += dot(x(0), y(0), "goal", 3);
    return {
      body: body + plot.body + clipped(`${data.name}-clip`, box, out),
      height: box.top + box.height + 38,
      status: `${said.join("; ")}.`,
    };
  } };

  // Level sets of a quadratic function of two numbers, and the axes of its Hessian.
  kinds.hessian = { draw: (state, data, width) => {
    const { body, height } = legend(data.series, width);
    const size = Math.min(width, 400) - 40;
    const box = { left: (width - size) / 2 + 10, top: height + 14, width: size, height: size };
    const plot = frame(box, [-2, 2], [-2, 2]);
    const { x, y } = plot;
    const { values, vectors } = data.values[key(state, data)];
    // From coordinates along the two axes to pixels.
    const at = ([u, v]) => [
      x(u * vectors[0][0] + v * vectors[1][0]),
      y(u * vectors[0][1] + v * vectors[1][1]),
    ];
    const along = Array.from({ length: 97 }, (_, i) => -3 + i / 16);
    let out = "";
    for (const level of [-8, -4, -2, -1, -0.5, -0.125, 0.125, 0.5, 1, 2, 4, 8]) {
      const [p, q] = values.map((value) => Math.sqrt(Math.abs((2 * level) / value)));
      const [alike, flat] = [values.map((value) => value * level > 0), values.map((value) => Math.abs(value) < 1e-6)];
      const branches = [-1, 1].flatMap((sign) => {
        if (flat[0]) return alike[1] ? [along.map((t) => [t, sign * q])] : [];
        if (flat[1]) return alike[0] ? [along.map((t) => [sign * p, t])] : [];
        if (alike[0] && alike[1]) {
          return [along.map((t) => [p * Math.cos((t * Math.PI) / 3), sign * q * Math.sin((t * Math.PI) / 3)])];
        }
        if (alike[0]) return [along.map((t) => [sign * p * Math.cosh(t), q * Math.sinh(t)])];
        if (alike[1]) return [along.map((t) => [p * Math.sinh(t), sign * q * Math.cosh(t)])];
        return [];
      });
      for (const points of branches) out += path(points.map(at), level < 0 ? "level dashed" : "level");
    }
    const steepest = Math.abs(values[0]) > Math.abs(values[1]) ? 0 : 1;
    vectors.forEach((_, i) => {
      const unit = i ? [0, 1] : [1, 0];
      out += path([at(unit.map((u) => -u)), at(unit)], `line s${i === steepest ? 0 : 1}`);
    });
    const shapes = { "1,1": "a bowl", "-1,1": "a saddle", "-1,-1": "a hill", "0,1": "a valley without end", "-1,0": "a ridge without end" };
    const shape = shapes[values.map((value) => (Math.abs(value) < 1e-6 ? 0 : Math.sign(value))).join(",")];
    return {
      body: body + plot.body + clipped(`${data.name}-clip`, box, out),
      height: box.top + box.height + 25,
      status: `Eigenvalues ${values.map(format).join(" and ")}: ${shape || "flat"}.`,
    };
  } };

  // A step from a point of the unit circle, and the way back to the circle.
  kinds.circle = {
    box: (data, width) => {
      const { body, height } = legend(data.series, width);
      const size = Math.min(width, 380) - 40;
      const box = { left: (width - size) / 2 + 10, top: height + 14, width: size, height: size };
      const found = frame(box, [-0.6, 1.8], [-1.2, 1.2]);
      return { ...found, box, body: body + found.body };
    },
    draw: (state, data, width) => {
      const { x, y, box, body } = kinds.circle.box(data, width);
      const { tip, end, turn } = data.values[key(state, data)];
      const angles = Array.from({ length: 121 }, (_, i) => (i * Math.PI) / 60);
      let out = path(angles.map((u) => [x(Math.cos(u)), y(Math.sin(u))]), "level");
      out += path([[x(0), y(0)], [x(1), y(0)]], "level");
      out += path([[x(1), y(0)], [x(tip[0]), y(tip[1])]], "line s0");
      out += path([[x(tip[0]), y(tip[1])], [x(end[0]), y(end[1])]], "line s2 dashed");
      out += dot(x(1), y(0), "goal") + dot(x(end[0]), y(end[1]), "fill s1");
      out += dot(x(tip[0]), y(tip[1]), "fill s0") + dot(x(tip[0]), y(tip[1]), "handle", 9);
      const asked = data.controls[0].texts[state.eta];
      return {
        body: body + clipped(`${data.name}-clip`, box, out),
        height: box.top + box.height + 25,
        status: `A step of ${asked} turns the weight by ${format(turn)}.`,
      };
    },
    drag: (state, data, width, px, py) => {
      const { x, y } = kinds.circle.box(data, width);
      const keys = Object.keys(data.values);
      const tips = keys.map((k) => [x(data.values[k].tip[0]), y(data.values[k].tip[1])]);
      const [eta, gamma] = keys[nearest(tips, px, py)].split(",").map(Number);
      return { eta, gamma };
    },
  };

  // Draws a widget: {svg, status}.
  function draw(state, data, width) {
    const { body, height, status } = kinds[data.kind].draw(state, data, width);
    return { svg: svg(width, round(height), body, `${data.title}. ${status}`), status };
  }

  // Returns what changes in the state when the handle of a widget is dragged to a place.
  const drag = (state, data, width, px, py) => kinds[data.kind].drag(state, data, width, px, py);

  // Returns the state that a widget begins with: an index for each control, or several.
  const initial = (data) => Object.fromEntries(data.controls.map((c) => [c.name, c.value]));

  return { draw, drag, initial };
})();
