"""Write a recipe for the GPUs you own: the ratios stay, sizes and lengths become what fits into memory and time.

grpo scale --gpus 1 --gpu-memory 80 --model Qwen/Qwen2.5-1.5B --out my.yaml
grpo scale --config configs/r1/50_sft.yaml --gpus 2 --gpu-memory 80 --model Qwen/Qwen2.5-7B --out sft.yaml
grpo scale --config configs/recipes/dapo-32b.yaml --gpus 8 --model Qwen/Qwen2.5-7B --hours 48 --out dapo.yaml

No weights are loaded. What comes out is an estimate; `grpo train --dry-run` measures it.
"""

import argparse
import math
from pathlib import Path

from grpo.config import shipped
from grpo.data.hub_names import check_model
from grpo.inference.options import is_supervised
from grpo.observe.console import errors_for_users, positive
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, default=shipped.shipped("r1_zero_paper"), help="the recipe; default: r1_zero_paper"
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_HUB_ID", help="only its configuration is read")
    parser.add_argument("--gpus", type=positive, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gpu-memory", type=_above_zero, default=80, metavar="GIB", help="of each; default: %(default)s"
    )
    parser.add_argument(
        "--gpu", choices=("a100", "h100", "h200"), default="h100", help="for the time; default: %(default)s"
    )
    parser.add_argument(
        "--hours", type=_above_zero, default=24, metavar="H", help="for the whole run; default: %(default)s"
    )
    parser.add_argument(
        "--max-tokens",
        type=positive,
        metavar="N",
        help="of a completion; default: the recipe's, 2048 at most; of a row of "
        "supervised training; default: the recipe's",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the YAML file to write")
    arguments = parser.parse_args()
    with errors_for_users():
        if arguments.out.exists():
            raise ValueError(f"--out is {arguments.out}; it is there already. Remove it, or name another file.")
        if not arguments.out.parent.is_dir():
            raise ValueError(f"--out is {arguments.out}; there is no directory {arguments.out.parent}. Make it first.")
        check_model(arguments.model, whole=False)
        arguments.config = shipped.find(arguments.config)  # so that the header has the name of a file
        text = supervised(arguments) if is_supervised(arguments.config) else reinforcement(arguments)
    arguments.out.write_text(text)
    print(text)


def supervised(arguments: argparse.Namespace) -> str:
    """The file's text; `--hours` has no say, as rows are not left out."""
    from grpo import SupervisedConfig
    from grpo.check import scale, scale_supervised

    recipe = SupervisedConfig.load(arguments.config)
    return scale_supervised.as_yaml(
        recipe,
        arguments.config,
        scale.shape_of(arguments.model),
        scale.Hardware(arguments.gpus, arguments.gpu_memory, arguments.gpu),
        max_tokens=arguments.max_tokens or recipe.data.max_tokens,
        run_dir=f"runs/{arguments.out.stem}",
        out=arguments.out,
    )


def reinforcement(arguments: argparse.Namespace) -> str:
    from grpo import Config
    from grpo.check import scale
    from grpo.data.files import load_table
    from grpo.data.where import Selection

    recipe = Config.load(arguments.config)
    max_tokens = arguments.max_tokens or min(scale.USUAL_TOKENS, recipe.rollout.max_completion_tokens)
    hardware = scale.Hardware(arguments.gpus, arguments.gpu_memory, arguments.gpu)
    shape = scale.shape_of(arguments.model)
    scaled = scale.scale_down(recipe, shape, hardware, max_tokens=max_tokens, hours=arguments.hours)
    name = recipe.data.name if isinstance(recipe.data.name, str) else None
    local = name is not None and Path(name).is_file()
    rows: int | None = None
    if local:
        table = load_table(str(name), None, recipe.data.split, "data.name")
        rows = sum(1 for _ in Selection.of(recipe.data, held_out=False).kept(table, "data.name"))
    return scale.as_yaml(
        scaled, arguments.config, run_dir=f"runs/{arguments.out.stem}", out=arguments.out, num_questions=rows
    )


def _above_zero(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return float(text)
