"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

accelerate launch scripts/train_zero.py --config configs/quickstart.yaml
accelerate launch scripts/train_zero.py --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

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
        raise_if_not_ours(error)
        rank = os.environ.get("RANK", "0")
        if rank != "0":
            time.sleep(5)  # the launcher ends all processes with the first; mostly rank 0 has the same to say
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    trainer.train()
    distributed.stop()


def raise_if_not_ours(error: ValueError) -> None:
    """A message for users speaks for itself; a ValueError out of a library needs its traceback."""
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if origin.parent.name not in ("grpo", "rollout", "rewards"):
        raise error


if __name__ == "__main__":
    main()
