(() => {
  const { steps, accuracy } = JSON.parse(document.getElementById('curves').textContent);
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const of = (list, field) => list.map((item) => item[field]);
  const percent = (u, v) => (v == null ? '–' : `${Math.round(100 * v)}%`);
  const fixed = (digits) => (u, v) => (v == null ? '–' : v.toFixed(digits));
  const whole = (u, v) => (v == null ? '–' : Math.round(v).toLocaleString('en-US'));

  /** Each value as the mean of itself and its neighbours. */
  function smooth(values, neighbours) {
    return values.map((_, i) => {
      const near = values.slice(Math.max(0, i - neighbours), i + neighbours + 1);
      return near.reduce((a, b) => a + b, 0) / near.length;
    });
  }

  const line = (label, stroke, value, more) => ({ label, stroke: color(stroke), width: 2, value, ...more });
  const loss = of(steps, 'loss');
  const charts = {
    'chart-accuracy': () => ({
      data: [of(accuracy, 'step'), of(accuracy, 'subtraction'), of(accuracy, 'oldSkills')],
      series: [
        line('Subtraction', 'new', percent, { width: 3, points: { show: true, size: 8, fill: color('new') } }),
        line('Old skills', 'old', percent, { dash: [7, 4], points: { show: true, size: 7, fill: color('card') } }),
      ],
      range: [0, 1],
      tick: (v) => `${Math.round(100 * v)}%`,
      wide: true,
    }),
    'chart-loss': () => ({
      data: [of(steps, 'step'), loss, smooth(loss, Math.round(loss.length / 60))],
      series: [
        line('Each step', 'past', fixed(3), { width: 1, alpha: 0.55 }),
        line('Smoothed', 'new', fixed(3), { width: 3 }),
      ],
      range: (u, min, max) => [0, max],
      tick: (v) => String(+v.toFixed(2)),
      wide: true,
    }),
    'chart-rate': () => ({
      data: [of(steps, 'step'), of(steps, 'learningRate')],
      series: [line('Learning rate', 'new', (u, v) => (v == null ? '–' : v.toExponential(2)))],
      range: (u, min, max) => [0, max * 1.05],
      tick: (v) => String(+v.toFixed(5)),
    }),
    'chart-speed': () => ({
      data: [of(steps, 'step'), of(steps, 'tokensPerSecond')],
      series: [line('Tokens a second', 'new', whole, { width: 1.5 })],
      range: (u, min, max) => [0, max * 1.05],
      tick: (v) => (v >= 1000 ? `${+(v / 1000).toFixed(1)}k` : String(v)),
    }),
  };

  const drawn = [];

  function draw() {
    for (const plot of drawn.splice(0)) plot.destroy();
    for (const [id, describe] of Object.entries(charts)) {
      const place = document.getElementById(id);
      const { data, series, range, tick, wide } = describe();
      const axis = {
        stroke: color('muted'),
        font: '12px system-ui, sans-serif',
        grid: { stroke: color('line'), width: 1 },
        ticks: { show: false },
      };
      const options = {
        ...sizeOf(place, wide),
        series: [{ label: 'Step', value: whole }, ...series.map((s) => ({ points: { show: false }, ...s }))],
        axes: [
          { ...axis, grid: { show: false }, space: 60, gap: 8 },
          { ...axis, size: 48, space: 36, values: (u, ticks) => ticks.map(tick) },
        ],
        scales: { x: { time: false }, y: { range } },
        cursor: { drag: { x: false, y: false } },
        legend: { markers: { fill: (u, i) => u.series[i].stroke() } },
        // Where nobody points, the legend shows the last step.
        hooks: { setCursor: [showLast] },
      };
      const plot = new uPlot(options, data, place);
      plot.wide = wide;
      showLast(plot);
      drawn.push(plot);
    }
  }

  function showLast(plot) {
    if (plot.cursor.idx == null) plot.setLegend({ idx: plot.data[0].length - 1 }, false);
  }

  const sizeOf = (place, wide) => ({ width: Math.floor(place.clientWidth), height: wide ? 280 : 190 });

  draw();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  addEventListener('resize', () => {
    for (const plot of drawn) plot.setSize(sizeOf(plot.root.parentElement, plot.wide));
  });
})();
