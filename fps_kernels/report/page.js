"use strict";
// Charts take their colours from the reader's scheme and some of their layout from the width of the window.
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 760px)");

function set(layout, path, value) {
  const keys = path.split(".");
  const last = keys.pop();
  let at = layout;
  for (const key of keys) at = at[key] ??= {};
  at[last] = value;
}

function draw() {
  const theme = report.themes[dark.matches ? "dark" : "light"];
  for (const [key, chart] of Object.entries(report.charts)) {
    const layout = structuredClone(chart.layout);
    layout.template = { layout: theme.layout };
    layout.autosize = true;
    if (narrow.matches) for (const [path, value] of Object.entries(chart.narrow)) set(layout, path, value);
    const data = structuredClone(chart.data);
    for (const trace of data) {
      if (trace.name === "even") trace.line.color = theme.ink;
      if (trace.meta === undefined) continue;
      const color = theme.layout.colorway[trace.meta.colour];
      trace.line = { ...trace.line, color };
      trace.marker = { ...trace.marker, color };
    }
    Plotly.react(key, data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

// The page holds plotly packed; whoever reads it without scripts has the tables.
async function load() {
  const letters = atob(document.getElementById("plotly").textContent);
  const packed = new Blob([Uint8Array.from(letters, (letter) => letter.charCodeAt(0))]);
  const code = document.createElement("script");
  code.textContent = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(code);
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
}

load();
