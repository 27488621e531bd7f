"""Train a base model with GRPO and rule-based rewards, R1-Zero style.

grpo train --config quickstart
grpo train --config configs/qwen1.5b.yaml --set rollout.group_size=8 run.steps=100
grpo train --config configs/qwen1.5b.yaml --dry-run

It starts a process on each GPU of this machine, or one where there is none. On several machines, or with options of its own, a
launcher starts them: accelerate launch scripts/train_zero.py ..., torchrun -m grpo train ...

Exit code 0: done; 1: refused by the preflight, or an error; 2: a setting is wrong; 75: stopped and saved, start it again with
run.resume=auto to go on; 76: another process was lost; 130: Ctrl-C before there was anything to save.
"""

import argparse
import os
import sys

from grpo.cli import launch
from grpo.config import Config
from grpo.observe.console import errors_for_users, positive
from grpo.system.stopping import EXIT_STOPPED, Stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config",
        required=True,
        help="a YAML file, or the name of one that comes with the library, such as quickstart",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="run the longest possible steps and say whether they fit"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="default: one for each GPU of this machine, else one"
    )
    arguments = parser.parse_args()
    with errors_for_users():
        config = Config.load(arguments.config, arguments.set)
        if "RANK" not in os.environ:
            num_processes = launch.num_processes(arguments.processes)
            if num_processes > 1:
                raise SystemExit(launch.run("grpo.cli.train", sys.argv[1:], num_processes=num_processes))
    raise SystemExit(dry_run(config) if arguments.dry_run else train(config))


def dry_run(config: Config) -> int:
    """See grpo/check/memory.py."""
    with errors_for_users():
        from grpo.check import memory
        from grpo.system import distributed

        exit_code = memory.check(config)
        distributed.stop()
        return exit_code


def train(config: Config) -> int:
    """The exit code of a run, in each of its processes."""
    with errors_for_users():
        from grpo import Trainer
        from grpo.run.preflight import PreflightRefused
        from grpo.system import distributed

        trainer = Trainer(config)
    exit_code = 0
    try:
        with errors_for_users(trainer.directory):
            trainer.train()
    except Stopped as stopped:
        if stopped.settings:  # out of memory: go on in a fresh process, in place of this one
            distributed.leave_environment()
            again = [
                sys.executable,
                "-m",
                "grpo.cli.train",
                *sys.argv[1:],
                "--processes",
                "1",
                "--set",
                *stopped.settings,
            ]
            os.execv(sys.executable, again)
        exit_code = EXIT_STOPPED
    except PreflightRefused:  # on all processes; what is wrong has been printed
        exit_code = 1
    distributed.stop()  # not after an error: the heartbeat lets the others know of it
    return exit_code


if __name__ == "__main__":
    main()
