// Small multiples. All charts share one view: which runs, how smooth, steps or time, zoom, and where the pointer is.

const view = { hidden: new Set(), sigma: 0, axis: "step", domain: null, cursor: null };
const charts = [];
const HEIGHT = 168;
const MARGIN = { left: 46, right: 12, top: 8, bottom: 24 };
const MOST_POINTS = 700;
const DASHES = ["", "5 3", "1.5 3", "7 2 1.5 2"];

function redraw() {
  for (const chart of charts) chart.draw();
}

/** Position of each step of a run on the axis: the step, or the minutes of training up to it. */
function positions(run) {
  if (view.axis === "step") return run.metrics.steps;
  if (!run.minutes) {
    let sum = 0;
    const seconds = run.metrics.values["time/step"] || [];
    run.minutes = run.metrics.steps.map((_, i) => (sum += (seconds[i] || 0) / 60));
  }
  return run.minutes;
}

/** Points in at most MOST_POINTS bins: [x, mean, smallest, largest]. */
function binned(points) {
  if (points.length <= MOST_POINTS) return points.map(([x, y]) => [x, y, y, y]);
  const bins = [];
  for (let b = 0; b < MOST_POINTS; b++) {
    const part = points.slice((b * points.length) / MOST_POINTS, ((b + 1) * points.length) / MOST_POINTS);
    const ys = part.map((p) => p[1]);
    const mean = (values) => values.reduce((a, v) => a + v, 0) / values.length;
    bins.push([mean(part.map((p) => p[0])), mean(ys), Math.min(...ys), Math.max(...ys)]);
  }
  return bins;
}

/** Means weighted by a Gaussian of the distance: unlike a running average it does not lag behind. */
function smoothed(bins, sigma) {
  if (!sigma) return bins.map(([x, y]) => [x, y]);
  let first = 0;
  return bins.map(([x]) => {
    while (bins[first][0] < x - 3 * sigma) first++;
    let sum = 0;
    let weights = 0;
    for (let j = first; j < bins.length && bins[j][0] <= x + 3 * sigma; j++) {
      const weight = Math.exp(-0.5 * ((bins[j][0] - x) / sigma) ** 2);
      sum += weight * bins[j][1];
      weights += weight;
    }
    return [x, sum / weights];
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++) found.push(i * step || 0);
  return found;
}

function path(points, x, y) {
  return points.map(([px, py], i) => `${i ? "L" : "M"}${x(px).toFixed(1)} ${y(py).toFixed(1)}`).join("");
}

function nearest(xs, x) {
  let low = 0;
  let high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle;
    else high = middle;
  }
  return high > 0 && Math.abs(xs[high] - x) <= Math.abs(xs[low] - x) ? high : low;
}

class Chart {
  /**
   * @param panels what it can show; the first at first, the others by a switch
   * @param only the run that it is of; null for all runs
   */
  constructor(panels, only) {
    this.panels = panels;
    this.only = only;
    this.inView = false;
    this.use(panels[0]);
    this.build();
  }

  use(panel) {
    this.panel = panel;
    this.name = panel.lines[0] || panel.points[0];
    this.share = page.shares.includes(this.name);
    this.format = this.share ? percent : number;
  }

  runs() {
    return page.runs.filter((run) => !view.hidden.has(run) && (this.only === null || run === this.only));
  }

  /** Whether colours tell runs apart, and not metrics. */
  get several() {
    return page.runs.length > 1 && this.only === null;
  }

  called(name) {
    const [label] = this.panel.legend[name] || [short(name)];
    return label;
  }

  /** Of a metric beside others in the chart of one run. */
  color(name, index, count) {
    const [, own] = this.panel.legend[name] || [];
    return own === undefined ? metricColor(name, index, count) : colorOf(own);
  }

  /** Of one of many lines: colours come again after eight. */
  dash(name) {
    const [, own] = this.panel.legend[name] || [];
    return DASHES[Math.floor((own || 0) / 8) % 4];
  }

