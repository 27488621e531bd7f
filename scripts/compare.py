"""`grpo compare`, for launchers and for a checkout; see grpo/cli/compare.py."""

from grpo.cli.compare import main

if __name__ == "__main__":
    main()
