// The browser of completions: filters look at columns of numbers; texts are unpacked where they are shown or searched.

const PER_PAGE = 6;

class Browser {
  constructor(place) {
    this.place = place;
    this.indices = new Map();
    this.blocks = new Map();
    this.mark = false;
    this.turn = 0;
  }

  get sources() {
    return page.runs.flatMap((run, r) => run.sources.map((source, s) => ({ ...source, run, id: `${r}-${s}` })));
  }

  async start() {
    const filter = (label, control, extra) => el("label", { class: extra }, el("span", {}, label), control);
    const option = (value, text) => el("option", { value }, text);
    const changed = () => this.show();
    const several = page.runs.length > 1;
    this.source = el(
      "select",
      { onchange: () => this.open() },
      this.sources.map((s, i) => option(i, (several ? `${s.run.name}: ` : "") + titleOf(s))),
    );
    this.verdict = el("select", { onchange: changed });
    this.cut = el(
      "select",
      { onchange: changed },
      option("", "any end"),
      option("1", "cut off"),
      option("0", "ended by itself"),
    );
    this.least = el("input", {
      type: "number",
      step: "any",
      placeholder: "least",
      "aria-label": "Least reward",
      oninput: later(changed),
    });
    this.most = el("input", {
      type: "number",
      step: "any",
      placeholder: "most",
      "aria-label": "Largest reward",
      oninput: later(changed),
    });
    this.search = el("input", {
      type: "search",
      placeholder: "words, or /regular expression/",
      oninput: later(changed),
    });
    this.words = el("input", {
      type: "checkbox",
      onchange: () => {
        this.mark = this.words.checked;
        this.show();
      },
    });
    this.reflective = el("input", { type: "checkbox", onchange: changed });
    this.step = el("input", {
      type: "range",
      min: 0,
      "aria-label": "Step",
      oninput: later(() => this.stepTo(Number(this.step.value))),
    });
    this.stepName = el("output", {});
    this.every = el("input", { type: "checkbox", onchange: changed });
    const move = (by) => () => this.stepTo(Number(this.step.value) + by);
    this.stepper = el(
      "div",
      { class: "stepper", role: "group", "aria-label": "Step" },
      el("button", { type: "button", "aria-label": "Step before", onclick: move(-1) }, "\u2039"),
      this.step,
      el("button", { type: "button", "aria-label": "Next step", onclick: move(1) }, "\u203a"),
      this.stepName,
      el("label", { class: "check" }, this.every, "all steps"),
    );
    this.status = el("p", { class: "status", role: "status" });
    this.list = el("div", { class: "groups" });
    this.more = el("button", { type: "button", class: "more", onclick: () => this.append() }, "Show more");
    this.place.append(
      el("h2", { id: "completions-title" }, "Completions"),
      el(
        "form",
        { class: "filters", onsubmit: (event) => event.preventDefault() },
        filter("From", this.source),
        filter("Verdict", this.verdict),
        filter("End", this.cut),
        el("fieldset", {}, el("legend", {}, "Reward"), this.least, this.most),
        filter("Text", this.search, "grow"),
        el(
          "div",
          { class: "checks" },
          el("label", { class: "check" }, this.words, "mark reflective words"),
          el("label", { class: "check" }, this.reflective, "only with them"),
        ),
      ),
      this.stepper,
      this.status,
      this.list,
      this.more,
    );
    await this.open();
  }

  async open() {
    const source = this.sources[Number(this.source.value)];
    if (!this.indices.has(source.id)) this.indices.set(source.id, await unpack(`index-${source.id}`));
    this.current = source;
    this.index = this.indices.get(source.id);
    const verdicts = [
      ["", "any"],
      ["1", "right"],
      ["0", "wrong"],
      ["null", "unknown"],
    ];
    if (source.kind === "held-out") verdicts.push(["learned", "wrong, then right"], ["forgotten", "right, then wrong"]);
    this.verdict.replaceChildren(...verdicts.map(([value, text]) => el("option", { value }, text)));
    this.steps = source.unit === "step" ? [...new Set(this.index.step)].sort((a, b) => a - b) : [];
    this.stepper.hidden = this.steps.length < 2;
    this.step.max = this.steps.length - 1;
    this.step.value = this.steps.length - 1;
    await this.show();
  }

