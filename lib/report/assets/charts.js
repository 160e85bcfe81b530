(() => {
  const charts = JSON.parse(document.getElementById('charts').textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const number = (v) => v.toLocaleString('en-US', { maximumSignificantDigits: 4 });
  const power = (v) => Math.min(3, v < 1 ? 0 : Math.floor(Math.log10(v) / 3));
  const bytes = (v) => `${+(v / 1000 ** power(v)).toPrecision(3)} ${['B', 'kB', 'MB', 'GB'][power(v)]}`;

  /** How the values of a chart are written, in the legend and at the axis. */
  const formats = {
    loss: { value: (v) => v.toFixed(3), tick: (v) => String(+v.toPrecision(3)) },
    rate: { value: (v) => v.toExponential(2), tick: (v) => (v === 0 ? '0' : (+v.toPrecision(3)).toExponential()) },
    percent: { value: (v) => `${Math.round(100 * v)}%`, tick: (v) => `${Math.round(100 * v)}%`, range: [0, 1] },
    count: { value: number, tick: (v) => (v >= 1000 ? `${+(v / 1000).toFixed(1)}k` : String(+v.toPrecision(3))) },
    bytes: { value: bytes, tick: bytes },
  };
  const fromZero = (u, min, max) => [0, max > 0 ? max * 1.05 : 1];

  /** Lines with steps of their own over one axis: of each the value at or before the pointer is shown. */
  function lastKnown(values, index) {
    for (let i = index ?? values.length - 1; i >= 0; i--) if (values[i] != null) return values[i];
    return null;
  }

  function seriesOf(line, { value }) {
    const points = line.points
      ? { show: true, size: 8, fill: color(line.dash ? 'card' : line.color) }
      : { show: line.x.length === 1, size: 8, fill: color(line.color) };
    return {
      label: line.label,
      stroke: color(line.color),
      width: line.width ?? 2,
      alpha: line.alpha ?? 1,
      dash: line.dash,
      points,
      spanGaps: true,
      value: (u, v, series, index) => {
        const known = lastKnown(u.data[series], index);
        return known == null ? '–' : value(known);
      },
    };
  }

  const sizeOf = (place, tall) => ({ width: Math.floor(place.clientWidth), height: tall ? 280 : 190 });
  const drawn = [];

  function draw() {
    for (const plot of drawn.splice(0)) plot.destroy();
    for (const { id, format, tall, lines } of charts) {
      const place = document.getElementById(id);
      if (!place) continue;
      const { value, tick, range = fromZero } = formats[format];
      const axis = {
        stroke: color('muted'),
        font: '12px system-ui, sans-serif',
        grid: { stroke: color('line'), width: 1 },
        ticks: { show: false },
      };
      const options = {
        ...sizeOf(place, tall),
        series: [
          { label: 'Step', value: (u, v) => (v == null ? '–' : v.toLocaleString('en-US')) },
          ...lines.map((line) => seriesOf(line, { value })),
        ],
        axes: [
          { ...axis, grid: { show: false }, space: 60, gap: 8 },
          { ...axis, size: format === 'bytes' ? 64 : 52, space: 36, values: (u, ticks) => ticks.map(tick) },
        ],
        scales: { x: { time: false }, y: { range } },
        cursor: { drag: { x: false, y: false } },
        legend: { markers: { fill: (u, i) => u.series[i].stroke() } },
        // Where nobody points, the legend shows the last step.
        hooks: { setCursor: [showLast] },
      };
      const plot = new uPlot(options, uPlot.join(lines.map(({ x, y }) => [x, y])), place);
      plot.tall = tall;
      showLast(plot);
      drawn.push(plot);
    }
  }

  function showLast(plot) {
    if (plot.cursor.idx == null) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
  }

  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  addEventListener('resize', () => {
    for (const plot of drawn) plot.setSize(sizeOf(plot.root.parentElement, plot.tall));
  });
})();
