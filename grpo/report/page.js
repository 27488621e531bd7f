// The page: what is on it and in which order.

let page = null;
let browser = null;

const part = (id) => document.getElementById(id);

function wholeInterval(interval, format) {
  return interval ? `${format(interval[1])} to ${format(interval[2])}` : "";
}

/** Shares before and after on a line from 0 to 100 %, with their intervals. */
function span(before, after, color) {
  const line = el("div", { class: "span", "aria-hidden": "true" });
  const at = (value) => `${100 * Math.min(1, Math.max(0, value))}%`;
  [
    [before, "before"],
    [after, "after"],
  ].forEach(([interval, kind]) => {
    if (!interval) return;
    const [value, low, high] = interval;
    line.append(
      el("i", {
        class: `whisker ${kind}`,
        style: { left: at(low), width: at(Math.min(1, high) - Math.max(0, low)), "--c": color },
      }),
      el("i", { class: `dot ${kind}`, style: { left: at(value), "--c": color } }),
    );
  });
  return line;
}

const isShare = (interval) => !interval || (interval[0] >= 0 && interval[0] <= 1);
const formatOf = (...intervals) => (intervals.every(isShare) ? percent : number);

function progress(top) {
  return top.planned && top.planned > top.steps
    ? `${top.steps.toLocaleString("en")} of ${top.planned.toLocaleString("en")}`
    : top.steps.toLocaleString("en");
}

const between = (ends, format) => (ends ? `${format(ends[0])} \u2192 ${format(ends[1])}` : NONE);

function machine(top) {
  if (!top.device) return NONE;
  const name =
    top.device === "cpu" || !top.device.includes("NVIDIA")
      ? top.device.replace(/^cpu$/, "CPU")
      : top.device.replace("NVIDIA ", "");
  return top.processes > 1 ? `${top.processes} \u00d7 ${name}` : name;
}

const lastParts = (path) => (path ? path.replace(/\/+$/, "").split("/").slice(-2).join("/") : "");

function subtitle(top) {
  return [
    lastParts(top.model),
    lastParts(top.data),
    top.template ? `template ${top.template}` : "",
    machine(top) === NONE ? "" : machine(top),
  ]
    .filter((t) => t)
    .join(" \u00b7 ");
}

function tile(label, value, detail) {
  return el(
    "div",
    { class: "tile" },
    el("dt", {}, label),
    el("dd", {}, value, detail ? el("small", {}, detail) : null),
  );
}

/** Where the curve through the rewards leads, or why that cannot be told. */
function leads(told) {
  const share = ["at_end", "limit"].every((part) => isShare(told[part]));
  const format = share ? percent : number;
  const limit = told.limit ? `limit ${format(told.limit[0])}, ${wholeInterval(told.limit, format)}` : "limit not told";
  const found = told.reason
    ? tile("Where it leads", NONE, `not told: ${told.reason}`)
    : tile(
        `Where ${told.name.split("/").pop()} leads: step ${told.step.toLocaleString("en")}`,
        format(told.at_end[0]),
        `${wholeInterval(told.at_end, format)} by the curve through ${plural(told.values, told.held_out ? "evaluation" : "step")}; ${limit}`,
      );
  found.classList.add("wide");
  return found;
}

