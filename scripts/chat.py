"""Talk to a model in the terminal: thoughts dimmed, the answer plain.

python scripts/chat.py --model runs/quickstart
echo "What is 2+3?" | python scripts/chat.py --model runs/quickstart
"""

import argparse
import sys

import torch

from grpo.config import DataConfig
from grpo.inference.chat import HELP, Conversation, show
from grpo.inference.resolve_model import Chosen, add_options, choose, said
from grpo.observe.console import console, errors_for_users
from grpo.policy.tokenizer import load_tokenizer
from grpo.system.distributed import stop
from grpo.system.terminal import say


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--seed", type=int, help="of the sampling; default: another one each time")
    options = parser.parse_args()
    with errors_for_users():
        chosen = choose(options)
        tokenizer = load_tokenizer(chosen.model)
        data = chosen.data(tokenizer, options.template, options.system)
        sampler = chosen.load(tokenizer, longest_prompt=1, engine="hf")
    if options.seed is not None:
        torch.manual_seed(options.seed)
    talk(Conversation(sampler.model, data, chosen.sampling), greeting(chosen, data))
    stop()


def greeting(chosen: Chosen, data: DataConfig) -> str:
    each = "" if data.template == "chat" else "; each question stands alone"
    return f"{chosen.model.name}, template {data.template}{each}, {said(chosen.sampling)}; /help"


def talk(conversation: Conversation, first_words: str) -> None:
    """Until the end of the input, or /quit. A pipe gets the answers alone."""
    terminal, is_interactive = console(), sys.stdin.isatty() and sys.stdout.isatty()
    if is_interactive:
        import readline  # noqa: F401  what is typed can be edited

        terminal.print(first_words, style="dim", markup=False)
    while True:
        try:
            line = input("> " if is_interactive else "").strip()
        except KeyboardInterrupt:
            terminal.print()
            continue
        except EOFError:
            terminal.print() if is_interactive else None
            return
        if line == "/quit":
            return
        try:
            if line.startswith("/"):
                terminal.print(conversation.command(line), style="dim", markup=False)
            elif line:
                show(conversation, line, terminal)
        except ValueError as error:
            say(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
