"""`grpo chat`, for launchers and for a checkout; see grpo/cli/chat.py."""

from grpo.cli.chat import main

if __name__ == "__main__":
    main()
