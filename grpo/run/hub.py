"""Push a run to the hub: checkpoints as revisions of a model, completions as a data set, the card.

The hub is somebody else's machine behind a network, and a run does not depend on it: without a login, without a network and with
an upload that fails, a line says so, and the run goes on. What was not pushed is where it was; `grpo export` pushes it later.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, get_token

from grpo.config import AnyConfig
from grpo.report.card import FIGURE, card, licence_of, read_run
from grpo.report.figures import plot_curves
from grpo.run.checkpoint import numbers_of
from grpo.system import progress
from grpo.system.distributed import Processes
from grpo.system.terminal import say
from grpo.training.callback import Callback

COMPLETIONS = ("completions.jsonl", "evaluations.jsonl")
"""Of a run's files, those that go into the data set."""


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
    staged = stage(run / "hub" / "completions", files)
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
            repo_id=repo, repo_type=repo_type, folder_path=folder, commit_message=tag or "grpo export"
        )
        if tag is not None:
            with suppress(Exception):  # of an earlier push of this step: the tag goes where the step is now
                api.delete_tag(repo, tag=tag, repo_type=repo_type)
            api.create_tag(repo, tag=tag, revision=done.oid, repo_type=repo_type)
    except Exception as error:  # of a network, a server, or a library on top of them
        raise NotPushed(_first_line(error)) from error
    return str(address)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _about_completions(repo: str, names: list[str]) -> str:
    configs = "\n".join(f"- config_name: {name.partition('.')[0]}\n  data_files: {name}" for name in names)
    return (
        f"---\nconfigs:\n{configs}\ntags:\n- grpo\n---\n\n# Completions of {repo}\n\nWhat the model answered while it was "
        "trained, with what each reward made of it: `completions` of the training, `evaluations` of held-out questions.\n"
    )


def stage(folder: Path, files: list[Path]) -> Path:
    """A folder of links to files, which stays whole while a run removes or continues them."""
    unstage(folder)
    folder.mkdir(parents=True)
    for file in files:
        _link(file, folder / file.name)
    return folder


def unstage(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()  # if it was the last


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


class PushToHub(Callback):
    """Pushes what `run.push_to_hub` and `run.push_at` ask for, from the main process; checkpoints in a thread."""

    def __init__(self, config: AnyConfig, directory: Path, processes: Processes) -> None:
        assert config.run.push_to_hub is not None, "made for runs that are pushed"
        self.config, self.directory, self.processes = config, directory, processes
        self.repo, self.private = config.run.push_to_hub, config.run.hub_private
        self._threads = ThreadPoolExecutor(1)
        self._waiting: list[Path] = []  # checkpoints that are not complete yet
        self._pushed_step: int | None = None
        if processes.is_main and not is_logged_in():
            processes.say(
                f"note: run.push_to_hub is {self.repo!r}, and nobody is logged in to the hub. The run goes on; log in before "
                f"it ends (`hf auth login`), or push it later: {self._later()}"
            )

    def on_save(self, step: int, checkpoint: Path) -> None:
        """See Callback."""
        if self.config.run.push_at == "checkpoint" and self.processes.is_main:
            self._waiting.append(checkpoint)
            self._push_complete()

    def on_step(self, *_: object) -> None:
        """See Callback."""
        if self.processes.is_main:
            self._push_complete()

    def on_end(self, checkpoint: Path) -> None:
        """See Callback."""
        self.processes.on_main(lambda: self._finish(checkpoint))

    def _push_complete(self) -> None:
        """A checkpoint has its name once it is complete, and may be removed when there are newer ones; links to it stay."""
        complete = [path for path in self._waiting if path.is_dir()]
        self._waiting = [path for path in self._waiting if path not in complete]
        for path in complete:
            if numbers_of(path)[1] is None and is_logged_in():
                step, staged = numbers_of(path)[0], self._stage(path)
                self._pushed_step = step
                self._threads.submit(self._try, partial(self._push, step, staged))

    def _finish(self, checkpoint: Path) -> None:
        with progress.busy("pushing to the hub"):
            self._push_complete()
            self._threads.shutdown(wait=True)
            if not is_logged_in():
                say(f"nothing was pushed to {self.repo}: nobody is logged in to the hub; {self._later()} pushes it")
                return
            step = numbers_of(checkpoint)[0]
            if self._pushed_step != step:
                self._try(partial(self._push, step, self._stage(checkpoint)))
            self._try(lambda: self._said(push_completions(self.repo, self.directory, private=self.private)))

    def _stage(self, checkpoint: Path) -> Path:
        files = [path for path in (checkpoint / "hf").iterdir() if path.is_file()]
        return stage(self.directory / "hub" / f"step-{numbers_of(checkpoint)[0]}", files)

    def _push(self, step: int, staged: Path) -> None:
        try:
            write_card(self.repo, self.directory, staged, base=self.config.model.name, step=step)
            self._said(push_model(self.repo, staged, step=step, private=self.private))
        finally:
            unstage(staged)

    def _said(self, address: str | None) -> None:
        if address is not None:
            say(f"pushed     {address}")

    def _try(self, push: Callable[[], None]) -> None:
        try:
            push()
        except (NotPushed, OSError) as error:
            say(f"warning: not pushed to {self.repo}: {error}. The run goes on; {self._later()} pushes it later")

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
