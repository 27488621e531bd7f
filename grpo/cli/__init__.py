"""`grpo COMMAND`: each command is a module here, imported when it is called."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper

from grpo.system.reader import ends_with_its_reader, outlives_its_reader

COMMANDS = {
    "train": "train a model, on every GPU of this machine",
    "sft": "train a model on rows: prompts with completions, conversations",
    "preflight": "is there anything to learn from, and in which template?",
    "check": "memory, invariance, gradients, steps: what to run before a long run",
    "scale": "write a recipe for the GPUs you own",
    "settings": "every setting with its meaning and its default",
    "evaluate": "answer benchmarks, several samples a question",
    "reject": "keep a model's own answers that are worth learning from: rejection sampling",
    "r1": "from R1-Zero to R1: cold start, rejection sampling, distillation, in one directory",
    "sample": "a group of completions for a question, with what each reward made of it",
    "chat": "talk to a model",
    "export": "a model as others run it: GGUF with an Ollama Modelfile, a folder, the hub",
    "serve": "an OpenAI-style server for a model, and a page to talk to it",
    "report": "one page to look at a run, or to compare several",
    "workspace": "a W&B workspace for the runs of a project, laid out as the report is",
    "compare": "run configurations with several seeds, and tell what differs",
    "aha": "words of reflection in a run's completions",
    "contamination": "which test questions share ten words with training questions",
    "completion": 'what a shell completes: eval "$(grpo completion bash)"',
}


GOES_ON = ("train", "sft", "r1")
"""Commands that do not end with the reader of their output: a line that nobody reads costs a run nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that is named first.

    Raises:
        SystemExit: 1: the command's own bad news; 2: it was called wrongly; 75: a run was stopped and saved; 130: Ctrl-C; 141:
            what reads the output has ended, of a command that is none of GOES_ON.
    """
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.encoding.lower() != "utf-8":
        with suppress(OSError):  # a pipe that was opened to be read, too
            sys.stdout.reconfigure(errors="backslashreplace")  # or a line with a character that it lacks is lost
    given = list(sys.argv[1:] if arguments is None else arguments)
    name = given[0] if given else "--help"
    with outlives_its_reader() if name in GOES_ON else ends_with_its_reader():
        _run(name, given[1:])


def _run(name: str, arguments: Sequence[str]) -> None:
    if name in ("-h", "--help", "help"):
        print(overview())
        return
    if name in ("-V", "--version"):
        from grpo.system.build import own_version

        print(f"grpo {own_version() or 'of a folder that is not installed'}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There is {', '.join(COMMANDS)}."
        print(f"error: grpo has no command {name!r}. {hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"grpo {name}", *arguments]
    import_module(f"grpo.cli.{name}").main()


def overview() -> str:
    lines = [f"  {name:<15}{what}" for name, what in COMMANDS.items()]
    return "\n".join(["grpo COMMAND ...; grpo COMMAND --help says more.\n", *lines, "\n  --version"])
