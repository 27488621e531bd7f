// The page of `grpo serve`: asks the server that it comes from, and shows answers while they are written.
"use strict";

const at = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens"];
let models = [], turns = [], running = null;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// ---- asking the server

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  if (response.status === 401) at("key-label").hidden = false;
  throw new Error(found?.error?.message ?? `The server answered ${response.status}.`);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The server has ended in the middle of an answer.");
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function start() {
  try {
    models = (await (await call("v1/models")).json()).data;
  } catch (error) {
    at("hint").replaceChildren(element("span", "problem", error.message));
    return;
  }
  at("hint").textContent = "";
  const own = models.map((model, place) => {
    const box = element("input");
    Object.assign(box, { type: "checkbox", value: model.id, checked: place === 0, onchange: follow });
    return element("label", "", box, model.id);
  });
  at("models").replaceChildren(at("models").firstElementChild, ...own);
  at("models").classList.toggle("alone", models.length === 1);
  for (const name of NUMBERS) at(name).placeholder = models[0].sampling[name];
  at("question").focus();
  follow();
}

function chosen() {
  const names = [...at("models").querySelectorAll("input:checked")].map((box) => box.value);
  return models.filter((model) => names.includes(model.id));
}

function follow() {
  const own = chosen();
  at("send").disabled = !own.length;
  const remembers = own.length > 0 && own.every((model) => model.has_history);
  at("system-label").hidden = !remembers;
  at("log").dataset.empty = models.length
    ? `${own.map((model) => model.id).join(", ") || "Choose a model."}\n` +
      (remembers || !own.length ? "" : `Template ${own.find((model) => !model.has_history).template}: each question stands alone.`)
    : "";
}

// ---- a turn

function messagesFor(model, question) {
  if (!model.has_history) return [{ role: "user", content: question }];
  const system = at("system").value.trim();
  const before = turns.flatMap((turn) => {
    const answer = turn.answers[turn.chosen];
    return answer?.content.trim() ? [{ role: "user", content: turn.question }, { role: "assistant", content: answer.content.trim() }] : [];
  });
  return [...(system ? [{ role: "system", content: system }] : []), ...before, { role: "user", content: question }];
}

function requestFor(model, question) {
  const request = {
    model: model.id,
    messages: messagesFor(model, question),
    n: Number(at("n").value) || 1,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const name of [...NUMBERS, "seed"]) if (at(name).value !== "") request[name] = Number(at(name).value);
  return request;
}

class Answer {
  constructor(model, turn) {
    Object.assign(this, { model, turn, reasoning: "", content: "", reason: null });
    this.thoughts = element("div", "words");
    this.summary = element("summary", "", "Thinking");
    this.fold = element("details", "thoughts", this.summary, this.thoughts);
    this.fold.open = true;
    this.fold.hidden = true;
    this.words = element("div", "words");
    this.note = element("span");
    this.verdict = element("span", "verdict");
    this.choose = element("button", "", "Go on with this");
    Object.assign(this.choose, { type: "button", hidden: true, onclick: () => turn.choose(this) });
    this.box = element("article", "reply live", element("header", "", element("b", "", model.id), this.verdict), this.fold, this.words,
      element("footer", "", this.note, this.choose));
  }

  add(delta) {
    if (delta.reasoning) {
      this.reasoning += delta.reasoning;
      this.fold.hidden = false;
      this.fold.classList.add("live");
      this.thoughts.textContent = this.reasoning.trimStart();
      this.thoughts.scrollTop = this.thoughts.scrollHeight;
    }
    if (delta.content) {
      if (this.reasoning && !this.content.trim()) this.closeThoughts();
      this.content += delta.content;
      this.words.textContent = this.content.replace(/^\s+/, "");
    }
  }

  closeThoughts() {
    this.fold.classList.remove("live");
    this.fold.open = false;
    const count = this.reasoning.trim().split(/\s+/).length;
    this.summary.textContent = `Thought in ${count} word${count === 1 ? "" : "s"}`;
  }

  end(reason) {
    this.reason = reason;
    this.box.classList.remove("live");
    if (this.reasoning) {
      const open = !this.content.trim();
      this.closeThoughts();
      this.fold.open = open;
    }
    this.words.replaceChildren(...this.content.trim().split(/(<\/?(?:answer|think)>)/).map((part) => (part.startsWith("<") && part.endsWith(">") ? element("span", "tag", part) : part)));
    this.note.textContent = { length: "cut off", stopped: "stopped", failed: "" }[reason] ?? "";
  }

  get whole() {
    return this.reasoning ? `<think>${this.reasoning}</think>${this.content}` : this.content;
  }
}

class Turn {
  constructor(question) {
    Object.assign(this, { question, answers: [], chosen: 0 });
    this.grid = element("div", "answers");
    this.speeds = element("div");
    this.box = element("section", "turn", element("div", "asked", question), this.grid, this.speeds);
  }

