"""`python -m grpo` is the command `grpo`."""

from grpo.cli import main

if __name__ == "__main__":
    main()
