"""`grpo sft`, for launchers and for a checkout; see grpo/cli/sft.py.

accelerate launch scripts/train_sft.py --config configs/sft-quickstart.yaml
"""

from grpo.cli.sft import main

if __name__ == "__main__":
    main()
