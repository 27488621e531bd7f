"""A W&B workspace for the runs of a project, laid out as the report is, with the "aha moment" first.

grpo workspace --project grpo
grpo workspace --project countdown --entity my-team --name "Countdown, 1.5B"

Each call adds a view to the project; those that are there stay as they are. What the project's 20 newest runs have logged is
drawn. It needs a login (`wandb login`) and the package wandb-workspaces.
"""

from __future__ import annotations

import argparse
import os

from grpo.observe.console import errors_for_users
from grpo.system.parser import Parser


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", help="of the runs; default: WANDB_PROJECT, else grpo")
    parser.add_argument("--entity", help="user or team; default: WANDB_ENTITY, else what your account has")
    parser.add_argument("--name", default="grpo", help="what the view is called; default: %(default)s")
    arguments = parser.parse_args()
    with errors_for_users():
        from grpo.report import workspace

        project, said = project_of(arguments)
        workspace.check_package()
        api = workspace.connect()
        entity = workspace.entity_of(api) if arguments.entity is None else arguments.entity
        logged = workspace.logged_names(api, entity, project, said=said)
        made = workspace.build(logged, entity=entity, project=project, name=arguments.name)
        print(workspace.save(made))
        for section in made.sections:
            count, closed = len(section.panels), "" if section.is_open else "  (closed)"
            print(f"{count:>4} panel{'s' if count != 1 else ' '}  {section.name}{closed}")


def project_of(arguments: argparse.Namespace) -> tuple[str, str]:
    """The name of the project, and who says it, for errors.

    Raises:
        ValueError: an argument is empty, or the project's name is more than one.
    """
    from grpo.observe.sinks import default_project

    for name in ("project", "entity", "name"):
        given = getattr(arguments, name)
        if given is not None and not given.strip():
            raise ValueError(f"--{name} is {given!r}; it is empty. Give one, or leave --{name} out.")
    given, project = arguments.project, arguments.project or default_project()
    if given is None and not os.environ.get("WANDB_PROJECT"):
        return project, f"the project is {project!r} by default, without --project or WANDB_PROJECT"
    said = f"{'WANDB_PROJECT' if given is None else '--project'} is {project!r}"
    if "/" in project:
        entity, _, name = project.strip("/").partition("/")
        named = (
            f"--entity {entity} --project {name}" if name and "/" not in name else "ENTITY and PROJECT of its address"
        )
        raise ValueError(f"{said}; the name of a project has no /. Give {named}.")
    return project, said
