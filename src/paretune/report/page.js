// Draws every figure from the JSON in the page, as wide as its column. A click on a method shows it alone, pointing to a curve names it; tables
// sort by their heads. Nothing else needs a script.
(function () {
  "use strict";
  const { views, looks, lead, shapes } = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg", CEILING = "the exact optimum";
  const root = document.documentElement, tip = document.getElementById("tip");
  const picked = new Set(), chosen = {}, drawn = new Map(), rest = { plots: [], timer: 0 };
  const pen = document.createElement("canvas").getContext("2d");
  const all = (query, from) => Array.from((from || document).querySelectorAll(query));
  const minus = (text) => (Number(text) === 0 ? text.replace("-", "") : text.replace("-", "\u2212"));
  const number = (value) => minus(Math.abs(value) < 100 ? value.toFixed(2) : value.toPrecision(3));
  const color = (name) => (looks[name] ? "var(--m" + looks[name].color + ")" : "var(--ink)");
  const shown = (name) => (name === CEILING ? "exact front" : name);

  function node(kind, attributes, parent) {
    const made = document.createElementNS(SVG, kind);
    for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  function text(said, attributes, parent) {
    const made = node("text", attributes, parent);
    made.textContent = said;
    return made;
  }

  // Data to pixels, with round values for ticks.
  function scale(axis, start, end, room) {
    const map = axis.log ? Math.log10 : (value) => value;
    const low = map(axis.range[0]), high = map(axis.range[1]);
    const at = (value) => start + ((end - start) * (map(value) - low)) / (high - low);
    const ticks = [];
    if (axis.log) {
      const digits = high - low > 2.2 ? [1] : high - low > 1.2 ? [1, 3] : [1, 2, 5];
      for (let e = Math.floor(low); e <= high; e++) for (const d of digits) ticks.push(d * 10 ** e);
      const said = (v) => (v >= 1e9 ? v / 1e9 + "G" : v >= 1e6 ? v / 1e6 + "M" : v >= 1e3 ? v / 1e3 + "k" : String(v));
      return { at, ticks: ticks.filter((v) => map(v) >= low && map(v) <= high).map((v) => [at(v), said(v)]) };
    }
    const most = Math.max(2, Math.floor(Math.abs(end - start) / room));
    let step = 10 ** Math.floor(Math.log10((high - low) / most));
    step *= [1, 2, 2.5, 5, 10].find((times) => (high - low) / (step * times) <= most) || 10;
    const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9) + (Math.abs(step / 10 ** Math.floor(Math.log10(step) + 1e-9) - 2.5) < 0.01 ? 1 : 0)));
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9; k++) ticks.push(k * step);
    return { at, ticks: ticks.map((v) => [at(v), minus(v.toFixed(digits))]) };
  }

  // Greedy places for labels: in the plot, off other labels, covering few curves, near the point that each names.
  function place(wanted, ink, box, boxes) {
    const found = [];
    for (const one of wanted) {
      const half = one.width / 2 + 3, tall = 8;
      let best = null;
      for (const [ax, ay] of one.anchors) {
        for (const radius of [14, 24, 38, 60]) for (let turn = 0; turn < 16; turn++) {
          const angle = (turn * Math.PI) / 8, dx = radius * Math.cos(angle), dy = radius * Math.sin(angle);
          const x = ax + dx + (Math.abs(dx) > 4 ? Math.sign(dx) * half * Math.min(1, Math.abs(dx) / 12) : 0), y = ay + dy;
          if (x - half < box[0] || x + half > box[2] || y - tall < box[1] || y + tall > box[3]) continue;
          if (boxes.some((b) => Math.abs(x - b[0]) < half + b[2] && Math.abs(y - b[1]) < tall + b[3])) continue;
          let cost = 0.06 * Math.hypot(x - ax, y - ay);
          for (const [px, py, weight, name] of ink) {
            if (Math.abs(px - x) < half && Math.abs(py - y) < tall) cost += 3 * weight;
            if (name !== one.name && Math.abs(px - ax) + Math.abs(py - ay) < 12) cost += 0.8 * weight;
            const mx = (x - Math.sign(dx) * Math.min(half, Math.abs(x - ax)) + ax) / 2;
            if (name !== one.name && Math.abs(px - mx) < 4 && Math.abs(py - (y + ay) / 2) < 4) cost += weight;
          }
          if (best === null || cost < best.cost) best = { cost, x, y, ax, ay, half };
        }
      }
      if (best === null) continue;
      boxes.push([best.x, best.y, half, tall]);
      found.push({ ...one, ...best });
    }
    return found;
  }

  function dense(points) {
    const found = [];
    points.forEach(([x, y], k) => {
      if (k) for (let t = 0.2; t < 1; t += 0.2) found.push([points[k - 1][0] + t * (x - points[k - 1][0]), points[k - 1][1] + t * (y - points[k - 1][1])]);
      found.push([x, y]);
    });
    return found;
  }

  function size(plot) {
    const width = Math.max(240, plot.clientWidth);
    return [width, Math.round(Math.min(460, Math.max(280, 0.62 * width)))];
  }

  function draw(plot) {
    const view = views[plot.id][chosen[plot.id]] || Object.values(views[plot.id])[0];
    const [width, height] = size(plot);
    const box = [46, 26, width - 10, height - 42];
    const x = scale(view.x, box[0], box[2], 64), y = scale(view.y, box[3], box[1], 44);
    const svg = node("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    for (const [at, said] of y.ticks) {
      node("line", { x1: box[0], x2: box[2], y1: at, y2: at, class: "grid" }, svg);
      text(said, { x: box[0] - 8, y: at + 4, "text-anchor": "end", class: "tick" }, svg);
    }
    for (const [at, said] of x.ticks) text(said, { x: at, y: box[3] + 18, "text-anchor": "middle", class: "tick" }, svg);
    node("line", { x1: box[0], x2: box[2], y1: box[3], y2: box[3], class: "zero" }, svg);
    const caption = plot.parentNode.querySelector("figcaption");
    if (!caption || caption.textContent.toLowerCase() !== view.y.title.toLowerCase()) text(view.y.title, { x: 0, y: 12, class: "title" }, svg);
    text(view.x.title, { x: box[2], y: height - 6, "text-anchor": "end", class: "title" }, svg);
    const taken = [];
    pen.font = "600 12px " + getComputedStyle(root).fontFamily;
    for (const level of view.levels) {
      const at = y.at(level.at);
      node("line", { x1: box[0], x2: box[2], y1: at, y2: at, class: level.name ? "strong" : "zero" }, svg);
      if (level.name) {
        text(level.name, { x: box[2], y: at - 6, "text-anchor": "end", class: "label", fill: "currentColor" }, svg);
        const half = pen.measureText(level.name).width / 2;
        taken.push([box[2] - half, at - 10, half + 4, 9], [(box[0] + box[2]) / 2, at, (box[2] - box[0]) / 2, 1]);
      }
    }
    const front = (name) => name === CEILING || (picked.size ? picked.has(name) : !looks[name] || !lead.length || lead.includes(name));
    const series = view.series.map((one) => ({ ...one, front: front(one.name), at: one.x.map((v, k) => [x.at(v), y.at(one.y[k])]) }));
    series.sort((a, b) => a.front - b.front || (b.name === CEILING) - (a.name === CEILING));
    const ink = [], wanted = [];
    for (const one of series) {
      curve(svg, one, x, y);
      for (const [a, b] of one.line ? dense(one.at) : one.at) ink.push([a, b, one.front ? 1 : 0.25, one.name]);
    }
    for (const one of series) {
      const low = (one.below || []).filter((v) => v !== null && v !== undefined);
      if (!(one.front || low.length) || !one.at.length || (picked.size && !one.front)) continue;
      const twin = low.length ? null : wanted.find((other) => !other.low && other.at.length === one.at.length && other.at.every((p, k) => Math.hypot(p[0] - one.at[k][0], p[1] - one.at[k][1]) < 2));
      if (twin && one.front) {
        const more = pen.measureText(", " + shown(one.name)).width, room = twin.width + more < 0.9 * (box[2] - box[0]);
        if (room) { twin.parts.push([one.name, ", " + shown(one.name)]); twin.width += more; } else if (!twin.full) { twin.full = true; twin.parts.push(["", " \u2026"]); }
        continue;
      }
      const n = one.at.length, places = [n >> 1, Math.floor(n / 3), Math.floor((2 * n) / 3), Math.floor(n / 6), Math.floor((5 * n) / 6), 0, n - 1];
      const deepest = low.length ? [one.below.indexOf(Math.min(...low))] : null;
      const said = shown(one.name) + (low.length ? " " + number(Math.min(...low)) : "");
      wanted.push({ name: one.name, parts: [[one.name, said]], low: low.length, at: one.at, front: one.front, width: pen.measureText(said).width, anchors: [...new Set(deepest ? [...deepest, ...places.filter((k) => one.below[k] !== null)] : one.spots || places)].map((k) => one.at[k]).filter(Boolean) });
    }
    wanted.sort((a, b) => b.front - a.front || b.width - a.width);
    for (const label of place(wanted, ink, [box[0], box[1] - 14, box[2], box[3]], taken)) {
      const g = node("g", { style: "color:" + color(label.name), class: label.front ? "" : "faint" }, svg);
      const edge = label.x + Math.max(-label.half, Math.min(label.half, label.ax - label.x));
      if (Math.hypot(edge - label.ax, label.y - label.ay) > 18) node("line", { x1: label.ax, y1: label.ay, x2: edge, y2: label.y, class: "leader" }, g);
      const said = text("", { x: label.x, y: label.y + 4, "text-anchor": "middle", class: "label" }, g);
      for (const [name, part] of label.parts) node("tspan", { fill: color(name) }, said).textContent = part;
    }
    plot.replaceChildren(svg);
    drawn.set(plot, { svg, series, view, x, y });
    svg.addEventListener("pointermove", (event) => point(plot, event));
    svg.addEventListener("pointerleave", () => leave(svg));
    svg.addEventListener("click", () => { const near = svg.querySelector(".series.near"); if (near && looks[near.dataset.name]) pick(near.dataset.name); });
  }

  function curve(svg, one, x, y) {
    const look = looks[one.name], g = node("g", { class: "series" + (one.front ? " lead" : "") + (look ? "" : " exact"), style: "color:" + color(one.name) }, svg);
    g.dataset.name = one.name;
    const path = (points) => "M" + points.map(([a, b]) => a.toFixed(1) + " " + b.toFixed(1)).join("L");
    if (one.band) {
      const edge = (k) => one.band[k].map((v, n) => [one.at[n][0], y.at(v)]);
      node("path", { d: path([...edge(0), ...edge(1).reverse()]) + "Z", class: "band" }, g);
    }
    one.at.forEach(([a, b], k) => {
      const dx = one.error && one.error.x ? one.error.x[k] : 0, dy = one.error && one.error.y ? one.error.y[k] : 0;
      if (dx) node("path", { d: `M${x.at(one.x[k] - dx)} ${b}H${x.at(one.x[k] + dx)}`, class: "whisker" }, g);
      if (dy) node("path", { d: `M${a} ${y.at(one.y[k] - dy)}V${y.at(one.y[k] + dy)}`, class: "whisker" }, g);
    });
    if (one.line && one.at.length > 1) node("path", { d: path(one.at), class: "curve", ...(look && look.dash ? { "stroke-dasharray": look.dash } : {}) }, g);
    if (one.plain) return;
    one.at.forEach(([a, b], k) => {
      const clipped = one.below && one.below[k] !== null && one.below[k] !== undefined, hollow = one.hollow && one.hollow[k];
      const radius = clipped ? 5 : !look ? 1.6 : (one.at.length < 3 ? 5.2 : 3.7) * (one.front ? 1 : 0.75);
      node("path", { d: shapes[clipped ? "arrow" : look ? look.marker : "circle"], transform: `translate(${a.toFixed(1)} ${b.toFixed(1)}) scale(${radius})`, class: "dot" + (hollow ? " hollow" : clipped ? " clipped" : ""), "stroke-width": ((hollow ? 1.5 : 0.9) / radius).toFixed(3) }, g);
    });
  }

  // Pointing: the nearest point's method stands out, and a small box beside the point says more.
  function point(plot, event) {
    const { svg, series, view } = drawn.get(plot), frame = svg.getBoundingClientRect(), times = svg.viewBox.baseVal.width / frame.width;
    const px = (event.clientX - frame.left) * times, py = (event.clientY - frame.top) * times;
    let best = null;
    for (const one of series) one.at.forEach(([a, b], k) => {
      const gap = Math.hypot(a - px, b - py) + (one.name === CEILING ? 8 : one.front ? 0 : 3);
      if (gap < 30 && (best === null || gap < best.gap)) best = { gap, one, k, a, b };
    });
    if (best === null) return leave(svg);
    svg.classList.add("over");
    all(".series", svg).forEach((g) => g.classList.toggle("near", g.dataset.name === best.one.name));
    const { one, k } = best, lines = [];
    if (one.text && one.text[k]) lines.push(one.text[k]);
    if (view.both) lines.push(view.x.title + " " + number(one.x[k]) + interval(one.error && one.error.x && one.error.x[k]));
    const below = one.below && one.below[k] !== null && one.below[k] !== undefined;
    const band = one.band ? " [" + number(one.band[0][k]) + ", " + number(one.band[1][k]) + "]" : interval(one.error && one.error.y && one.error.y[k]);
    lines.push(view.y.title + " " + number(below ? one.below[k] : one.y[k]) + band + (below ? ", below the edge" : ""));
    const head = document.createElement("b");
    head.textContent = shown(one.name);
    const look = looks[one.name];
    if (look) { const mark = node("svg", { class: "mark", style: "color:" + color(one.name) }); node("use", { href: "#m-" + look.marker }, mark); head.prepend(mark); }
    tip.replaceChildren(head, ...lines.map((line) => { const made = document.createElement("span"); made.textContent = line; return made; }));
    tip.hidden = false;
    // Beside the point, where it covers the fewest names and stays on the screen.
    const left = frame.left + best.a / times, top = frame.top + best.b / times, { width, height } = tip.getBoundingClientRect();
    const names = all(".label", svg).map((label) => label.getBoundingClientRect());
    const over = (x, y) => names.reduce((sum, r) => sum + Math.max(0, Math.min(x + width, r.right) - Math.max(x, r.left)) * Math.max(0, Math.min(y + height, r.bottom) - Math.max(y, r.top)), 0);
    const places = [];
    for (const x of [left + 18, left - width - 18, left - width / 2]) for (const y of [top - height - 16, top + 18, top - height / 2]) {
      const off = Math.max(0, 8 - x, x + width + 8 - innerWidth) + Math.max(0, 50 - y, y + height + 8 - innerHeight);
      const covers = x < left + 8 && x + width > left - 8 && y < top + 8 && y + height > top - 8;
      places.push([over(x, y) + 1e3 * off + (covers ? 1e5 : 0), x, y]);
    }
    const [, x, y] = places.reduce((a, b) => (b[0] < a[0] ? b : a));
    tip.style.left = x + "px";
    tip.style.top = y + "px";
  }

  const interval = (half) => (half ? " ± " + number(half) : "");

  function leave(svg) {
    svg.classList.remove("over");
    tip.hidden = true;
  }

  function redraw() {
    tip.hidden = true;
    root.classList.toggle("picking", picked.size > 0);
    all("button[data-series]").forEach((button) => button.setAttribute("aria-pressed", String(picked.has(button.dataset.series))));
    const late = all(".plot").filter((plot) => {
      plot.style.height = size(plot)[1] + "px";
      const { top, bottom } = plot.getBoundingClientRect(), seen = bottom > -200 && top < innerHeight + 200;
      if (seen) draw(plot);
      return !seen;
    });
    clearTimeout(rest.timer);
    rest.plots = late;
    rest.timer = setTimeout(step, 0);
  }

  // What is not on the screen is drawn afterwards, one picture at a time; all of it before the page is printed.
  function step() {
    if (rest.plots.length) { draw(rest.plots.shift()); rest.timer = setTimeout(step, 0); }
  }

  addEventListener("beforeprint", () => { while (rest.plots.length) draw(rest.plots.shift()); });

  function pick(name, more) {
    const alone = picked.has(name) && (more || picked.size === 1);
    if (!more) picked.clear();
    if (alone) picked.delete(name); else picked.add(name);
    redraw();
  }

  all("button[data-series]").forEach((button) => button.addEventListener("click", (event) => pick(button.dataset.series, event.shiftKey || event.ctrlKey || event.metaKey)));
  document.addEventListener("keydown", (event) => { if (event.key === "Escape" && picked.size) { picked.clear(); redraw(); } });

  all("button[data-view]").forEach((button) => button.addEventListener("click", () => {
    const section = document.getElementById(button.dataset.section);
    all("button[data-view]", section).forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    all(".plot", section).forEach((plot) => { chosen[plot.id] = button.dataset.view; draw(plot); });
    all("[data-split]", section).forEach((board) => board.toggleAttribute("data-off", board.dataset.split !== button.dataset.view));
    boards(section);
  }));

  // One table: tabs and prompts choose which of its parts is seen; its heads sort all of them.
  function boards(section) {
    const tab = section.dataset.tab;
    all("[data-board]", section).forEach((board) => { board.hidden = board.hasAttribute("data-off") || (tab !== undefined && board.dataset.board !== tab); });
    all(".choice, [data-more]", section).forEach((choice) => { choice.hidden = tab === "all"; });
  }

  all("[data-tab]").forEach((section) => {
    boards(section);
    const choose = (tab) => {
      section.dataset.tab = tab;
      all(".tabs button", section).forEach((button) => button.setAttribute("aria-pressed", String(button.value === tab)));
      boards(section);
    };
    all(".tabs button", section).forEach((button) => button.addEventListener("click", () => choose(button.value)));
    all("select", section).forEach((select) => select.addEventListener("change", () => choose(select.value)));
  });

  all("button[data-more]").forEach((button) => button.addEventListener("click", () => {
    const wide = document.getElementById(button.dataset.more).classList.toggle("wide");
    button.setAttribute("aria-expanded", String(wide));
    button.textContent = wide ? "Fewer columns" : "All columns";
  }));

  all("table[data-sortable] thead button").forEach((button) => button.addEventListener("click", () => {
    const key = button.dataset.key, section = button.closest("section"), head = button.closest("th");
    const up = head.getAttribute("aria-sort") === "descending" || (!head.hasAttribute("aria-sort") && key === "method");
    all("table[data-sortable]", section).forEach((table) => {
      const heads = all("thead tr:last-child th", table), place = heads.findIndex((other) => other.firstElementChild.dataset.key === key);
      heads.forEach((other, k) => { if (k === place) other.setAttribute("aria-sort", up ? "ascending" : "descending"); else other.removeAttribute("aria-sort"); });
      if (place < 0) return;
      const rows = all("tbody tr", table), worth = (row) => row.cells[place].dataset.value;
      const compare = (a, b) => {
        if (worth(a) === undefined && worth(b) === undefined) return a.cells[place].textContent.localeCompare(b.cells[place].textContent);
        if (worth(a) === undefined || worth(b) === undefined) return worth(a) === undefined ? 1e9 : -1e9;
        return worth(a) - worth(b);
      };
      rows.sort((a, b) => b.classList.contains("ceiling") - a.classList.contains("ceiling") || (Math.abs(compare(a, b)) >= 1e9 ? compare(a, b) : up ? compare(a, b) : -compare(a, b)));
      table.tBodies[0].append(...rows);
    });
  }));

  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("paretune-theme", root.dataset.theme); } catch (refused) { /* a page from a disk may not keep it */ }
  });

  redraw();
  let waiting = 0, before = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== before) { before = innerWidth; clearTimeout(waiting); waiting = setTimeout(redraw, 60); } });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
})();
