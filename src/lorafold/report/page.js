"use strict";
// Three things: the pictures in the colours of the theme, the switch between themes, and the table.
(() => {
  const root = document.documentElement;
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const THEMES = {
    light: {
      text: "#1b1f26", grid: "#e3e6eb", line: "#aab2bd", box: "#ffffff",
      colors: ["#2563c9", "#d1570c", "#12805c", "#a8328f", "#8a6d00", "#0b7a94", "#b3253a", "#5b5bd6",
               "#4f6b12", "#8f4a2b", "#6b7280", "#c0267c"],
      scale: [[0, "#a3162c"], [0.25, "#e58a76"], [0.5, "#ffffff"], [0.75, "#6aa5d8"], [1, "#0d4a8f"]],
    },
    dark: {
      text: "#e6e9ee", grid: "#2a303a", line: "#5b6573", box: "#1c2027",
      colors: ["#7aa7ff", "#ff9d5c", "#4fd1a1", "#e38bd6", "#e6c34a", "#5cc9e0", "#ff8090", "#a9a7ff",
               "#a9cf5a", "#d9a184", "#b5bcc7", "#ff86bd"],
      scale: [[0, "#ff8f85"], [0.25, "#a04a45"], [0.5, "#14171c"], [0.75, "#2f6fae"], [1, "#9cd0ff"]],
    },
  };
  // Only buttons that keep to the page: plotly's own set has one that sends the chart to a cloud.
  const CONFIG = {
    responsive: true, displaylogo: false, typesetMath: false, showSendToCloud: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  let chosen = null;

  const theme = () => chosen ?? (system.matches ? "dark" : "light");

  function themed(figure, colors) {
    const axis = {
      gridcolor: colors.grid, linecolor: colors.line, zerolinecolor: colors.grid,
      tickcolor: colors.line,
    };
    const layout = structuredClone(figure.layout);
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = { ...axis, ...layout[key] };
    }
    if (layout.coloraxis) layout.coloraxis.colorscale = colors.scale;
    Object.assign(layout, {
      autosize: true,
      colorway: colors.colors,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colors.text, family: getComputedStyle(document.body).fontFamily, size: 12 },
      hoverlabel: {
        align: "left", bgcolor: colors.box, bordercolor: colors.line, font: { color: colors.text },
      },
    });
    const data = structuredClone(figure.data);
    for (const trace of data) {
      if (trace.meta?.color === undefined) continue;
      trace.line = { ...trace.line, color: colors.colors[trace.meta.color % colors.colors.length] };
    }
    return { data, layout };
  }

  function draw() {
    root.dataset.theme = theme();
    document.getElementById("theme").textContent = theme() === "dark" ? "Light" : "Dark";
    for (const [key, figure] of Object.entries(pictures)) {
      const { data, layout } = themed(figure, THEMES[theme()]);
      Plotly.react(`picture-${key}`, data, layout, CONFIG);
    }
  }

  document.getElementById("theme").addEventListener("click", () => {
    chosen = theme() === "dark" ? "light" : "dark";
    draw();
  });
  system.addEventListener("change", () => { if (chosen === null) draw(); });

  const table = document.getElementById("adapters");
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const find = document.getElementById("find");
  const count = document.getElementById("count");

  function filter() {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let left = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      if (!row.hidden) left += 1;
    });
    count.textContent = `${left} of ${rows.length} rows`;
  }

  function value(row, column) {
    const cell = row.cells[column];
    if (!("value" in cell.dataset)) return cell.textContent;
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  }

  function sort(head) {
    const column = head.cellIndex;
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const keyed = rows.map((row) => [value(row, column), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what has none comes last
      return sign * (typeof a === "number" ? a - b : a.localeCompare(b, undefined, { numeric: true }));
    });
    body.append(...keyed.map(([, row]) => row));
  }

  find.addEventListener("input", filter);
  for (const head of table.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => sort(head));
  }
  filter();
  draw();
})();
