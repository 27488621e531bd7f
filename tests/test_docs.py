"""The documents' commands and code run, tables and generated pages are what the code says, and the wheel is whole."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import zipfile
from argparse import ArgumentParser, Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest
import warm
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, clean_environment
from torch.distributed.run import get_args_parser

from grpo import cli
from grpo.cli import scale
from grpo.cli.settings import chosen, settings
from grpo.config import AnyConfig, Config, RewardConfig, SupervisedConfig
from grpo.config.elsewhere import ELSEWHERE
from grpo.evaluation.arms import arms_of
from grpo.observe.metric_names import METRICS
from grpo.pipeline.stages import TRAINED, read_plan
from grpo.scoring.reward import resolve_function
from grpo.system.heartbeat import PEER_LOST
from grpo.system.stopping import EXIT_STOPPED

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = ("python", "accelerate", "torchrun", "deepspeed")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)


def block(language: str, document: str, *, beginning: str) -> str:
    """The only one in that language with that beginning."""
    (found,) = [each for each in blocks(language, document) if each.startswith(beginning)]
    return found


def commands(document: Path) -> list[str]:
    """Lines and `inline code` that start one of our programs, or make. `grpo train` within a sentence is a name."""
    text = document.read_text().replace("\\\n", " ")
    inline = [code for code in re.findall(r"`([^`\n]+)`", text) if code.removeprefix("grpo ") not in NAMES]
    codes = [line.strip() for line in text.splitlines()] + inline
    starts = rf"({'|'.join(LAUNCHERS)}) .*(\.py\b|-m grpo)|grpo [\w-]|make [a-z]+( |$)"
    return [re.sub(" +", " ", code) for code in codes if re.match(starts, code)]


NAMES = {*cli.COMMANDS, *(f"check {name}" for name in ("memory", "invariance", "gradients", "steps"))}


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]


def program_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """What a command line runs, a file or "grpo COMMAND", and what it is given; the launcher's own options are checked."""
    redirected = [place for place, word in enumerate(words) if word in (">", "|", "&&")]
    words = words[: min(redirected, default=len(words))]
    if words[0] == "grpo":
        return " ".join(words[:2]), words[2:]
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        if launched.module:
            return program_and_arguments([launched.training_script, *launched.training_script_args])
        return launched.training_script, launched.training_script_args
    if words[:2] == ["python", "-m"]:
        return program_and_arguments(words[2:])
    place = next(place for place, word in enumerate(words) if word.endswith(".py"))
    assert words[0] == "deepspeed" or place == 1, "a command for python begins with its script"
    return words[place], words[place + 1 :]


class Parsed(Exception):
    """A program has read its arguments."""


@pytest.fixture
def arguments_of(monkeypatch: pytest.MonkeyPatch):
    """Start a program, and end it once it has read its arguments; fails if they are not what it takes."""
    parse = ArgumentParser.parse_args

    def parse_and_end(parser: ArgumentParser, *args: object) -> None:
        raise Parsed(parse(parser, *args))

    def arguments_of(program: str, arguments: list[str]) -> Namespace:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_end)
        if program.startswith("grpo "):
            start = partial(cli.main, [program.removeprefix("grpo "), *arguments])
        else:
            monkeypatch.syspath_prepend(str((ROOT / program).parent))
            start = partial(runpy.run_path, program, run_name="__main__")
        with pytest.raises(Parsed) as parsed:
            start()
        monkeypatch.setattr(ArgumentParser, "parse_args", parse)
        return parsed.value.args[0]

    return arguments_of


