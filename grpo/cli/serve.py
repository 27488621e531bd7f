"""Serve a model as OpenAI's API does, with continuous batching, and a page to talk to it.

grpo serve --model runs/gsm8k
grpo serve --model runs/gsm8k --steps 100 200 latest --port 8080
GRPO_API_KEY=... grpo serve --model Qwen/Qwen2.5-0.5B --host 0.0.0.0

The key in the environment variable GRPO_API_KEY, if there is one, has to be sent by clients. SIGTERM and Ctrl-C let what runs
come to its end; a second one does not.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack

from grpo.cli.model_options import add_options
from grpo.data.hub_names import check_model
from grpo.inference.options import check_options, served_models
from grpo.observe.console import errors_for_users, positive
from grpo.system.parser import Parser

API_KEY = "GRPO_API_KEY"


def main() -> None:
    options = _parser().parse_args()
    with errors_for_users():
        _check_installed()
        check_model(options.model)
        for _, _, asked in served_models(options):
            check_options(asked)
        from grpo.serving import run

        with ExitStack() as stack:
            run.serve(options, api_key=os.environ.get(API_KEY) or None, stack=stack)
    from grpo.system.distributed import stop

    stop()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, one_model=False)
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="N",
        help="of a run: these checkpoints side by side, numbers, `latest` or `base`; default: the newest",
    )
    parser.add_argument("--name", metavar="NAME", help="what clients call the model; default: the directory's name")
    parser.add_argument("--port", type=_port, default=8000, metavar="N", help="0: any; default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all networks; default: %(default)s, this machine")
    parser.add_argument(
        "--max-context",
        type=positive,
        metavar="N",
        help="tokens of a prompt with its completion; default: what the model knows, at most 32768, or there is memory for",
    )
    parser.add_argument(
        "--max-sequences",
        type=positive,
        metavar="N",
        help="completions of a model at once; default: 256, on a CPU 32",
    )
    parser.add_argument(
        "--kv-cache-gib",
        type=_positive_number,
        metavar="GIB",
        help="for keys and values of each model; default: a share of what is free",
    )
    parser.add_argument(
        "--max-queue",
        type=_not_negative,
        default=256,
        metavar="N",
        help="completions of a model that may wait; beyond that clients are told to come again (429); default: %(default)s",
    )
    parser.add_argument(
        "--timeout",
        type=_positive_number,
        default=600.0,
        metavar="SECONDS",
        help="of a request; default: %(default)g",
    )
    return parser


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; it is from 0 to 65535")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _positive_number(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _check_installed() -> None:
    """Raises ValueError if the packages of the server are not there."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"grpo serve needs the package {error.name}. Install it: pip install 'starlette>=1.0,<2' 'uvicorn>=0.40'."
        ) from None
