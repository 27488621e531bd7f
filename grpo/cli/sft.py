"""Train a model on rows: prompts with completions, conversations, or token ids. docs/sft.md says what a row is.

grpo sft --config sft-quickstart
grpo sft --config configs/r1/20_cold_start.yaml --set training.epochs=3

It starts a process on each GPU of this machine, or one where there is none. On several machines, or with options of its own, a
launcher starts them: accelerate launch scripts/train_sft.py ..., torchrun -m grpo sft ... Exit codes are those of grpo train.
"""

import argparse
import os
import sys

from grpo.cli import launch
from grpo.config import SupervisedConfig
from grpo.observe.console import errors_for_users, positive
from grpo.system.stopping import EXIT_STOPPED, Stopped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one that comes with the library")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.SETTING=VALUE", help="override settings"
    )
    parser.add_argument(
        "--processes", type=positive, metavar="N", help="default: one for each GPU of this machine, else one"
    )
    arguments = parser.parse_args()
    with errors_for_users():
        config = SupervisedConfig.load(arguments.config, arguments.set)
        if "RANK" not in os.environ:
            num_processes = launch.num_processes(arguments.processes)
            if num_processes > 1:
                raise SystemExit(launch.run("grpo.cli.sft", sys.argv[1:], num_processes=num_processes))
    raise SystemExit(train(config))


def train(config: SupervisedConfig) -> int:
    """The exit code of a run, in each of its processes."""
    with errors_for_users():
        from grpo.sft.trainer import SupervisedTrainer
        from grpo.system import distributed

        trainer = SupervisedTrainer(config)
    exit_code = 0
    try:
        trainer.train()
    except Stopped as stopped:
        if stopped.settings:  # out of memory: go on in a fresh process, in place of this one
            distributed.leave_environment()
            given = [*sys.argv[1:], "--processes", "1", "--set", *stopped.settings]
            os.execv(sys.executable, [sys.executable, "-m", "grpo.cli.sft", *given])
        exit_code = EXIT_STOPPED
    distributed.stop()  # not after an error: the heartbeat lets the others know of it
    return exit_code


if __name__ == "__main__":
    main()
