"""Mistakes on the command line: each is answered in three lines at most, with the setting, the value and a remedy."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import ROOT, TINY

from grpo import cli
from grpo.check.at_once import check_config
from grpo.config import Config, SupervisedConfig
from grpo.policy.model_source import check_files
from grpo.run.resumable import check_newest, checksum_of

MODEL = str(TINY / "model")
QUICKSTART = ["train", "--config", "quickstart", "--set", "preflight.num_questions=0"]
CHAT = ["data.template=chat", "data.question_template=null"]
EVALUATE = ["evaluate", "--model", MODEL, "--benchmarks", "mine"]
REJECT = ["reject", "--model", MODEL, "--out", "a.jsonl", "--config"]

FILES = {
    "empty.jsonl": "",
    "broken.jsonl": '{"question": "a", "answer": "1"}\n{"question": \n',
    "columns.jsonl": '{"prompt": "a", "solution": "1"}\n' * 5,
    "list.jsonl": "[1,2]\n",
    "null.jsonl": '{"question": null, "answer": "1"}\n' * 3,
    "text.txt": "hello",
    "open.jinja": "{% generation %}{% endgeneration %}\n{% for message in messages %}",
    "twice.yaml": "model: {name: a}\nrun: {dir: x, steps: 1}\nrun: {dir: y, steps: 1}\n",
    "tab.yaml": "model:\n\tname: a\n",
    "list.yaml": "- a\n- b\n",
    "empty.yaml": "",
    "without_run.yaml": "model: {name: a}\n",
    "bad.py": "def f(completion:\n",
    "one.py": "def g(completion): return 1.0\n",
    "imports.py": "import no_such_module\ndef g(completion): return 1.0\n",
    "exits.py": "def g(completion): return 1.0\nraise SystemExit(3)\n",
    "nothing.py": "def g(): return 1.0\n",
    "classes.py": "class Game:\n    def __call__(self, completion): return 1.0\n",
    "sums.jsonl": '{"question": "1+1", "answer": "2"}\n' * 5,
    "latin.jsonl": '{"question": "1+1", "answer": "2"}\n{"question": "caf\udce9", "answer": "1"}\n',
    "again.jsonl": '{"question": "a", "question": "b", "answer": "1"}\n',
    "nested.jsonl": '{"question": {"a": 1}, "answer": "1"}\n',
    "wide.csv": "question,answer\n1+1,2,3\n",
    "letters.yaml": "model: {name: a}\nrun: {dir: x, steps: 1}\nrewards: [accuracy]\n",
    "file": "",
}

AFTER_TORCH: list[tuple[list[str], str]] = [
    (
        [*QUICKSTART, "rewards.0.function=imports.py:g"],
        r"line 1 of .*imports\.py raised ModuleNotFoundError while the file was imported: .* Install it, or correct the file",
    ),
    (
        [*QUICKSTART, "rewards.0.function=exits.py:g"],
        r"line 2 of .*exits\.py raised SystemExit .*: 3\. Correct the file",
    ),
    (
        [*QUICKSTART, "rewards.0.function=nothing.py:g"],
        r"reward g has no parameters, .* Name what it is to be given: completion",
    ),
]
"""What only running the user's own code can tell."""

