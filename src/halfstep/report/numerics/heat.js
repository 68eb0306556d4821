// The two heat maps of a run, and what chooses between them.
function drawRun(run) {
  const $ = (id) => document.getElementById(id);
  const decades = Math.round(-Math.log10(run.smallest));
  const ticks = Array.from({ length: decades / 2 + 1 }, (_, i) => -2 * i);

  // a character of shares.py: a space for nothing, "0" for none, then by the logarithm
  function level(text, place) {
    const code = text.charCodeAt(place) - 48;
    if (code < 0) return null;
    return code === 0 ? -decades - 1 : -decades * (1 - (code - 1) / (run.levels - 1));
  }
  function words(value) {
    if (value === null) return "not recorded";
    if (value < -decades) return "nothing";
    const percent = 100 * Math.pow(10, value);
    return "about " + (percent < 0.1 ? percent.toExponential(0) : percent.toPrecision(2)) + " %";
  }
  // nothing is no colour; the smallest share that is told from it is the darkest
  function colourscale() {
    const first = 1 / (decades + 1), paper = halfstep.colours().empty;
    const viridis = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];
    const stops = viridis.map((colour, i) => [first + (1 - first) * i / (viridis.length - 1), colour]);
    return [[0, paper], [first * 0.99, paper], [first * 0.99, viridis[0]], ...stops];
  }
  const bar = {
    title: { text: "share", side: "right" }, thickness: 12, outlinewidth: 0,
    tickvals: ticks, ticktext: ticks.map((t) => (t === 0 ? "all" : "10<sup>" + t + "</sup>")),
  };
  function heat(more) {
    return Object.assign({ type: "heatmap", zmin: -decades - 1, zmax: 0, colorscale: colourscale(), colorbar: bar, hoverongaps: false }, more);
  }

  // the largest share that a layer loses
  function depth(layer, format) {
    return Array.from(layer.lost[format], (_, i) => level(layer.lost[format], i) ?? -99).reduce((a, b) => Math.max(a, b), -99);
  }

  let view = null, rows = [], chosen = 0;

  function choose() {
    view = run.views[Number($("kind").value) || 0];
    const before = $("format").value;
    $("format").replaceChildren(...view.formats.map((name) => new Option(name, name)));
    if (view.formats.includes(before)) $("format").value = before;
    const format = Math.max(0, view.formats.indexOf($("format").value));
    const lost = view.layers.map((layer) => depth(layer, format));
    chosen = lost.indexOf(Math.max(...lost));
    $("layer").replaceChildren(...view.layers.map((layer, i) => new Option(layer.label + " (" + layer.title + ")", i)));
    overview();
    detail();
  }

  function overview() {
    const format = Math.max(0, view.formats.indexOf($("format").value));
    const some = (layer) => /[^ 0]/.test(layer.lost[format]);
    rows = view.layers.map((layer, i) => i).filter((i) => !$("only").checked || some(view.layers[i]));
    const z = rows.map((i) => Array.from(view.steps, (_, c) => level(view.layers[i].lost[format], c)));
    const text = z.map((line) => line.map(words));
    const labels = rows.map((i) => view.layers[i].label);
    const tall = Math.min(1400, Math.max(220, 60 + 15 * rows.length));
    $("overview").style.height = tall + "px";
    const trace = heat({
      x: view.steps, y: labels, z: z, text: text,
      hovertemplate: "<b>%{y}</b><br>step %{x}<br>lost: %{text}<extra></extra>",
    });
    const layout = halfstep.layoutOf({ layout: {
      xaxis: { title: { text: "step" }, type: "linear" },
      yaxis: { autorange: "reversed", type: "category", tickfont: { size: 10 }, nticks: Math.floor((tall - 60) / 14) },
      annotations: rows.length ? [] : [{ text: "No row loses anything in this format.", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }],
    } });
    Plotly.react("overview", [trace], layout, halfstep.config);
  }

  function detail() {
    const layer = view.layers[chosen];
    $("layer").value = String(chosen);
    const high = layer.high;
    const exponents = Array.from({ length: high }, (_, i) => layer.low + i);
    const z = exponents.map((_, e) => view.fine.map((_, c) => level(layer.exponents, c * high + e)));
    const trace = heat({
      x: view.fine, y: exponents, z: z, text: z.map((line) => line.map(words)),
      hovertemplate: "<b>" + layer.label.replace(/</g, "&lt;") + "</b><br>step %{x}<br>2<sup>%{y}</sup>: %{text}<extra></extra>",
    });
    const limit = run.limits.find((each) => each.name === $("limits").value) || run.limits[0];
    const c = halfstep.colours();
    const line = (y, dash) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line: { color: "#D55E00", width: 2, dash: dash } });
    const note = (y, text) => ({ xref: "paper", x: 1, y: y, text: text, showarrow: false, xanchor: "right", yanchor: "bottom", font: { size: 11, color: "#D55E00" }, bgcolor: c.paper, opacity: 0.85 });
    const top = Math.max(layer.low + high + 1, -4), low = Math.min(layer.low - 1, top - 4);
    const within = [["largest", limit.max, "solid"], ["smallest normal", limit.normal, "dash"], ["zero below", limit.zero, "dot"]]
      .filter((each) => each[1] <= top + 6 && each[1] >= low - 6);
    const ends = within.map((each) => each[1]);
    const layout = halfstep.layoutOf({ layout: {
      xaxis: { title: { text: "step" }, type: "linear" },
      yaxis: { title: { text: "exponent" }, range: [Math.min(low, ...ends) - 1, Math.max(top, ...ends) + 1.5] },
      shapes: within.map((each) => line(each[1], each[2])),
      annotations: within.map((each) => note(each[1], limit.name + ": " + each[0])),
    } });
    Plotly.react("detail", [trace], layout, halfstep.config);
  }

  function draw() {
    for (const plot of run.plots) Plotly.react(plot.id, plot.data, halfstep.layoutOf(plot), halfstep.config);
    if (view) { overview(); detail(); }
  }

  // begin with what loses most: a page of nothing lost tells nothing
  function begin() {
    const depths = run.views.map((each) => Math.max(...each.layers.map((layer) => depth(layer, 0))));
    $("kind").value = String(depths.indexOf(Math.max(...depths)));
  }

  if (run.views.length) {
    begin();
    $("limits").replaceChildren(...run.limits.map((each) => new Option(each.name, each.name)));
    choose();
    $("kind").addEventListener("change", choose);
    $("format").addEventListener("change", overview);
    $("only").addEventListener("change", overview);
    $("limits").addEventListener("change", detail);
    $("layer").addEventListener("change", () => { chosen = Number($("layer").value); detail(); });
    $("overview").on("plotly_click", (event) => {
      const at = rows[event.points[0].pointNumber[0]];
      if (at !== undefined) { chosen = at; detail(); }
    });
  }
  for (const plot of run.plots) Plotly.react(plot.id, plot.data, halfstep.layoutOf(plot), halfstep.config);
  halfstep.onChange(draw);
  document.documentElement.dataset.views = String(run.views.length);
}
