// SPDX-License-Identifier: Apache-2.0
// Draw the charts; one legend hides a recipe in every curve, one switch changes every map.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const charts = new Map();
  // A finger on a chart scrolls the page; a mouse selects a range.
  const dragmode = matchMedia("(pointer: fine)").matches ? "zoom" : false;
  // With a view box, print can scale what was drawn for the screen.
  const scalable = (place) => {
    const { width, height } = place._fullLayout;
    place.style.setProperty("--ratio", String(width / height));
    for (const svg of place.querySelectorAll(".main-svg")) svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  };
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById(name);
    if (!place) continue;
    charts.set(name, place);
    Plotly.newPlot(place, figure.data, { ...figure.layout, dragmode }, { responsive: true, displayModeBar: false });
    scalable(place);
    place.on("plotly_afterplot", () => scalable(place));
  }

  const press = (button, on) => button.setAttribute("aria-pressed", String(on));
  const visible = (names, shown) => {
    for (const name of names) {
      const place = charts.get(name);
      if (!place) continue;
      const traces = place.data.map((trace, i) => [trace.meta, i]).filter(([meta]) => meta in shown);
      if (traces.length) {
        Plotly.restyle(place, { visible: traces.map(([meta]) => shown[meta]) }, traces.map(([, i]) => i));
      }
    }
  };

  for (const button of document.querySelectorAll("[data-arm]")) {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      press(button, on);
      const curves = [...charts.keys()].filter((name) => name.startsWith("method-"));
      visible(["validation", "training", "gap-curve", ...curves], { [button.dataset.arm]: on });
    });
  }
  // Maps over the run show one recipe and one metric; the maps of all recipes one metric.
  const buttons = (key) => [...document.querySelectorAll(`[data-${key}]`)];
  const pressed = (key) => buttons(key).find((button) => button.getAttribute("aria-pressed") === "true")?.dataset[key];
  const redraw = () => {
    const metric = pressed("metric");
    const names = [...charts.keys()];
    visible(names.filter((name) => name.startsWith("errors-")),
      Object.fromEntries(buttons("metric").map(({ dataset }) => [dataset.metric, dataset.metric === metric])));
    visible(names.filter((name) => name.startsWith("history-")),
      Object.fromEntries(buttons("metric").flatMap(({ dataset }) => buttons("history").map((arm) =>
        [`${arm.dataset.history}|${dataset.metric}`,
          dataset.metric === metric && arm.dataset.history === pressed("history")]))));
  };
  for (const key of ["metric", "history"]) {
    for (const button of buttons(key)) {
      button.addEventListener("click", () => {
        for (const other of buttons(key)) press(other, other === button);
        redraw();
      });
    }
  }
  document.documentElement.dataset.drawn = String(charts.size);
})();
