"""`grpo r1`, for a checkout; see grpo/cli/r1.py."""

from grpo.cli.r1 import main

if __name__ == "__main__":
    main()
