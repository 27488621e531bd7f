"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

grpo train --config quickstart
grpo train --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
grpo train --config configs/qwen1.5b.yaml --dry-run

It starts a process on each GPU of this machine, or one where there is none. On several machines, or with options of its own, a
launcher starts them: accelerate launch scripts/train_zero.py ..., torchrun -m grpo train ...

Exit code 0: done; 1: refused by the preflight, or an error; 2: a setting is wrong; 75: stopped and saved, start it again with
run.resume=auto to go on; 76: another process was lost; 130: Ctrl-C before there was anything to save.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from grpo.check.at_once import check_config
from grpo.cli import launch
from grpo.config import Config
from grpo.observe.console import errors_for_users, positive
from grpo.system.parser import Parser

if TYPE_CHECKING:
    from grpo import Trainer

MODULE = "grpo.cli.train"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        required=True,
        help="a YAML file, or the name of one that comes with the library, such as quickstart",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run the longest possible steps and say whether they fit"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="default: one for each GPU of this machine, else one"
    )
    arguments = parser.parse_args()
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        check_config(config, resumes=not arguments.dry_run)
        launch.start_processes(MODULE, arguments.processes)
        if not arguments.dry_run:
            launch.say_other_place(config, arguments.config)
    raise SystemExit(dry_run(config) if arguments.dry_run else launch.train(lambda: make_trainer(config), MODULE))


def dry_run(config: Config) -> int:
    """See grpo/check/memory.py."""
    with errors_for_users():
        from grpo.check import memory
        from grpo.system import distributed

        exit_code = memory.check(config)
        distributed.stop()
        return exit_code


def make_trainer(config: Config) -> Trainer:
    with launch.ending_at_once():
        from grpo import Trainer

    return Trainer(config)


if __name__ == "__main__":
    main()