MISTAKES: list[tuple[list[str], str]] = [
    (["tran"], r"grpo has no command 'tran'\. Did you mean train\?"),
    (["train", "--confg", "quickstart"], r"unrecognized arguments: --confg\. Did you mean --config\?"),
    ([*QUICKSTART, "tools.functions=[calculatr]"], r"tools\.functions is 'calculatr'; .*did you mean calculator\?"),
    (
        [*QUICKSTART, "environment.function=gues_number"],
        r"environment\.function is 'gues_number'; .*did you mean guess_number\?",
    ),
    (["train"], r"required: --config\. `grpo train --help` lists the options"),
    (["evaluate", "--model", "x"], r"required: --benchmarks, or an --environment"),
    (["chat"], r"required: --model"),
    (
        [*EVALUATE, "--data", "mine=columns.jsonl", "--samples", "0"],
        r"--samples: '0' is not a whole number of at least 1",
    ),
    (["train", "--config", "quickstart", "--processes", "two"], r"--processes: 'two' is not a whole number"),
    (["train", "--config", "nope.yaml"], r"--config is 'nope\.yaml'; there is no such file.* Name a YAML file"),
    (["train", "--config", "quikstart"], r"Did you mean quickstart\?"),
    (["train", "--config", "twice.yaml"], r"key 'run' is given twice, the second time in line 3 of twice\.yaml"),
    (
        ["train", "--config", "tab.yaml"],
        r"tab\.yaml is not valid YAML, line 2, column 1: found character '\\t'.*spaces",
    ),
    (["train", "--config", "list.yaml"], r"list\.yaml holds .*; a configuration is a mapping of sections"),
    (["train", "--config", "empty.yaml"], r"empty\.yaml is empty; a configuration is a mapping"),
    (["train", "--config", "without_run.yaml"], r"run is missing; it has no default\. Set run"),
    (["train", "--config", "sft-quickstart"], r"training is not a setting here.*grpo sft"),
    (["sft", "--config", "quickstart"], r"rollout is not a setting here.*grpo train"),
    (["preflight", "--config", "nope"], r"--config is 'nope'; there is no such file"),
    ([*QUICKSTART, "run.steps"], r"--set 'run\.steps': an override reads section\.setting=value"),
    ([*QUICKSTART, "run.stepz=3"], r"run\.stepz is not a setting\. Did you mean run\.steps\?"),
    ([*QUICKSTART, "rolout.group_size=3"], r"rolout is not a setting\. Did you mean rollout\?"),
    ([*QUICKSTART, "run.steps=abc"], r"run\.steps is 'abc'; input should be a valid integer"),
    ([*QUICKSTART, "run.steps=-1"], r"run\.steps is -1; input should be greater than 0"),
    ([*QUICKSTART, "run.steps=1.5"], r"run\.steps is 1\.5; input should be a valid integer"),
    ([*QUICKSTART, "rollout.fused_layers=maybe"], r"rollout\.fused_layers is 'maybe'; input should be a valid boolean"),
    (
        [*QUICKSTART, "optimizer.learning_rate=fast"],
        r"optimizer\.learning_rate is 'fast'; input should be a valid number",
    ),
    ([*QUICKSTART, "algorithm.beta=0.1"], r"algorithm\.beta is not a setting here.*algorithm\.kl_coef"),
    ([*QUICKSTART, "rollout.group_size=1"], r"rollout\.group_size is 1; .* Set rollout\.group_size >= 2"),
    ([*QUICKSTART, "rollout.temperature=0"], r"rollout\.temperature is 0; input should be greater than 0"),
    ([*QUICKSTART, "rollout.top_p=1.5"], r"rollout\.top_p is 1\.5; input should be less than or equal to 1"),
    ([*QUICKSTART, "distributed.zero_stage=4"], r"distributed\.zero_stage is 4; input should be 0, 1, 2 or 3"),
    ([*QUICKSTART, "algorithm.num_minibatches=3"], r"algorithm\.num_minibatches is 3; .* Set it to a divisor"),
    (
        [*QUICKSTART, "memory.micro_batch_tokens=8"],
        r"memory\.micro_batch_tokens is 8; .* Set memory\.micro_batch_tokens >= 160",
    ),
    ([*QUICKSTART, "data.template=chatml"], r"data\.template is 'chatml'; input should be 'r1_zero'"),
    (
        [*QUICKSTART, *CHAT, "data.chat_template=no.jinja"],
        r"data\.chat_template is 'no\.jinja'; there is no file .* Name a file",
    ),
    (
        [*QUICKSTART, *CHAT, "data.chat_template=open.jinja"],
        r"data\.chat_template is 'open\.jinja'; line 2 is not valid Jinja: .*'endfor'.* Correct the file",
    ),
    (
        ["sft", "--config", "sft-quickstart", "--set", "data.chat_template=open.jinja"],
        r"data\.chat_template is 'open\.jinja'; line 2 is not valid Jinja: ",
    ),
    ([*QUICKSTART, "model.dtype=fp8"], r"model\.dtype is 'fp8'; input should be 'auto', 'bfloat16' or 'float32'"),
    ([*QUICKSTART, "rollout.engine=sglang"], r"rollout\.engine is 'sglang'; input should be 'auto', 'native'"),
    ([*QUICKSTART, "data.answer_regex=["], r"'\[' is not valid YAML, line 1, column 2: .*\. Quote it"),
    ([*QUICKSTART, "run.resume=yes"], r"run\.resume is True; input should be 'never' or 'auto'"),
    ([*QUICKSTART, "run.max_hours=soon"], r"run\.max_hours is 'soon'; input should be a valid number"),
    ([*QUICKSTART, "rewards=accuracy"], r"rewards is 'accuracy'; input should be a valid list"),
    (
        [*QUICKSTART, "rewards.7.weight=1"],
        r"--set rewards\.7\.weight: '7' is no entry of a list of 2; entries are numbered from 0",
    ),
    ([*QUICKSTART, "rewards.0.weight=much"], r"rewards\.0\.weight is 'much'; input should be a valid number"),
    (
        [*QUICKSTART, "rewards.0.weight=0", "rewards.1.weight=0"],
        r"rewards is \['accuracy', 'format'\] without any weight",
    ),
    ([*QUICKSTART, "rewards.0.function=acuracy"], r"function is 'acuracy'; there is accuracy.*did you mean accuracy\?"),
    (
        [*QUICKSTART, "rewards.0.function=nope.py:f"],
        r"function is 'nope\.py:f'; there is no file .*nope\.py\. Give the path",
    ),
    ([*QUICKSTART, "rewards.0.function=one.py:f"], r"one\.py has no function or class 'f': there is g\. Name one"),
    (
        [*QUICKSTART, "rewards.0.function=classes.py:Gam"],
        r"has no function or class 'Gam': there is .*did you mean Game\?",
    ),
    ([*QUICKSTART, "rewards.0.function=bad.py:f"], r"the file is not valid Python: .*bad\.py, line 1.*Correct it"),
    ([*QUICKSTART, "rewards.0.function=no.such:f"], r"the module 'no\.such' cannot be imported: .* Install it"),
    ([*QUICKSTART, "model.name=./nope"], r"model\.name is './nope'; there is no such directory\. Correct the path"),
    ([*QUICKSTART, "model.name=folder"], r"model\.name is 'folder'; it is neither a model .* Name one of these"),
    (
        [*QUICKSTART, "data.name=missing.jsonl"],
        r"data\.name is 'missing\.jsonl'; there is no such file\. Correct the path",
    ),
    ([*QUICKSTART, "data.name=empty.jsonl"], r"data\.name holds no rows \(empty\.jsonl\)\. Name a data set"),
    ([*QUICKSTART, "data.name=broken.jsonl"], r"broken\.jsonl, line 2, column 13: not JSON: .*\. Correct the line"),
    (
        [*QUICKSTART, "data.name=columns.jsonl"],
        r"data\.question_column is 'question'; row 0 .* columns prompt, solution\. Name one",
    ),
    ([*QUICKSTART, "data.name=list.jsonl"], r"list\.jsonl, item 0: 1 is no row; a row is an object"),
    ([*QUICKSTART, "data.name=null.jsonl"], r"row 0 of data\.name has no question\. Drop the row"),
    ([*QUICKSTART, "data.name=text.txt"], r"data\.name is 'text\.txt'; a local file ends in \.json.*Convert the file"),
    (
        ["report", "runs/nope"],
        r"RUN_DIR is 'runs/nope'; neither metrics\.jsonl nor config\.yaml is there.*Give the directory",
    ),
    (["report", "folder", "--out", "none/x.html"], r"--out is 'none/x\.html'; .* make 'none' first"),
    (["sample", "--model", "folder", "--row", "1"], r"--model is 'folder'; it is neither a model"),
    (["evaluate", "--model", MODEL, "--benchmarks", "gsm9k"], r"--benchmarks has 'gsm9k'; .*did you mean gsm8k\?"),
    ([*EVALUATE, "--data", "mine=nope.jsonl"], r"--data mine is 'nope\.jsonl'; there is no such file"),
    ([*EVALUATE, "--data", "nope.jsonl"], r"--data has 'nope\.jsonl'; it reads NAME=FILE"),
    (
        [*EVALUATE, "--data", "mine=sums.jsonl", "--out", "sums.jsonl"],
        r"--out is 'sums\.jsonl', a file; an evaluation is a directory\. Name another",
    ),
    (
        [*EVALUATE, "--data", "mine=sums.jsonl", "--templates", "chatml"],
        r"--templates has 'chatml'; it is one of r1_zero",
    ),
    (
        [*EVALUATE, "--data", "mine=columns.jsonl", "--templates", "chat"],
        r"there is no column 'question'; .* Rename the column",
    ),
    (["settings", "zzzz"], r"no setting has 'zzzz' in its name or meaning\. `grpo settings` lists all"),
    (["aha", "folder"], r"folder is not the directory of a run; there is no config\.yaml in it\. Name one"),
    (["r1", "nope"], r"'nope' is no folder of stages: .* Name a folder"),
    (
        ["train", "--config", "letters.yaml"],
        r"rewards\.0 is 'accuracy'; it is a mapping .*Write \{function: accuracy\}",
    ),
    (["train", "--config", "quickstart", "--dryrun"], r"unrecognized arguments: --dryrun\. Did you mean --dry-run\?"),
    (["train", "--config", "quickstart", "run.steps=3"], r"Settings follow --set: --set run\.steps=3\."),
    ([*QUICKSTART, "run.dir=file"], r"run\.dir is 'file'; it is a file, .* Name another"),
    ([*QUICKSTART, "run.dir=file/run"], r"run\.dir is 'file/run'; 'file' is a file, .* Name another"),
    (
        [*QUICKSTART, "data.name=sums.jsonl", "data.eval_name=null"],
        r"data\.eval_name is missing; .* Set data\.eval_name",
    ),
    (
        [*QUICKSTART, "data.name=latin.jsonl"],
        r"latin\.jsonl, line 2: the byte 0xe9 is no UTF-8 .* Save the file as UTF-8",
    ),
    (
        [*QUICKSTART, "data.name=again.jsonl"],
        r"again\.jsonl, line 1: the key 'question' is there twice\. Correct the line",
    ),
    (
        [*QUICKSTART, "data.name=nested.jsonl"],
        r"question of row 0 .* is a dictionary with a, not a text\. Name what is inside",
    ),
    ([*QUICKSTART, "data.name=wide.csv"], r"wide\.csv, line 2: 3 cells under 2 column names\. Quote a cell"),
    (
        [*QUICKSTART, "model.name=cut_off"],
        r"model\.name is 'cut_off'; its file model\.safetensors is not whole: .* again into",
    ),
    ([*QUICKSTART, "model.name=only_config"], r"there are no weights in it .* Copy or download the model again"),
    (
        [*QUICKSTART, "model.name=part"],
        r"model\.name is 'part'; its file two\.safetensors is missing\. Copy or download",
    ),
    (
        [*QUICKSTART, "model.name=pointer"],
        r"is a pointer of Git LFS and holds no weights \(`git lfs pull` fetches them\)",
    ),
    ([*QUICKSTART, "model.name=no_json"], r"its config\.json is not JSON .* Copy or download the model again"),
    (["serve", "--model", "cut_off"], r"--model is 'cut_off'; its file model\.safetensors is not whole"),
    (["chat", "--model", "only_config"], r"--model is 'only_config'; there are no weights in it"),
    (["export", MODEL, "--to", "ggfu", "--out", "new"], r"--to is ggfu; it is one of gguf, folder, hub\. Choose one"),
    (["export", MODEL], r"--out is missing; with --to gguf it names a new folder\. Add it"),
    (
        [*EVALUATE, "--data", "mine=sums.jsonl", "--temperature", "hot"],
        r"--temperature: 'hot' is no number of 0 or more",
    ),
    ([*EVALUATE, "--data", "mine=sums.jsonl", "--top-p", "2"], r"--top-p: '2' is no number above 0 and at most 1"),
    ([*EVALUATE, "--data", "mine=sums.jsonl", "--samples", "x"], r"--samples: 'x' is not a whole number of at least 1"),
    (["sample", "--model", MODEL, "--row", "one"], r"--row: 'one' is no whole number"),
    (["compare", "nope.yaml", "--out", "compared"], r"'nope\.yaml'; there is no such file.* Name a YAML file"),
    (
        ["compare", "quickstart", "--out", "compared", "--variant", "a:algorithm.kl_coff=1"],
        r"algorithm\.kl_coff is not a setting\. Did you mean algorithm\.kl_coef\?",
    ),
    (
        ["compare", "quickstart", "--out", "compared", "--set", "data.name=no.jsonl"],
        r"data\.name is '.*no\.jsonl'; there is no such file",
    ),
    (
        [*QUICKSTART, "run.dir=old_run", "run.resume=auto", "optimizer.learning_rate=0.5"],
        r"optimizer\.learning_rate is 0\.5; old_run/checkpoints/step-00000002 was written with 0\.0\d+, .* Restore the value",
    ),
    (["scale", "--model", MODEL, "--gpus", "1", "--hours", "x", "--out", "new.yaml"], r"--hours: 'x' is no number"),
    (["aha", "broken_run"], r"broken_run/config\.yaml is not valid YAML, line 1, column 5: .* Correct it"),
    (
        ["scale", "--config", "tab.yaml", "--model", MODEL, "--hours", "1", "--out", "new.yaml"],
        r"tab\.yaml is not valid YAML, line 2, column 1: .* Correct it",
    ),
    (["check", "memroy", "--config", "quickstart"], r"invalid choice: 'memroy' \(choose from 'memory'"),
    (["reject", "--model", MODEL, "--out", "rows.txt"], r"--out is 'rows\.txt'; the rows are JSON lines"),
]

