"""The path from R1-Zero to R1: stages that hand models and rows on to each other, in one directory.

grpo r1 r1-tiny
grpo r1 r1 --print
grpo r1 r1-tiny --out runs/short --set zero:run.steps=10 cold_rows:num_questions=64

It runs what is not done yet; a stage that was stopped goes on. docs/r1.md says what a stage is.

Exit code 0: done; 2: a setting is wrong, or files of a finished stage changed; 75: a stage was stopped, start it again to go on;
else that of the stage that failed.
"""

import argparse

from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser
from grpo.system.terminal import say


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        metavar="DIR",
        help="a folder with stages.yaml, or the name of one that comes with the library: r1-tiny, r1, gsm8k-warm, "
        "gsm8k-distil, countdown-warm, countdown-short",
    )
    parser.add_argument("--out", metavar="DIR", help="where all files go; default: runs/ and the folder's name")
    parser.add_argument(
        "--print", action="store_true", help="print the launch line of each stage, for a scheduler, and run nothing"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="STAGE:NAME=VALUE",
        help="override a setting of a stage, or an option of one that is no training",
    )
    arguments = parser.parse_args()
    with errors_for_users():
        from grpo.cli.check_stages import check_stages
        from grpo.pipeline.run import line, run
        from grpo.pipeline.stages import read_plan

        plan = read_plan(arguments.stages, arguments.out, arguments.set)
        if arguments.print:
            say("\n".join(line(plan, stage) for stage in plan.stages))
            return
        code = run(plan, check=check_stages)
    raise SystemExit(code)
