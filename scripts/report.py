"""`grpo report`, for launchers and for a checkout; see grpo/cli/report.py."""

from grpo.cli.report import main

if __name__ == "__main__":
    main()