  /** What is drawn: a line per run, or per metric where there is one run. */
  series() {
    const { several } = this;
    const { lines, alone, stacked } = this.panel;
    const names = several ? lines : [...lines, ...alone];
    const isDrawn = (values) => values && !(stacked && values.every((v) => !v));
    return this.runs().flatMap((run) =>
      names
        .filter((name) => isDrawn(run.metrics.values[name]))
        .map((name, i) => ({
          run,
          name,
          label: several ? (names.length > 1 ? `${run.name}, ${this.called(name)}` : run.name) : this.called(name),
          color: several ? run.color : this.color(name, i, names.length),
          dash: several ? DASHES[i % 4] : this.dash(name),
        })),
    );
  }

  build() {
    const { panel } = this;
    const title = panel.title + (this.only && page.runs.length > 1 ? `: ${this.only.name}` : "");
    const named = this.panels.flatMap((each) => [...each.lines, ...each.points, ...each.alone]);
    const described = named.filter((name) => name && page.formulas[name]);
    const formula = described.map((name) => `${name}: ${page.formulas[name]}`).join("\n");
    this.readout = el("span", { class: "readout", title: "mean of the last steps" });
    this.legend = el("div", { class: "legend" });
    this.svg = svg("svg", { role: "img", tabindex: 0, height: HEIGHT, class: "plot" });
    this.tip = el("div", { class: "tip", hidden: true });
    this.spoken = el("span", { class: "spoken", "aria-live": "polite" });
    this.help = el("div", { class: "formula", hidden: true, id: `formula-${charts.length}` }, formula);
    const about = el(
      "button",
      {
        type: "button",
        class: "about",
        "aria-expanded": "false",
        "aria-controls": this.help.id,
        title: formula,
        "aria-label": `Formula of ${title}`,
      },
      "i",
    );
    const explain = (open) => {
      this.help.hidden = !open;
      about.setAttribute("aria-expanded", String(open));
    };
    about.addEventListener("click", () => explain(this.help.hidden));
    about.addEventListener("blur", () => explain(false));
    about.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || this.help.hidden) return;
      event.preventDefault(); // an overlay around it stays
      explain(false);
    });
    this.wide = el(
      "button",
      { type: "button", class: "about", "aria-label": `Enlarge ${title}`, title: "Enlarge" },
      "\u2922",
    );
    this.wide.addEventListener("click", () => (this.card.closest("dialog") ? this.overlay.close() : this.enlarge()));
    this.card = el(
      "article",
      { class: "panel" },
      el(
        "div",
        { class: "head" },
        el("h4", {}, title, this.panels.length > 1 ? this.chooser() : panel.unit ? el("small", {}, panel.unit) : null),
        formula ? about : null,
        this.wide,
        this.readout,
      ),
      this.help,
      this.legend,
      this.svg,
      this.tip,
      this.spoken,
    );
    this.listen();
  }

  /** The switch between what this chart can show. */
  chooser() {
    const choice = el(
      "select",
      {
        class: "measure",
        "aria-label": "What is counted",
        onchange: () => {
          this.use(this.panels[Number(choice.value)]);
          this.draw();
        },
      },
      this.panels.map((panel, i) => el("option", { value: i }, panel.measure)),
    );
    return choice;
  }

  /** Over the page, as large as it has room, until it is closed. */
  enlarge() {
    const place = el("div", { class: "panel" });
    place.style.minHeight = `${this.card.offsetHeight}px`;
    this.overlay = el("dialog", { class: "overlay", "aria-label": this.panel.title });
    this.overlay.addEventListener("click", (event) => {
      if (event.target === this.overlay) this.overlay.close();
    });
    this.overlay.addEventListener("close", () => {
      place.replaceWith(this.card);
      this.overlay.remove();
      this.label("Enlarge", "\u2922");
      this.draw();
      this.wide.focus();
    });
    this.card.replaceWith(place);
    this.overlay.append(this.card);
    document.body.append(this.overlay);
    this.overlay.showModal();
    this.label("Close", "\u00d7");
    this.inView = true;
    this.draw();
  }

  label(word, sign) {
    this.wide.textContent = sign;
    this.wide.title = word;
    this.wide.setAttribute("aria-label", `${word} ${this.panel.title}`);
  }

  /** Whether no panel of it changes in any run. */
  isFlat() {
    const now = this.panel;
    const flat = this.panels.every((panel) => {
      this.use(panel);
      return this.constant() !== undefined;
    });
    this.use(now);
    return flat;
  }

  /** The value that all runs have at all steps; undefined where there is none. */
  constant() {
    const runs = this.only ? [this.only] : page.runs;
    const all = runs
      .flatMap((run) =>
        [...this.panel.lines, ...this.panel.points, ...this.panel.alone].flatMap((name) => run.metrics.values[name] || []),
      )
      .filter((v) => v !== null);
    const broken = runs.some((run) => this.panel.lines.some((name) => run.metrics.not_finite[name]));
    return !broken && all.length > 1 && all.every((v) => v === all[0]) ? all[0] : undefined;
  }

  draw() {
    if (!this.inView) return;
    const width = this.svg.clientWidth;
    if (!width) return;
    this.height = this.card.closest("dialog") ? Math.max(300, Math.round(0.68 * window.innerHeight)) : HEIGHT;
    this.svg.setAttribute("height", this.height);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.width = width;
    this.collect();
    this.scale();
    this.svg.replaceChildren(
      ...this.axes(),
      ...this.marks(),
      ...(this.panel.stacked ? this.areas() : this.lines()),
      ...this.held(),
    );
    this.over = svg("g", {});
    this.svg.append(this.over);
    this.describe();
  }

  collect() {
    this.drawn = this.series().map((series) => {
      const xs = positions(series.run);
      const values = series.run.metrics.values[series.name];
      const margin = 3 * this.sigma();
      const points = [];
      for (let i = 0; i < xs.length; i++) {
        if (
          values[i] !== null &&
          (!view.domain || (xs[i] >= view.domain[0] - margin && xs[i] <= view.domain[1] + margin))
        )
          points.push([xs[i], values[i]]);
      }
      const bins = binned(points);
      return { ...series, bins, line: smoothed(bins, this.sigma()) };
    });
    this.dots = this.runs().flatMap((run) => this.panel.points.flatMap((name) => this.dotsOf(run, name)));
  }

  dotsOf(run, name) {
    const values = run.metrics.values[name];
    if (!values) return [];
    const xs = positions(run);
    const found = run.intervals[name] || {};
    const { lines, alone, points } = this.panel;
    const color = this.several ? run.color : this.color(lines[0] || name, 0, lines.length + alone.length);
    const label = points.length > 1 ? this.called(name) : "held out";
    return values
      .map((v, i) => ({ run, name, label, color, i, x: xs[i], value: v, interval: found[run.metrics.steps[i]] }))
      .filter((dot) => dot.value !== null);
  }

  sigma() {
    if (view.axis === "step") return view.sigma;
    const longest = Math.max(...page.runs.map((run) => run.metrics.steps.at(-1) || 1));
    return (view.sigma * Math.max(...page.runs.map((run) => positions(run).at(-1) || 0))) / longest;
  }

  scale() {
    const all = page.runs
      .filter((run) => !view.hidden.has(run))
      .map(positions)
      .filter((xs) => xs.length);
    let [x0, x1] = view.domain || [Math.min(...all.map((xs) => xs[0])), Math.max(...all.map((xs) => xs.at(-1)))];
    if (!(x1 > x0)) [x0, x1] = [(x0 || 0) - 0.5, (x0 || 0) + 0.5];
    const inside = (x) => x >= x0 && x <= x1;
    const main = this.drawn.filter((s) => this.sets(s));
    let values = (main.length ? main : this.drawn).flatMap((s) =>
      s.bins.filter((b) => inside(b[0])).flatMap((b) => [b[2], b[3]]),
    );
    if (this.panel.stacked)
      values = [
        0,
        ...this.totals()
          .filter(([x]) => inside(x))
          .map(([, y]) => y),
      ];
    for (const dot of this.dots)
      if (inside(dot.x)) values.push(dot.value, ...(dot.interval ? dot.interval.slice(1) : []));
    values.push(...this.bases().map((base) => base.value));
    let low = values.reduce((a, v) => Math.min(a, v), Infinity);
    let high = values.reduce((a, v) => Math.max(a, v), -Infinity);
    if (!values.length) [low, high] = [0, 1];
    if (low >= 0 && low < 0.6 * high) low = 0;
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) {
      const room = Math.abs(high) * 0.1 || 1;
      [low, high] = [low < 0 || low - room >= 0 ? low - room : 0, high + room];
    }
    const room = (high - low) * 0.06;
    high = this.share ? Math.max(high, Math.min(1, high + room)) : high + room;
    if (low !== 0) low -= room;
    const { left, right, top, bottom } = MARGIN;
    this.domain = [x0, x1];
    this.range = [low, high];
    this.x = (x) => left + ((x - x0) / (x1 - x0)) * (this.width - left - right);
    this.y = (y) => top + (1 - (y - low) / (high - low)) * (this.height - top - bottom);
    this.inverse = (px) => x0 + ((px - left) / (this.width - left - right)) * (x1 - x0);
  }

  axes() {
    const { left, right, top, bottom } = MARGIN;
    const clip = `clip-${charts.indexOf(this)}`;
    const parts = [
      svg(
        "clipPath",
        { id: clip },
        // with room for half a point, and none for a line that goes on beyond the top
        svg("rect", {
          x: left,
          y: top - 4,
          width: Math.max(0, this.width - left - right),
          height: this.height - top - bottom + 8,
        }),
      ),
    ];
    this.clip = `url(#${clip})`;
    const ys = ticks(...this.range, this.height > HEIGHT ? 8 : 4);
    const exact = (d) => ys.every((value) => Math.abs(Number((100 * value).toFixed(d)) - 100 * value) < 1e-9);
    const digits = [0, 1, 2, 3].find(exact) ?? 4;
    for (const value of ys) {
      const y = this.y(value);
      const text = this.share ? `${(100 * value).toFixed(digits)}%` : axisNumber(value, ys);
      parts.push(
        svg("line", { class: "grid", x1: left, x2: this.width - right, y1: y, y2: y }),
        svg("text", { class: "tick", x: left - 6, y: y + 3.5, "text-anchor": "end" }, text),
      );
    }
    for (const value of ticks(...this.domain, Math.max(2, Math.floor(this.width / 64)))) {
      if (view.axis === "step" && !Number.isInteger(value)) continue;
      parts.push(
        svg(
          "text",
          { class: "tick", x: this.x(value), y: this.height - bottom + 16, "text-anchor": "middle" },
          value.toLocaleString("en"),
        ),
      );
    }
    return parts;
  }

  /** Roll-backs, and steps at which a value was not finite. */
  marks() {
    const parts = [];
    const bottom = this.height - MARGIN.bottom;
    for (const run of this.runs()) {
      const at = (step) => this.x(positions(run)[nearest(run.metrics.steps, step)]);
      for (const back of run.roll_backs) {
        parts.push(
          svg("line", {
            class: "rollback",
            x1: at(back.to),
            x2: at(back.to),
            y1: MARGIN.top,
            y2: bottom,
            "clip-path": this.clip,
          }),
        );
      }
      for (const name of this.panel.lines) {
        for (const step of run.metrics.not_finite[name] || []) {
          parts.push(
            svg(
              "path",
              { class: "broken", d: `M${at(step) - 4} ${bottom}l4 -7l4 7z`, "clip-path": this.clip },
              svg("title", {}, `not a finite number at step ${step}`),
            ),
          );
        }
      }
    }
    return parts;
  }

  bases() {
    if (!this.panel.base) return [];
    return this.drawn
      .filter((series) => series.name === this.panel.lines[0])
      .flatMap((series) => {
        const at = series.run.metrics.steps.indexOf(1);
        const value = at < 0 ? null : series.run.metrics.values[series.name][at];
        return value === null ? [] : [{ value, color: series.color }];
      });
  }

  lines() {
    const bases = this.bases().map((base, i) =>
      svg(
        "g",
        {},
        svg("line", {
          class: "base",
          x1: MARGIN.left,
          x2: this.width - MARGIN.right,
          y1: this.y(base.value),
          y2: this.y(base.value),
          style: { stroke: base.color },
        }),
        i
          ? null
          : svg(
              "text",
              { class: "tick halo", x: this.width - MARGIN.right, y: this.y(base.value) - 4, "text-anchor": "end" },
              "step 1, untrained",
            ),
      ),
    );
    const smooth = view.sigma > 0;
    const raw = this.drawn
      .filter((s) => smooth && s.bins.length > 1 && this.sets(s))
      .map((s) => {
        const sparse = s.bins.every((b) => b[2] === b[3]);
        const band = [...s.bins.map((b) => [b[0], b[3]]), ...s.bins.map((b) => [b[0], b[2]]).reverse()];
        return svg("path", {
          class: sparse ? "raw" : "band",
          d: path(sparse ? s.bins : band, this.x, this.y),
          "clip-path": this.clip,
          style: { [sparse ? "stroke" : "fill"]: s.color },
        });
      });
    const main = this.drawn.map((s) =>
      s.line.length === 1
        ? svg("circle", {
            cx: this.x(s.line[0][0]),
            cy: this.y(s.line[0][1]),
            r: 3,
            "clip-path": this.clip,
            style: { fill: s.color },
          })
        : svg("path", {
            class: "line",
            d: path(s.line, this.x, this.y),
            "stroke-dasharray": s.dash,
            "clip-path": this.clip,
            style: { stroke: s.color },
          }),
    );
    return [...bases, ...raw, ...main]; // no label covers a curve
  }

  /** Whether a line sets the scale and has its single values drawn; one of few completions a step would hide the others. */
  sets(series) {
    return !this.panel.alone.includes(series.name);
  }

  totals() {
    const sums = new Map();
    for (const s of this.drawn) for (const [x, y] of s.line) sums.set(x, (sums.get(x) || 0) + y);
    return [...sums].sort((a, b) => a[0] - b[0]);
  }

  areas() {
    const lower = new Map();
    return this.drawn.map((s) => {
      const top = s.line.map(([x, y]) => [x, y + (lower.get(x) || 0)]);
      const bottom = s.line.map(([x]) => [x, lower.get(x) || 0]).reverse();
      for (const [x, y] of top) lower.set(x, y);
      return svg("path", {
        class: "area",
        d: path([...top, ...bottom], this.x, this.y) + "Z",
        "clip-path": this.clip,
        style: { fill: s.color },
      });
    });
  }

  /** Held-out values with their 95 % intervals; joined where no line of training goes by them. */
  held() {
    const joined = this.panel.lines.length
      ? []
      : this.dotted().map((dots) =>
          svg("path", {
            class: "joined",
            d: path(
              dots.map((dot) => [dot.x, dot.value]),
              this.x,
              this.y,
            ),
            "stroke-dasharray": this.dash(dots[0].name),
            "clip-path": this.clip,
            style: { stroke: dots[0].color },
          }),
        );
    const single = this.dots
      .filter((dot) => dot.x >= this.domain[0] && dot.x <= this.domain[1])
      .map((dot) => {
        const x = this.x(dot.x);
        return svg(
          "g",
          { class: "held" },
          dot.interval
            ? svg("line", {
                x1: x,
                x2: x,
                y1: this.y(Math.max(dot.interval[1], this.range[0])),
                y2: this.y(dot.interval[2]),
                style: { stroke: dot.color },
              })
            : null,
          svg("circle", { cx: x, cy: this.y(dot.value), r: 4, style: { fill: dot.color } }),
        );
      });
    return [...joined, ...single];
  }

  /** The dots of each run and metric. */
  dotted() {
    const found = new Map();
    for (const dot of this.dots) {
      const key = `${page.runs.indexOf(dot.run)} ${dot.name}`;
      found.set(key, [...(found.get(key) || []), dot]);
    }
    return [...found.values()];
  }

  describe() {
    const last = page.runs.length === 1 && !this.panel.by_run ? page.runs[0].metrics.last[this.name] : undefined;
    this.readout.textContent = last === undefined ? "" : this.format(last);
    const ends = this.drawn
      .filter((s) => s.line.length)
      .map((s) => `${s.label} from ${this.format(s.line[0][1])} to ${this.format(s.line.at(-1)[1])}`);
    if (!this.panel.lines.length)
      for (const dots of this.dotted())
        ends.push(`${dots[0].label} from ${this.format(dots[0].value)} to ${this.format(dots.at(-1).value)}`);
    this.svg.setAttribute(
      "aria-label",
      `${this.panel.title}: ${ends.join("; ")}. Arrow keys read values, plus and minus zoom, enter shows the step's completions.`,
    );
    const keys = new Map();
    if (!this.several) {
      if (this.drawn.length > 1)
        for (const s of this.drawn) {
          const beyond = s.line.some(([x, y]) => x >= this.domain[0] && x <= this.domain[1] && y > this.range[1]);
          const label = beyond && !this.panel.stacked ? `${s.label}, beyond the top` : s.label;
          keys.set(label, el("i", { style: { background: s.color } }));
        }
    } else if (this.panel.lines.length > 1) {
      this.panel.lines.forEach((name, i) =>
        keys.set(
          short(name),
          svg(
            "svg",
            { width: 18, height: 4 },
            svg("line", {
              x1: 0,
              x2: 18,
              y1: 2,
              y2: 2,
              class: "key",
              "stroke-dasharray": ["", "5 3", "1.5 3", "7 2 1.5 2"][i % 4],
            }),
          ),
        ),
      );
    }
    const sure = this.dots.some((dot) => dot.interval);
    if (this.panel.points.length > 1 && !this.several) {
      for (const [dot] of this.dotted()) keys.set(dot.label, el("i", { class: "dot", style: { background: dot.color } }));
      if (sure) keys.set("95 % intervals", null);
    } else if (this.dots.length && this.panel.lines.length)
      keys.set(
        sure ? "held out, 95 % interval" : "held out",
        el("i", { class: "dot", style: this.several ? {} : { background: this.dots[0].color } }),
      );
    this.legend.replaceChildren(...[...keys].map(([label, key]) => el("span", {}, key, label)));
  }

  /** A line at the pointer in every chart; what is there, in the one it is on. */
  point(here) {
    if (!this.over) return;
    const x = view.cursor;
    this.over.replaceChildren();
    this.tip.hidden = true;
    if (x === null || x < this.domain[0] || x > this.domain[1]) return;
    const px = this.x(x);
    this.over.append(svg("line", { class: "cursor", x1: px, x2: px, y1: MARGIN.top, y2: this.height - MARGIN.bottom }));
    const rows = [];
    let where = "";
    for (const s of this.drawn) {
      if (!s.line.length) continue;
      const xs = positions(s.run);
      const i = nearest(xs, x);
      const value = s.run.metrics.values[s.name][i];
      const line =
        s.line[
          nearest(
            s.line.map((p) => p[0]),
            xs[i],
          )
        ];
      if (!this.panel.stacked)
        this.over.append(
          svg("circle", {
            cx: this.x(line[0]),
            cy: this.y(line[1]),
            r: 3,
            "clip-path": this.clip,
            style: { fill: s.color },
          }),
        );
      if (!here) continue;
      where =
        where ||
        `step ${s.run.metrics.steps[i].toLocaleString("en")}` +
          (view.axis === "time" ? `, ${duration(60 * xs[i])}` : "");
      rows.push([s.color, s.label, this.format(value), view.sigma && value !== null ? this.format(line[1]) : ""]);
    }
    if (!here) return;
    for (const dot of this.dots) {
      if (nearest(positions(dot.run), x) !== dot.i) continue;
      where = where || `step ${dot.run.metrics.steps[dot.i]}`;
      const between = dot.interval ? `${this.format(dot.interval[1])} to ${this.format(dot.interval[2])}` : "";
      rows.push([dot.color, dot.label, this.format(dot.value), between]);
    }
    this.tell(px, where, rows);
  }

  tell(px, where, rows) {
    const smooth = view.sigma && rows.some((row) => row[3]);
    this.tip.replaceChildren(
      el("b", {}, where),
      el(
        "table",
        {},
        el(
          "tbody",
          {},
          rows.map(([color, label, value, second]) =>
            el(
              "tr",
              {},
              el("td", {}, el("i", { style: { background: color } }), label),
              el("td", {}, value),
              smooth ? el("td", { class: "muted" }, second) : null,
            ),
          ),
        ),
      ),
      withCompletions(this.runs()) ? el("p", {}, "click: completions of this step") : null,
    );
    this.tip.hidden = !rows.length;
    const [card, plot] = [this.card, this.svg].map((each) => each.getBoundingClientRect());
    const left = plot.left - card.left + px;
    const room = this.card.clientWidth - this.tip.offsetWidth - 4;
    this.tip.style.left = `${Math.max(4, Math.min(px > this.width / 2 ? left - this.tip.offsetWidth - 10 : left + 10, room))}px`;
    this.tip.style.top = `${plot.top - card.top + 6}px`;
    if (document.activeElement === this.svg)
      this.spoken.textContent = `${where}: ` + rows.map((row) => `${row[1]} ${row[2]}`).join(", ");
  }

  listen() {
    let start = null;
    const at = (event) =>
      Math.min(this.width - MARGIN.right, Math.max(MARGIN.left, event.clientX - this.svg.getBoundingClientRect().left));
    this.svg.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "mouse" && event.button === 0) {
        start = at(event);
        this.svg.setPointerCapture(event.pointerId);
      }
    });
    this.svg.addEventListener("pointermove", (event) => {
      if (!this.over) return;
      moveCursor(this.inverse(at(event)), this);
      if (start === null) return;
      const [a, b] = [start, at(event)].sort((p, q) => p - q);
      this.over.append(
        svg("rect", {
          class: "selection",
          x: a,
          width: b - a,
          y: MARGIN.top,
          height: this.height - MARGIN.top - MARGIN.bottom,
        }),
      );
    });
    this.svg.addEventListener("pointerup", (event) => {
      if (start === null) return;
      const [a, b] = [start, at(event)].sort((p, q) => p - q);
      start = null;
      if (b - a > 8) zoom([this.inverse(a), this.inverse(b)]);
      else this.goTo();
    });
    this.svg.addEventListener("pointerleave", () => moveCursor(null, this));
    this.svg.addEventListener("blur", () => moveCursor(null, this));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  /** Show the completions of the step under the cursor. */
  goTo() {
    const run = withCompletions(this.runs());
    if (run && view.cursor !== null) browser.goTo(run, run.metrics.steps[nearest(positions(run), view.cursor)]);
  }

  key(event) {
    if (!this.domain) return;
    const [x0, x1] = this.domain;
    const unit = (view.axis === "step" ? 1 : (x1 - x0) / 100) * (event.shiftKey ? 10 : 1);
    const from = view.cursor === null ? x1 : view.cursor;
    const bounded = (x) => Math.min(x1, Math.max(x0, x));
    if (event.key === "ArrowLeft") moveCursor(bounded((view.axis === "step" ? Math.round(from) : from) - unit), this);
    else if (event.key === "ArrowRight")
      moveCursor(bounded((view.axis === "step" ? Math.round(from) : from) + unit), this);
    else if (event.key === "+" || event.key === "=") zoom([from - (x1 - x0) / 4, from + (x1 - x0) / 4]);
    else if (event.key === "-" || event.key === "Escape") zoom(null);
    else if (event.key === "Enter") this.goTo();
    else return;
    event.preventDefault();
  }
}

