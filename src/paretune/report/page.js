// Draws every figure from the JSON in the page. Buttons hide a method everywhere, or choose the prompts; nothing needs them.
(function () {
  "use strict";
  const views = JSON.parse(document.getElementById("views").textContent);
  const hidden = new Set();
  const chosen = {};
  const config = { responsive: true, displaylogo: false, displayModeBar: false };

  function draw(id) {
    const figure = views[id];
    const node = document.getElementById(id);
    const view = figure[chosen[id]] || figure[Object.keys(figure)[0]];
    const data = view.data.map((trace) => Object.assign({}, trace, { visible: !hidden.has(trace.name) }));
    const notes = (view.layout.annotations || []).filter((note) => {
      return !note.name || !note.name.split(", ").every((name) => hidden.has(name));
    });
    Plotly.react(node, data, Object.assign({}, view.layout, { annotations: notes }), config).then(() => scalable(node));
  }

  // On paper a figure is as wide as its column: give its layers a view box that the style sheet can scale.
  function scalable(node) {
    node.querySelectorAll(".main-svg").forEach((svg) => {
      svg.setAttribute("viewBox", "0 0 " + svg.getAttribute("width") + " " + svg.getAttribute("height"));
    });
  }

  document.querySelectorAll("button[data-series]").forEach((button) => {
    button.addEventListener("click", () => {
      const name = button.dataset.series;
      if (hidden.has(name)) hidden.delete(name); else hidden.add(name);
      document.querySelectorAll("button[data-series]").forEach((other) => {
        if (other.dataset.series === name) other.setAttribute("aria-pressed", String(!hidden.has(name)));
      });
      Object.keys(views).forEach(draw);
    });
  });

  document.querySelectorAll("button[data-view]").forEach((button) => {
    button.addEventListener("click", () => {
      const section = document.getElementById(button.dataset.section);
      section.querySelectorAll("button[data-view]").forEach((b) => b.setAttribute("aria-pressed", String(b === button)));
      section.querySelectorAll(".which").forEach((which) => { which.textContent = button.dataset.prompts; });
      section.querySelectorAll(".plot").forEach((plot) => { chosen[plot.id] = button.dataset.view; draw(plot.id); });
    });
  });

  Object.keys(views).forEach(draw);
  window.addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach(scalable));
})();
