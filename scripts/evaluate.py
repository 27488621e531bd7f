"""`grpo evaluate`, for launchers and for a checkout; see grpo/cli/evaluate.py."""

from grpo.cli.evaluate import main

if __name__ == "__main__":
    main()
