"""Run configurations with several seeds, and tell what differs in the end, with intervals.

grpo compare configs/quickstart.yaml --seeds 0 1 --out runs/compare \
    --variant drgrpo:algorithm.normalize_by_std=false,algorithm.aggregation=constant --variant token:algorithm.aggregation=token

Started again with the same arguments, it goes on where it was. Asked to stop (Ctrl-C, SIGTERM), it lets the runs save and prints
the table of what there is. Exit code 1: a run has failed, and the table is without it; 75: none has, but one has
stopped; 130 or 143: after Ctrl-C or SIGTERM.
"""

import argparse
import shlex
import sys
from pathlib import Path

from grpo.check.at_once import check_config
from grpo.evaluation.arms import arms_of, plan
from grpo.observe.console import errors_for_users, positive
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG", help="YAML files, such as those in configs/")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0], metavar="N", help="run.seed of the runs; default: 0"
    )
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:SECTION.SETTING=VALUE,...",
        help="each configuration with these overrides too, under this name",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override in all runs"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs and the table go")
    parser.add_argument(
        "--launch",
        type=_options,
        default=[],
        metavar="OPTIONS",
        help='options of accelerate launch, such as "--num_processes 2"',
    )
    parser.add_argument(
        "--at-once",
        type=positive,
        default=1,
        metavar="N",
        help="runs at once, each on its share of the GPUs; default: 1",
    )
    arguments = parser.parse_args()
    with errors_for_users():
        runs = plan(arms_of(arguments.configs, arguments.variant, arguments.set), arguments.seeds, arguments.out)
        for config in {run.arm.name: run.config for run in runs}.values():
            check_config(config)
        from grpo.evaluation import compare

        at = compare.places(arguments.at_once)
    options = ["--main_process_port", "0", *arguments.launch]  # 0: one that is free
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m"]
    exit_code = compare.carry_out(runs, [*launcher, "grpo.cli.train"], at=at)
    rows = compare.compare(runs)
    paths = compare.write(rows, runs, arguments.out)  # before the output, whose reader may be gone
    print(f"\n{compare.as_text(rows)}\n")
    for path in paths:
        print(path)
    raise SystemExit(exit_code)


def _options(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
