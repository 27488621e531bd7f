"""Every command in the bash blocks of README and docs/ that can run on a CPU is run, made shorter by settings.

tests/test_docs.py checks that programs take the arguments of all of them; here stands why some do not run.
"""

import re
import shlex
from pathlib import Path

import pytest
import warm
from helpers import QUESTIONS, ROOT, clean_environment

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

FEW = (
    "run.steps=2 rollout.num_prompts=4 rollout.group_size=4 evaluation.num_questions=4 preflight.num_questions=4 "
    f"data.name={QUESTIONS}"
)
SHORTER = {
    "grpo train": f"--set {FEW}",
    "grpo sft": "--set training.epochs=0.2 optimizer.warmup_steps=1 evaluation.num_questions=4",
    "grpo evaluate": "--questions 4",
    "grpo reject": "--num-questions 4",
    "grpo sample": "--group 2",
    "grpo preflight": "--questions 4",
}
"""What is added to a command of each program, so that it takes seconds."""

ELSEWHERE = {
    r"^grpo serve|^curl|--endpoint": "a server and who asks it; tests/test_serve.py does both",
    r"^python benchmarks/(serve|soak)\.py": "takes minutes or a GPU; tests/test_benchmarks.py runs it with less",
    r"^make |^source ": "sets up or runs all tests",
    r"configs/qwen1\.5b|--config qwen1\.5b|gsm8k|Qwen/|r1/20_cold_start|r1/80_distil": "needs the hub, and mostly a GPU",
    r"^pip install": "needs the package index",
    r"--config my\.yaml": "tests/test_docs.py runs it with the README's files",
    r"^grpo r1 r1-tiny( --out .*)?$": "takes minutes; tests/test_pipeline.py runs its stages in short",
    r"^grpo workspace": "needs a login at W&B; tests/test_workspace.py has a server of its own",
    r"^grpo compare": "trains six runs; tests/test_compare.py does so with smaller ones",
    r"scripts/check_gpu\.py": "needs GPUs; tests/test_check_gpu.py rehearses it",
    r"--group 8|,probes|--require accuracy=1|max_oversampling=3": "as a shorter one beside it; tests of that option run it",
    r"^grpo report runs/a runs/b": "tests/test_report.py compares runs",
}
"""Why a command is not run here: what it looks like, and the reason."""

SHOWN = {
    "grpo train": r"held-out, step 2:  (?:accuracy|environment) \d\.\d{3} ± \d\.\d{3}  .*length \d+\.\d{3}  cut off \d\.\d{3}",
    "grpo report": r"runs/quickstart/report\.html  \d\.\d MB",
    "grpo sample": r"[✓✗?] 2/2  reward .*advantage .*tokens, (ended|cut off|out of turns)",
    "grpo chat": r"<think>|answer|\d",
    "grpo aha": r"reflection",
    "grpo evaluate": r"pass@1|reward \[95 %\]",
    "grpo reject": r"kept",
    "grpo export": r"exported/quickstart",
    "grpo r1": r"grpo (train|sft|reject) .*--",
    "grpo sft": r"step|loss",
}
"""Of the output of each program, what the documents show or a reader looks for."""


def commands() -> list[str]:
    """Each once, without its comment, in the order of the documents; after the commands whose files it reads."""
    blocks = [text for each in DOCUMENTS for text in re.findall(r"^```bash\n(.*?)^```", each.read_text(), re.M | re.S)]
    lines = [line for text in blocks for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found = dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines)
    return sorted(filter(None, found), key=lambda command: "runs/sft-quickstart" in command)


def reason_of(command: str) -> str | None:
    return next((reason for pattern, reason in ELSEWHERE.items() if re.search(pattern, command)), None)


RUN_HERE = [command for command in commands() if reason_of(command) is None]
TIMEOUT = 300.0
FIRST = "grpo train --config quickstart"


