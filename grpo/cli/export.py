"""Write a trained model as others run it: GGUF for llama.cpp and Ollama, or a plain Hugging Face folder.

grpo export runs/quickstart --to gguf --quantization q8_0 --out exported/quickstart
grpo export runs/gsm8k --step 200 --to gguf --quantization bf16 --out exported/gsm8k-200

docs/export.md says how to run them, and how near the quantised ones are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say


def main() -> None:
    options = parser().parse_args()
    with errors_for_users():
        say(f"written to {run(options)}")


def run(options: argparse.Namespace) -> Path:
    from grpo.export.export import Asked, export_gguf
    from grpo.inference.resolve_model import choose, run_directory

    asked = Asked(choose(options), run_directory(options.model), Path(options.out), options.quantization)
    return export_gguf(asked)


def parser() -> argparse.ArgumentParser:
    made = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="RUN_OR_DIR", help="a run's directory, a checkpoint, a model or an adapter")
    made.add_argument("--to", choices=("gguf",), default="gguf", help="default: %(default)s")
    made.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    made.add_argument(
        "--quantization",
        default="q8_0",
        metavar="TYPE",
        help="f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0; default: %(default)s",
    )
    made.add_argument("--step", type=int, metavar="N", help="of a run: the checkpoint of step N instead of the newest")
    made.add_argument("--base", action="store_true", help="of a run: the model that it started from")
    made.add_argument("--trust-remote-code", action="store_true", help="run the Python code that comes with the model")
    made.add_argument("--temperature", type=float, default=0.6, help="that is proposed; default: %(default)s")
    made.add_argument("--top-p", type=float, default=0.95, help="that is proposed; default: %(default)s")
    made.set_defaults(config=None, max_tokens=None)
    return made