def load_settings(program: str, options: Namespace) -> list[AnyConfig]:
    """Every configuration that a program would load with these options; a wrong key or value raises."""
    if program == "benchmarks/step.py":
        import step

        model = Path("model")
        with tempfile.TemporaryDirectory() as scratch, patch.object(step, "saved_model", lambda *_, **__: model):
            return [step.make_config(options, model, Path(scratch))]
    if program == "grpo settings" and not chosen(list(settings()), options.word):
        raise ValueError(f"no setting has {options.word!r} in its name or meaning")
    overrides = list(getattr(options, "set", []))
    if hasattr(options, "stages"):
        plan = read_plan(options.stages, options.out, overrides)
        return [plan.config(stage) for stage in plan.stages if stage.kind in TRAINED]
    if hasattr(options, "variant"):
        return [Config.load(arm.config, arm.overrides) for arm in arms_of(options.configs, options.variant, overrides)]
    if getattr(options, "config", None) == "my.yaml":
        with tempfile.TemporaryDirectory() as scratch:
            own = Path(scratch) / "my.yaml"
            own.write_text(block("yaml", "README.md", beginning="# my.yaml"))
            return [Config.load(own, overrides)]
    if program == "grpo reject" and options.config is not None:
        return [Config.load_questions(options.config, overrides)]
    if getattr(options, "config", None) is not None:
        is_supervised = program in ("grpo sft", "scripts/train_sft.py") or (
            program == "grpo scale" and scale.is_supervised(Path(options.config))
        )
        return [(SupervisedConfig if is_supervised else Config).load(options.config, overrides)]
    assert not overrides, f"how {program} reads --set is not known here"
    return []


def test_the_readme_has_commands_and_code_and_so_have_the_documents():
    assert sum(document == ROOT / "README.md" for document, _ in COMMANDS) >= 15
    assert sum(document.name == "performance.md" for document, _ in COMMANDS) >= 10
    shown = " ".join(command for _, command in COMMANDS)
    assert [name for name in cli.COMMANDS if f"grpo {name} " not in shown] == [
        "completion"
    ]  # it is within eval "$(...)"
    assert len(blocks("python", "README.md")) == 2


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d.name}: {c[:70]}" for d, c in COMMANDS])
def test_every_command_of_the_documents_is_one_that_its_program_takes(document: Path, command: str, arguments_of):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    program, arguments = program_and_arguments(words)
    if "..." in arguments:  # some are left out
        assert (ROOT / program).is_file() or program.removeprefix("grpo ") in cli.COMMANDS
    else:
        load_settings(program, arguments_of(program, arguments))


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("benchmarks/step.py", "--size 0.6b"),
        ("benchmarks/rollout.py", "--peer generate2"),
        ("benchmarks/step.py", "--set memory.micro_batch_token=1"),
        ("scripts/train_zero.py", "--config configs/quickstart.yaml --set algorithm.clip=wei"),
        ("scripts/compare.py", "configs/quickstart.yaml --out x --variant a:algorithm.clip_hi=2"),
        ("grpo check", "momory --config configs/quickstart.yaml"),
        ("grpo check", "memory --config configs/quickstart.yaml --set memory.max_sequence=2"),
        ("grpo train", "--config quikstart"),
        ("grpo train", "--config quickstart --process 2 --sett a=b"),
        ("grpo train", "--config my.yaml --set rollout.group_sise=8"),
        ("grpo settings", "temperatur3"),
        ("grpo evaluate", "--model runs/quickstart --benchmark"),
        ("grpo trian", "--config quickstart"),
    ],
)
def test_a_command_with_a_wrong_option_or_setting_is_found(program: str, arguments: str, arguments_of):
    with pytest.raises((SystemExit, ValueError)):
        load_settings(program, arguments_of(program, shlex.split(arguments)))


def test_every_program_of_the_documents_is_run_by_a_test():
    """By its file's name, as each of them is started; a module of benchmarks/ also by importing it."""
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").glob("*.py") if path != Path(__file__))
    named = [shlex.split(command, comments=True) for _, command in COMMANDS if not command.startswith("make")]
    programs = {program_and_arguments(words)[0] for words in named}
    assert {"benchmarks/rollout.py", "scripts/train_zero.py", "grpo train", "grpo check"} <= programs
    assert [program for program in sorted(programs) if not is_run(program, tests)] == []


def is_run(program: str, tests: str) -> bool:
    """A command also where a test runs its module, or the script that is another name of it."""
    if program.startswith("grpo "):
        command = program.removeprefix("grpo ")
        shims = [path for path in (ROOT / "scripts").glob("*.py") if f"grpo.cli.{command} " in path.read_text()]
        started = rf"""call\("{command}"|"grpo", "{command}"|run_module\("grpo\.{command}\""""
        return bool(re.search(started, tests)) or any(is_run(f"scripts/{path.name}", tests) for path in shims)
    name = re.escape(Path(program).name)
    return bool(re.search(rf"""["/]{name}"|^ +import {name[:-4]}$""", tests, re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "docs/getting-started.md"])