ASKED: list[tuple[list[str], str]] = [
    (["chat", "--model", MODEL, "--temperature", "-1"], r"--temperature is -1\.0; it is at least 0\. Set 0 for"),
    (
        ["chat", "--model", MODEL, "--tools", "calculater"],
        r"--tools is 'calculater'; .* did you mean calculator\? Name one",
    ),
    (["chat", "--model", MODEL, "--step", "3"], r"--step is 3; .* belongs to no run .* Leave --step out"),
    (["sample", "--model", MODEL, "--question", "1+1", "--answer", "2", "--answer", "3"], r"--answer is given 2 times"),
    (["sample", "--model", MODEL, "--question", "1+1", "--config", "a.yaml"], r"--config is 'a\.yaml'.*no such file"),
    (
        ["serve", "--model", MODEL, "--steps", "5"],
        r"--steps is 5; .* belongs to no run .* Leave it out, or name a run's",
    ),
    (["serve", "--model", MODEL, "--max-tokens", "0"], r"--max-tokens is 0; an answer has at least 1 token\. Raise it"),
    (
        ["export", MODEL, "--to", "folder", "--out", "x", "--step", "7"],
        r"--step is 7; .* Leave --step out, or name a run",
    ),
    (
        ["reject", "--model", MODEL, "--out", "a.jsonl", "--questions", "no.jsonl"],
        r"--questions is 'no\.jsonl'; there is no such",
    ),
    (
        ["reject", "--model", MODEL, "--config", "quickstart", "--out", "a.jsonl", "--set", "data.nam=b"],
        r"data\.nam is not a setting\. Did you mean data\.name\?",
    ),
    (
        [*REJECT, "quickstart-tools"],
        r"tools\.functions of quickstart-tools names tools; .* Give --tools without a name",
    ),
    ([*REJECT, "quickstart-game"], r"environment\.function of quickstart-game is .*; grpo reject has no environment"),
    ([*REJECT, "quickstart", "--tools", "python"], r"--tools names tools; grpo reject calls none"),
    (
        [*REJECT, "quickstart", "--rewrite-samples", "2"],
        r"--rewrite-samples is 2; it has no effect without --rewrite-with",
    ),
    (
        [*REJECT, "quickstart", "--rewrite-with", MODEL, "--tags"],
        r"--tags has no effect with --rewrite-with\. Leave it out",
    ),
    (
        [*REJECT, "quickstart", "--rewrite-with", MODEL, "--rewrite-template", "text.txt"],
        r"--rewrite-template is 'text\.txt'; the file has no \{question\}, .* Add it",
    ),
    ([*REJECT, "quickstart", "--questions", "columns.jsonl"], r"row 0 of .* columns prompt, solution\. Name one"),
    (["reject", "--model", MODEL, "--out", "a.jsonl"], r"--questions is missing; the model belongs to no run"),
    (
        ["reject", "--model", MODEL, "--out", "a.jsonl", "--set", "data.name=sums.jsonl"],
        r"--set is data\.name=sums\.jsonl; .* belongs to no run\. Leave it out, or name a --config",
    ),
    (
        ["reject", "--model", "foreign_run", "--out", "a.jsonl"],
        r"names reward functions .*: one\.py:g\. If you trust them",
    ),
    (["reject", "--model", MODEL, "--out", "a.txt"], r"--out is 'a\.txt'; the rows are JSON lines\. Let its name end"),
    (["reject", "--model", MODEL, "--out", "a.jsonl", "--top-p", "2"], r"--top-p is 2\.0; it is above 0 and at most 1"),
    (
        ["reject", "--model", "sft_run", "--out", "a.jsonl"],
        r"--model is 'sft_run', of supervised training: .* no questions .* Name questions with --questions .*--config a YAML of",
    ),
    (
        ["reject", "--model", MODEL, "--config", "sft_run/config.yaml", "--out", "a.jsonl"],
        r"--config is 'sft_run/config.yaml', of supervised training: ",
    ),
    (
        ["reject", "--model", MODEL, "--config", "sft-quickstart", "--out", "a.jsonl"],
        r"--config is 'sft-quickstart', of supervised training: ",
    ),
    (
        ["reject", "--model", "sft_run", "--out", "a.jsonl", "--questions", "no.jsonl"],
        r"--questions is 'no\.jsonl'; there is no such",
    ),
    (["chat", "--model", "broken_run"], r"broken_run/config\.yaml is not valid YAML, line 1, column 5: .* Correct it"),
]
"""What options say of a model that is asked."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("mistakes")
    (place / "folder").mkdir()
    for name, text in FILES.items():
        (place / name).write_text(text, errors="surrogateescape")
    (place / "broken_run").mkdir()
    (place / "broken_run" / "config.yaml").write_text("a: [")
    (place / "sft_run" / "checkpoints").mkdir(parents=True)
    (place / "sft_run" / "config.yaml").write_text(SupervisedConfig.load("sft-quickstart").to_yaml())
    _make_models(place)
    (place / "foreign_run").mkdir()
    foreign = Config.load("quickstart", ['rewards=[{"function": "one.py:g"}]'])
    (place / "foreign_run" / "config.yaml").write_text(foreign.to_yaml())
    checkpoint = place / "old_run" / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    record = {"config": Config.load("quickstart").model_dump(mode="json")}
    (checkpoint / "state.json").write_text(json.dumps({"checksum": checksum_of(record), **record}))
    before = Path.cwd()
    os.chdir(place)
    yield place
    os.chdir(before)


def _make_models(place: Path) -> None:
    for name in ("cut_off", "only_config", "part", "pointer", "no_json"):
        (place / name).mkdir()
        shutil.copy(TINY / "model" / "config.json", place / name)
    weights = (TINY / "model" / "model.safetensors").read_bytes()
    (place / "cut_off" / "model.safetensors").write_bytes(weights[:-1])
    (place / "part" / "one.safetensors").write_bytes(weights)
    named = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (place / "part" / "model.safetensors.index.json").write_text(json.dumps(named))
    (place / "pointer" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (place / "no_json" / "config.json").write_text("{broken")


ALL = [*MISTAKES, *ASKED, *AFTER_TORCH]


@pytest.mark.parametrize(("arguments", "answer"), ALL, ids=[" ".join(given)[-60:] for given, _ in ALL])
def test_a_mistake_is_answered_in_three_lines_at_most(
    arguments: list[str], answer: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", [])  # which the command line replaces
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(answer, said), said
    assert len(said.splitlines()) <= 3, said
    assert not [path for path in folder.iterdir() if path.name in ("runs", "lock")]


EARLY = [
    given
    for given, _ in MISTAKES
    if given[:3] == QUICKSTART[:3]
    or given[0] == "sft"
    or given[0] in ("compare", "export", "report")
    or "mine=sums.jsonl" in given
] + [given for given, _ in ASKED]


def test_what_is_wrong_with_a_configuration_is_told_before_torch_is_imported(folder: Path):
    """In one process that refuses to import it: a command that needs it fails with another message."""
    program = (
        "import json, sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from grpo import cli\n"
        "for given in json.loads(sys.argv[1]):\n"
        "    try: cli.main(given)\n"
        "    except SystemExit as ended: print(ended.code)\n"
        "    except BaseException as error: print(given, repr(error))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(EARLY)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["2"] * len(EARLY), done.stdout + done.stderr


def test_what_lies_beside_weights_in_one_file_is_not_read(tmp_path: Path):
    """As transformers reads it: an index that was left over, or a file of other software."""
    shutil.copytree(TINY / "model", tmp_path / "model")
    (tmp_path / "model/model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    (tmp_path / "model/consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    check_files(tmp_path / "model", "model.name is 'model'")


def test_what_a_message_asks_to_install_is_what_the_package_declares():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    known = {requirement for extra in declared.values() for requirement in extra}
    asked = [
        quoted or plain.rstrip(".,")
        for folder in ("grpo", "tools", "rewards")
        for path in (ROOT / folder).rglob("*.py")
        for told in re.findall(r"pip install ((?:'[^']+' ?)+|[\w.=-]+)", path.read_text())
        for quoted, plain in re.findall(r"'([^']+)'|([\w.=-]+)", told)
    ]
    assert len(asked) >= 9
    assert not set(asked) - known


def test_what_is_only_tried_or_is_left_to_the_run_is_not_refused_for_a_checkpoint(folder: Path):
    """A dry run beside checkpoints, and what a run makes of its models and its data before it writes them down."""

    def config(*changes: str) -> Config:
        return Config.load("quickstart", ["run.dir=old_run", "run.resume=auto", *changes])

    check_config(config("rollout.group_size=4"))
    with pytest.raises(
        ValueError, match=r"rollout\.group_size is 4; old_run/checkpoints/step-00000002 was written with"
    ):
        check_config(config("rollout.group_size=4"), resumes=True)
    check_config(config("run.steps=99", "memory.max_sequences=7"), resumes=True)
    rewritten = (
        "data.max_prompt_tokens=70",
        f"model.name={MODEL}",
        "teacher.name=old_run",
        "algorithm.kl_estimator=k3",
    )
    check_newest(config(*rewritten))
    (folder / "old_run/checkpoints/step-00000003").mkdir()  # without a state: the run sets it aside and takes the other
    check_newest(config("rollout.group_size=4"))
