"""A W&B workspace for the runs of a project, laid out as the report is, with the "aha moment" first.

grpo workspace --project grpo
grpo workspace --project countdown --entity my-team --name "Countdown, 1.5B"

Each call adds a view to the project; those that are there stay as they are. What the project's 20 newest runs have logged is
drawn. It needs a login (`wandb login`) and `pip install -e '.[workspace]'`.
"""

import argparse

from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", help="of the runs; default: WANDB_PROJECT, else grpo")
    parser.add_argument("--entity", help="user or team; default: WANDB_ENTITY, else what your account has")
    parser.add_argument("--name", default="grpo", help="what the view is called; default: %(default)s")
    arguments = parser.parse_args()
    with errors_for_users():
        from grpo.observe.sinks import default_project
        from grpo.report import workspace

        workspace.check_package()
        project = arguments.project or default_project()
        api = workspace.connect()
        entity = arguments.entity or workspace.entity_of(api)
        logged = workspace.logged_names(api, entity, project)
        made = workspace.build(logged, entity=entity, project=project, name=arguments.name)
        print(workspace.save(made))
        for section in made.sections:
            count, closed = len(section.panels), "" if section.is_open else "  (closed)"
            print(f"{count:>4} panel{'s' if count != 1 else ' '}  {section.name}{closed}")
