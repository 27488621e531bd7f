"""Save and resume. A checkpoint is a directory that appears whole or not at all:

    checkpoints/step-00000050/         after step 50; step-00000050-0003: and three of the updates of the step under way
        hf/             weights, config and tokenizer; `AutoModelForCausalLM.from_pretrained` loads it
        adapter/        with LoRA: the adapters alone, which are merged into hf/; `PeftModel.from_pretrained` loads it
        training/       DeepSpeed's state: float32 masters and optimizer moments, a file per process
        reference.safetensors    the reference's weights, once it is no longer the starting model
        random/         each process's random states
        under_way/      each process's part of the step under way: minibatches to come, and what is known of those done
        drafts/         with rollout.carry_over: each process's part of what is sampled of later questions
        state.json      where the run stands, the configuration it ran with, and each file's size and checksum

It is written under a temporary name and renamed once everything is on disk, so a run that is killed while saving still has
the checkpoint before. Only then are old ones removed. One that is not as it was written is set aside when a run resumes, and
the one before it is taken.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from grpo.config import AnyConfig, Config
from grpo.policy.model_source import complete_checkpoints, name_of, numbers_of
from grpo.policy.policy import Policy
from grpo.run import disk, inputs
from grpo.run.resumable import check_resumable, checksum_of, longer, read_state
from grpo.system import progress
from grpo.system.distributed import GIB, Processes, num_local_processes
from grpo.system.files import flush
from grpo.system.host_memory import available_bytes
from grpo.system.stopping import RunError
from grpo.system.terminal import say
from grpo.system.writer import Writer, problem_with, save_tensors
from grpo.training import carry_over
from grpo.training.state import RunState, StepState
from grpo.types import Drafts

REFERENCE = "reference.safetensors"


class CheckpointError(RunError):
    """A checkpoint could not be written. Those before it are untouched."""


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    final: Path
    writer: Writer
    record: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of a run. Every process has one, and all call the same methods at the same time."""

    def __init__(self, directory: Path, config: AnyConfig, processes: Processes, *, given: dict[str, str]) -> None:
        """Args: given: digests of what the run was given; see grpo/run/inputs.py."""
        self.directory = directory
        self.config = config
        self.processes = processes
        self.given = given
        self._pending: _Pending | None = None
        progress.last_checkpoint = None
        self._stuck: set[Path] = set()  # old checkpoints that cannot be removed, which was said

    def save(self, state: RunState, step: StepState, *, policy: Policy, wait: bool = False) -> Path:
        """Write a checkpoint of the state, or, in the background (`checkpoint.background`), begin to.

        Args:
            step: this process's part of a step that is not finished; not sampled, between steps.
            wait: until it is complete, for which no copy is needed.

        Raises:
            CheckpointError: on all processes, if one of them could not write its part, now or in the background.
        """
        self.try_to(self.finish)  # what became of the one before must not cost this one
        under_way, updates = None, None
        if step.rollout is not None:
            under_way = replace(step, rollout=replace(step.rollout, passes=[]), drafts={})
            updates = state.optimizer_steps - step.first_update
        final = self.directory / name_of(state.step, updates)
        if self.processes.on_main(final.exists):
            return final
        self._make_room(policy)
        waits = wait or under_way is not None
        writer = Writer(_partial(final), background=not waits and self._goes_to_background(policy))
        self._check([self.processes.on_main(lambda: _prepare(_partial(final)))], final)
        carries = isinstance(self.config, Config) and self.config.rollout.carry_over
        drafts = step.drafts if carries else None
        _write_all(writer, policy, rank=self.processes.rank, under_way=under_way, drafts=drafts)
        record = {
            **asdict(state),
            "world_size": self.processes.world_size,
            "config": self.config.model_dump(mode="json"),
            "given": self.given,
            "optimizer": type(policy.engine.basic_optimizer).__name__,
        }
        self._pending = _Pending(final, writer, record)
        writer.start()
        if not writer.background:
            self.finish()
        return final

    def _goes_to_background(self, policy: Policy) -> bool:
        """What `checkpoint.background` comes to now, for all processes alike, since they complete a checkpoint together."""
        chosen = self.config.checkpoint.background
        return all(self.processes.gather(copy_fits(policy, self.processes))) if chosen == "auto" else chosen

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part of a checkpoint that is not complete yet."""
        return self._pending is not None and self._pending.writer.is_done

    def wait(self) -> None:
        """Until this process has written its part of a checkpoint. Alone it completes it; of several, one may have failed, and
        the others would wait for it in `finish`."""
        if self._pending is not None:
            self._pending.writer.wait()
            if self.processes.world_size == 1:
                self.try_to(self.finish)

    def finish(self) -> None:
        """Wait for a checkpoint that is being written, and make it one.

        Raises:
            CheckpointError: as `save`.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        pending.writer.wait()
        parts = self.processes.gather((pending.writer.files, pending.writer.error))
        self._check([error for _, error in parts], pending.final)
        files = {name: known for part, _ in parts for name, known in part.items()}
        self._check([self.processes.on_main(lambda: self._complete(pending, files))], pending.final)
        progress.last_checkpoint = pending.final

    def try_to(self, write: Callable[[], object]) -> None:
        """Save or finish; where that fails, say so, because a run does not end because its disk is full for a while."""
        try:
            write()
        except CheckpointError as error:
            self.processes.say(f"warning: {error} Training goes on, and the next checkpoint is tried when it is due.")

    def _complete(self, pending: _Pending, files: dict[str, Any]) -> str | None:
        partial = _partial(pending.final)
        with progress.busy("completing a checkpoint"):
            try:
                _write_state(partial, {**pending.record, "files": files})
                for path in [path for path in partial.rglob("*") if path.is_dir()]:
                    flush(path)
                flush(partial)
                os.replace(partial, pending.final)
                flush(self.directory)
            except OSError as error:
                return str(error)
            self._prune()
        return None

    def _prune(self) -> None:
        for old in disk.beyond(self.directory, self.config, self.config.checkpoint.keep):
            self._remove_old(old)

    def _remove_old(self, old: Path) -> None:
        problem = _remove(old)
        if problem is not None and old not in self._stuck:
            self._stuck.add(old)
            say(f"warning: the old checkpoint {old} cannot be removed: {problem}. Training goes on.")

    def _make_room(self, policy: Policy) -> None:
        """Where the disk is too full for another checkpoint, the oldest go before it and not after; see disk.to_go."""
        needed = disk.num_bytes(policy)

        def remove() -> list[str]:
            going = disk.to_go(self.directory, self.config, needed)
            for old in going:
                self._remove_old(old)
            return [old.name for old in going if not old.exists()]

        with progress.busy("removing checkpoints"):
            gone = self.processes.on_main(remove)
        if gone:
            self.processes.say(f"the disk has no room for another checkpoint, so {', '.join(gone)} went before it")

    def last_before(self, began: int, policy: Policy) -> Path | None:
        """The newest checkpoint from before the trouble that showed in step `began`, on every process; None if there is none.

        The weights that `began` started from are those saved the step before, so they are suspect; older ones sampled and updated
        at least one step that was well. A policy whose reference has moved goes back only to a checkpoint that holds a reference.
        """
        for path in reversed(self.processes.on_main(lambda: complete_checkpoints(self.directory))):
            step, updates = numbers_of(path)
            if step + 1 >= began or updates is not None:
                continue
            has_reference = self.processes.on_main((path / REFERENCE).exists)
            if (has_reference or not policy.reference_moved) and _problem(path, self.processes) is None:
                return path
        return None

    def remove_after(self, checkpoint: Path) -> None:
        """Remove the later ones, which the run is not going to build on.

        Raises:
            CheckpointError: on all processes, if one of them would stay.
        """

        def remove() -> str | None:
            later = [path for path in complete_checkpoints(self.directory) if path.name > checkpoint.name]
            return next((f"{path} cannot be removed: {problem}" for path in later if (problem := _remove(path))), None)

        with progress.busy("removing checkpoints"):
            problem = self.processes.on_main(remove)
        if problem is not None:
            raise CheckpointError(f"{problem}. The run must not build on it. Remove it, and resume.")
        progress.last_checkpoint = checkpoint

    def check_room(self, policy: Policy, *, step: int, num_steps: int) -> None:
        """Before training, which may take hours until the first checkpoint is due; every process calls it.

        Args:
            step: of `num_steps`, after which training begins.

        Raises:
            CheckpointError: the disk has no room for one. It has none for as many as are to be there at once: a warning.
        """
        room = self.processes.on_main(
            lambda: disk.Room.at(self.directory, self.config, policy, step=step, num_steps=num_steps)
        )
        if room.each > room.free + room.can_go:
            raise CheckpointError(
                f"a checkpoint takes about {room.each / GIB:.3g} GiB, and {room.free / GIB:.3g} GiB are free at "
                f"{self.directory.parent}. Free some space, or set run.dir to a directory on another disk."
            )
        if room.fits < room.at_once:
            settings = self.config.checkpoint
            self.processes.say(
                f"warning: the disk of {self.directory.parent} has room for {room.fits} checkpoints of about "
                f"{room.each / GIB:.3g} GiB; {room.at_once} are to be there at once (checkpoint.keep is {settings.keep}, "
                f"keep_every {settings.keep_every}). Where it is full the oldest go before another is written, but for the "
                "newest, those of keep_every and those that a roll-back needs; what does not fit then is not written. Free some "
                "space, or set run.dir to a directory on another disk."
            )

    def _check(self, errors: list[str | None], final: Path) -> None:
        for rank, error in enumerate(errors):
            if error is not None:
                self.processes.on_main(lambda: shutil.rmtree(_partial(final), ignore_errors=True))
                before = self.processes.on_main(lambda: [path.name for path in complete_checkpoints(self.directory)])
                raise CheckpointError(
                    f"checkpoint {final.name} was not written: {error} (process {rank}). {self._room()} Complete checkpoints in "
                    f"{self.directory}: {', '.join(before) or 'none'}."
                )

    def _room(self) -> str:
        return f"{shutil.disk_usage(self.directory.parent).free / 2**30:.2f} GiB are free there."


