// What every page shares: colours that follow the system's, and how a plot is laid out.
const halfstep = (function () {
  const narrow = window.matchMedia("(max-width: 44rem)");
  const printing = window.matchMedia("print");
  const dark = window.matchMedia("screen and (prefers-color-scheme: dark)");
  const touch = window.matchMedia("(pointer: coarse)").matches;

  function colours() {
    return dark.matches && !printing.matches
      ? { ink: "#e6e9ec", line: "#343b42", paper: "#1c2126", empty: "#22282e" }
      : { ink: "#1b1f24", line: "#d9dee3", paper: "#ffffff", empty: "#eef1f4" };
  }
  function layoutOf(plot) {
    const c = colours();
    const axis = { gridcolor: c.line, zerolinecolor: c.line, linecolor: c.line, tickcolor: c.line, automargin: true };
    return Object.assign({
      margin: { l: 52, r: 12, t: 8, b: 44 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: c.ink },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      hoverlabel: { bgcolor: c.paper, bordercolor: c.line, font: { color: c.ink } },
      hovermode: "closest", dragmode: touch ? false : "zoom", bargap: 0.45,
    }, plot.layout, {
      xaxis: Object.assign({}, axis, plot.layout.xaxis),
      yaxis: Object.assign({}, axis, plot.layout.yaxis),
    });
  }
  function dataOf(plot) {
    const ink = colours().ink;
    return plot.data.map(function (trace) {
      return trace.error_x ? Object.assign({}, trace, { error_x: Object.assign({ color: ink }, trace.error_x) }) : trace;
    });
  }
  const config = { responsive: true, displayModeBar: false, displaylogo: false };
  function onChange(draw) {
    for (const query of [dark, printing, narrow]) query.addEventListener("change", draw);
  }
  return { narrow, colours, layoutOf, dataOf, config, onChange };
})();
