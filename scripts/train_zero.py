"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

accelerate launch scripts/train_zero.py --config configs/quickstart.yaml
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
"""

import argparse
import os
import sys
import time

from grpo import Config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    arguments = parser.parse_args()
    try:
        config = Config.load(arguments.config, arguments.set)
        from grpo import Trainer, distributed

        trainer = Trainer(config)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        else:
            time.sleep(5)  # the launcher ends all processes with the first: let the one that speaks be first
        raise SystemExit(2) from None
    trainer.train()
    distributed.stop()


if __name__ == "__main__":
    main()
