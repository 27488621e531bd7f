"""`grpo scale`, for launchers and for a checkout; see grpo/cli/scale.py."""

from grpo.cli.scale import main

if __name__ == "__main__":
    main()