/** The run whose completions a click on a chart leads to: the first that is drawn and has any. */
const withCompletions = (runs) => runs.find((run) => run.sources.some((source) => source.kind === "training"));

function moveCursor(x, here) {
  view.cursor = x;
  for (const chart of charts) if (chart.inView) chart.point(chart === here);
}

function zoom(domain) {
  view.domain = domain;
  view.cursor = null;
  document.getElementById("unzoom").hidden = domain === null;
  redraw();
}

function axisNumber(value, all) {
  if (!value) return "0";
  const largest = Math.max(...all.map(Math.abs));
  if (largest >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (largest >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (largest < 1e-3) return Number(value.toPrecision(2)).toExponential().replace("-", "\u2212");
  return String(Number(value.toPrecision(6))).replace("-", "\u2212");
}

const short = (name) => {
  const last = name.replace(/^[^/]*\//, "");
  const side = /_(right|wrong|truncated)$/.exec(last);
  if (side) return side[1] === "truncated" ? "cut off" : side[1];
  return name.startsWith("aha/") ? "all" : last.replaceAll("_", " ");
};

/** Of a metric beside others in the chart of one run. */
function metricColor(name, index, count) {
  if (name.endsWith("_right")) return "var(--c0)";
  if (name.endsWith("_wrong")) return "var(--c1)";
  if (name.endsWith("_truncated")) return "var(--c7)";
  return count > 1 && index === 0 && !name.startsWith("time/") && !name.startsWith("memory/")
    ? "var(--ink)"
    : colorOf(index);
}