COPY_SHARE = 1 / 3
"""Of the available memory, what a copy may take: as much again may be in the system's cache until the disk has it."""


def copy_fits(policy: Policy, processes: Processes) -> bool:
    """Whether this machine trains on GPUs and has the memory for its processes' copies of what they write."""
    share = num_local_processes() / processes.world_size
    return processes.device.type == "cuda" and num_copied_bytes(policy, share=share) <= COPY_SHARE * available_bytes()


def num_copied_bytes(policy: Policy, *, share: float) -> int:
    """At most what a machine copies of a checkpoint: its share of the training state, and, as if it had the main process, the
    model as it is exported, as DeepSpeed has it, and as the reference once that has moved."""
    return round(share * disk.num_training_bytes(policy)) + (2 + policy.reference_moved) * policy.num_whole_bytes()


def _prepare(partial: Path) -> str | None:
    try:
        with progress.busy("removing what a kill left of a checkpoint"):
            shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        return str(error)
    return None


def _write_all(
    writer: Writer, policy: Policy, *, rank: int, under_way: StepState | None, drafts: Drafts | None
) -> None:
    directory = writer.directory
    policy.export(directory / "hf", writer.write)
    policy.export_adapter(directory / "adapter", writer.write)
    policy.save_training_state(directory, writer.write)
    if policy.reference_moved:
        policy.save_reference(directory / REFERENCE, writer.write)
    writer.write(directory / "random" / f"rank-{rank}.pt", _random_states(), save_tensors)
    if under_way is not None:
        writer.write(directory / "under_way" / f"rank-{rank}.pt", under_way, save_tensors)
    if drafts is not None:
        writer.write(directory / "drafts" / f"rank-{rank}.pt", carry_over.to_tensors(drafts), save_tensors)


