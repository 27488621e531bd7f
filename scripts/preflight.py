"""`grpo preflight`, for launchers and for a checkout; see grpo/cli/preflight.py."""

from grpo.cli.preflight import main

if __name__ == "__main__":
    main()
