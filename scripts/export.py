"""`grpo export`, for launchers and for a checkout; see grpo/cli/export.py."""

from grpo.cli.export import main

if __name__ == "__main__":
    main()