def _partial(final: Path) -> Path:
    return final.with_suffix(".partial")


def _remove(checkpoint: Path) -> str | None:
    """Make it none at a stroke, then delete its files; what went wrong if it is still there. A link goes, its target stays."""
    try:
        if checkpoint.is_symlink():
            checkpoint.unlink()
        else:
            shutil.rmtree(checkpoint.rename(_partial(checkpoint)), ignore_errors=True)  # a resume deletes what is left
    except OSError as error:
        return str(error)
    return None


def _write_state(directory: Path, record: dict[str, Any]) -> None:
    path = directory / "state.json"
    path.write_text(json.dumps({"checksum": checksum_of(record), **record}, indent=1))
    flush(path)


def find(directory: Path, config: AnyConfig, processes: Processes, *, given: dict[str, str]) -> Path | None:
    """The newest checkpoint to resume that is as it was written, or None to start anew. Every process calls it.

    Newer ones that are not are renamed to `.corrupt`, and a line says so.

    Args:
        given: digests of what the run is given; see grpo/run/inputs.py.

    Raises:
        ValueError: it is of another experiment, or was given other questions or functions, or there are only corrupt ones.
    """
    if config.run.resume == "never":
        return None
    accept = config.run.accept_changes
    there = processes.on_main(lambda: _tidy(directory))
    for checkpoint in reversed(there):
        problem = _problem(checkpoint, processes)
        if problem is None:
            check_resumable(checkpoint, config)
            notes = [longer(checkpoint, config), *_compare_given(checkpoint, given, accept=accept)]
            for note in filter(None, notes if processes.is_main else []):
                say(note)
            progress.last_checkpoint = checkpoint
            return checkpoint
        _set_aside(checkpoint, problem, processes)
    if there:
        raise ValueError(
            f"run.resume is 'auto'; not one of the {len(there)} checkpoints in {directory} is as it was written. Choose another "
            "run.dir to start anew."
        )
    processes.say(f"no checkpoint in {directory.parent}: starts at step 1")
    return None


