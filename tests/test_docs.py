"""The documents' commands and the README's code run, docs/metrics.md is what the code says, and the wheel is whole."""

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
from pathlib import Path

import pytest
import warm
import yaml
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT, clean_environment
from torch.distributed.run import get_args_parser

from grpo.config import Config, RewardConfig
from grpo.evaluation.compare import arms_of
from grpo.observe.metrics import METRICS
from grpo.scoring.reward import resolve_function

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LAUNCHERS = ("python", "accelerate", "torchrun", "deepspeed")


def commands(document: Path) -> list[str]:
    """Lines and `inline code` that start one of our programs, or make."""
    text = document.read_text().replace("\\\n", " ")
    codes = [line.strip() for line in text.splitlines()] + re.findall(r"`([^`\n]+)`", text)
    starts = rf"({'|'.join(LAUNCHERS)}) .*(\.py\b|-m grpo)|make [a-z]+( |$)"
    return [re.sub(" +", " ", code) for code in codes if re.match(starts, code)]


COMMANDS = [(document, command) for document in DOCUMENTS for command in commands(document)]


def program_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """What a command line runs, a file or "-m module", and what it is given; the launcher's own options are checked."""
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    if words[:2] == ["python", "-m"]:
        return f"-m {words[2]}", words[3:]
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
        monkeypatch.syspath_prepend(str((ROOT / program).parent))
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        monkeypatch.setattr(ArgumentParser, "parse_args", parse_and_end)
        is_module = program.startswith("-m ")
        start = (
            partial(runpy.run_module, program.removeprefix("-m ")) if is_module else partial(runpy.run_path, program)
        )
        with pytest.raises(Parsed) as parsed:
            start(run_name="__main__")
        monkeypatch.setattr(ArgumentParser, "parse_args", parse)
        return parsed.value.args[0]

    return arguments_of


def load_settings(program: str, options: Namespace) -> list[Config]:
    """Every configuration that a program would load with these options; a wrong key or value raises."""
    if program == "benchmarks/step.py":
        import step

        with tempfile.TemporaryDirectory() as scratch:
            return [step.make_config(options, Path("model"), Path(scratch))]
    settings = list(getattr(options, "set", []))
    if hasattr(options, "variant"):
        return [Config.load(arm.config, arm.overrides) for arm in arms_of(options.configs, options.variant, settings)]
    if getattr(options, "config", None) is not None:
        return [Config.load(options.config, settings)]
    assert not settings, f"how {program} reads --set is not known here"
    return []


def test_the_readme_has_commands_and_code_and_so_have_the_documents():
    assert sum(document.name == "README.md" for document, _ in COMMANDS) >= 20
    assert sum(document.name == "performance.md" for document, _ in COMMANDS) >= 10
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize(("document", "command"), COMMANDS, ids=[f"{d.name}: {c[:70]}" for d, c in COMMANDS])
def test_every_command_of_the_documents_is_one_that_its_program_takes(document: Path, command: str, arguments_of):
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    program, arguments = program_and_arguments(words)
    if "..." in arguments:  # some are left out
        assert (ROOT / program).is_file()
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
        ("-m grpo.check", "momory --config configs/quickstart.yaml"),
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
    assert {"benchmarks/rollout.py", "scripts/train_zero.py", "-m grpo.check"} <= programs
    assert [program for program in sorted(programs) if not is_run(program, tests)] == []


def is_run(program: str, tests: str) -> bool:
    module = program.removeprefix("-m ")
    name = re.escape(Path(program).name)
    return bool(
        re.search(rf"""run_module\("{re.escape(module)}"|["/]{name}"|^ +import {name[:-4]}$""", tests, re.MULTILINE)
    )


def test_the_readmes_library_example_runs(tmp_path: Path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = blocks("python")[0]
    done = warm.run(["-c", code], cwd=tmp_path, timeout=300, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/brief/checkpoints/step-00000002/hf").is_dir()


def test_the_readmes_own_reward_works_by_the_name_in_its_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(blocks("python")[1])
    (block,) = [block for block in blocks("yaml") if block.startswith("rewards:")]
    rewards = [RewardConfig(**item) for item in yaml.safe_load(block)["rewards"]]
    function = resolve_function(rewards[1].function)
    assert function("so <answer>7.005</answer>", "7", **rewards[1].args) == 1.0
    assert function("so <answer>8</answer>", "7", **rewards[1].args) == 0.0
    assert function("so <answer>8</answer>", "seven", **rewards[1].args) is None


def test_the_readmes_tree_is_the_tree():
    tree = README.split("## Files")[1].split("## Departures")[0]
    folders: list[str] = []
    listed = set()
    for indent, name in re.findall(r"^    ( *)([\w.-]+(?:/|\.py))(?= )", tree, re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name.rstrip("/")]
        listed.add("/".join(folders))
    listed = {path for path in listed if path.startswith("grpo/") and path.endswith(".py")}
    files = [path for path in (ROOT / "grpo").rglob("*.py") if not path.name.startswith("__")]
    assert listed == {str(path.relative_to(ROOT)) for path in files}
    for name in re.findall(r"\b[\w-]+\.(?:py|sh)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"*/*/{name}")), name


def test_the_readmes_schedules_are_valid():
    (block,) = [block for block in blocks("yaml") if block.startswith("schedules:")]
    settings = yaml.safe_load((ROOT / "configs/qwen1.5b.yaml").read_text()) | yaml.safe_load(block)
    for section, setting in (("rollout", "max_completion_tokens"), ("algorithm", "kl_coef")):
        settings[section].pop(setting, None)
    settings["memory"]["micro_batch_tokens"] = 70_000
    config = Config(**settings)
    assert config.at(10_000).rollout.max_completion_tokens == 65_536
    assert config.at(500).algorithm.kl_coef == pytest.approx(0.0005)


def test_the_readmes_list_of_sources_is_valid():
    (block,) = [block for block in blocks("yaml") if block.startswith("data:")]
    config = Config(**yaml.safe_load(block), model={"name": "m"}, run={"dir": "d", "steps": 1})
    assert list((config.data.weights or {}).values()) == [3, 1]


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_metrics_are_documented_with_their_formulas():
    documented = (ROOT / "docs" / "metrics.md").read_text()
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", documented, re.MULTILINE))
    assert rows == {name: formula.replace("|", "\\|") for name, formula in METRICS.items()}


def test_the_wheel_holds_the_rewards_within_the_library_and_nothing_of_the_tests(tmp_path: Path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "grpo", "rewards"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    subprocess.run([*command, str(source)], check=True, env={**os.environ}, timeout=200)
    (wheel,) = tmp_path.glob("grpo-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("grpo", "grpo"), ("rewards", "grpo/rewards")):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{path.relative_to(ROOT / folder)}" in names
    for path in (ROOT / "grpo" / "report").glob("*"):
        assert path.is_dir() or str(path.relative_to(ROOT)) in names
    assert not any(name.startswith(("tests/", "rewards/")) for name in names)


def test_every_test_that_the_reliability_table_names_exists():
    table, file, missing = (ROOT / "docs/reliability.md").read_text(), "", []
    named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", table)
    for name, test in named:
        file = name or file
        if f"def {test}(" not in (ROOT / "tests" / file).read_text():
            missing.append(f"{file}::{test}")
    assert len(named) > 70
    assert missing == []
