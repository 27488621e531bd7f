"""What is right: the reward that says it, of a run with several, and of questions of several kinds."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import warm
from helpers import ROOT, TINY, FixedGenerator, clean_environment, number_in_text, tiny_config
from test_report import a_run
from test_scoring import make_group, make_scorer

from grpo import Trainer
from grpo.algorithm.objective import AdvantageRule
from grpo.cli import reject
from grpo.config import RewardConfig
from grpo.evaluation.arms import verdicts_in
from grpo.inference.inspect import verdicts_left
from grpo.observe.rundir import RunLog
from grpo.observe.sinks import overview
from grpo.rejection.rules import Required, Rules, falls_of_row, pass_rate
from grpo.report.fit import prediction
from grpo.report.panels import sections
from grpo.report.read import read_runs, verdicts_of_runs
from grpo.report.summary import headline
from grpo.run.resumable import MAY_CHANGE, changed_setting
from grpo.scoring.answers import completion_rows, judged, summarize, verdict_name, verdicts_of
from grpo.scoring.deciding import signal_from, who_decides
from grpo.scoring.reward import Reward, sure_name
from grpo.scoring.scorer import join_scores
from grpo.system.jsonl import read_jsonl
from grpo.training.rollout import RolloutMaker
from grpo.types import Scores

nan = math.nan


def short(completion: str) -> float:
    """Shaping: paid in full for one character."""
    return 1 / len(completion)


def checked(completion: str, answer: str) -> float | None:
    return None if completion == "?" else float(completion == answer)


def run_code(completion: str) -> float | None:
    return None if completion == "?" else float(completion == "code")


def right_of(*groups: Any, rewards: list[Reward], **options: Any) -> list[bool | None]:
    with make_scorer(*rewards, columns=["question", "answer", "kind"], **options) as scorer:
        return [row["right"] for row in completion_rows(list(groups), scorer.score(list(groups)))]


def test_the_reward_that_is_named_says_what_is_right_and_else_the_first():
    group, rewards = make_group(["1", "18", "?"], kind="maths"), [Reward(short), Reward(checked)]
    assert right_of(group, rewards=rewards) == [True, False, True]
    assert right_of(group, rewards=rewards, verdict="checked") == [False, True, None]


def test_of_several_names_the_first_that_can_tell_of_a_question_is_its_verdict():
    groups = [make_group(["18", "code", "?"], kind="maths"), make_group(["18", "code", "?"], row=1, kind="code")]
    rewards = [Reward(checked, only={"kind": ["maths"]}), Reward(run_code, only={"kind": ["code"]})]
    unknown = [None] * 3
    assert right_of(*groups, rewards=rewards) == [True, False, None, *unknown]
    assert right_of(*groups, rewards=rewards, verdict="run_code") == [*unknown, False, True, None]
    for names in (["checked", "run_code"], ["run_code", "checked"]):
        assert right_of(*groups, rewards=rewards, verdict=names) == [True, False, None, False, True, None]


def test_an_answer_that_the_verdict_of_its_question_cannot_judge_is_not_judged_by_another():
    values = {
        "a": torch.tensor([[1.0, nan], [nan, nan], [nan, nan]]),
        "b": torch.tensor([[0.0, 0.0], [1.0, nan], [1.0, 1.0]]),
    }
    scores = Scores(torch.zeros(3, 2), values, 0, 0, is_due={"a": torch.tensor([False, False, True])})
    expected = torch.tensor([[1.0, nan], [1.0, nan], [nan, nan]])  # of the last a had to tell: it failed
    torch.testing.assert_close(judged(scores, ["a", "b"]), expected, equal_nan=True)
    torch.testing.assert_close(judged(scores, ["b", "a"]), values["b"], equal_nan=True)
    assert judged(Scores(torch.zeros(0, 4), {"a": torch.zeros(0, 4)}, 0, 0), ["a", "a"]).shape == (0, 4)


def test_without_rewards_nobody_can_tell_and_of_no_groups_there_are_no_rows():
    for rows in (2, 0):
        groups, scores = [make_group(["a", "b"])] * rows, Scores(torch.ones(rows, 2, dtype=torch.float64), {}, 0, 0)
        assert [row["right"] for row in completion_rows(groups, scores)] == [None] * 2 * rows


def test_scores_that_an_older_run_saved_within_a_step_are_read():
    old = Scores(torch.ones(1, 2), {"checked": torch.tensor([[1.0, 0.0]])}, 0, 0)
    del old.__dict__["is_due"], old.__dict__["verdicts"]
    assert [row["right"] for row in completion_rows([make_group(["a", "b"])], old)] == [True, False]
    assert join_scores([old, old]).is_due is None
    new = Scores(torch.ones(1, 2), old.values, 0, 0, is_due={"checked": torch.tensor([True])})
    assert join_scores([new, new]).is_due["checked"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("def mine(completion):\n    return 1.0\n", "mine"),
        ("def other(completion):\n    return 1.0\nmine = other\n", None),
        ("def named(f):\n    return f\n\n@named\ndef mine(completion):\n    return 1.0\n", None),
        ("class mine:\n    def __call__(self, completion):\n        return 1.0\n", "mine"),
    ],
)
def test_the_name_of_a_reward_is_sure_where_its_source_says_it_plainly(tmp_path: Path, source: str, name: str | None):
    (tmp_path / "own.py").write_text(source)
    spec = f"{tmp_path}/own.py:mine"
    assert sure_name(RewardConfig(function=spec)) == name
    assert sure_name(RewardConfig(function=spec, name="given")) == "given"
    assert sure_name(RewardConfig(function="accuracy")) == "accuracy"
    assert sure_name(RewardConfig(function="package.module:mine")) is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            "cheked",
            r"is 'cheked'; cheked is no reward that can say .*: there is checked, short; did you mean checked\? Name",
        ),
        (["checked", "shrt"], r"; shrt is no reward that can say what is right here: there is .* did you mean short\?"),
        ([], r"is \[\]; it names no reward: there is checked, short\. Name one of them, or remove it\.$"),
        (["checked", "vote"], r"; vote is no reward that can say what is right here: there is checked, short\."),
        (["checked", "checked"], r"is \['checked', 'checked'\], with checked twice\. Name it once\.$"),
    ],
)
def test_a_verdict_is_one_of_the_rewards(wrong: Any, said: str):
    with pytest.raises(ValueError, match=rf"^scoring\.verdict .*{said}"):
        verdicts_of(wrong, ["short", "checked", "vote"])
    with pytest.raises(ValueError, match=r"^scoring\.verdict is 'no'"):
        make_scorer(short, checked, verdict="no")
    assert verdicts_of(None, []) == verdicts_of("accuracy", []) == []  # supervised training that grades nothing


@pytest.mark.parametrize("wrong", [5, True, {"a": "b"}])
def test_a_verdict_is_a_name_or_a_list_of_names(tmp_path: Path, wrong: Any):
    said = f"scoring.verdict is {wrong!r}; it is a name, or a list of names. Correct scoring.verdict."
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        tiny_config(tmp_path, scoring={"verdict": wrong})


def test_an_environment_says_what_is_right_before_rewards_beside_it():
    assert verdict_name(["turns_short", "environment"]) == "environment"
    assert verdict_name(["environment", "accuracy"]) == "accuracy"
    assert verdict_name(["vote", "format", "mine"]) == "mine"  # the values of vote are names


def test_what_says_what_is_right_may_not_change_on_resume(tmp_path: Path):
    before, now = (
        {"scoring": {"verdict": name, "num_workers": number}} for name, number in ((None, 1), ("accuracy", 2))
    )
    assert changed_setting(before, now, may_change=MAY_CHANGE) == "scoring.verdict"
    assert (
        changed_setting(before, now | {"scoring": {"verdict": None, "num_workers": 2}}, may_change=MAY_CHANGE) is None
    )


@pytest.mark.parametrize("verdict", ["number", ["number", "nomber"]])
def test_a_run_whose_verdict_is_missing_is_refused_before_the_model_is_loaded(tmp_path: Path, verdict: Any):
    config = tiny_config(tmp_path / "run", scoring={"verdict": verdict}, model={"name": str(tmp_path)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"^scoring\.verdict is .*: there is number_in_text; did you"):
        Trainer(config, rewards=[number_in_text])


# ---- who goes by it --------------------------------------------------------------------------------------------------

FIXED = {"algorithm": {"kl_coef": 0.0, "max_sampling_gap": 100}}


def half(completion: str) -> float:
    """Of FixedGenerator's numbers."""
    return float(float(completion) > 0.5)


