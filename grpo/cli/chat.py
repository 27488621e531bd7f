"""Talk to a model in the terminal: thoughts dimmed, the answer plain.

grpo chat --model runs/quickstart
echo "What is 2+3?" | grpo chat --model runs/quickstart
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from grpo.cli.model_options import add_options
from grpo.data.hub_names import check_model
from grpo.inference.commands import HELP
from grpo.inference.options import check_options
from grpo.observe.console import console, errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say

if TYPE_CHECKING:
    from grpo.inference.chat import Conversation


def main() -> None:
    parser = Parser(description=__doc__, epilog=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--seed", type=int, help="of the sampling; default: another one each time")
    options = parser.parse_args()
    with errors_for_users():
        check_model(options.model)
        check_options(options)
    import torch

    from grpo.inference.chat import Conversation
    from grpo.inference.resolve_model import choose, said, trusted_tools
    from grpo.policy.tokenizer import load_tokenizer
    from grpo.system.distributed import stop
    from grpo.turns.use import Tools

    with errors_for_users():
        chosen = choose(options)
        tokenizer = load_tokenizer(chosen.model)
        data = chosen.data(tokenizer, options.template, options.system)
        tools = Tools.of(trusted_tools(chosen, options), chosen.settings.scoring, tokenizer, data)
        sampler = chosen.load(tokenizer, longest_prompt=1, engine="hf")
    for notice in [] if tools is None else tools.toolbox.notices():
        say(notice, file=sys.stderr)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    each = "" if data.template == "chat" else "; each question stands alone"
    greeting = f"{chosen.model.name}, template {data.template}{each}, {said(chosen.sampling)}; /help"
    talk(Conversation(sampler.model, data, chosen.sampling, tools=tools), greeting)
    stop()


def talk(conversation: Conversation, first_words: str) -> None:
    """Until the end of the input, or /quit. A pipe gets the answers alone."""
    from grpo.inference.chat import show

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
