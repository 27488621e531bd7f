"""The README's commands and code run, docs/metrics.md is what the code says, and the wheel is whole."""

import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, clean_environment

from grpo.config import Config, RewardConfig
from grpo.metrics import METRICS
from grpo.scoring import resolve_function

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line.strip()]


def test_the_readme_has_commands_and_code():
    assert len(COMMANDS) >= 6
    assert len(blocks("python")) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_valid(command: str):
    words = shlex.split(command)
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        return
    if words[:3] == ["python", "-m", "grpo.check"]:
        assert words[3] in ("memory", "invariance")
    else:
        assert words[0] == "python" or words[:2] in (["accelerate", "launch"], ["deepspeed", "--no_local_rank"])
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file()
        if "--config" not in words:
            known = subprocess.run(
                [sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            assert set(re.findall(r"--[a-z-]+", command.split(script)[1])) <= set(
                re.findall(r"--[a-z-]+", known.stdout)
            )
            return
    config = words[words.index("--config") + 1]
    overrides = words[words.index("--set") + 1 :] if "--set" in words else []
    Config.load(ROOT / config, overrides)


def test_the_readmes_library_example_runs(tmp_path: Path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = blocks("python")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=clean_environment()
    )
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


def test_every_file_of_the_readmes_tree_exists_and_every_module_is_in_it():
    tree = README.split("## Files")[1].split("## Departures")[0]
    for name in re.findall(r"\b[\w-]+\.(?:py|sh)\b", tree):
        assert list(ROOT.glob(f"*/{name}")) + list(ROOT.glob(f"*/*/{name}")), name
    for path in (ROOT / "grpo").glob("*.py"):
        assert path.name == "__init__.py" or path.name in tree, f"{path.name} is not in the README's tree"


def test_the_readmes_schedules_are_valid():
    (block,) = [block for block in blocks("yaml") if block.startswith("schedules:")]
    settings = yaml.safe_load((ROOT / "configs/qwen1.5b.yaml").read_text()) | yaml.safe_load(block)
    for section, setting in (("rollout", "max_completion_tokens"), ("algorithm", "kl_coef")):
        settings[section].pop(setting, None)
    settings["memory"]["micro_batch_tokens"] = 70_000
    config = Config(**settings)
    assert config.at(10_000).rollout.max_completion_tokens == 65_536
    assert config.at(500).algorithm.kl_coef == pytest.approx(0.0005)


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