def a_mixed_run(tmp_path: Path, **sections: Any) -> tuple[Trainer, list[dict[str, Any]]]:
    """After a step, over questions of two kinds with a reward each, and what it wrote of each completion."""
    rows = [{"question": f"{number}?", "answer": "1", "kind": "ab"[number % 2]} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(
        tmp_path / "run", **FIXED, data={"name": str(tmp_path / "rows.jsonl"), "kind_column": "kind"}, **sections
    )
    rewards = [Reward(half, name=f"of_{kind}", only={"kind": [kind]}) for kind in "ab"]
    trainer = Trainer(config, rewards=rewards)
    trainer.collector.generator = FixedGenerator()
    trainer.train_step()
    trainer.close()
    return trainer, read_jsonl(tmp_path / "run/completions.jsonl")


DYNAMIC = {"num_prompts": 8, "group_size": 4, "max_completion_tokens": 24, "max_oversampling": 4}


def test_dynamic_sampling_takes_questions_of_every_kind(tmp_path: Path):
    """By the one reward that says what is right questions of the other kind had never signal, and were never trained on."""
    _, rows = a_mixed_run(tmp_path, rollout=DYNAMIC)
    used = [row for row in rows if row["in_batch"]]
    assert {row["kind"] for row in used} == {"a", "b"}
    groups = [used[i : i + 4] for i in range(0, len(used), 4)]
    assert len(groups) == 8
    assert all(len({row["reward"] for row in group}) > 1 for group in groups)
    assert {row["right"] for row in rows if row["kind"] == "a"} == {True, False}
    assert {row["right"] for row in rows if row["kind"] == "b"} == {None}  # nobody named its reward a verdict


def test_questions_of_every_kind_count_as_solved_by_their_verdict(tmp_path: Path):
    rollout = {
        "num_prompts": 16,
        "group_size": 4,
        "max_completion_tokens": 24,
        "solved_share": 0.5,
        "solved_from": 0.75,
    }
    trainer, rows = a_mixed_run(tmp_path, rollout=rollout, scoring={"verdict": ["of_a", "of_b"]})
    groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    solved = {group[0]["row"] for group in groups if sum(row["right"] for row in group) >= 3}
    assert set(trainer.state.solved) == solved
    assert {row["kind"] for row in rows if row["row"] in solved} == {"a", "b"}
    (metrics,) = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert metrics["verdict/right"] == pytest.approx(sum(row["right"] for row in rows) / len(rows))


def judged_row(number: int, kind: str, right: bool | None) -> dict[str, Any]:
    value = None if right is None else float(right)
    rewards = {"shaping": 1.0, "of_a": value if kind == "a" else None, "of_b": value if kind == "b" else None}
    asked = {"row": number, "sample": 0, "question": "How many?", "answer": "3"}
    written = {
        "completion": "<think> two words </think> <answer> 3 </answer>",
        "num_tokens": 8,
        "finish_reason": "stop",
    }
    return asked | written | {"rewards": rewards, "right": right}


ANSWERS = [judged_row(0, "a", True), judged_row(1, "b", True), judged_row(2, "b", False), judged_row(3, "a", None)]


def test_pass_rates_count_every_kind():
    assert summarize(ANSWERS)["eval/pass@1"] == pytest.approx(2 / 3)


def test_a_report_names_the_verdicts_and_shows_the_share_of_both(tmp_path: Path):
    evaluations = [row | {"step": step, "right": row["right"] or step == 2} for step in (0, 2) for row in ANSWERS[:3]]
    metrics = [{"step": step} | summarize([row for row in evaluations if row["step"] == step]) for step in (0, 2)]
    metrics += [{"step": step, "verdict/right": step / 4} for step in range(1, 5)]
    directory = a_run(tmp_path / "run", metrics=metrics, evaluations=evaluations)
    config = tiny_config(tmp_path / "run", scoring={"verdict": ["of_a", "of_b"]})
    (directory / "config.yaml").write_text(config.to_yaml())
    (run,) = read_runs([directory], max_completions=9)
    assert (run.verdict, run.verdicts) == ("of_a", ["of_a", "of_b"])
    found = headline(run)
    assert found["verdict"] == "of_a or of_b"
    assert [found["before"][0], found["after"][0]] == pytest.approx([2 / 3, 1])
    assert found["accuracy"][0] < 0.5 < found["accuracy"][1]
    names = [name for row in metrics for name in row]
    panels = {panel.title: panel for section in sections(names, verdicts=run.verdicts) for panel in section.panels}
    assert (panels["Right of all kinds"].lines, panels["Right of all kinds"].points) == (
        ["verdict/right"],
        ["eval/pass@1"],
    )
    assert "pass@1" not in panels
    assert prediction(run)["name"] == "verdict/right"


def test_a_row_of_an_older_run_is_judged_by_the_rule(tmp_path: Path):
    old = [{name: value for name, value in row.items() if name != "right"} | {"step": 0} for row in ANSWERS]
    (run,) = read_runs([a_run(tmp_path / "run", evaluations=old)], max_completions=9)
    assert [row["right"] for row in run.evaluations] == [True] * 4  # `shaping` is the first that is not about manners


def test_rejection_keeps_what_is_right_of_every_kind():
    required = Rules().required(["shaping", "of_a", "of_b"], ["of_a", "of_b"])
    assert required == Required({"of_a": 1.0, "of_b": 1.0}, by_row=True)
    found = [
        [(fall.rule, fall.detail) for fall in falls_of_row(row, "How many?", Rules(), required)] for row in ANSWERS
    ]
    assert found == [[], [], [("wrong", "of_b 0")], [("unknown", "of_a, of_b")]]
    assert pass_rate(ANSWERS, required) == pytest.approx(2 / 3)
    failed = judged_row(4, "a", None) | {"rewards": {"of_a": None, "of_b": 1.0}}  # what failed is judged by no other
    assert [fall.rule for fall in falls_of_row(failed, "How many?", Rules(), required)] == ["unknown"]
    asked = Rules(require={"shaping": 0.5}).required(["shaping", "of_a", "of_b"], ["of_a", "of_b"])
    assert falls_of_row(failed | {"rewards": {"shaping": 0.5}}, "How many?", Rules(), asked) == []


def test_the_command_rejects_by_the_verdict_of_each_question(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "def shaping(completion):\n    return 1.0\n\n"
        "def of_a(completion):\n    return float(len(completion) % 2)\n\n"
        "def of_b(completion):\n    return float(len(completion) % 3 == 0)\n"
    )
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()[:8]]
    data = [row | {"kind": "ab"[number % 2]} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    own = [{"function": f"{tmp_path}/own.py:of_{kind}", "only": {"kind": kind}} for kind in "ab"]
    config = tiny_config(
        tmp_path / "run",
        data={"name": str(tmp_path / "rows.jsonl")},
        rewards=[{"function": f"{tmp_path}/own.py:shaping", "weight": 0.1}, *own],
        scoring={"verdict": ["of_a", "of_b"]},
    )
    (tmp_path / "own.yaml").write_text(config.to_yaml())
    out = tmp_path / "kept.jsonl"
    words = f"--model {TINY}/model --config {tmp_path}/own.yaml --samples 6 --max-tokens 48 --workers 1".split()
    words += ["--trust-rewards", "--out", str(out)]
    found = reject.run(reject._parser().parse_args(words))
    with pytest.raises(
        ValueError, match=r"the samples there have scoring.verdict 'of_a, of_b', and these 'of_b, of_a'"
    ):
        reject.run(reject._parser().parse_args([*words, "--set", "scoring.verdict=[of_b,of_a]"]))
    every = [*read_jsonl(out), *read_jsonl(out.with_suffix(".dropped.jsonl"))]
    assert len(every) == 48
    right = {(row["row"], row["sample"]) for row in every if row["rewards"][f"of_{'ab'[row['row'] % 2]}"] == 1}
    kept = {(row["row"], row["sample"]) for row in read_jsonl(out)}
    assert kept <= right
    assert {row % 2 for row, _ in kept} == {0, 1}
    assert not right & {(row["row"], row["sample"]) for row in every if row.get("reason") == "wrong"}
    assert found["rules"]["require"] == {"of_a": 1.0, "of_b": 1.0}
    for rate in read_jsonl(out.with_suffix(".pass_rates.jsonl")):
        assert rate["pass_rate"] == pytest.approx(sum(row == rate["row"] for row, _ in right) / 6)


def test_a_report_takes_the_order_of_rewards_from_the_configuration(tmp_path: Path):
    """In the first step no question of the verdict's kind was asked."""
    metrics = [{"step": 1, "reward/longish": 2.0}, {"step": 2, "reward/longish": 1.0, "reward/sums_ok": 0.5}]
    directory = a_run(tmp_path / "run", metrics=metrics)
    named = [{"function": "own.py:sums_ok"}, {"function": "own.py:other", "name": "longish"}]
    (directory / "config.yaml").write_text(tiny_config(tmp_path / "run", rewards=named).to_yaml())
    assert read_runs([directory], max_completions=0)[0].verdicts == ["sums_ok"]
    given = [
        judged_row(0, "a", True) | {"step": 0, "rewards": {"of_a": None, "longish": 2.0}}
    ]  # to Trainer, in this order
    assert read_runs([a_run(tmp_path / "given", metrics=metrics, evaluations=given)], max_completions=0)[
        0
    ].verdicts == ["of_a"]


def test_the_headline_counts_the_questions_that_somebody_judged(tmp_path: Path):
    rows = [row | {"step": 0} for row in ANSWERS]
    (run,) = read_runs(
        [a_run(tmp_path / "run", metrics=[{"step": 0} | summarize(rows)], evaluations=rows)], max_completions=0
    )
    assert headline(run)["questions"] == 3


def test_two_arms_are_judged_by_the_verdict_that_each_configuration_names(tmp_path: Path):
    named = [{"function": "format"}, {"function": "accuracy"}]
    config = tiny_config(tmp_path, rewards=named, scoring={"verdict": "format"})
    assert verdicts_in(config) == ["format"]
    assert verdicts_in(tiny_config(tmp_path, rewards=named)) == ["accuracy"]
    game = {"environment": {"function": "guess_number"}, "rewards": [{"function": "own.py:turns_short"}]}
    assert verdicts_in(tiny_config(tmp_path, **game)) == ["environment"]


def test_a_question_of_ones_own_is_judged_by_the_verdicts_that_can_be_asked(tmp_path: Path):
    rewards = [Reward(short), Reward(checked), Reward(run_code)]
    scoring = tiny_config(tmp_path, scoring={"verdict": ["checked", "run_code"]}).scoring
    assert verdicts_left(scoring, rewards, {"run_code": ["tests"]}) == ["checked"]
    assert verdicts_left(scoring, rewards, {"run_code": ["tests"], "checked": ["answer"]}) == []
    assert verdicts_left(tiny_config(tmp_path).scoring, rewards, {"short": ["kind"]}) == []  # by no other in its place


def test_without_its_answer_nobody_says_that_an_answer_is_right():
    """`format` is left, and says nothing of what is right."""
    words = ["--model", str(TINY / "model"), "--config", str(ROOT / "configs" / "quickstart.yaml"), "--group", "4"]
    done = warm.run(
        ["-m", "grpo", "sample", *words, "--question", "What is 3+4?", "--json"],
        cwd=ROOT,
        env=clean_environment(),
        timeout=100,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["right"] for row in rows] == [None] * 4, done.stderr
    assert {*rows[0]["rewards"]} == {"format"}


def test_runs_without_rewards_have_no_verdict(tmp_path: Path):
    (run,) = read_runs([a_run(tmp_path / "sft", metrics=[{"step": 1, "supervised/loss": 1.0}])], max_completions=0)
    assert (run.verdicts, run.verdict, headline(run)["verdict"]) == ([], "accuracy", "accuracy")
    assert verdicts_of_runs([run]) == []


def test_the_overview_of_weights_and_biases_is_of_all_kinds():
    assert overview(["mine"])["eval/mine"] == "held-out mine"
    several = overview(["of_a", "of_b"])
    assert (several["verdict/right"], several["eval/pass@1"]) == ("right", "held-out right")
    assert "reward/of_a" not in several


def test_dynamic_sampling_looks_at_what_has_a_weight_and_solved_questions_at_the_verdict(tmp_path: Path):
    rewards = [Reward(checked, weight=0), Reward(short), Reward(run_code), Reward(format, name="format", weight=0.1)]

    def found(**sections: Any) -> tuple[list[str], list[str]]:
        return signal_from(tiny_config(tmp_path, **sections), rewards)

    assert found() == (["short"], ["short", "run_code"])  # and not format
    assert found(scoring={"verdict": "checked"}) == (["checked"], ["short", "run_code"])
    assert found(scoring={"verdict": ["checked", "run_code"]}) == (["checked", "run_code"], ["run_code", "short"])
    named = {"max_oversampling": 2.0, "signal_from": "run_code"}
    assert found(rollout=named, scoring={"verdict": "checked"}) == (["run_code"], ["run_code"])


def test_completions_without_a_reward_give_a_group_no_signal():
    """The verdict tells them apart, and none of them is trained on."""
    maker = RolloutMaker(None, None, None, verdicts=["checked"], signal_from=["checked"], words={})
    values = {"checked": torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)}
    rewards = torch.tensor([[1.0, nan], [1.0, 0.0]], dtype=torch.float64)
    assert maker._signal(AdvantageRule(), Scores(rewards, values, 0, 0)).tolist() == [False, True]


