"""Push a run to the hub: checkpoints as revisions of a model, completions as a data set, the card.

The hub is somebody else's machine behind a network, and a run does not depend on it: without a login, without a network and with
an upload that fails, a line says so, and the run goes on. What was not pushed is where it was; `grpo export` pushes it later.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from grpo.config import AnyConfig
from grpo.policy.model_source import numbers_of
from grpo.report.card import FIGURE, card, licence_of, read_run
from grpo.report.figures import plot_curves
from grpo.system import progress
from grpo.system.distributed import Processes
from grpo.system.terminal import say
from grpo.training.callback import Callback

COMPLETIONS = ("completions.jsonl", "evaluations.jsonl")
"""Of a run's files, those that go into the data set."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_*")
"""Of a model in a repository, the files that a new one replaces: shards of both would be mixed."""

LIMIT_SECONDS = 6 * 3600.0
"""How long the end of a run waits for the hub."""

TICK_SECONDS = 5.0
"""How often a process that waits for the hub lets the others know that it works."""


class NotPushed(Exception):
    """The hub was not reached, or refused; the text says why in one line."""


def is_logged_in() -> bool:
    return get_token() is not None


def push_model(repo: str, folder: Path, *, step: int | None, private: bool) -> str:
    """Upload a folder as the newest state of a model, and give it the tag `step-N`; the model's address.

    Raises:
        NotPushed: whatever went wrong.
    """
    return _push(repo, folder, repo_type="model", tag=None if step is None else f"step-{step}", private=private)


def push_completions(repo: str, run: Path, *, private: bool) -> str | None:
    """Upload a run's completions as the data set `repo-completions`; its address, or None if there are none.

    Raises:
        NotPushed: whatever went wrong.
    """
    files = [run / name for name in COMPLETIONS if (run / name).is_file()]
    if not files:
        return None
    staged = stage(run / "hub", "completions", files)
    try:
        (staged / "README.md").write_text(_about_completions(repo, [file.name for file in files]), encoding="utf-8")
        return _push(f"{repo}-completions", staged, repo_type="dataset", tag=None, private=private)
    finally:
        unstage(staged)


def _push(repo: str, folder: Path, *, repo_type: str, tag: str | None, private: bool) -> str:
    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type=repo_type, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo,
            repo_type=repo_type,
            folder_path=folder,
            commit_message=tag or "grpo export",
            delete_patterns=list(WEIGHTS) if repo_type == "model" else None,
        )
        if tag is not None:
            _put_tag(api, repo, tag, done.oid, repo_type=repo_type)
    except Exception as error:  # of a network, a server, or a library on top of them
        raise NotPushed(_first_line(error)) from error
    return str(address)


def _put_tag(api: HfApi, repo: str, tag: str, commit: str, *, repo_type: str) -> None:
    """Tag a commit. A tag of an earlier push moves, for which the hub has no call: it is deleted, and put back if that fails."""
    try:
        api.create_tag(repo, tag=tag, revision=commit, repo_type=repo_type)
        return
    except HfHubHTTPError as error:
        tags = {each.name: each.target_commit for each in api.list_repo_refs(repo, repo_type=repo_type).tags}
        if error.response.status_code != 409 or tag not in tags:
            raise
    api.delete_tag(repo, tag=tag, repo_type=repo_type)
    try:
        api.create_tag(repo, tag=tag, revision=commit, repo_type=repo_type)
    except Exception:
        with suppress(Exception):  # the first error tells more
            api.create_tag(repo, tag=tag, revision=tags[tag], repo_type=repo_type)
        raise


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _about_completions(repo: str, names: list[str]) -> str:
    configs = "\n".join(f"- config_name: {name.partition('.')[0]}\n  data_files: {name}" for name in names)
    return (
        f"---\nconfigs:\n{configs}\ntags:\n- grpo\n---\n\n# Completions of {repo}\n\nWhat the model answered while it was "
        "trained, with what each reward made of it: `completions` of the training, `evaluations` of held-out questions.\n"
    )


# --- files that wait to be pushed -----------------------------------------------------------------------------------------

_staging = threading.Lock()
_staged: set[Path] = set()
"""The folders of pushes that wait or are under way in this process; no other push has the same."""


def stage(parent: Path, name: str, files: list[Path]) -> Path:
    """A new folder in `parent` with links to files, which stays whole while a run removes or continues them.

    Raises:
        OSError: a file is gone, or the disk is full; nothing is left then.
    """
    with _staging:
        parent.mkdir(exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent)).resolve()
        _staged.add(folder)
    try:
        with progress.busy("making files ready for the hub"):  # a copy takes long
            for file in files:
                _link(file, folder / file.name)
    except BaseException:
        unstage(folder)
        raise
    return folder


