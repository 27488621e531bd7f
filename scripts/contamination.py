"""`grpo contamination`, for launchers and for a checkout; see grpo/cli/contamination.py."""

from grpo.cli.contamination import main

if __name__ == "__main__":
    main()
