"""`grpo sample`, for launchers and for a checkout; see grpo/cli/sample.py."""

from grpo.cli.sample import main

if __name__ == "__main__":
    main()