def unstage(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with _staging:
        _staged.discard(folder)
        with suppress(OSError):
            folder.parent.rmdir()  # if it was the last


@atexit.register
def _unstage_all() -> None:
    """A push that is under way ends with the process."""
    for folder in list(_staged):
        unstage(folder)


os.register_at_fork(after_in_child=_staged.clear)  # which are its parent's


def remove_leftovers(parent: Path) -> None:
    """Remove what a process that was killed had staged."""
    with suppress(OSError), _staging, progress.busy("removing what was not pushed"):
        for folder in parent.iterdir() if parent.is_dir() else ():
            if folder.resolve() not in _staged:
                shutil.rmtree(folder, ignore_errors=True)
        parent.rmdir()


def _link(source: Path, target: Path) -> None:
    """Files that are appended to are copied: a link would grow while it is read."""
    if source.suffix == ".jsonl":
        shutil.copyfile(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


# --- while a run trains ---------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Push:
    """One that waits, is under way, or is over."""

    name: str
    work: Callable[[], None]
    staged: Path | None  # removed when it is over
    is_done: bool = False  # the hub has it


class PushQueue:
    """Pushes one after another in a thread; one more may wait.

    The thread is a daemon and lives while there is something to push: the end of the process does not wait for an upload, as it
    does for the threads of concurrent.futures.
    """

    def __init__(self, carry_out: Callable[[Push], None]) -> None:
        """Args: carry_out: does the work of a push; must not raise."""
        self._carry_out = carry_out
        self._change = threading.Condition()
        self._waiting: Push | None = None
        self._is_running = False

    def submit(self, push: Push) -> Push | None:
        """Let it be the next; the one that waited before and is not pushed now, if there was one."""
        with self._change:
            before, self._waiting = self._waiting, push
            if not self._is_running:
                threading.Thread(target=self._run, name="hub", daemon=True).start()
                self._is_running = True
        return before

    def remove(self, push: Push) -> bool:
        """Whether it still waited, and does no more."""
        with self._change:
            if self._waiting is not push:
                return False
            self._waiting = None
            return True

    def wait(self, seconds: float) -> bool:
        """Whether within that time all are over."""
        with self._change:
            return self._change.wait_for(lambda: not self._is_running, seconds)

    def _run(self) -> None:
        while (push := self._next()) is not None:
            self._carry_out(push)

    def _next(self) -> Push | None:
        with self._change:
            push, self._waiting = self._waiting, None
            self._is_running = push is not None
            self._change.notify_all()
            return push


class PushToHub(Callback):
    """Pushes what `run.push_to_hub` and `run.push_at` ask for, from the main process, in a thread."""

    def __init__(
        self, config: AnyConfig, directory: Path, processes: Processes, *, stop_reason: Callable[[], str | None]
    ) -> None:
        """Args: stop_reason: what has asked the run to stop; None if nothing has."""
        assert config.run.push_to_hub is not None, "made for runs that are pushed"
        self.config, self.directory, self.processes = config, directory, processes
        self.repo, self.private = config.run.push_to_hub, config.run.hub_private
        self._stop_reason = stop_reason
        self._queue = PushQueue(self._carry_out)
        self._incomplete: dict[int, Path] = {}  # checkpoints that are still being written, by step
        self._pushes: dict[int, Push] = {}  # of checkpoints, by step
        if processes.is_main:
            remove_leftovers(directory / "hub")
            if not is_logged_in():
                say(
                    f"note: run.push_to_hub is {self.repo!r}, and nobody is logged in to the hub. The run goes on; log in "
                    f"before it ends (`hf auth login`), or push it later: {self._later()}"
                )

    def on_save(self, step: int, checkpoint: Path) -> None:
        """See Callback. The last checkpoint comes twice: it is saved, then waited for."""
        is_whole_step = numbers_of(checkpoint)[1] is None
        if self.config.run.push_at == "checkpoint" and self.processes.is_main and is_whole_step:
            if step not in self._pushes:
                self._incomplete[step] = checkpoint
            self._try(self._push_complete)

    def on_step(self, step: int, *_: object) -> None:
        """See Callback."""
        if self.processes.is_main:
            self._forget_from(step)
            self._try(self._push_complete)

    def on_end(self, checkpoint: Path) -> None:
        """See Callback."""
        self.processes.on_main(lambda: self._try(lambda: self._finish(checkpoint)))

    def on_stop(self) -> None:
        """The run was asked to stop: it does not wait for the hub."""
        if self.processes.is_main and not self._queue.wait(0):
            self._give_up("the run stops")

    def _forget_from(self, step: int) -> None:
        """A step that has just been done is not saved yet: if it is known, the run was rolled back, and it is another one."""
        self._incomplete = {known: path for known, path in self._incomplete.items() if known < step}
        for known in [known for known in self._pushes if known >= step]:
            self._remove(self._pushes.pop(known))

    def _push_complete(self) -> None:
        """A checkpoint has its name once it is complete, and may be removed when there are newer ones; links to it stay."""
        for step, path in list(self._incomplete.items()):
            if path.is_dir():
                del self._incomplete[step]
                if is_logged_in():
                    self._push_checkpoint(step, path)

    def _push_checkpoint(self, step: int, checkpoint: Path) -> None:
        files = [path for path in (checkpoint / "hf").iterdir() if path.is_file()]
        staged = stage(self.directory / "hub", f"step-{step}", files)
        push = Push(f"step {step}", partial(self._push, step, staged), staged)
        self._pushes[step] = push
        self._submit(push)

    def _submit(self, push: Push) -> None:
        before = self._queue.submit(push)
        if before is not None:
            self._unstage(before)
            say(
                f"note: {before.name} is not pushed to {self.repo}: {push.name} was saved while it waited for an earlier "
                "push. With a larger checkpoint.every_steps all are pushed."
            )

    def _remove(self, push: Push) -> None:
        if self._queue.remove(push):
            self._unstage(push)

    def _finish(self, checkpoint: Path) -> None:
        if not is_logged_in():
            say(f"nothing was pushed to {self.repo}: nobody is logged in to the hub; {self._later()} pushes it")
            return
        deadline = time.monotonic() + LIMIT_SECONDS
        for begin in (self._push_complete, partial(self._push_last, checkpoint), self._push_completions):
            self._try(begin)
            why = self._wait_until(deadline)
            if why is not None:
                self._give_up(why)
                return

    def _push_last(self, checkpoint: Path) -> None:
        """Unless it is pushed; once more, if that has failed."""
        step = numbers_of(checkpoint)[0]
        if step not in self._pushes or not self._pushes[step].is_done:
            self._push_checkpoint(step, checkpoint)

    def _push_completions(self) -> None:
        self._submit(
            Push(
                "completions",
                lambda: self._said(push_completions(self.repo, self.directory, private=self.private)),
                None,
            )
        )

    def _wait_until(self, deadline: float) -> str | None:
        """Wait until nothing is left to push; why not, if it is given up. All other processes wait for this one."""
        with progress.phase("pushing to the hub"):
            while not self._queue.wait(TICK_SECONDS):
                progress.tick()
                if time.monotonic() >= deadline:
                    return f"the hub has taken more than {LIMIT_SECONDS / 3600:g} h"
                if (reason := self._stop_reason()) is not None:
                    return f"the run was asked to stop ({reason})"
        return None

    def _give_up(self, why: str) -> None:
        """The push that is under way goes on as long as the process does."""
        for push in self._pushes.values():
            self._remove(push)
        say(f"warning: not all is pushed to {self.repo}: {why}; {self._later()} pushes it later")

    def _push(self, step: int, staged: Path) -> None:
        write_card(self.repo, self.directory, staged, base=self.config.model.name, step=step)
        self._said(push_model(self.repo, staged, step=step, private=self.private))

    def _said(self, address: str | None) -> None:
        if address is not None:
            say(f"pushed     {address}")

    def _carry_out(self, push: Push) -> None:
        """In the queue's thread."""
        try:
            push.work()
            push.is_done = True
        except BaseException as error:  # nobody above would tell; and a panic of hf_xet is no Exception
            self._warn(error)
        finally:
            self._unstage(push)

    def _unstage(self, push: Push) -> None:
        if push.staged is not None:
            unstage(push.staged)

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of a full disk, or of a library: no run ends for that
            self._warn(error)

    def _warn(self, error: BaseException) -> None:
        why = str(error) if isinstance(error, NotPushed) else _first_line(error)
        say(f"warning: not pushed to {self.repo}: {why}. The run goes on; {self._later()} pushes it later")

    def _later(self) -> str:
        return f"`grpo export {self.directory} --to hub {self.repo}`"


def write_card(repo: str, run_dir: Path, folder: Path, *, base: str, step: int | None) -> None:
    """README.md, and the figure that it shows."""
    run = read_run(run_dir)
    if run.metrics:
        plot_curves(run_dir, folder / FIGURE)
    name = repo.rpartition("/")[2]
    text = card(name, run, base=base, step=step, usage=hub_usage(repo), licence=licence_of(base))
    (folder / "README.md").write_text(text, encoding="utf-8")


def hub_usage(repo: str) -> str:
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'lm = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto", device_map="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{repo}")\n'
        "```\n\n"
        "Checkpoints are revisions: `revision='step-100'`.\n\n"
        "```bash\n"
        f"vllm serve {repo}\n"
        f"grpo export {repo} --to gguf --out {repo.rpartition('/')[2]} # for llama.cpp and Ollama\n"
        "```"
    )