def test_a_run_says_who_decides_where_it_is_not_plain(tmp_path: Path):
    rewards = [Reward(short), Reward(checked, only={"kind": ["maths"]}), Reward(format)]

    def said(**sections: Any) -> list[str]:
        return [*who_decides(tiny_config(tmp_path, **sections), rewards, ["short"])]

    assert said() == ["of short, checked the reward short says what is right. Set scoring.verdict to name another"]
    assert said(scoring={"verdict": "checked"}) == []
    named = {"max_oversampling": 2.0, "signal_from": "checked"}
    (line,) = said(rollout=named, scoring={"verdict": "checked"})
    assert line.startswith("rollout.signal_from is 'checked', which is asked about some questions only")
    assert [*who_decides(tiny_config(tmp_path), [Reward(short), Reward(format)], ["short"])] == []


def test_a_run_tells_weights_and_biases_what_its_configuration_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def in_background(name: str, make: Any, **_: Any) -> MagicMock:
        asked.append(make.keywords["verdicts"])
        return MagicMock()

    monkeypatch.setattr("grpo.observe.rundir.InBackground", in_background)
    processes = SimpleNamespace(is_main=True, device=torch.device("cpu"), world_size=1)
    for verdict in ("second", ["second", "first"], None):
        config = tiny_config(tmp_path, logging={"wandb": "offline"}, scoring={"verdict": verdict})
        log = RunLog(tmp_path, config, processes, reward_names=["first", "second"])
        log.open(resumed_step=None)
        log.close()
    assert asked == [["second"], ["second", "first"], ["first"]]