function hero(top) {
  const format = formatOf(top.before, top.after);
  const accuracy = top.accuracy && top.accuracy.every((v) => v >= 0 && v <= 1) ? percent : number;
  const name = top.verdict === "accuracy" ? "accuracy" : top.verdict;
  if (!top.before) {
    return el(
      "div",
      { class: "hero" },
      el("p", { class: "label" }, `Training ${name}, first to last steps`),
      el(
        "p",
        { class: "big" },
        top.accuracy
          ? [
              el("span", { class: "was" }, accuracy(top.accuracy[0])),
              el("span", { class: "arrow" }, "\u2192"),
              accuracy(top.accuracy[1]),
            ]
          : "no steps yet",
      ),
      el("p", { class: "muted" }, "Nothing was held out."),
    );
  }
  const questions = top.questions ? `${plural(top.questions, "held-out question")}, ` : "";
  return el(
    "div",
    { class: "hero" },
    el("p", { class: "label" }, `Held-out ${name}` + (top.after ? ", before \u2192 after" : "")),
    el(
      "p",
      { class: "big" },
      el("span", { class: top.after ? "was" : "" }, format(top.before[0])),
      top.after ? [el("span", { class: "arrow" }, "\u2192"), format(top.after[0])] : null,
    ),
    isShare(top.before) ? span(top.before, top.after, "var(--c0)") : null,
    el(
      "p",
      { class: "muted" },
      `${questions}step ${top.evaluated[0]}` +
        (top.after ? ` and step ${top.evaluated[1]}` : "") +
        `; 95 % intervals ${wholeInterval(top.before, format)}` +
        (top.after ? ` and ${wholeInterval(top.after, format)}` : ""),
    ),
  );
}

function one(run) {
  const top = run.headline;
  const going = top.planned && top.steps < top.planned;
  return [
    el("h1", { dir: "auto" }, shown(run.name, [])),
    el("p", { class: "lede" }, subtitle(top)),
    el(
      "div",
      { class: "top" },
      hero(top),
      el(
        "dl",
        { class: "tiles" },
        tile("Reward", between(top.reward, number), "first \u2192 last steps"),
        tile("Tokens per completion", between(top.length, number), "first \u2192 last steps"),
        tile(
          "Steps",
          top.steps.toLocaleString("en"),
          going ? `of ${top.planned.toLocaleString("en")}, when this was written` : null,
        ),
        tile(
          "Training time",
          duration(top.seconds),
          top.seconds && top.steps ? `${number(top.seconds / top.steps)}${THIN}s a step` : null,
        ),
        tile("Sampled", top.tokens === null ? NONE : number(top.tokens), "tokens"),
        tile(
          top.memory === null ? "Hardware" : "GPU memory",
          top.memory === null ? machine(top) : `${number(top.memory)}${THIN}GiB`,
          top.memory === null ? null : `at most, ${machine(top)}`,
        ),
        run.prediction ? leads(run.prediction) : null,
      ),
    ),
  ];
}

function several(runs) {
  const head = [
    "Run",
    "Held out: before",
    "after",
    "",
    "questions",
    "Reward",
    "Tokens",
    "Steps",
    "Time",
    "Sampled",
    "Hardware",
  ];
  const held = (interval, step, format) =>
    interval ? [measured(interval, format), el("small", { class: "muted" }, `step ${step}`)] : NONE;
  const row = (run) => {
    const top = run.headline;
    const format = formatOf(top.before, top.after);
    return el(
      "tr",
      {},
      el(
        "th",
        { scope: "row" },
        el("i", { class: "swatch", style: { background: run.color } }),
        el("span", { dir: "auto" }, shown(run.name, [])),
      ),
      el("td", {}, held(top.before, top.evaluated?.[0], format)),
      el("td", {}, held(top.after, top.evaluated?.[1], format)),
      el("td", { class: "spans" }, top.before && isShare(top.before) ? span(top.before, top.after, run.color) : null),
      el(
        "td",
        {},
        top.questions ? top.questions.toLocaleString("en") : NONE,
        top.before ? el("small", { class: "model" }, top.verdict) : null,
      ),
      el("td", {}, between(top.reward, number)),
      el("td", {}, between(top.length, number)),
      el("td", {}, progress(top)),
      el("td", {}, duration(top.seconds)),
      el("td", {}, top.tokens === null ? NONE : number(top.tokens)),
      el("td", {}, machine(top)),
    );
  };
  return [
    el("h1", {}, `${runs.length} runs`),
    el("p", { class: "lede" }, [...new Set(runs.map((run) => subtitle(run.headline)))].slice(0, 2).join("; ")),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "group", "aria-label": "The runs" },
      el(
        "table",
        { class: "runs" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map((text) => el("th", { scope: "col" }, text)),
          ),
        ),
        el("tbody", {}, runs.map(row)),
      ),
    ),
  ];
}

