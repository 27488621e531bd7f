"""`grpo reject`, for launchers and for a checkout; see grpo/cli/reject.py."""

from grpo.cli.reject import main

if __name__ == "__main__":
    main()
