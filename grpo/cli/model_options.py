"""Which model is asked, and how: what `grpo sample`, `chat` and `serve` share."""

from argparse import ArgumentParser
from typing import get_args

from grpo.config import DataConfig

TEMPLATES = get_args(DataConfig.model_fields["template"].annotation)


def add_options(parser: ArgumentParser, *, one_model: bool = True) -> None:
    """What these commands ask for; inference/resolve_model.py answers it.

    Args:
        one_model: of a run one checkpoint is chosen here; otherwise a command has options of its own for that.
    """
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="a run's directory, a checkpoint, a directory with a model, or a hub id",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model"
    )
    if one_model:
        parser.add_argument(
            "--step", type=int, metavar="N", help="of a run: the checkpoint of step N instead of the newest"
        )
        parser.add_argument("--base", action="store_true", help="of a run: the model that it started from")
        parser.add_argument(
            "--tools",
            nargs="*",
            metavar="NAME",
            help="that the model can call, as in tools.functions; none after it: no tools; default: the run's",
        )
    parser.add_argument(
        "--config", metavar="YAML", help="template, rewards, sampling and data from here; default: the run's"
    )
    parser.add_argument("--template", choices=TEMPLATES, help="default: the run's; without a run chat if there is one")
    parser.add_argument("--system", metavar="TEXT", help="system message of the chat template")
    parser.add_argument(
        "--temperature", type=float, help="0: the likeliest token; default: the run's, without a run 0.6"
    )
    parser.add_argument("--top-p", type=float, help="default: the run's, without a run 0.95")
    parser.add_argument(
        "--max-tokens",
        type=int,
        metavar="N",
        help="of an answer; default: the run's, without a run 1024 or half of what the model knows",
    )