/** Roll-backs, alarms, and what the reader of the files could not read. */
function remarks(run) {
  const name = page.runs.length > 1 ? `${run.name}: ` : "";
  return [
    ...run.roll_backs.map((back) => [
      "alarm",
      `${name}rolled back at step ${back.step} to step ${back.to} (${back.rule}): ${back.text}`,
    ]),
    ...run.alarms.map(([where, text]) => ["alarm", `${name}${where}: ${text.trim()}`]),
    ...run.notes.map((text) => ["", `${name}${text}.`]),
  ].map(([kind, text]) => el("p", { class: `note ${kind}` }, shown(text, [])));
}

function buildSummary() {
  const { runs } = page;
  part("summary").append(...(runs.length === 1 ? one(runs[0]) : several(runs)), ...runs.flatMap(remarks));
}

function controls() {
  const longest = Math.max(1, ...page.runs.map((run) => run.metrics.steps.length));
  view.sigma = longest < 10 ? 0 : Math.max(1, Math.round(longest / 50));
  const most = Math.max(4, Math.round(longest / 10));
  const text = el("output", {});
  const say = () => (text.textContent = view.sigma ? `\u03c3 = ${plural(view.sigma, "step")}` : "off");
  const slider = el("input", {
    type: "range",
    min: 0,
    max: most,
    value: view.sigma,
    oninput: () => {
      view.sigma = Number(slider.value);
      say();
      redraw();
    },
  });
  const timed = page.runs.every((run) => run.metrics.values["time/step"]);
  const axis = el(
    "select",
    {
      onchange: () => {
        view.axis = axis.value;
        zoom(null);
      },
    },
    el("option", { value: "step" }, "steps"),
    el("option", { value: "time" }, "minutes of training"),
  );
  say();
  return el(
    "div",
    { class: "controls" },
    page.runs.length > 1
      ? el("div", { class: "chips", role: "group", "aria-label": "Runs that are drawn" }, page.runs.map(chip))
      : null,
    el("label", {}, "Smoothing", slider, text),
    timed ? el("label", {}, "Over", axis) : null,
    el("button", { type: "button", id: "unzoom", hidden: true, onclick: () => zoom(null) }, "Whole run"),
    page.runs.length === 1 ? el("span", { class: "muted fine" }, "Bold: mean of the last steps, not smoothed. Click a point to read what was written there.") : null,
  );
}

function chip(run) {
  const button = el(
    "button",
    { type: "button", "aria-pressed": "true" },
    el("i", { class: "swatch", style: { background: run.color } }),
    run.name,
  );
  button.addEventListener("click", () => {
    if (!view.hidden.delete(run)) view.hidden.add(run);
    button.setAttribute("aria-pressed", String(!view.hidden.has(run)));
    redraw();
  });
  return button;
}

