"use strict";

// Pure functions from the state of a widget and its data to an SVG and a sentence. The
// browser calls them when a control moves, and the build calls them for the figure that
// is shown without JavaScript. They draw numbers that Python computed; see tour/widgets.
const Tour = (() => {
  const { format, rect, label, dot, line, squares, ellipse, clipped, frame, fill, stroke, legend, svg } = Svg;

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

  // Returns a legend above a frame over the whole width.
  const plot = (data, width, xs, ys, ratio, colors, names = data.series) => {
    const top = legend(names, width, colors);
    const begin = top.height + (data.ylabel ? 28 : 14);
    const box = { left: 50, top: begin, width: width - 68, height: Math.min(720, width) * ratio };
    const found = frame(box, xs, ys, data);
    const height = begin + box.height + (data.xlabel ? 38 : 25);
    return { ...found, height, body: top.body + found.body };
  };

  // Returns a legend above a square frame in the middle.
  const square = (data, width) => {
    const top = legend(data.series, width);
    const size = Math.min(width, 400) - 40;
    const box = { left: (width - size) / 2 + 10, top: top.height + 14, width: size, height: size };
    const found = frame(box, data.xs, data.ys);
    return { ...found, height: box.top + size + 25, body: top.body + found.body };
  };

  // Each kind of widget has a function that draws it; some have handles to drag.
  const kinds = {};
  const handles = {};

  // Paths of several optimizers over the level sets of a quadratic function.
  const plain = (data, width) => plot(data, width, data.xs, data.ys, 0.46);

  kinds.paths = (state, data, width) => {
    const { x, y, box, body, height } = plain(data, width);
    const [a, b] = data.curvatures[state.curvature || 0];
    let inside = "";
    for (const level of data.levels) {
      const [u, v] = [Math.sqrt((2 * level) / a), Math.sqrt((2 * level) / b)];
      inside += ellipse(x(0), y(0), x(u) - x(0), y(0) - y(v), "level");
    }
    inside += dot(x(0), y(0), "ring", 6);
    const sentences = data.paths.map((paths, i) => {
      // A path ends with its first point outside; its places are hundredths.
      const [xs, ys, losses] = paths[key(state, data, data.by[i])];
      const last = Math.min(state.step, xs.length - 1);
      const points = xs.slice(0, last + 1).map((u, k) => [x(u / 100), y(ys[k] / 100)]);
      inside += line(points, stroke(i)) + dot(...points[last], fill(i));
      const gone = losses[last] === null;
      return gone ? `${data.series[i]} left the picture` : `${data.series[i]}: loss ${format(losses[last])}`;
    });
    if (data.starts) {
      const [u, v] = data.starts[state.start];
      inside += dot(x(u), y(v), "handle", 12);
    }
    const drawn = body + clipped(`${data.name}-clip`, box, inside);
    return { body: drawn, height, status: `Step ${state.step}. ${sentences.join(", ")}.` };
  };

  handles.paths = (state, data, width, px, py) => {
    const { x, y } = plain(data, width);
    return { start: nearest(data.starts.map(([u, v]) => [x(u), y(v)]), px, py) };
  };

  // Curves over steps. Where the data lets the reader choose the series, only those.
  kinds.curves = (state, data, width) => {
    const chosen = state.series || data.series.map((_, i) => i);
    const names = chosen.map((i) => data.series[i]);
    const ends = [data.x[0], data.x[data.x.length - 1]];
    const { x, y, body, height } = plot(data, width, ends, data.range, 0.4, chosen, names);
    let drawn = body;
    const sentences = chosen.map((i) => {
      const values = data.values[key(state, data)][i];
      // A curve ends where it is not a number any more.
      const end = values.includes(null) ? values.indexOf(null) : values.length;
      const inside = values.slice(0, end).map((v) => Math.min(Math.max(v, data.range[0]), data.range[1]));
      drawn += line(inside.map((v, k) => [x(data.x[k]), y(v)]), stroke(i));
      return `${data.series[i]} ${end < values.length ? "diverged" : format(values[end - 1])}`;
    });
    const status = sentences.length ? `${data.end}: ${sentences.join(", ")}.` : "Nothing is chosen.";
    return { body: drawn, height, status };
  };

  // Bars side by side.
  kinds.bars = (state, data, width) => {
    const values = data.values[key(state, data)];
    const count = data.labels.length;
    const { y, box, body, height } = plot({ ...data, bare: true }, width, [0, count], data.range, 0.38);
    let drawn = body;
    const floor = data.range[0];
    const slot = box.width / count;
    const each = (slot * 0.8) / values.length;
    const sentences = data.labels.map((text, k) => {
      drawn += label(box.left + (k + 0.5) * slot, box.top + box.height + 15, text);
      const parts = values.map((series, i) => {
        const high = y(Math.min(Math.max(series[k], floor), data.range[1]));
        const left = box.left + k * slot + slot * 0.1 + i * each;
        drawn += rect(left, high, each * 0.92, y(floor) - high, fill(i));
        return `${data.series[i]} ${format(series[k])}`;
      });
      return `${text}: ${parts.join(", ")}`;
    });
    return { body: drawn, height, status: `${sentences.join("; ")}.` };
  };

  // Matrices as squares in two colors, by sign.
  kinds.maps = (state, data, width) => {
    const maps = data.values[key(state, data)];
    const across = width < 500 ? 2 : maps.length;
    const side = Math.min((width - 10 * (across - 1)) / across, 190);
    let body = "";
    maps.forEach(({ entries, note }, i) => {
      const left = (i % across) * (side + 10);
      const top = 20 + Math.floor(i / across) * (side + 42);
      body += label(left + side / 2, top - 6, data.series[i], "middle", "strong");
      const size = side / entries.length;
      const largest = Math.max(...entries.flat().map(Math.abs)) || 1;
      // One shape for all cells of a sign and a strength, because many shapes are slow.
      const cells = {};
      entries.forEach((row, r) => {
        row.forEach((value, c) => {
          const kind = `${value < 0 ? "minus" : "plus"} ${Math.round((10 * Math.abs(value)) / largest)}`;
          (cells[kind] ||= []).push([left + c * size, top + r * size]);
        });
      });
      for (const [kind, corners] of Object.entries(cells)) {
        const [sign, tenths] = kind.split(" ");
        body += squares(corners, size, sign, tenths / 10);
      }
      body += rect(left, top, side, side, "frame");
      body += label(left + side / 2, top + side + 15, note);
    });
    const height = 20 + Math.ceil(maps.length / across) * (side + 42);
    const sentences = maps.map(({ note }, i) => `${data.series[i]}: ${note}`);
    return { body, height, status: `${sentences.join("; ")}.` };
  };

  // Points, a line through the origin and the batch of a step; and the loss by slope.
  kinds.fit = (state, data, width) => {
    const narrow = width < 500;
    const half = narrow ? width : width / 2;
    const size = { width: half - 55, height: 210 };
    const first = { left: 40, top: 30, ...size };
    const second = narrow ? { left: 40, top: 300, ...size } : { left: half + 45, top: 30, ...size };
    const left = frame(first, data.xs, data.ys, { xlabel: "x", ylabel: "y" });
    const right = frame(second, data.slopes, data.losses, { xlabel: "slope w", ylabel: "loss" });
    const [slopes, losses] = data.runs[key(state, data)];
    const [slope, loss] = [slopes[state.step], losses[state.step]];
    let inside = line(data.xs.map((x) => [left.x(x), left.y(slope * x)]), "line s1");
    const batch = new Set(data.orders[state.step].slice(0, data.sizes[state.size]));
    data.points[0].forEach((u, i) => {
      const [x, y] = [left.x(u), left.y(data.points[1][i])];
      if (batch.has(i)) inside += line([[x, y], [x, left.y(slope * u)]], "line s0");
      inside += dot(x, y, batch.has(i) ? "fill s0" : "quiet", 4);
    });
    const [best, least] = data.best;
    const curve = data.curve[0].map((w, k) => [right.x(w), right.y(data.curve[1][k])]);
    const marks = line(curve, "level") + dot(right.x(best), right.y(least), "ring", 6);
    const body =
      left.body + clipped(`${data.name}-line`, first, inside) +
      right.body + clipped(`${data.name}-loss`, second, marks + dot(right.x(slope), right.y(loss), "fill s1"));
    const status = `Step ${state.step}. Slope ${format(slope)}, loss ${format(loss)}.`;
    return { body, height: second.top + size.height + 38, status };
  };

  // Two valleys with the same slope at 0, and where a step from there ends in each.
  kinds.slopes = (state, data, width) => {
    const { x, y, box, body, height } = plot(data, width, data.xs, data.ys, 0.4);
    let inside = "";
    const sentences = data.values[key(state, data)].map(({ end, goal }, i) => {
      inside += line(data.curves[i].map((v, k) => [x(data.points[k]), y(v)]), stroke(i));
      inside += dot(x(goal[0]), y(goal[1]), "ring", 6);
      inside += line([[x(0), y(0)], [x(end[0]), y(end[1])]], `${stroke(i)} dashed`);
      inside += dot(x(end[0]), y(end[1]), fill(i));
      const change = ["lower than before", "as before", "higher than before"][Math.sign(end[1]) + 1];
      return `${data.series[i]}: loss ${format(end[1])}, ${change}`;
    });
    inside += dot(x(0), y(0), "quiet", 4);
    const drawn = body + clipped(`${data.name}-clip`, box, inside);
    return { body: drawn, height, status: `${sentences.join("; ")}.` };
  };

  // Returns the points of a level set of ½ (p u² + q v²): an ellipse, hyperbolas or lines.
  function levelSet([p, q], level) {
    const along = Array.from({ length: 97 }, (_, i) => -3 + i / 16);
    const [u, v] = [p, q].map((value) => Math.sqrt(Math.abs((2 * level) / value)));
    const [first, second] = [p, q].map((value) => value * level > 0);
    if (first && second) {
      const turn = along.map((t) => (t * Math.PI) / 3);
      return [turn.map((t) => [u * Math.cos(t), v * Math.sin(t)])];
    }
    const both = (curve) => [-1, 1].map((sign) => along.map((t) => curve(sign, t)));
    if (first && q === 0) return both((sign, t) => [sign * u, t]);
    if (second && p === 0) return both((sign, t) => [t, sign * v]);
    if (first) return both((sign, t) => [sign * u * Math.cosh(t), v * Math.sinh(t)]);
    if (second) return both((sign, t) => [u * Math.sinh(t), sign * v * Math.cosh(t)]);
    return [];
  }

  // Level sets of a quadratic function of two numbers, and the axes of its Hessian.
  kinds.hessian = (state, data, width) => {
    const { x, y, box, body, height } = square(data, width);
    const { values, vectors } = data.values[key(state, data)];
    // From coordinates along the two axes to pixels.
    const at = ([u, v]) => [
      x(u * vectors[0][0] + v * vectors[1][0]),
      y(u * vectors[0][1] + v * vectors[1][1]),
    ];
    let inside = "";
    for (const level of data.levels.flatMap((size) => [-size, size])) {
      const kind = level < 0 ? "level dashed" : "level";
      for (const points of levelSet(values, level)) inside += line(points.map(at), kind);
    }
    const steepest = Math.abs(values[0]) > Math.abs(values[1]) ? 0 : 1;
    [[1, 0], [0, 1]].forEach(([u, v], i) => {
      inside += line([at([-u, -v]), at([u, v])], stroke(i === steepest ? 0 : 1));
    });
    const signs = values.map(Math.sign).join(",");
    const names = { "1,1": "bowl", "-1,1": "saddle", "-1,-1": "hill", "0,1": "valley without end", "-1,0": "ridge without end" };
    const drawn = body + clipped(`${data.name}-clip`, box, inside);
    const status = `Eigenvalues ${values.map(format).join(" and ")}: a ${names[signs]}.`;
    return { body: drawn, height, status };
  };

  // A step from a point of the unit circle, and the way back to the circle.
  kinds.circle = (state, data, width) => {
    const { x, y, box, body, height } = square(data, width);
    const { tip, end, turn } = data.values[key(state, data)];
    const at = ([u, v]) => [x(u), y(v)];
    const angles = Array.from({ length: 121 }, (_, i) => (i * Math.PI) / 60);
    const inside =
      line(angles.map((u) => at([Math.cos(u), Math.sin(u)])), "level") +
      line([at([0, 0]), at([1, 0])], "level") +
      line([at([1, 0]), at(tip)], "line s0") +
      line([at(tip), at(end)], "line s2 dashed") +
      dot(...at([1, 0]), "ring") + dot(...at(end), "fill s1") +
      dot(...at(tip), "fill s0") + dot(...at(tip), "handle", 12);
    const [eta, gamma] = data.controls.map((c) => c.texts[state[c.name]]);
    const status = `A step of ${eta} with γ = ${gamma} turns the weight by ${format(turn)} radians.`;
    return { body: body + clipped(`${data.name}-clip`, box, inside), height, status };
  };

  handles.circle = (state, data, width, px, py) => {
    const { x, y } = square(data, width);
    const keys = Object.keys(data.values);
    const tips = keys.map((each) => data.values[each].tip).map(([u, v]) => [x(u), y(v)]);
    const [eta, gamma] = keys[nearest(tips, px, py)].split(",").map(Number);
    return { eta, gamma };
  };

  // Returns the state that a widget begins with: an index for each control, or several.
  const initial = (data) => Object.fromEntries(data.controls.map((c) => [c.name, c.value]));

  // Draws a widget: {svg, status}.
  function draw(state, data, width) {
    const { body, height, status } = kinds[data.kind](state, data, width);
    return { svg: svg(width, height, body, `${data.title}. ${status}`), status };
  }

  // Returns what changes in the state when the handle of a widget is dragged to a place.
  const drag = (state, data, width, x, y) => handles[data.kind](state, data, width, x, y);

  return { draw, drag, initial };
})();