def run(command: str, place: Path, wanted: int = 0) -> str:
    words = shlex.split(command)
    assert words[0] == "grpo", f"{command}: say how it is run, or in ELSEWHERE why it is not"
    more = SHORTER.get(" ".join(words[:2]), "").split()
    if "quickstart-game" in words:
        more.remove(f"data.name={QUESTIONS}")  # its questions are its environment's
    if "--set" in words and "--set" in more:
        at = words.index("--set") + 1
        words[at:at] = more[1:]  # before the document's own settings, which win
    else:
        words += more
    environment = {**clean_environment(), "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    log = place / "printed.txt"
    with log.open("w") as out:
        process = warm.Process(
            ["-m", *words], cwd=place, env=environment, stdin=warm.PIPE, stdout=out, stderr=warm.STDOUT
        )
    assert process.stdin is not None
    process.stdin.write("What is 2+3?\n")  # for chat; the others do not read
    process.stdin.close()
    try:
        code = process.wait(TIMEOUT)
    finally:
        process.kill()
    printed = log.read_text()
    assert code == wanted, f"{command}: {printed[-3000:]}"
    return printed


PRINTED: dict[tuple[Path, str], str] = {}


def printed_by(command: str, place: Path, code: int = 0) -> str:
    """Of a command that is run once for all tests."""
    if (place, command) not in PRINTED:
        PRINTED[place, command] = run(command, place, code)
    return PRINTED[place, command]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as the documents' reader has it: a clone, in which the quickstart was run."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "configs").symlink_to(ROOT / "configs")
    assert re.search(SHOWN["grpo train"], printed_by(FIRST, folder))
    return folder


@pytest.mark.parametrize("command", [each for each in RUN_HERE if each != FIRST])
def test_a_command_of_the_documents_runs(command: str, place: Path):
    printed = printed_by(command, place)
    program = " ".join(shlex.split(command)[:2])
    assert re.search(SHOWN[program], printed), printed[-3000:]


EXCERPTS = [
    ("README.md", "preflight: what the untrained", FIRST, 0),
    ("docs/getting-started.md", "4,000 training questions", FIRST, 0),
    (
        "docs/getting-started.md",
        "✗ 2/2",
        "grpo sample --model runs/quickstart --question 'What is 12+8+5-5+9?' --answer 29",
        0,
    ),
    ("docs/aha.md", "reflection  ", "grpo aha runs/quickstart", 0),
    (
        "docs/before-a-run.md",
        "  template  ",
        "grpo preflight --config configs/quickstart.yaml --set data.template=r1_zero data.max_prompt_tokens=300 --questions 16",
        1,
    ),
    (
        "docs/evaluation.md",
        "benchmark  template",
        "grpo evaluate --model runs/quickstart --benchmarks mine --data mine=configs/quickstart/test.jsonl --templates chat "
        "--samples 4",
        0,
    ),
    ("README.md", "error: rollout.group_sise", "grpo train --config quickstart --set rollout.group_sise=8", 2),
]
"""Of a document: how an excerpt begins, the command that prints such lines, and its exit code."""

OTHERWISE = re.compile(r"Question|before \(|after \(|│|</?think>|Wait|[-\d+]+=|(accuracy|format) +[01] x|gsm8k ")
"""Begins what a model is asked and writes, which is as the training went, and the rows of another model."""


def excerpt(document: str, beginning: str) -> list[str]:
    """The indented lines from the first one that begins so to the end of the block."""
    text = (ROOT / document).read_text()
    found = re.search(rf"^    {re.escape(beginning)}.*\n(?:    .*\n)*", text, re.MULTILINE)
    assert found, f"{document} has no excerpt that begins with {beginning!r}"
    return [line for line in found[0].splitlines() if not OTHERWISE.match(line.strip())]


def shape(line: str) -> str:
    """A line whose numbers and verdicts are all the same; words stay as they are."""
    line = re.sub(r"(?<!\w)-(?!\w)|\d[\d,:]*(\.\d+)?(e[-+]\d+)?", "#", line)
    return " ".join(re.sub(r"-#|#(-#)?", "#", line.translate(str.maketrans("✓✗", "??"))).split())


@pytest.mark.parametrize(("document", "beginning", "command", "code"), EXCERPTS, ids=lambda value: str(value)[:40])
def test_an_excerpt_is_what_its_command_prints_but_for_numbers(
    document: str, beginning: str, command: str, code: int, place: Path
):
    printed = [shape(line) for line in printed_by(command, place, code).splitlines()]
    for line in excerpt(document, beginning):
        wanted, is_cut, _ = shape(line).partition("[...]")
        assert any(each.startswith(wanted) if is_cut else each == wanted for each in printed), (line, printed)


def test_not_all_is_left_out():
    assert FIRST in RUN_HERE
    assert len(RUN_HERE) >= 10