function buildCurves() {
  const place = part("curves");
  place.classList.toggle("several", page.runs.length > 1);
  place.append(el("h2", { id: "curves-title" }, "Curves"));
  if (!page.sections.length) {
    place.append(
      el("p", { class: "muted" }, "No step has been finished."),
      el("button", { id: "unzoom", hidden: true }),
    );
    return;
  }
  place.append(controls());
  const isNarrow = window.matchMedia("(max-width: 560px)").matches; // where all charts would be a page of many screens
  const charted = (number) => ` ${number} ${number === 1 ? "chart" : "charts"}`;
  for (const section of page.sections) {
    const made = section.panels.flatMap((panel) =>
      panel.by_run
        ? page.runs
            .filter((run) => [...panel.lines, ...panel.points].some((name) => run.metrics.values[name]))
            .map((run) => new Chart([panel], run))
        : panel.family && panel !== ofFamily(section, panel)[0]
          ? []
          : [new Chart(ofFamily(section, panel), null)],
    );
    const flat = made.filter((chart) => chart.isFlat());
    charts.push(...made.filter((chart) => !flat.includes(chart)));
    const grid = el(
      "div",
      { class: "grid-of-panels" },
      made.filter((chart) => !flat.includes(chart)).map((chart) => chart.card),
    );
    const same = flat.length ? el("p", { class: "same" }, "Always the same: ", flat.map(unchanged)) : null;
    const isFolded = section !== page.sections[0] && (isNarrow || section.title === "Everything else");
    const heading = el("summary", {}, el("h3", {}, section.title), el("span", {}, charted(made.length)));
    place.append(el("details", { class: "section", open: !isFolded }, heading, grid, same));
  }
  const observer = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const chart = charts.find((each) => each.card === entry.target);
        chart.inView = entry.isIntersecting;
        if (entry.isIntersecting) chart.draw();
      }
    },
    { rootMargin: "300px" },
  );
  charts.forEach((chart) => observer.observe(chart.card));
  window.addEventListener("beforeprint", () => {
    for (const closed of place.querySelectorAll("details.section:not([open])")) {
      closed.open = true;
      window.addEventListener("afterprint", () => (closed.open = false), { once: true });
    }
    for (const chart of charts) {
      chart.inView = true; // also what was never scrolled to
      chart.draw();
    }
  });
  window.addEventListener("resize", later(redraw));
}

/** The panels that are one chart with this one: of a list of words, each way to count them. */
const ofFamily = (section, panel) =>
  panel.family ? section.panels.filter((each) => each.family === panel.family) : [panel];

function unchanged(chart) {
  return el(
    "span",
    { title: page.formulas[chart.name] },
    chart.panel.title,
    " ",
    el("b", {}, chart.format(chart.constant()), chart.panel.unit ? ` ${chart.panel.unit}` : ""),
  );
}

function table(head, rows, label) {
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "group", "aria-label": label },
    el(
      "table",
      {},
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          head.map((text) => el("th", { scope: "col" }, text)),
        ),
      ),
      el(
        "tbody",
        {},
        rows.map((row) =>
          el(
            "tr",
            {},
            row.map((cell, i) => el(i ? "td" : "th", i ? {} : { scope: "row" }, cell)),
          ),
        ),
      ),
    ),
  );
}

function measured(interval, format, color) {
  if (!interval || interval[0] === null) return NONE;
  return el(
    "div",
    { class: "measured" },
    el("b", {}, format(interval[0])),
    interval[1] === undefined || interval[1] === null ? null : el("small", {}, wholeInterval(interval, format)),
    color && isShare(interval) ? span(null, interval, color) : null,
  );
}

function buildEvaluation() {
  const place = part("evaluation");
  place.append(el("h2", { id: "evaluation-title" }, "Evaluation"));
  const during = page.runs.filter((run) => run.held_out.length);
  const after = page.runs.filter((run) => run.results.length);
  if (!during.length && !after.length) place.append(el("p", { class: "muted" }, "No evaluation was made."));
  if (after.length) place.append(el("h3", {}, "Benchmarks"), ...benchmarks(after));
  if (during.length) place.append(el("h3", {}, "Held-out questions during training"), ...during.map(heldOut));
}

const named = (run, text) => (page.runs.length > 1 ? `${run.name}: ${text}` : text);

