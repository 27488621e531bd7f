"""What an evaluation is asked to do: benchmarks, templates, samples; and the part of it that is one benchmark in one template."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.data import registry as benchmarks
from grpo.types import Prompt, Sampling

QUESTION = "{question}"
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True)
class PromptFormat:
    """How a question is put to the model, and where its answer is looked for."""

    template: str  # see grpo/data/prompts.py
    source: str  # see rewards/accuracy.py
    suffix: str = ""  # of the question


PROMPT_FORMATS = {
    "r1_zero": PromptFormat("r1_zero", "answer_tag"),
    "r1_zero_think": PromptFormat("r1_zero_think", "answer_tag"),
    "chat": PromptFormat("chat", "anywhere"),
    "chat_boxed": PromptFormat("chat", "anywhere", BOXED),
    "none": PromptFormat("none", "anywhere"),
    "none_boxed": PromptFormat("none", "anywhere", BOXED),
}
"""By name. Only the paper's template asks for the tag, so only there it has to be; elsewhere a base is not held to a form."""

SOURCES = {
    "answer_tag": "the last <answer> </answer> only",
    "anywhere": "the last <answer> </answer>, else the last \\boxed{}, else the last number",
}


@dataclass(frozen=True)
class Settings:
    """What is asked, and all that the answers depend on."""

    model: str  # a directory or an id of the hub
    benchmarks: list[str]
    templates: list[str]
    data: dict[str, str] = field(default_factory=dict)  # a file for a benchmark
    revision: str = "main"
    num_samples: int | None = None  # None: what each benchmark recommends
    temperature: float = 0.6
    top_p: float = 0.95
    max_completion_tokens: int | None = None  # None: see default_max_tokens in benchmark.py
    stop: list[str] = field(default_factory=list)  # texts that end a completion
    num_questions: int | None = None  # the first of each benchmark; None: all
    system_prompt: str | None = None  # of the chat templates; None: what the tokenizer's template says by itself
    dtype: str = "auto"
    seed: int = 0
    tools: list[str] = field(default_factory=list)  # that the model can call, as --tools has them
    environment: dict[str, Any] | None = (
        None  # that answers its turns, as the section has it; None: an answer is one turn
    )
    question_template: str | None = None  # around each question, {question} in it; None: it stands by itself
    endpoint: str | None = None  # the address of a server that hosts the model; None: it is loaded here

    def __post_init__(self) -> None:
        """Raises ValueError: a name that is not known, or settings that contradict each other."""
        if self.benchmarks or self.environment is None:
            benchmarks.check_names(self.benchmarks, self.data)
        for name in self.templates:
            if name not in PROMPT_FORMATS or self.templates.count(name) > 1:
                raise ValueError(
                    f"--templates has {name!r}; it is one of {', '.join(PROMPT_FORMATS)}, each at most once. Correct it."
                )
        if self.system_prompt is not None and not any(
            PROMPT_FORMATS[name].template == "chat" for name in self.templates
        ):
            raise ValueError(
                f"--system-prompt is {self.system_prompt!r}; only the chat templates have a system message, and --templates is "
                f"{','.join(self.templates)}. Remove it, or add chat or chat_boxed."
            )
        if self.endpoint is not None and self.stop:
            raise ValueError(
                f"--stop is {self.stop} with --endpoint; servers cut stop texts off, and with </answer> the answer could not be "
                "found. Leave it out."
            )
        if self.endpoint is not None and self.tools:
            raise ValueError(
                f"--tools is {self.tools} with --endpoint; tools are called where the model is sampled, and a server does that "
                "itself. Leave it out."
            )
        if self.endpoint is not None and self.environment is not None:
            raise ValueError(
                f"--environment is {self.environment['function']!r} with --endpoint; what it says is put behind the tokens of a "
                "turn, which a server does not hand out. Serve nothing, and name the model's directory: --model DIR."
            )
        if self.environment is not None and self.environment["rows"] and self.benchmarks:
            raise ValueError(
                f"--environment has rows {self.environment['rows']}; the questions are those of --benchmarks, and they have no "
                "effect. Remove one of the two."
            )
        if self.question_template is not None and self.question_template.count(QUESTION) != 1:
            raise ValueError(
                f"--question-template is {self.question_template!r}; the question takes the place of {QUESTION} in it, once. "
                "Write $'User: {question}\\nAssistant:', say."
            )
        if self.revision != "main" and Path(self.model).is_dir():
            raise ValueError(
                f"--revision is {self.revision!r}; --model is the directory {self.model!r}, which has none, so it has no effect. "
                "Remove it."
            )
        if "" in self.stop:
            raise ValueError(
                '--stop has ""; every completion contains it and would end with its first token. Remove it.'
            )
        if self.temperature == 0 and (self.num_samples or 1) > 1:
            raise ValueError(
                f"--samples is {self.num_samples}; at --temperature 0 all samples of a question are the same. Set it to 1, or "
                "raise --temperature."
            )
        if self.temperature == 0 and self.top_p < 1:
            raise ValueError(
                f"--top-p is {self.top_p}; at --temperature 0 the likeliest token is taken and it has no effect. Remove it."
            )

    def put(self, question: str, prompt_format: PromptFormat) -> str:
        """A question as it is asked."""
        return (self.question_template or QUESTION).replace(QUESTION, question + prompt_format.suffix)

    def samples_of(self, benchmark: str) -> int:
        """How often each question is answered."""
        if self.temperature == 0:
            return 1
        return self.num_samples or benchmarks.default_samples(benchmark)

    @property
    def sampling(self) -> Sampling:
        assert self.max_completion_tokens is not None, "evaluate has found out what the model allows"
        return Sampling(
            self.max_completion_tokens, temperature=self.temperature, top_p=self.top_p, stop=tuple(self.stop)
        )


@dataclass(frozen=True)
class Task:
    """One benchmark in one template."""

    benchmark: str
    template: str
    num_samples: int
    prompts: list[Prompt]
    num_ungradable: int  # questions left out, because their gold answer cannot be graded

    @property
    def key(self) -> dict[str, str]:
        return {"benchmark": self.benchmark, "template": self.template}

    @property
    def keys(self) -> list[tuple[str, str, int]]:
        """Of its questions."""
        return [(self.benchmark, self.template, prompt.row) for prompt in self.prompts]


@dataclass(frozen=True)
class Runtime:
    """What the answers do not depend on, but the time."""

    engine: str = "auto"
    max_sequences: int = 512
    kv_cache_gib: float | None = None
    num_workers: int = 2
    timeout_seconds: float = 10.0
    trust_remote_code: bool = False  # run the Python code that comes with the model
