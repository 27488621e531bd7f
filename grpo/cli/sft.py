"""Train a model on rows: prompts with completions, conversations, or token ids. docs/sft.md says what a row is.

grpo sft --config sft-quickstart
grpo sft --config configs/r1/20_cold_start.yaml --set training.epochs=3
grpo sft --config configs/r1/20_cold_start.yaml --dry-run

It starts a process on each GPU of this machine, or one where there is none. On several machines, or with options of its own, a
launcher starts them: accelerate launch scripts/train_sft.py ..., torchrun -m grpo sft ... Exit codes are those of grpo train.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from grpo.check.at_once import check_config
from grpo.cli import launch
from grpo.config import SupervisedConfig
from grpo.observe.console import errors_for_users, positive
from grpo.system.parser import Parser

if TYPE_CHECKING:
    from grpo import SupervisedTrainer

MODULE = "grpo.cli.sft"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one that comes with the library")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument("--dry-run", action="store_true", help="learn the longest update and say whether it fits")
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="default: one for each GPU of this machine, else one"
    )
    arguments = parser.parse_args()
    with errors_for_users():
        config = SupervisedConfig.load(arguments.config, arguments.set)
        check_config(config, resumes=not arguments.dry_run)
        launch.start_processes(MODULE, arguments.processes)
        if not arguments.dry_run:
            launch.say_other_place(config, arguments.config)
    raise SystemExit(dry_run(config) if arguments.dry_run else launch.train(lambda: make_trainer(config), MODULE))


def dry_run(config: SupervisedConfig) -> int:
    """See grpo/check/supervised.py."""
    with errors_for_users():
        from grpo.check import supervised
        from grpo.system import distributed

        exit_code = supervised.check(config)
        distributed.stop()
        return exit_code


def make_trainer(config: SupervisedConfig) -> SupervisedTrainer:
    with launch.ending_at_once():
        from grpo import SupervisedTrainer

    return SupervisedTrainer(config)


if __name__ == "__main__":
    main()
