"""`grpo train`, for launchers and for a checkout; see grpo/cli/train.py.

accelerate launch scripts/train_zero.py --config configs/quickstart.yaml
"""

from grpo.cli.train import main

if __name__ == "__main__":
    main()
