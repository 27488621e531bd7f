"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

accelerate launch scripts/train_zero.py --config configs/quickstart.yaml
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --dry-run
"""

import argparse

from grpo import Config
from grpo.console import errors_for_users


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
        from grpo import Trainer, distributed
        from grpo.preflight import PreflightRefused

        if arguments.dry_run:
            from grpo.check import memory

            exit_code = memory.check(config)
            distributed.stop()
            raise SystemExit(exit_code)
        trainer = Trainer(config)
    exit_code = 0
    try:
        trainer.train()
    except PreflightRefused:  # on all processes; what is wrong has been printed
        exit_code = 1
    distributed.stop()
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main()