  stepTo(position) {
    this.step.value = Math.min(this.steps.length - 1, Math.max(0, position));
    this.every.checked = false;
    this.show();
  }

  /** The completions of a run's training nearest to a step. */
  async goTo(run, step) {
    const at = this.sources.findIndex((source) => source.run === run && source.kind === "training");
    if (at < 0) return;
    if (Number(this.source.value) !== at) {
      this.source.value = at;
      await this.open();
    }
    this.stepTo(nearest(this.steps, step));
    location.hash = "";
    location.hash = "completions";
  }

  /** Find and show what the filters let through; a later call overtakes an earlier one that is still searching. */
  async show() {
    const turn = ++this.turn;
    this.stepName.textContent = this.every.checked
      ? "all"
      : `step ${(this.steps[this.step.value] ?? 0).toLocaleString("en")}`;
    this.pattern = patternOf(this.search.value);
    this.search.setCustomValidity(this.pattern === false ? "This is no regular expression." : "");
    if (this.pattern === false) {
      this.status.textContent = "The text is no regular expression.";
      return;
    }
    let rows = this.filtered();
    const texts = this.texts();
    if (texts.length) {
      this.status.textContent = "Searching\u2026";
      rows = await this.searched(rows, texts, turn);
    }
    if (turn !== this.turn) return;
    this.collect(rows);
    this.list.replaceChildren();
    this.shown = 0;
    await this.append();
  }

  /** What the run counts as reflection. */
  reflects() {
    return new RegExp(this.current.run.reflective, "gi");
  }

  texts() {
    return [this.pattern, this.reflective.checked ? this.reflects() : null].filter((each) => each);
  }

  filtered() {
    const { index } = this;
    const only = this.steps.length > 1 && !this.every.checked ? this.steps[this.step.value] : null;
    const [least, most] = [this.least, this.most].map((input) => (input.value === "" ? null : Number(input.value)));
    const changed = this.current.run.held_out.at(-1)?.[this.verdict.value]; // by most samples, as the table counts them
    const change = changed && new Set(changed.map(String));
    const rows = [];
    for (let i = 0; i < index.reward.length; i++) {
      if (only !== null && index.step[i] !== only) continue;
      if (change ? !change.has(index.group[i]) : this.verdict.value && String(index.right[i]) !== this.verdict.value)
        continue;
      if (this.cut.value && String(index.cut[i]) !== this.cut.value) continue;
      if (least !== null && !(index.reward[i] !== null && index.reward[i] >= least)) continue;
      if (most !== null && !(index.reward[i] !== null && index.reward[i] <= most)) continue;
      rows.push(i);
    }
    return rows;
  }

  async searched(rows, patterns, turn) {
    const found = [];
    let block = null;
    let at = -1;
    for (const i of rows) {
      while (at < 0 || i >= this.current.blocks[at][1]) {
        at += 1;
        if (i < this.current.blocks[at][1]) block = await this.block(at);
        if (turn !== this.turn) return found;
      }
      const text = block.completions[i - this.current.blocks[at][0]];
      if (patterns.every((pattern) => new RegExp(pattern.source, pattern.flags.replace("g", "")).test(text)))
        found.push(i);
    }
    return found;
  }

  /** Whole groups that have a match; what does not match in them is dimmed. */
  collect(rows) {
    const { index } = this;
    const key = (i) => (this.current.unit === "step" ? `${index.step[i]} ` : "") + index.group[i];
    this.matching = new Set(rows);
    const wanted = new Set(rows.map(key));
    const groups = new Map();
    for (let i = 0; i < index.reward.length; i++) {
      const k = key(i);
      if (!wanted.has(k)) continue;
      if (!groups.has(k)) groups.set(k, []);
      groups.get(k).push(i);
    }
    this.groups = [...groups.values()];
    if (this.current.unit === "step") {
      for (const group of this.groups) group.sort((a, b) => this.matching.has(b) - this.matching.has(a));
      const hasSignal = (group) => group.some((i) => index.reward[i] !== index.reward[group[0]]);
      this.groups.sort((a, b) => hasSignal(b) - hasSignal(a)); // those that taught something come first
    }
    const { current } = this;
    const of =
      current.shown === current.rows
        ? ""
        : ` The page holds ${plural(current.kept, current.unit)} of ${current.units.toLocaleString("en")}, evenly chosen: ${current.shown.toLocaleString("en")} of ${plural(current.rows, "completion")}.`;
    this.status.textContent = `${plural(rows.length, "completion")} in ${plural(this.groups.length, this.current.unit === "step" ? "group" : "question")}.${this.current.unit === "step" ? " Groups with different rewards come first. A is the advantage: how much better than its group." : ""}${of}`;
  }

