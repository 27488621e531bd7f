"""Write a trained model as others run it: GGUF with an Ollama Modelfile, or a plain Hugging Face folder, each with a model card.

grpo export runs/quickstart --to gguf --quantization q8_0 --out exported/quickstart
grpo export runs/quickstart --to folder --out exported/quickstart-hf
grpo export runs/quickstart --to hub user/quickstart
grpo export runs/gsm8k --step 200 --to gguf --quantization bf16 --out exported/gsm8k-200

docs/export.md says how to run them, and how near the quantised ones are.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from grpo.data.hub_names import check_model
from grpo.export.destination import check_destination
from grpo.export.quantizations import check_quantization
from grpo.inference.options import check_options, run_directory, short_name
from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say


def main() -> None:
    options = parser().parse_args()
    before = signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # by way of what removes half a folder
    try:
        with errors_for_users():
            check_model(options.model, "RUN_OR_DIR")
            check_options(options)
            say("\n".join(f"written to {place}" for place in run(options)))
    finally:
        signal.signal(signal.SIGTERM, before)


def run(options: argparse.Namespace) -> list[str]:
    """Where it is now."""
    kind, *repo = options.to
    check(options, kind, repo)
    from grpo.export.export import Asked, export, push
    from grpo.inference.resolve_model import choose

    asked = Asked(
        choose(options),
        run_directory(options.model),
        Path(repo[0] if repo else options.out),
        kind,
        options.quantization or "q8_0",
        options.think_tokens,
    )
    return push(asked, private=not options.public) if kind == "hub" else [str(export(asked))]


def check(options: argparse.Namespace, kind: str, repo: list[str]) -> None:
    """Raises ValueError for options that are missing, or have no effect."""
    if kind not in KINDS:
        raise ValueError(f"--to is {kind}; it is one of {', '.join(KINDS)}. Choose one of them.")
    if len(repo) != (kind == "hub"):
        raise ValueError(f"--to is {' '.join([kind, *repo])}; it is gguf, folder, or hub with user/name. Correct it.")
    if kind != "hub" and options.out is None:
        raise ValueError(f"--out is missing; with --to {kind} it names a new folder. Add it.")
    for name, given, kinds in (
        ("quantization", options.quantization, ("gguf",)),
        ("out", options.out, ("gguf", "folder")),
        ("public", options.public or None, ("hub",)),
    ):
        if given is not None and kind not in kinds:
            raise ValueError(f"--{name} is {given} with --to {kind}, where it has no effect. Leave it out.")
    if options.quantization is not None:
        check_quantization(
            options.quantization, file=f"{short_name(options.model, run_directory(options.model))}-BF16.gguf"
        )
    if options.out is not None:
        check_destination(Path(options.out))


KINDS = ("gguf", "folder", "hub")


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="RUN_OR_DIR", help="a run's directory, a checkpoint, a model or an adapter")
    made.add_argument(
        "--to",
        nargs="+",
        default=["gguf"],
        metavar=("KIND", "USER/NAME"),
        help="gguf, folder, or hub with the name of a model there; default: gguf",
    )
    made.add_argument("--out", metavar="DIR", help="a new folder, of gguf and folder")
    made.add_argument("--public", action="store_true", help="of hub: let everybody see a repository that is new")
    made.add_argument(
        "--quantization",
        metavar="TYPE",
        help="of gguf: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; default: q8_0",
    )
    made.add_argument(
        "--think-tokens",
        nargs="?",
        const="mean",
        choices=("mean", "sum"),
        help="make <think> and </think> tokens of their own, with the mean or the sum of their parts' rows",
    )
    made.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint of step N instead of the newest")
    made.add_argument("--base", action="store_true", help="of a run: the model that it started from")
    made.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with the model")
    made.add_argument("--temperature", type=float, default=0.6, help="that is proposed; default: %(default)s")
    made.add_argument("--top-p", type=float, default=0.95, help="that is proposed; default: %(default)s")
    made.set_defaults(config=None, max_tokens=None)
    return made