function heldOut(run) {
  const names = Object.keys(run.held_out[0].functions);
  const format = (name) => formatOf(...run.held_out.map((row) => row.functions[name]));
  const head = [
    "Step",
    ...names.map((name) => name.replaceAll("_", " ")),
    "length",
    "cut off",
    "newly right",
    "newly wrong",
    "questions",
  ];
  const rows = run.held_out.map((row, i) => [
    row.step.toLocaleString("en"),
    ...names.map((name) => measured(row.functions[name], format(name), run.color)),
    number(row.length),
    percent(row.truncated),
    i ? `+${row.learned.length}` : NONE,
    i ? `\u2212${row.forgotten.length}` : NONE,
    row.questions === row.answers ? row.questions : `${row.questions} \u00d7 ${number(row.answers / row.questions)}`,
  ]);
  return el(
    "div",
    {},
    page.runs.length > 1 ? el("h4", {}, run.name) : null,
    table(head, rows, named(run, "held-out questions")),
    el(
      "p",
      { class: "muted fine" },
      "Intervals: 95 %, Wilson's of the share of questions for values between 0 and 1. Newly right and wrong: questions, against the first evaluation.",
    ),
  );
}

/** A checkpoint by the run and the step that a person knows it by. */
function modelName(path) {
  const found = /([^/]+)\/checkpoints\/step-0*(\d+)/.exec(path || "");
  return found ? `${found[1]}, step ${Number(found[2]).toLocaleString("en")}` : lastParts(path);
}

const SHARE = /^(pass|cons|format|truncated|unknown)/;
const metricFormat = (name, metric) =>
  SHARE.test(name) || (metric && metric.low >= 0 && metric.high <= 1) ? percent : number;
const triple = (metric) => (metric ? [metric.value, metric.low, metric.high] : null);

function benchmarks(runs) {
  const entries = runs.flatMap((run) =>
    run.results.flatMap((result) =>
      result.results.map((entry) => ({
        ...entry,
        run,
        name: named(run, result.name),
        model: result.model,
        stop: result.settings.stop || [],
      })),
    ),
  );
  const names = [...new Set(entries.map((entry) => entry.benchmark))];
  return names.flatMap((benchmark) => {
    const own = entries.filter((entry) => entry.benchmark === benchmark);
    const metrics = [...new Set(own.flatMap((entry) => Object.keys(entry.metrics)))];
    const ways = own.map(wayOf);
    const alike = ways[0].filter((part) => ways.every((way) => way.includes(part)));
    const several = ways.some((way) => way.length > alike.length);
    const rows = own.map((entry, i) => [
      [entry.name, el("small", { class: "model" }, modelName(entry.model))],
      entry.template,
      ...(several ? [el("div", { class: "sampled" }, ways[i].filter((part) => !alike.includes(part)).join(", "))] : []),
      ...metrics.map((name) =>
        measured(
          triple(entry.metrics[name]),
          metricFormat(name, entry.metrics[name]),
          SHARE.test(name) ? entry.run.color : null,
        ),
      ),
    ]);
    return [
      el("h4", {}, benchmark, el("small", {}, alike.join(", "))),
      several
        ? el("p", { class: "muted fine" }, "Rows that were sampled otherwise, or of other questions, are no comparison.")
        : null,
      table(["model", "template", ...(several ? ["sampled"] : []), ...metrics], rows, benchmark),
      ...splits(own),
    ].filter((part) => part !== null);
  });
}

/** How the answers of a benchmark were sampled, in parts: rows compare where these are the same. */
function wayOf(entry) {
  return [
    plural(entry.num_questions, "question"),
    `${plural(entry.num_samples, "sample")} each`,
    entry.temperature === 0 ? "greedy" : `temperature ${entry.temperature}, top-p ${entry.top_p}`,
    `at most ${number(entry.max_completion_tokens)} tokens`,
    entry.stop.length ? `ends at ${entry.stop.map((text) => JSON.stringify(text)).join(" or ")}` : "no stop text",
  ];
}