  async append() {
    const turn = this.turn;
    const next = this.groups.slice(this.shown, this.shown + PER_PAGE);
    const made = await Promise.all(next.map((rows) => this.group(rows)));
    if (turn !== this.turn) return;
    this.list.append(...made);
    this.shown += next.length;
    this.more.hidden = this.shown >= this.groups.length;
    this.more.textContent = `Show more (${(this.groups.length - this.shown).toLocaleString("en")} left)`;
  }

  async block(number) {
    const id = `texts-${this.current.id}-${number}`;
    if (!this.blocks.has(id)) this.blocks.set(id, unpack(id));
    return this.blocks.get(id);
  }

  async row(i) {
    const number = this.current.blocks.findIndex(([start, end]) => i >= start && i < end);
    const block = await this.block(number);
    const at = i - this.current.blocks[number][0];
    return {
      text: block.completions[at],
      results: block.results[at] || [],
      rewards: block.rewards[at],
      question: block.questions[this.index.group[i]],
    };
  }

  async group(rows) {
    const { index, current } = this;
    const texts = await Promise.all(rows.map((i) => this.row(i)));
    const known = rows.map((i) => index.right[i]).filter((v) => v !== null);
    const right = known.filter((v) => v).length;
    const name = index.group[rows[0]].split(" ");
    const facts = [
      current.unit === "step" ? `step ${index.step[rows[0]].toLocaleString("en")}` : null,
      ...name.slice(0, -1),
      `row ${name.at(-1)}`,
      `${right} of ${known.length} right`,
    ].filter((fact) => fact);
    return el(
      "article",
      { class: "group" },
      el(
        "header",
        {},
        el("p", { class: "facts" }, facts.join(" \u00b7 ")),
        el("p", { class: "question", dir: "auto" }, shown(texts[0].question[0], [])),
        el(
          "p",
          { class: "gold" },
          el("span", {}, "answer "),
          el("b", { dir: "auto" }, shown(texts[0].question[1], [])),
        ),
      ),
      el(
        "div",
        {
          class: "cards",
          tabindex: 0,
          role: "group",
          "aria-label": `${plural(rows.length, "completion")} of this question`,
        },
        rows.map((i, n) => this.card(i, texts[n])),
      ),
    );
  }

  card(i, { text, results, rewards }) {
    const { index, current } = this;
    const verdict = index.right[i];
    const mark = verdict === null ? "?" : verdict ? "\u2713" : "\u2717";
    const word = verdict === null ? "unknown" : verdict ? "right" : "wrong";
    const marks = [this.pattern ? ["hit", this.pattern] : null, this.mark ? ["reflects", this.reflects()] : null].filter(
      (each) => each,
    );
    const parts = Object.entries(rewards)
      .map(([name, value]) => `${name} ${number(value)}`)
      .join(", ");
    const when = current.kind === "held-out" ? el("span", { class: "when" }, `step ${index.step[i]}`) : null;
    const sample =
      current.unit !== "step" && index.sample.some((number) => number > 0)
        ? el("span", { class: "when" }, `sample ${index.sample[i]}`)
        : null;
    return el(
      "section",
      { class: `card ${word}${this.matching.has(i) ? "" : " dim"}` },
      el(
        "div",
        { class: "meta" },
        when,
        sample,
        el("span", { class: `verdict ${word}` }, mark, el("span", {}, word)),
        el("span", { title: parts }, "reward ", el("b", {}, number(index.reward[i]))),
        index.advantage[i] === null ? null : advantage(index.advantage[i]),
        index.cut[i] ? el("span", { class: "cut" }, "cut off") : null,
      ),
      el("div", { class: "text", dir: "auto" }, thoughts(text, marks, results)),
      el("div", { class: "parts" }, `${parts} \u00b7 ${plural(index.tokens[i], "token")}`),
    );
  }
}

