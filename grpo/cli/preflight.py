"""Before training: is there anything to learn from, and in which template?

grpo preflight --config configs/qwen1.5b.yaml
grpo preflight --config configs/qwen1.5b.yaml --templates r1_zero chat --questions 64

Exits with 0 if the configured template can be trained with, with 1 if it is refused, and with 2 if a setting is wrong.
"""

import argparse

from grpo import Config
from grpo.check.at_once import check_config
from grpo.cli.model_options import TEMPLATES
from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument(
        "--templates",
        nargs="+",
        choices=TEMPLATES,
        default=TEMPLATES,
        help="what to try besides data.template; default: all",
    )
    parser.add_argument("--questions", type=int, metavar="N", help="how many; default: preflight.num_questions")
    arguments = parser.parse_args()
    if arguments.questions is not None and arguments.questions < 1:
        parser.error(f"--questions is {arguments.questions}; there must be at least 1 question.")
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        check_config(config)
        from grpo.check import templates
        from grpo.system import distributed

        exit_code = templates.check(config, templates=arguments.templates, num_questions=arguments.questions)
    distributed.stop()
    raise SystemExit(exit_code)