/** By level and by subject, where the data has them. */
function splits(entries) {
  const kinds = [...new Set(entries.flatMap((entry) => Object.keys(entry.by || {})))];
  return kinds.map((kind) => {
    const own = entries.filter((entry) => entry.by && entry.by[kind]);
    const values = [...new Set(own.flatMap((entry) => Object.keys(entry.by[kind])))].sort((a, b) =>
      a.localeCompare(b, "en", { numeric: true }),
    );
    const rows = own.map((entry) => [
      `${entry.name}, ${entry.template}`,
      ...values.map((value) => {
        const cell = entry.by[kind][value];
        return measured(triple(cell && cell.metrics["pass@1"]), percent, entry.run.color);
      }),
    ]);
    const count = (value) => own.map((entry) => entry.by[kind][value]).find((cell) => cell).num_questions;
    return el(
      "details",
      {},
      el("summary", {}, `pass@1 by ${kind}`),
      table(["model", ...values.map((value) => `${value} (${count(value)})`)], rows, `by ${kind}`),
    );
  });
}

function buildSettings() {
  const place = part("settings");
  const { runs } = page;
  const several = runs.length > 1;
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.settings)))];
  const where = [...new Set(runs.flatMap((run) => Object.keys(run.environment)))];
  const differs = (of) => (key) => runs.some((run) => run[of][key] !== runs[0][of][key]);
  const chosen = (key) =>
    page.defaults[key] === undefined || runs.some((run) => run.settings[key] !== page.defaults[key]);
  const few = el("input", { type: "checkbox" });
  few.checked = true;
  const body = el("div", {});
  const show = () =>
    body.replaceChildren(
      compared("settings", keys.filter(few.checked ? (several ? differs("settings") : chosen) : () => true)),
      el("h3", {}, "Environment"),
      compared("environment", where.filter(few.checked && several ? differs("environment") : () => true)),
    );
  const compared = (of, shownKeys) =>
    shownKeys.length
      ? table(
          ["", ...(several ? runs.map((run) => run.name) : [""])],
          shownKeys.map((key) => [
            key,
            ...runs.map((run) =>
              el(
                "code",
                { class: run[of][key] === runs[0][of][key] ? "" : "differs" },
                shown(run[of][key] ?? NONE, []),
              ),
            ),
          ]),
          of,
        )
      : el("p", { class: "muted" }, several ? "No difference." : "Nothing to show.");
  few.addEventListener("change", show);
  place.classList.toggle("single", !several);
  place.append(
    el("h2", { id: "settings-title" }, "Settings"),
    el("label", { class: "check" }, few, several ? "differences only" : "only what is not the default"),
    body,
  );
  show();
}

/** Light or dark as the system has it, until the button is pressed. */
function chooseTheme() {
  const root = document.documentElement;
  part("theme").addEventListener("click", () => {
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });
}

/** What a run has in common with those that differ from it in their seed and directory alone: seeds of one arm. */
function armOf(run) {
  const settings = { ...run.settings };
  for (const key of ["run.seed", "run.dir", "run.resume", "logging.wandb_name"]) delete settings[key];
  return Object.keys(settings).length ? JSON.stringify(Object.entries(settings).sort()) : run.name;
}

async function start() {
  chooseTheme();
  page = await unpack("head");
  const arms = [...new Set(page.runs.map(armOf))];
  page.runs.forEach((run) => (run.color = colorOf(arms.indexOf(armOf(run)))));
  buildSummary();
  buildCurves();
  buildEvaluation();
  buildSettings();
  part("foot").append(`Written by grpo on ${page.written}. This file is all there is: it loads nothing.`);
  if (page.runs.some((run) => run.sources.length)) {
    browser = new Browser(part("completions"));
    await browser.start();
  } else
    part("completions").append(
      el("h2", { id: "completions-title" }, "Completions"),
      el("p", { class: "muted" }, "This page holds no completions."),
    );
  // charts in view are drawn within the next frame; whoever measures or photographs the page waits for this
  requestAnimationFrame(() =>
    requestAnimationFrame(() => {
      performance.mark("usable");
      document.documentElement.dataset.ready = "true";
    }),
  );
}

start().catch((error) =>
  part("summary").append(
    el("p", { class: "note alarm" }, `This page cannot be drawn here (browsers since 2023 can): ${error}`),
  ),
);
