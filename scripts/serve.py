"""`grpo serve`, for launchers and for a checkout; see grpo/cli/serve.py."""

from grpo.cli.serve import main

if __name__ == "__main__":
    main()