function titleOf(source) {
  if (source.kind === "training") return "training";
  return source.kind === "held-out" ? "held-out questions" : `evaluation: ${source.kind}`;
}

/** A bar to the right for a completion better than its group, to the left for a worse one. */
function advantage(value) {
  const half = Math.min(1, Math.abs(value) / 3) * 50;
  const bar = el("i", {
    class: value < 0 ? "worse" : "better",
    style: { left: `${value < 0 ? 50 - half : 50}%`, width: `${half}%` },
  });
  return el(
    "span",
    { class: "advantage", title: "advantage" },
    el("span", { class: "track", "aria-hidden": "true" }, bar),
    `A ${value > 0 ? "+" : ""}${value.toFixed(2).replace("-", "\u2212")}`,
  );
}

/** null for no text, false for what is no regular expression. */
function patternOf(text) {
  if (!text) return null;
  const between = /^\/(.+)\/(i?)$/s.exec(text);
  try {
    return between
      ? new RegExp(between[1], `g${between[2]}u`)
      : new RegExp(text.replace(/[\\^$.*+?()[\]{}|/]/g, "\\$&"), "giu");
  } catch {
    return false;
  }
}

/** What a tool answered, at its place in a completion. */
function result(text) {
  const [first] = text.split("\n");
  if (text.length <= 80 && first === text) return el("span", { class: "result" }, shown(text, []));
  return el("details", { class: "result" }, el("summary", {}, shown(first.slice(0, 80), [])), shown(text, []));
}

/**
 * A completion with its thinking, its answer and what tools answered told apart; a prompt that opens the thoughts leaves a lone
 * </think>. Results stand at their offsets: they are known from where they came from, never read from the text.
 */
function thoughts(text, marks, results = []) {
  const parts = [];
  const left = [...results];
  let at = 0;
  const put = (piece, kind, marked) => {
    let begin = 0;
    const upTo = (end) => {
      if (end > begin) parts.push(el("span", { class: kind }, shown(piece.slice(begin, end), marked)));
      begin = end;
    };
    while (left.length && left[0][0] < at + piece.length) {
      upTo(left[0][0] - at);
      parts.push(result(left.shift()[1]));
    }
    upTo(piece.length);
    at += piece.length;
  };
  const [opened, closed] = [text.indexOf("<think>"), text.indexOf("</think>")];
  let kind = closed >= 0 && !(opened >= 0 && opened < closed) ? "think" : "";
  for (const piece of text.split(/(<\/?(?:think|answer)>)/)) {
    const tag = /^<(\/?)(think|answer)>$/.exec(piece);
    if (tag) {
      kind = tag[1] ? "" : tag[2];
      put(piece, "tag", []);
    } else if (piece) put(piece, kind || "plain", marks);
  }
  parts.push(...left.map(([, answer]) => result(answer))); // nothing was written behind these
  return parts.length ? parts : [el("span", { class: "muted" }, "(empty)")];
}

/** Text with what matches marked and with characters that one would not see, or that turn others round, spelled out. */
function shown(text, marks) {
  if (!marks.length) return spelled(text);
  const [[name, pattern], ...others] = marks;
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    if (!found[0]) continue;
    parts.push(...shown(text.slice(end, found.index), others), el("mark", { class: name }, ...shown(found[0], [])));
    end = found.index + found[0].length;
  }
  return [...parts, ...shown(text.slice(end), others)];
}

const UNSEEN = /((?![\n\t\u200c\u200d])[\p{Cc}\p{Cf}\p{Cs}\u2028\u2029])/u;

function spelled(text) {
  return text
    .split(UNSEEN)
    .map((part, i) =>
      i % 2
        ? el("span", { class: "unseen" }, "U+" + part.codePointAt(0).toString(16).toUpperCase().padStart(4, "0"))
        : part,
    );
}

/** Calls at most once in a while, after the last of many changes. */
function later(action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, 120);
  };
}
