"""`grpo aha`, for launchers and for a checkout; see grpo/cli/aha.py."""

from grpo.cli.aha import main

if __name__ == "__main__":
    main()