def _set_aside(checkpoint: Path, problem: str, processes: Processes) -> None:
    """Rename a corrupt checkpoint, or on all processes raise ValueError if it cannot be."""

    def rename() -> str | None:
        names = (checkpoint.with_suffix(f".corrupt{f'-{n}' * (n > 1)}") for n in count(1))
        try:
            aside = checkpoint.rename(next(path for path in names if not path.exists()))
        except OSError as error:
            return str(error)
        say(f"checkpoint {checkpoint} is corrupt and was renamed to {aside.name}: {problem}")
        return None

    stuck = processes.on_main(rename)
    if stuck is not None:
        raise ValueError(
            f"run.resume is 'auto'; checkpoint {checkpoint} is corrupt ({problem}) and cannot be renamed: {stuck}. Move it out "
            "of the way."
        )


def _tidy(directory: Path) -> list[Path]:
    """Remove what a kill left half written or half removed; the complete checkpoints."""
    with progress.busy("removing what a kill left of checkpoints"):
        for partial in directory.glob("step-*.partial"):
            shutil.rmtree(partial, ignore_errors=True)  # what cannot be removed is in nobody's way
    return complete_checkpoints(directory)


def _problem(checkpoint: Path, processes: Processes) -> str | None:
    """What is wrong with a checkpoint, each process reading a part of the files."""
    try:
        files = read_state(checkpoint)["files"]
    except ValueError as error:
        own: str | None = str(error)
    else:
        mine = sorted(files)[processes.rank :: processes.world_size]
        with progress.busy("checking a checkpoint"):
            own = problem_with(checkpoint, {name: files[name] for name in mine})
    return next((problem for problem in processes.gather(own) if problem is not None), None)


def _compare_given(checkpoint: Path, now: dict[str, str], *, accept: bool) -> list[str]:
    """What there is to say of questions and functions that are not those of the checkpoint.

    Raises:
        ValueError: they changed, and the run does not accept it.
    """
    before = read_state(checkpoint).get("given")
    if before is None:
        return [
            f"note: {checkpoint.name} does not say what questions and rewards it was written with; they are not compared."
        ]
    names = " and ".join(inputs.described(name, before, now) for name in inputs.changed(before, now))
    if names and not accept:
        raise ValueError(
            f"run.resume is 'auto'; {names} changed since {checkpoint} was written: the questions with their columns and "
            "prompts, or the source or the arguments of a function. Restore what they were, choose another run.dir, or set "
            "run.accept_changes=true to go on with what is there now."
        )
    return (
        [f"warning: from here on {names} are others than up to {checkpoint.name} (run.accept_changes)"] if names else []
    )


def _random_states() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}
