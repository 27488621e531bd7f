"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

accelerate launch scripts/train_zero.py --config configs/quickstart.yaml
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --dry-run
"""

import argparse
import os
import sys

from grpo import Config
from grpo.observe.console import errors_for_users
from grpo.system.stopping import EXIT_STOPPED, Stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run the longest possible steps and say whether they fit"
    )
    arguments = parser.parse_args()
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        from grpo import Trainer
        from grpo.run.preflight import PreflightRefused
        from grpo.system import distributed

        if arguments.dry_run:
            from grpo.check import memory

            exit_code = memory.check(config)
            distributed.stop()
            raise SystemExit(exit_code)
        trainer = Trainer(config)
    exit_code = 0
    try:
        trainer.train()
    except Stopped as stopped:
        if stopped.settings:  # out of memory: go on in a fresh process, in place of this one
            distributed.leave_environment()
            os.execv(sys.executable, [sys.executable, *sys.argv, "--set", *stopped.settings])
        exit_code = EXIT_STOPPED
    except PreflightRefused:  # on all processes; what is wrong has been printed
        exit_code = 1
    distributed.stop()  # not after an error: the heartbeat lets the others know of it
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
