"""Checks of a configuration on this machine, before a long run.

grpo check memory --config configs/qwen1.5b.yaml
grpo check invariance --config configs/qwen1.5b.yaml --processes 1 2
grpo check gradients --config configs/qwen1.5b.yaml --out gradients.json
grpo check steps --config configs/qwen1.5b.yaml --steps 15 --seeds 0 1 2

memory      Steps of the longest possible prompts and completions: memory and seconds of each phase, and what to lower if they do
            not fit. One process; `grpo train --dry-run` does the same on every GPU.
invariance  One update on the same completions with other token budgets, ZeRO stages and numbers of processes, compared.
gradients   The gradient of the fast update, part by part, against that of the plain model in float32.
steps       The first steps of the run with the fast update and with the plain one, side by side.

Exit code 0: all is well; 1: it does not fit, or an update or a gradient differs; 2: a setting is refused.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from grpo import Config
from grpo.check.at_once import check_config
from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(prog="grpo check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="memory | invariance | gradients | steps")
    for name in ("memory", "invariance", "gradients", "steps"):
        command = commands.add_parser(name)
        command.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
        command.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
        )
        if name == "invariance":
            command.add_argument(
                "--processes", nargs="+", type=int, metavar="N", help="numbers of processes; default: 1, 2 and all GPUs"
            )
        if name == "gradients":
            command.add_argument(
                "--sequences", type=_positive, default=32, metavar="N", help="completions in the minibatch; default: 32"
            )
            command.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there, as JSON")
        if name == "steps":
            command.add_argument("--steps", type=_positive, default=15, metavar="N", help="of each run; default: 15")
            command.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="default: run.seed")
    arguments = parser.parse_args()
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        check_config(config)
        from grpo.check import gradients, invariance, memory, steps
        from grpo.system import distributed

        if arguments.command == "invariance":
            raise SystemExit(invariance.check(config, processes=arguments.processes))
        checks: dict[str, Callable[[], int]] = {
            "memory": lambda: memory.check(config),
            "gradients": lambda: gradients.check(config, num_sequences=arguments.sequences, out=arguments.out),
            "steps": lambda: steps.check(config, num_steps=arguments.steps, seeds=arguments.seeds),
        }
        exit_code = checks[arguments.command]()
        distributed.stop()
        raise SystemExit(exit_code)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


if __name__ == "__main__":
    main()