  choose(answer) {
    this.chosen = this.answers.indexOf(answer);
    this.answers.forEach((each, place) => each.box.classList.toggle("chosen", place === this.chosen));
  }

  async ask(model, signal) {
    const request = requestFor(model, this.question);
    const own = Array.from({ length: request.n }, () => new Answer(model, this));
    this.answers.push(...own);
    this.grid.append(...own.map((answer) => answer.box));
    const speed = element("p", "speed");
    this.speeds.append(speed);
    let first = 0, tokens = 0, atFirst = 0;
    const name = chosen().length > 1 ? `${model.id}: ` : "";
    try {
      const response = await call("v1/chat/completions", request, signal);
      for await (const event of events(response)) {
        if (event.usage) {
          tokens = event.usage.completion_tokens;
          if (!first && tokens) [first, atFirst] = [performance.now(), tokens];
          const seconds = (performance.now() - first) / 1000;
          const rate = seconds > 0.05 ? `, ${Math.round((tokens - atFirst) / seconds).toLocaleString("en")} tokens/s` : "";
          speed.textContent = `${name}${tokens.toLocaleString("en")} tokens${rate}`;
        }
        const follows = isAtEnd();
        for (const choice of event.choices) {
          own[choice.index].add(choice.delta);
          if (choice.finish_reason) own[choice.index].end(choice.finish_reason);
        }
        if (follows) toEnd();
      }
    } catch (error) {
      const stopped = error.name === "AbortError";
      for (const answer of own) if (!answer.reason) answer.end(stopped ? "stopped" : "failed");
      if (!stopped) {
        own.filter((answer) => !answer.content && !answer.reasoning).forEach((answer) => answer.box.remove());
        this.speeds.append(element("p", "problem", error.message));
        this.failed = true;
      }
    }
    return own;
  }

  async grade(gold) {
    try {
      const graded = this.answers.filter((answer) => answer.reason && answer.reason !== "failed");
      if (!graded.length) return;
      const body = { completions: graded.map((answer) => answer.whole), answer: gold, question: this.question };
      const found = await (await call("v1/verdict", body)).json();
      graded.forEach((answer, place) => {
        const right = found.verdicts[place];
        answer.verdict.textContent = right === null ? "can't tell" : right ? "\u2713 right" : "\u2717 wrong";
        answer.verdict.classList.add(right === null ? "unknown" : right ? "right" : "wrong");
      });
    } catch (error) {
      this.speeds.append(element("p", "problem", error.message));
    }
  }
}

const isAtEnd = () => at("log").scrollHeight - at("log").scrollTop - at("log").clientHeight < 60;
const toEnd = () => { at("log").scrollTop = at("log").scrollHeight; };

async function ask() {
  const question = at("question").value.trim();
  const wrong = [...at("settings").querySelectorAll("input")].find((input) => !input.checkValidity());
  if (wrong) {
    at("settings").hidden = false;
    wrong.reportValidity();
    return;
  }
  if (!question || running || !chosen().length) return;
  running = new AbortController();
  const turn = new Turn(question), gold = at("gold").value.trim();
  at("log").append(turn.box);
  at("question").value = "";
  grow();
  at("send").hidden = true;
  at("stop").hidden = false;
  at("said").textContent = "Answering";
  toEnd();
  await Promise.all(chosen().map((model) => turn.ask(model, running.signal)));
  running = null;
  at("stop").hidden = true;
  at("send").hidden = false;
  if (turn.answers.some((answer) => answer.content || answer.reasoning)) {
    turns.push(turn);
    if (turn.answers.length > 1 && chosen().some((model) => model.has_history)) {
      for (const answer of turn.answers) answer.choose.hidden = false;
      turn.choose(turn.answers[0]);
    }
  } else if (turn.failed && !at("question").value) {
    at("question").value = question; // to be asked again
    grow();
  }
  at("said").textContent = turn.failed ? "The server could not answer" : "Answered";
  if (gold) await turn.grade(gold);
  toEnd();
  at("question").focus();
}

function grow() {
  const field = at("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

// ---- what can be pressed

at("ask").onsubmit = (event) => { event.preventDefault(); ask(); };
at("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
};
at("question").oninput = grow;
at("stop").onclick = () => running?.abort();
document.onkeydown = (event) => { if (event.key === "Escape") running?.abort(); };
at("toggle").onclick = () => {
  at("settings").hidden = !at("settings").hidden;
  at("toggle").setAttribute("aria-expanded", String(!at("settings").hidden));
};
at("theme").onclick = () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
};
at("new").onclick = () => { running?.abort(); turns = []; at("log").replaceChildren(); at("question").focus(); };
at("key").onchange = start;
if (matchMedia("(max-width: 760px)").matches) at("toggle").onclick();
start();