def test_the_documents_library_examples_run(tmp_path: Path, document: str):
    code = block("python", document, beginning="from grpo")
    done = warm.run(["-c", code], cwd=tmp_path, timeout=300, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/brief/checkpoints/step-00000002/hf").is_dir()


def test_the_readmes_own_model_data_and_reward_train(tmp_path: Path):
    """With the quickstart's model and settings in place of what a GPU would take."""
    (tmp_path / "my.yaml").write_text(block("yaml", "README.md", beginning="# my.yaml"))
    (tmp_path / "my_rewards.py").write_text(block("python", "README.md", beginning="# my_rewards.py"))
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text((ROOT / f"configs/quickstart/{name}.jsonl").read_text())
    small = ["rollout.num_prompts=2", "rollout.group_size=2", "rollout.max_completion_tokens=16", "run.steps=1"]
    off = ["preflight.num_questions=0", "evaluation.num_questions=2", "data.template=chat", "algorithm.kl_coef=0"]
    model = f"model.name={ROOT / 'configs/quickstart/model'}"
    command = ["-m", "grpo", "train", "--config", "my.yaml", "--set", model, *small, *off]
    done = warm.run(command, cwd=tmp_path, timeout=300, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    # 16 tokens are fewer than 400 characters
    rows = map(json.loads, (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines())
    assert [row["reward/brief"] for row in rows if "reward/brief" in row] == [1.0]


def test_the_documents_own_reward_works_by_the_name_in_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(block("python", "docs/rewards.md", beginning="import re"))
    written = yaml.safe_load(block("yaml", "docs/rewards.md", beginning="rewards:"))
    rewards = [RewardConfig(**item) for item in written["rewards"]]
    function = resolve_function(rewards[1].function)
    assert function("so <answer>7.005</answer>", "7", **rewards[1].args) == 1.0
    assert function("so <answer>8</answer>", "7", **rewards[1].args) == 0.0
    assert function("so <answer>8</answer>", "seven", **rewards[1].args) is None


def test_the_documents_tree_is_the_tree():
    tree = page("architecture.md").split("## Files")[1].split("## Departures")[0]
    folders: list[str] = []
    listed = set()
    for indent, name in re.findall(r"^    ( *)([\w.-]+(?:/|\.py))(?= )", tree, re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name.rstrip("/")]
        listed.add("/".join(folders))
    listed = {path for path in listed if path.startswith("grpo/") and path.endswith(".py")}
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "grpo").rglob("*.py") if not path.name.startswith("__")}
    commands = {path for path in files if path.startswith("grpo/cli/")}  # a line for all of them
    assert listed - commands == files - commands
    for name in re.findall(r"\b[\w-]+\.(?:py|sh)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"*/*/{name}")), name


def test_the_documents_schedules_are_valid():
    schedules = yaml.safe_load(block("yaml", "docs/getting-started.md", beginning="schedules:"))
    sections = yaml.safe_load((ROOT / "configs/qwen1.5b.yaml").read_text()) | schedules
    for section, setting in (("rollout", "max_completion_tokens"), ("algorithm", "kl_coef")):
        sections[section].pop(setting, None)
    sections["memory"]["micro_batch_tokens"] = 70_000
    config = Config(**sections)
    assert config.at(10_000).rollout.max_completion_tokens == 65_536
    assert config.at(500).algorithm.kl_coef == pytest.approx(0.0005)


def test_the_documents_sources_and_rows_are_valid():
    configs = [
        Config(**yaml.safe_load(text), model={"name": "m"}, run={"dir": "d", "steps": 1})
        for text in blocks("yaml", "docs/data.md")
    ]
    assert [list((config.data.weights or {}).values()) for config in configs] == [[3, 1], [], [1, 3]]
    assert configs[1].data.where == {"level": [3, 4, 5], "subject": "Algebra"}


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_the_documents_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), target
        if anchor:
            assert anchor in headings(path), target


def headings(document: Path) -> set[str]:
    """As a link names them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", page("README.md")))
    pages = {str(path.relative_to(ROOT / "docs")) for path in DOCUMENTS[1:]} - {"README.md"}
    assert pages - linked == set()


def test_the_page_of_settings_is_what_the_command_writes():
    done = warm.run(["-m", "grpo", "settings", "--markdown"], cwd=ROOT, timeout=100)
    assert page("settings.md") == done.stdout, "grpo settings --markdown > docs/settings.md"


def test_the_readmes_names_of_other_libraries_are_those_that_the_error_answers():
    readme = (ROOT / "README.md").read_text().split("## Names for users")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \| (.*?) \| (.+) \|$", readme, re.MULTILINE)
    assert len(rows) >= 8
    for trl, verl, ours in rows:
        settings_here = re.findall(r"`(\w+\.\w+|rewards)", ours)
        for library in (trl, verl):
            for place, theirs in enumerate(re.findall(r"`([\w.]+)`", library)):
                name = ELSEWHERE.get(theirs, ELSEWHERE.get(theirs.split(".")[-1]))
                assert name is not None, theirs
                assert settings_here[min(place, len(settings_here) - 1)] in name, theirs


def test_the_table_of_exit_codes_is_that_of_the_command():
    table = page("reliability.md").split("## Exit codes")[1].split("\n## ")[0]
    told = (import_module("grpo.cli.train").__doc__ or "").split("Exit code")[1]
    assert re.findall(r"^\| (\d+) \|", table, re.MULTILINE) == re.findall(r"(\d+): ", told)
    assert (str(EXIT_STOPPED), str(PEER_LOST)) == ("75", "76")


def test_metrics_are_documented_with_their_formulas():
    documented = page("metrics.md")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", documented, re.MULTILINE))
    assert rows == {name: formula.replace("|", "\\|") for name, formula in METRICS.items()}


def test_the_wheel_holds_the_rewards_within_the_library_and_nothing_of_the_tests(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "grpo", "rewards", "tools", "configs"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    subprocess.run([*command, str(source)], check=True, env={**os.environ}, timeout=200)
    (wheel,) = tmp_path.glob("grpo_zero-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("grpo", "grpo"), ("rewards", "grpo/rewards"), ("tools", "grpo/tools")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "configs").rglob("*"):
        assert path.is_dir() or f"grpo/{path.relative_to(ROOT)}" in names, path
    assert "grpo/py.typed" in names
    for path in (ROOT / "grpo" / "report").glob("*"):
        assert path.is_dir() or str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("tests/", "rewards/", "tools/")) for name in names)


def test_every_test_file_that_a_document_names_exists():
    named = {name for document in DOCUMENTS for name in re.findall(r"\btest_\w+\.py\b", document.read_text())}
    assert {"test_checkpoint.py", "test_heartbeat.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []


def message_templates() -> set[str]:
    """Every text in the code, with … for what is filled in; neighbouring literals are one."""
    found = set()
    for path in [*(ROOT / "grpo").rglob("*.py"), *(ROOT / "rewards").rglob("*.py")]:
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def says(template: str, message: str) -> bool:
    """Whether the parts of a message between its values follow each other in a text of the code."""
    place = 0
    for part in message.split("…"):
        place = template.find(part.strip(), place)
        if place < 0:
            return False
        place += len(part.strip())
    return True


def test_every_message_on_the_page_of_errors_is_one_of_the_code():
    templates = message_templates()
    listed = re.findall(r"^\| `([^`]+)` \|", page("errors.md"), re.MULTILINE)
    assert len(listed) >= 40
    assert [message for message in listed if not any(says(template, message) for template in templates)] == []
    assert not any(says(template, "rollout.group_size is …; no message of ours") for template in templates)


def test_the_site_builds_without_a_broken_link(tmp_path: Path):
    """Links to the source are names there, and its search needs no server."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "search" / "search_index.js").is_file()  # which, unlike JSON, a page on disk may load
    for name, up in (("index.html", ""), ("results/gsm8k.html", "../")):
        html = (tmp_path / "site" / name).read_text()
        assert f'src="{up}assets/file_worker.js"' in html
        assert not re.search(r"<(link|script|img)[^>]+(href|src)=.https?://", html), "it fetches something"
    assert "advantage" in (tmp_path / "site" / "api.html").read_text()
    assert "(../grpo" not in (tmp_path / "site" / "architecture.html").read_text()
