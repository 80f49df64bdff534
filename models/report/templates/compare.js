"use strict";

// Figures take their colours and fonts from the page, now and whenever it changes between light and dark.
function theme() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: color("--line"), linecolor: color("--line"), zerolinecolor: color("--line"), automargin: true };
  const menu = { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--ink") } };
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("--ink") },
    hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--line"), font: { color: color("--ink") }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--ink") },
    legend: { orientation: "h", y: -0.18, yanchor: "top" },
    margin: { t: 40, r: 16, b: 56, l: 64 },
    axis,
    menu,
  };
}

function layoutOf(figure) {
  const { axis, menu, ...common } = theme();
  const layout = { ...common, ...figure.layout };
  for (const name of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) {
    if (name in figure.layout || name === "xaxis" || name === "yaxis") {
      layout[name] = { ...axis, ...figure.layout[name] };
    }
  }
  if (figure.layout.updatemenus) {
    layout.updatemenus = figure.layout.updatemenus.map((item) => ({ ...item, ...menu }));
  }
  return layout;
}

const drawn = [...document.querySelectorAll("script.figure")].map((source) => ({
  plot: document.getElementById(source.dataset.for),
  figure: JSON.parse(source.textContent),
}));
// Only what works without leaving the page: plotly's own choice has a button that sends the figure to a service.
const buttons = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
const options = { displaylogo: false, responsive: true, modeBarButtons: buttons };
for (const { plot, figure } of drawn) {
  Plotly.newPlot(plot, figure.data, layoutOf(figure), options);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const { plot, figure } of drawn) {
    Plotly.react(plot, plot.data, layoutOf(figure), options);
  }
});

// A click on a heading sorts by it, a second one the other way round; what was not measured stays last.
const table = document.getElementById("results");
const headings = [...table.tHead.rows[0].cells];
headings.forEach((heading, index) => {
  heading.firstChild.addEventListener("click", () => {
    const isAscending = heading.getAttribute("aria-sort") !== "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", isAscending ? "ascending" : "descending");
    const isNumber = heading.classList.contains("number");
    const value = (row) => row.cells[index]?.dataset.value ?? "";
    const compare = (a, b) => (isNumber ? a - b : a.localeCompare(b));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
      return isAscending ? compare(value(a), value(b)) : compare(value(b), value(a));
    });
    table.tBodies[0].append(...rows);
  });
});
