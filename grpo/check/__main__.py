"""Checks of a configuration on this machine, before a long run.

python -m grpo.check memory --config configs/qwen1.5b.yaml
python -m grpo.check invariance --config configs/qwen1.5b.yaml --processes 1 2

memory      Steps of the longest possible prompts and completions: memory and seconds of each phase, and what to lower if they do
            not fit. One process; scripts/train_zero.py --dry-run does the same with all that a launcher starts.
invariance  One update on the same completions with other token budgets, ZeRO stages and numbers of processes, compared.

Exit code 0: all is well; 1: it does not fit, or an update differs; 2: a setting is refused.
"""

import argparse

from grpo import Config
from grpo.console import errors_for_users


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m grpo.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="memory | invariance")
    for name in ("memory", "invariance"):
        command = commands.add_parser(name)
        command.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
        command.add_argument(
            "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
        )
        if name == "invariance":
            command.add_argument(
                "--processes", nargs="+", type=int, metavar="N", help="numbers of processes; default: 1, 2 and all GPUs"
            )
    arguments = parser.parse_args()
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        from grpo import distributed
        from grpo.check import invariance, memory

        if arguments.command == "memory":
            exit_code = memory.check(config)
            distributed.stop()
            raise SystemExit(exit_code)
        raise SystemExit(invariance.check(config, processes=arguments.processes))


if __name__ == "__main__":
    main()
