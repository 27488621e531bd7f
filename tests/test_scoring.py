"""The scorer: who is given what, the three endings of a call, and the sum."""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo.rewards import accuracy, format, overlong

from grpo.config import RewardConfig
from grpo.scoring import verdict_cache
from grpo.scoring.binding import pickled
from grpo.scoring.reward import Reward, RewardError, resolve_function, resolve_rewards
from grpo.scoring.scorer import Scorer, weighted_sum
from grpo.scoring.worker import Call, Outcome
from grpo.turns.episode import environment
from grpo.types import Completion, Episode, Group, Prompt

nan = math.nan
NOT_DUE = torch.zeros(2, 2, dtype=torch.bool)


def make_group(
    texts: list[str], *, row: int = 0, answer: str = "18", messages: list[dict[str, str]] | None = None, **columns: Any
) -> Group:
    """Completion i has i + 1 tokens; the last one of a group was cut off."""
    cells = {"question": f"Q{row}?", "answer": answer} | columns
    prompt = Prompt(row, [1, 2], f"Q{row}? A:", "", cells, messages=messages)
    completions = [
        Completion(list(range(i + 1)), [0.0] * (i + 1), text, "length" if i + 1 == len(texts) else "stop")
        for i, text in enumerate(texts)
    ]
    return Group(prompt, completions)


def make_scorer(*rewards: Reward | Callable[..., Any], **options: Any) -> Scorer:
    settings: dict[str, Any] = {
        "columns": ["question", "answer"],
        "max_completion_tokens": 10,
        "num_workers": 1,
        "timeout_seconds": 20.0,
        "memory_gib": 1.0,
    }
    return Scorer([r if isinstance(r, Reward) else Reward(r) for r in rewards], **(settings | options))


def score_one(
    function: Callable[..., Any], texts: list[str], *, messages: list[dict[str, str]] | None = None, **options: Any
) -> list[float]:
    """What a function says of the completions of one group."""
    with make_scorer(Reward(function, name="it"), **options) as scorer:
        return scorer.score([make_group(texts, messages=messages)]).values["it"][0].tolist()


def assert_equal(actual: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(
        actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
    )


# ---- the sum ---------------------------------------------------------------------------------------------------------


def test_reward_is_the_weighted_sum() -> None:
    right, well_formed = "<think>a</think><answer>18</answer>", "<think>a</think><answer>1</answer>"
    groups = [make_group([right, well_formed, "18"]), make_group(["<answer>7</answer>", "", right], answer="7")]
    with make_scorer(accuracy, Reward(format, weight=0.5)) as scorer:
        scores = scorer.score(groups)
    assert_equal(scores.values["accuracy"], [[1, 0, 0], [1, 0, 0]])
    assert_equal(scores.values["format"], [[1, 1, 0], [0, 0, 1]])
    assert_equal(scores.rewards, [[1.5, 0.5, 0], [1, 0, 0.5]])
    assert scores.rewards.dtype == torch.float64
    assert (scores.num_timeouts, scores.num_crashes) == (0, 0)


def test_a_function_that_cannot_tell_is_left_out_of_a_group_or_makes_the_sum_unknown() -> None:
    values = torch.tensor(
        [
            [[1.0, 0.0, 1.0], [nan, nan, nan]],  # a, weight 1
            [[0.5, nan, 0.0], [1.0, 2.0, 3.0]],  # b, weight 2
        ]
    )
    # group 0: both apply. 1 + 2*0.5 = 2; b cannot tell -> NaN; 1 + 2*0 = 1
    # group 1: a cannot tell for any, so it does not apply: 2*1, 2*2, 2*3
    assert_equal(weighted_sum(values, torch.tensor([1.0, 2.0]), NOT_DUE), [[2, nan, 1], [2, 4, 6]])
    # b at weight 0 has no say, not even its NaN; then no weighted function applies to group 1
    assert_equal(weighted_sum(values, torch.tensor([1.0, 0.0]), NOT_DUE), [[1, 0, 1], [nan, nan, nan]])
    assert_equal(weighted_sum(values, torch.tensor([0.0, 0.0]), NOT_DUE), [[0.0] * 3] * 2)
    # a's verdict on group 1 is due: it is no question that a knows nothing of
    is_due = torch.tensor([[False, True], [False, False]])
    assert_equal(weighted_sum(values, torch.tensor([1.0, 2.0]), is_due), [[2, nan, 1], [nan, nan, nan]])
    assert_equal(weighted_sum(values, torch.tensor([0.0, 2.0]), is_due), [[1, nan, 0], [2, 4, 6]])


def hangs(completion: str) -> float:
    return time.sleep(60) or 1.0


def leaves(completion: str) -> float:
    os._exit(3)


def knows_nothing(completion: str) -> None:
    return None


def length(completion: str) -> float:
    return float(len(completion))


def leaves_at_one(completion: str) -> None:
    """Of the others it knows nothing."""
    if completion == "bc":
        os._exit(3)


def test_a_grader_that_knows_nothing_of_a_question_and_fails_once_leaves_it_to_the_others() -> None:
    with make_scorer(leaves_at_one, length) as scorer:
        scores = scorer.score([make_group(["a", "bc"])])
    assert scores.num_crashes == 1
    assert_equal(scores.rewards, [[1, 2]])


def test_an_episode_that_failed_is_not_trained_on_for_the_sake_of_other_rewards() -> None:
    group = make_group(["a", "bc"])
    failed = Episode(reward=None, ended=False, num_turns=1)
    group = Group(group.prompt, [replace(completion, episode=failed) for completion in group.completions])
    with make_scorer(length, Reward(environment)) as scorer:
        assert_equal(scorer.score([group]).rewards, [[nan, nan]])


@pytest.mark.parametrize("fails", [hangs, leaves])
def test_a_group_whose_grader_fails_is_not_trained_on_the_other_rewards(fails: Callable[..., Any]) -> None:
    with make_scorer(fails, length, timeout_seconds=0.5) as scorer:
        assert_equal(scorer.score([make_group(["a", "bc"])]).rewards, [[nan, nan]])
    with make_scorer(Reward(fails, weight=0), length, timeout_seconds=0.5) as scorer:
        assert_equal(scorer.score([make_group(["a", "bc"])]).rewards, [[1, 2]])


def test_a_question_of_which_a_function_knows_nothing_is_left_to_the_others_unless_it_should_know() -> None:
    groups = [make_group(["a", "bc"], kind="maths"), make_group(["a", "bc"], row=1, kind="chat")]
    of_maths = Reward(knows_nothing, only={"kind": ["maths"]})
    for reward, first in ((Reward(knows_nothing), [1, 2]), (of_maths, [nan, nan])):
        with make_scorer(reward, length, columns=["question", "answer", "kind"]) as scorer:
            assert_equal(scorer.score(groups).rewards, [first, [1, 2]])
    tells = partial(knows_nothing)
    tells.tells_of_all = True
    with make_scorer(Reward(tells), length) as scorer:
        assert_equal(scorer.score([make_group(["a", "bc"])]).rewards, [[nan, nan]])


def test_none_is_unknown_and_not_wrong() -> None:
    assert str(score_one(lambda completion: {"a": 1, "b": None, "c": False}[completion], ["a", "b", "c"])) == str(
        [1.0, nan, 0.0]
    )


def test_no_groups_have_scores_of_no_rows() -> None:
    with make_scorer(accuracy) as scorer:
        scores = scorer.score([])
        assert scores.rewards.shape[0] == scores.values["accuracy"].shape[0] == 0
        assert scorer.check_rows([]) == []


# ---- who is given what -----------------------------------------------------------------------------------------------


def test_a_function_is_given_what_its_parameters_name() -> None:
    def check(
        completion: str,
        prompt: str,
        finish_reason: str,
        num_tokens: int,
        max_completion_tokens: int,
        completion_ids: list[int],
        question: str,
        *,
        bonus: float,
        unused: int = 7,
    ) -> float:
        assert (prompt, question, max_completion_tokens, unused) == ("Q0? A:", "Q0?", 10, 7)
        assert completion_ids == list(range(num_tokens))
        return {"a": 1, "b": 2}[completion] * num_tokens + (finish_reason == "length") * bonus

    with make_scorer(Reward(check, args={"bonus": 100})) as scorer:
        assert_equal(scorer.score([make_group(["a", "b"])]).rewards, [[1, 104]])  # 1 * 1, 2 * 2 + 100


def test_kwargs_receive_everything() -> None:
    with make_scorer(Reward(lambda **kw: len(kw["completion"]) + kw["x"], name="f", args={"x": 10})) as scorer:
        assert_equal(scorer.score([make_group(["a", "bb"])]).rewards, [[11, 12]])
    names = {"completion", "prompt", "finish_reason", "num_tokens", "max_completion_tokens", "completion_ids", "turns"}
    names.add("environment_reward")
    as_in_trl = {"trainer_state", "log_metric", "log_extra"}
    assert score_one(lambda **kw: set(kw) == names | as_in_trl | {"question", "answer"}, ["a"]) == [1.0]


# As a TRL user writes them, see the GRPO trainer's documentation, "Using a custom reward function".


def test_a_list_function_written_for_trl_runs_unchanged() -> None:
    def reward_func(completions, ground_truth, **kwargs):  # type: ignore[no-untyped-def]
        import re

        matches = [re.search(r"\\boxed\{(.*?)\}", completion) for completion in completions]
        contents = [match.group(1) if match else "" for match in matches]
        return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth, strict=True)]

    def length_func(completion_ids, completions, prompts, **kwargs):  # type: ignore[no-untyped-def]
        assert prompts == ["Q0? A:"] * 3 or prompts == ["Q1? A:"] * 3
        return [None if len(ids) == 2 else float(len(ids)) for ids in completion_ids]

    groups = [make_group(["\\boxed{4}", "4", "\\boxed{5}"], row=row, ground_truth=gt) for row, gt in enumerate("45")]
    with make_scorer(reward_func, length_func, columns=["question", "answer", "ground_truth"]) as scorer:
        scores = scorer.score(groups)
    assert_equal(scores.values["reward_func"], [[1, 0, 0], [0, 0, 1]])
    assert_equal(scores.values["length_func"], [[1, nan, 3], [1, nan, 3]])


TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Q0?"}]


def test_a_conversational_function_written_for_trl_runs_unchanged() -> None:
    def format_reward_func(completions, **kwargs):  # type: ignore[no-untyped-def]
        import re

        contents = [completion[0]["content"] for completion in completions]
        assert kwargs["prompts"] == [TALK] * 2
        assert [completion[0]["role"] for completion in completions] == ["assistant"] * 2
        assert kwargs["answer"] == ["18", "18"]
        return [1.0 if re.match(r"^<think>.*?</think>", content) else 0.0 for content in contents]

    assert score_one(format_reward_func, ["<think>a</think> b", "b"], messages=TALK) == [1.0, 0.0]


def test_lambdas_closures_callable_objects_and_partials_travel() -> None:
    import functools

    factor = 3

    class Scaled:
        def __call__(self, completion: str) -> float:
            return factor * len(completion)

    def times(completion: str, *, by: float) -> float:
        return by * len(completion)

    for function in (lambda completion: 3 * len(completion), Scaled(), functools.partial(times, by=3)):
        assert score_one(function, ["a", "bb"]) == [3.0, 6.0]


def test_numpy_and_torch_numbers_are_numbers() -> None:
    import numpy as np

    assert score_one(lambda completion: np.float32(0.5), ["a"]) == [0.5]
    assert score_one(lambda completions: np.array([0.5, 1.0]), ["a", "b"]) == [0.5, 1.0]


TRL_REWARDS = """
# As in trl.rewards 1.16, cut to what a caller sees.
import functools
from collections.abc import Callable

def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str],
                    log_extra: Callable[[str, list], None] | None = None, **kwargs) -> list[float | None]:
    rewards = [float(gold in completion[0]["content"]) for completion, gold in zip(completions, solution, strict=True)]
    log_extra("gold_parsed", [f"parsed {gold}" for gold in solution])
    return rewards

def think_format_reward(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    return [float(completion[0]["content"].startswith("<think>")) for completion in completions]

class _Penalty:
    __name__ = "repetition_penalty_reward"
    def __init__(self, ngram_size): self.ngram_size = ngram_size
    def __call__(self, completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [-float(len(ids) >= self.ngram_size) for ids in completion_ids]

repetition_penalty = _Penalty(2)
overlong = functools.partial(_Penalty.__call__, _Penalty(3))
"""


@pytest.mark.parametrize("messages", [None, [{"role": "user", "content": "Q0?"}]], ids=["raw text", "conversation"])
def test_trls_own_rewards_run_under_every_template(tmp_path: Path, messages: Any) -> None:
    path = tmp_path / "trl_rewards.py"
    path.write_text(TRL_REWARDS)
    names = ["accuracy_reward", "think_format_reward", "repetition_penalty", "overlong"]
    rewards = [Reward(resolve_function(f"{path}:{name}")) for name in names]
    assert [reward.name for reward in rewards][2:] == ["repetition_penalty_reward", "__call__"]
    group = make_group(["<think> 4", "5", "44"], messages=messages, solution="4")
    with make_scorer(*rewards, columns=["question", "answer", "solution"]) as scorer:
        scores = scorer.score([group])
    assert [values[0].tolist() for values in scores.values.values()] == [[1, 0, 1], [1, 0, 0], [0, -1, -1], [0, 0, -1]]
    assert scores.extras == [[{"accuracy_reward": {"gold_parsed": "parsed 4"}}] * 3]


def test_a_reward_says_which_form_it_wants_and_an_error_says_how_it_was_called() -> None:
    def wants_messages(completions, **kwargs):  # type: ignore[no-untyped-def]
        return [len(completion[0]["content"]) for completion in completions]

    def ids_of_a_group(completion_ids, **kwargs):  # type: ignore[no-untyped-def]
        return [len(ids) for ids in completion_ids]

    with make_scorer(Reward(wants_messages, form="messages"), Reward(ids_of_a_group, form="texts")) as scorer:
        scores = scorer.score([make_group(["a", "bb"])])
    assert [values[0].tolist() for values in scores.values.values()] == [[1, 2], [1, 2]]
    with make_scorer(wants_messages) as scorer, pytest.raises(RewardError) as error:
        scorer.score([make_group(["a", "bb"])])
    assert "once for a group, with its completions as texts. If it wants another form, set rewards.*.form" in str(
        error.value
    )
    assert "`messages` (once for a group, with its completions as lists of messages)" in str(error.value)
    with pytest.raises(ValueError, match="wants_messages asks for 'completions'"):
        make_scorer(Reward(wants_messages, form="completion"))


def test_async_rewards_are_awaited() -> None:
    async def one(completion: str) -> float:
        import asyncio

        await asyncio.sleep(0)
        return len(completion)

    async def listed(completions: list[str], **kwargs: Any) -> list[float]:
        return [await one(completion) for completion in completions]

    assert score_one(one, ["a", "bb"]) == score_one(listed, ["a", "bb"]) == [1, 2]


def test_what_functions_log_comes_back_with_the_scores_and_the_state_of_training_goes_to_them() -> None:
    def single(completion, trainer_state, log_metric, log_extra):  # type: ignore[no-untyped-def]
        log_metric("length", len(completion))
        log_extra("upper", [completion.upper()])
        return trainer_state.global_step / trainer_state.max_steps

    def listed(completions, log_extra, **kwargs):  # type: ignore[no-untyped-def]
        kwargs["log_metric"]("groups", 1)
        log_extra("odd", [object] * len(completions))
        return [0.0 for _ in completions]

    with make_scorer(single, listed) as scorer:
        scorer.trainer_state.global_step, scorer.trainer_state.max_steps = 3, 4
        scores = scorer.score([make_group(["a", "bb"]), make_group(["c", "d"])])
    assert_equal(scores.values["single"], [[0.75, 0.75], [0.75, 0.75]])
    assert scores.metrics == {"length": [1, 2, 1, 1], "groups": [1, 1]}
    assert scores.extras[0][1] == {"single": {"upper": "BB"}, "listed": {"odd": "<class 'object'>"}}
    too_many = make_scorer(lambda completion, log_extra: log_extra("x", [1, 2]))
    with (
        too_many as scorer,
        pytest.raises(RewardError, match=r"logged 2 values of 'x' \(log_extra\) for 1 completions"),
    ):
        scorer.score([make_group(["a"])])


def test_a_reward_beyond_32_bits_is_refused_and_one_within_keeps_its_advantage() -> None:
    from grpo.algorithm.advantage import group_advantages

    def penalty(completion: str) -> float:
        return {"a": 0.0, "b": -1.0, "c": -4.0, "d": -1e20, "e": -1e39}[completion]

    def huge(completion: str) -> int:
        return 10**400

    with make_scorer(penalty) as scorer:
        scores = scorer.score([make_group(["a", "b", "c", "d"])])
        # mean -2.5e19, deviation 4.33e19: (2.5 / 4.33, ..., -7.5 / 4.33)
        expected = torch.tensor([[3**-0.5] * 3 + [-(3**0.5)]], dtype=torch.float64)
        torch.testing.assert_close(group_advantages(scores.rewards, normalize_by_std=True), expected)
        with pytest.raises(
            RewardError, match=r"penalty returned -1e\+39; it must return a finite number within 3.4e\+38[\s\S]*'e'"
        ):
            scorer.score([make_group(["e"])])
    with make_scorer(huge) as scorer, pytest.raises(RewardError, match="huge returned 1000"):
        scorer.score([make_group(["e"])])
    with (
        make_scorer(Reward(penalty, weight=1e30)) as scorer,
        pytest.raises(RewardError, match=r"penalty times its weight \(1e\+30\)"),
    ):
        scorer.score([make_group(["d"])])


def test_a_function_that_makes_a_reward_is_told_from_one() -> None:
    with (
        make_scorer(lambda completion: len) as scorer,
        pytest.raises(RewardError, match="returned a function; if it makes a reward"),
    ):
        scorer.score([make_group(["a"])])


# ---- finding functions -----------------------------------------------------------------------------------------------


def test_functions_are_found_by_name_by_module_and_by_file(tmp_path: Path) -> None:
    assert resolve_function("accuracy") is accuracy
    assert resolve_function("grpo.rewards:overlong") is overlong
    path = tmp_path / "my rewards.v2.py"
    path.write_text(
        textwrap.dedent(
            """
            from __future__ import annotations
            import dataclasses, functools, threading
            LOCK = threading.Lock()  # cannot be pickled

            @dataclasses.dataclass
            class Verdict:
                value: float

            @functools.lru_cache
            def length(text):
                return len(text)

            def shout(completion, answer):
                with LOCK:
                    return Verdict(length(completion.upper())).value + (answer == "18") * 0.5
            """
        )
    )
    shout = resolve_function(f"{path}:shout")
    path.write_text("def shout(completion): return -1")  # a worker that is replaced later runs the same code
    assert score_one(shout, ["a", "bb"]) == [1.5, 2.5]


BESIDE_ITS_OWN_REWARDS = """
import torch
import rewards
from grpo.scoring.reward import Reward, resolve_function
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt

names = ["accuracy", "rewards:accuracy"]
listed = [Reward(resolve_function(name), name=name) for name in names]
group = Group(Prompt(0, [], "", "", {"answer": "18"}), [Completion([], [], "<answer>18</answer>", "stop")])
with Scorer(listed, columns=["answer"], max_completion_tokens=1, num_workers=1, timeout_seconds=60, memory_gib=1) as scorer:
    print({name: values.item() for name, values in scorer.score([group]).values.items()})
"""


@pytest.mark.parametrize("own", ["rewards.py", "rewards/__init__.py"])
def test_built_in_rewards_are_the_librarys_beside_a_users_module_rewards(tmp_path: Path, own: str) -> None:
    (tmp_path / own).parent.mkdir(exist_ok=True)
    (tmp_path / own).write_text("def accuracy(completion): return -7")
    (tmp_path / "train.py").write_text(BESIDE_ITS_OWN_REWARDS)
    path = f"{tmp_path}:{Path(__file__).parents[1]}"
    done = subprocess.run(
        [sys.executable, str(tmp_path / "train.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "{'accuracy': 1.0, 'rewards:accuracy': -7.0}\n", done.stderr


def test_a_file_imports_what_lies_beside_it_at_once_and_later(tmp_path: Path) -> None:
    (tmp_path / "beside_at_once.py").write_text("ONE = 1")
    (tmp_path / "beside_later.py").write_text("TWO = 2")
    (tmp_path / "own.py").write_text(
        "from beside_at_once import ONE\ndef f(completion):\n    from beside_later import TWO\n    return ONE + TWO"
    )
    before = list(sys.path)
    assert score_one(resolve_function(f"{tmp_path}/own.py:f"), ["a"]) == [3]
    assert sys.path == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "beside_at_once.py").write_text("ONE = 100")
    (other / "own.py").write_text("from beside_at_once import ONE\ndef f(completion): return ONE")
    with pytest.raises(ValueError, match=r"it imports beside_at_once, and .* is not the only module of that name"):
        resolve_function(f"{other}/own.py:f")
    (other / "between.py").write_text("from beside_at_once import ONE")
    (other / "farther.py").write_text("import between\ndef f(completion): return between.ONE")
    with pytest.raises(ValueError, match=r"it imports beside_at_once, and .* is not the only module of that name"):
        resolve_function(f"{other}/farther.py:f")
    (other / "broken.py").write_text("def f(:")
    with pytest.raises(ValueError, match="the file is not valid Python: invalid syntax"):
        resolve_function(f"{other}/broken.py:f")


def test_a_partial_from_a_file_travels(tmp_path: Path) -> None:
    path = tmp_path / "partial.py"
    path.write_text(
        "import functools\ndef f(completion, by): return by * len(completion)\nthrice = functools.partial(f, by=3)"
    )
    reward = Reward(resolve_function(f"{path}:thrice"))
    with make_scorer(reward) as scorer:
        assert scorer.score([make_group(["a", "bb"])]).values["f"].tolist() == [[3, 6]]
    with pytest.raises(ValueError, match="reward f has form='text'; it is completion, texts, messages or None"):
        Reward(reward.function, form="text")


CLASSES = """
class Longer:
    def __init__(self, than): self.than = than
    def __call__(self, completion, by=1): return float(len(completion) >= self.than + by)

class Nothing: pass
"""


def test_a_class_in_a_yaml_is_made_with_its_args_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.py"
    path.write_text(CLASSES)
    (reward,) = resolve_rewards([RewardConfig(function=f"{path}:Longer", args={"than": 1, "by": 2})])
    assert (reward.name, reward.args) == ("Longer", {"by": 2})
    with make_scorer(reward) as scorer:
        assert_equal(scorer.score([make_group(["aa", "aaa"])]).rewards, [[0, 1]])
    for name, args, message in (
        ("Longer", {}, "cannot be made from its args {}: .*; there is than. Set"),
        (
            "Longer",
            {"then": 1},
            "cannot be made from its args {'then': 1}: .*; there is than; did you mean than\\? Set",
        ),
        ("Nothing", {}, "its objects cannot be called"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_rewards([RewardConfig(function=f"{path}:{name}", args=args)])
    (mistaken,) = resolve_rewards([RewardConfig(function=f"{path}:Longer", args={"than": 1, "buy": 2})])
    with pytest.raises(ValueError, match=r"sets 'buy'; .*: there is by, than; did you mean by\? Remove it or correct"):
        make_scorer(mistaken)
    with pytest.raises(ValueError, match=r"reward dict is a class; .* Hand over an object: dict\(...\)"):
        Reward(dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"only": "sums"},
            r"only='sums'; it says by columns of the data which questions, in text, numbers or booleans, as in",
        ),
        ({"only": ["sums"]}, r"only=\['sums'\]; it says by columns"),
        ({"only": {"kind": {"a": 1}}}, r"only={'kind': {'a': 1}}; it says by columns"),
        ({"only": {"kind": None}}, r"only={'kind': None}; it says by columns"),
        ({"only": {1: "a"}}, r"only={1: 'a'}; it says by columns"),
        ({"args": 3}, r"args=3; it says the values of further parameters, as in"),
        ({"name": 3}, r"name=3; it is text"),
        ({"weight": "x"}, r"weight='x'; it is a finite number"),
        ({"form": "x"}, r"form='x'; it is completion, texts, messages or None"),
        ({"form": ["texts"]}, r"form=\['texts'\]; it is completion"),
    ],
)
def test_a_reward_is_made_of_nothing_that_a_yaml_could_not_say(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^reward \w+ has {message}"):
        Reward(returns_zero, **options)
    with pytest.raises(ValueError, match=r"^a Reward is made of 'accuracy'; it is made of a function"):
        Reward("accuracy")  # type: ignore[arg-type]


def test_workers_see_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    def variables(completion: str) -> float:
        return sum(
            10**i for i, name in enumerate(("PATH", "MY_API_KEY", "HF_TOKEN", "JUDGE_KEY")) if os.environ.get(name)
        )

    for name in ("MY_API_KEY", "HF_TOKEN", "JUDGE_KEY"):
        monkeypatch.setenv(name, "secret")
    assert score_one(variables, ["a"]) == [1]
    assert score_one(variables, ["a"], environment=["JUDGE_KEY"]) == [1001]
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"scoring.environment has 'JUDGE_KEY'; there is no such environment variable"):
        make_scorer(variables, environment=["JUDGE_KEY"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "acuracy",
            "there is accuracy, code, countdown, countdown_search, countdown_trials, exact_match, .*; did you mean accuracy?",
        ),
        ("check_answer", "there is accuracy"),
        ("no_such_module:f", "the module 'no_such_module' cannot be imported"),
        ("grpo.rewards:acuracy", "did you mean accuracy?"),
        ("no/such/file.py:f", "there is no file .*no/such/file.py"),
        ("accuracy.py", "there is accuracy"),
        (":f", "the module '' cannot be imported"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_with_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        resolve_function(spec)
    assert repr(spec) in str(error.value)


def returns_zero(completion: str) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ([lambda completion, anwser: 1], {}, "asks for 'anwser'; there is answer, .*; did you mean answer?"),
        ([lambda completions, anwsers: [1]], {}, "asks for 'anwsers'"),
        ([Reward(overlong)], {}, "overlong asks for 'buffer'; .* set rewards.*args.buffer"),
        ([Reward(overlong, args={"bufer": 3})], {}, "sets 'bufer'; .*did you mean buffer?"),
        (
            [Reward(accuracy, args={"answer": "18"})],
            {},
            "sets 'answer'; that comes with the completion or the data row",
        ),
        ([accuracy, accuracy], {}, "rewards has accuracy twice"),
        (
            [Reward(lambda completion, prompt: 1)],
            {"columns": ["question", "answer", "prompt"]},
            "asks for 'prompt'; the data has a column of that name",
        ),
    ],
)
def test_a_function_that_cannot_be_called_is_refused_before_anything_starts(
    rewards: list[Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_scorer(*rewards, **options)


def test_a_function_that_cannot_travel_is_refused() -> None:
    lock = threading.Lock()

    def locked(completion: str) -> float:
        with lock:
            return 1.0

    with pytest.raises(ValueError, match=r"reward locked is .*cannot be sent there: .*lock"):
        make_scorer(locked)


# ---- the three endings -----------------------------------------------------------------------------------------------


def naughty(completion: str) -> float | None:
    """Does what the completion says."""
    if completion == "loop":
        while True:
            pass
    if completion == "big power":  # in C, holding the interpreter's lock: no signal handler would run
        return float(10 ** (10**9) % 7)
    if completion == "spawn":
        subprocess.run(["sleep", "1000"], check=True)
    if completion == "exit":
        os._exit(0)
    if completion == "sys.exit":
        sys.exit(1)
    if completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if completion == "memory":
        return float(len(bytearray(2**30)))
    if completion == "print":
        print("noise " * 10_000, flush=True)
        os.write(1, b"noise")
        sys.stdin.read()
    return float(len(completion))


def test_a_hung_call_is_killed_and_counted_and_the_others_are_scored() -> None:
    groups = [
        make_group(["a", "loop", "ccc"], row=0),
        make_group(["big power", "a", "bb"], row=1),
        make_group(["a", "bb", "spawn"], row=2),
    ]
    with make_scorer(naughty, accuracy, num_workers=2, timeout_seconds=2.0) as scorer:
        started = time.perf_counter()
        scores = scorer.score(groups)
        assert time.perf_counter() - started < 40
        assert_equal(scores.values["naughty"], [[1, nan, 3], [nan, 1, 2], [1, 2, nan]])
        assert_equal(scores.values["accuracy"], [[0, 0, 0]] * 3)
        assert_equal(scores.rewards, [[1, nan, 3], [nan, 1, 2], [1, 2, nan]])
        assert (scores.num_timeouts, scores.num_crashes) == (3, 0)
        assert scorer.score(groups[:1]).num_timeouts == 1  # and it goes on working


def test_the_time_limit_holds_for_a_call_and_not_for_what_is_sent_with_it() -> None:
    def nap(completion: str) -> float:
        time.sleep(0.3)
        return 1.0

    with make_scorer(nap, timeout_seconds=1.5) as scorer:  # 12 calls for one worker are sent six at a time: 1.8 s
        assert scorer.score([make_group(["a"] * 12)]).num_timeouts == 0


def test_what_a_hung_call_started_is_killed_with_it(tmp_path: Path) -> None:
    def run_program(completion: str) -> float:
        with open(completion, "w") as file:
            subprocess.run("echo $$; exec sleep 1000", shell=True, stdout=file)
        return 1.0

    with make_scorer(run_program, timeout_seconds=2.0) as scorer:
        assert scorer.score([make_group([str(tmp_path / "pid")])]).num_timeouts == 1
    assert_gone(int((tmp_path / "pid").read_text()))


def test_a_list_function_has_the_time_of_all_its_completions() -> None:
    def slow(completions: list[str]) -> list[float]:
        for completion in completions:
            time.sleep(float(completion))
        return [1.0] * len(completions)

    with make_scorer(slow, timeout_seconds=0.4) as scorer:
        scores = scorer.score([make_group(["0.2"] * 4), make_group(["0.6", "0.6", "0.6", "9"])])
    assert_equal(scores.values["slow"], [[1, 1, 1, 1], [nan] * 4])
    assert scores.num_timeouts == 1


def test_a_dead_worker_or_no_memory_is_a_crash_and_the_others_are_scored() -> None:
    texts = ["a", "exit", "bb", "segfault", "ccc", "memory", "dddd", "sys.exit", "print"]
    with make_scorer(naughty, memory_gib=0.5) as scorer:
        scores = scorer.score([make_group(texts)])
    assert_equal(scores.values["naughty"], [[1, nan, 2, nan, 3, nan, 4, nan, 5]])
    assert (scores.num_timeouts, scores.num_crashes) == (0, 4)


def test_a_worker_that_dies_between_calls_is_replaced_and_blamed_on_nobody() -> None:
    with make_scorer(lambda completion: os.getpid()) as scorer:
        pid = int(scorer.score([make_group(["a"])]).rewards[0, 0])
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        scores = scorer.score([make_group(["a", "b"])])
        assert scores.num_crashes == 0
        assert pid not in scores.rewards[0].tolist()


def test_a_bug_stops_the_run_and_shows_the_sample() -> None:
    def buggy(completion: str, answer: str) -> float:
        return 1 / len(completion)

    with make_scorer(Reward(buggy, weight=0.0)) as scorer:
        with pytest.raises(RewardError) as error:
            scorer.score([make_group(["a", "b"]), make_group(["c", ""], answer="the gold one", row=3)])
        message = str(error.value)
        for shown in (
            "buggy raised an exception",
            "completion: ''",
            "prompt: 'Q3? A:'",
            "the gold one",
            "Q3?",
            "return 1 / len(completion)",
        ):
            assert shown in message
        assert "ZeroDivisionError: division by zero" in message
        assert scorer.score([make_group(["aaaa"])]).values["buggy"].tolist() == [[0.25]]  # it goes on working


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completion: "1.0", "returned '1.0'; it must return a finite number"),
        (lambda completion: nan, "returned nan"),
        (lambda completion: math.inf, "returned inf"),
        (lambda completion: [1.0], "returned \\[1.0\\]"),
        (lambda completions: [1.0], "returned 1 values for 2 completions"),
        (lambda completions: 1.0, "returned 1.0 for 2 completions"),
        (lambda completions: [1.0, "x"], "returned 'x'"),
        (lambda completion: lambda: 1, "raised an exception"),  # cannot even be sent back
        (lambda completion: (1.0 for _ in completion), "it returned a generator, .* Return a number, or a list"),
    ],
)
def test_what_is_not_a_reward_is_a_bug(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        score_one(function, ["a", "b"])


def test_a_reward_that_yields_is_refused_before_anything_is_scored() -> None:
    def one_by_one(completions: list[str]) -> Iterator[float]:
        for completion in completions:
            yield float(len(completion))

    async def later(completions: list[str]) -> AsyncIterator[float]:
        yield 1.0

    class Yields:
        def __call__(self, completions: list[str]) -> Iterator[float]:
            yield 1.0

    for function, name in (
        (one_by_one, "one_by_one"),
        (partial(one_by_one), "one_by_one"),
        (later, "later"),
        (Yields(), "Yields"),
    ):
        with pytest.raises(
            ValueError, match=rf"^reward {name} uses `yield`, .* or a list with one for each completion\.$"
        ):
            make_scorer(function)
    assert score_one(lambda completions: list(one_by_one(completions)), ["a", "bc"]) == [1.0, 2.0]


# ---- while others are sampled ----------------------------------------------------------------------------------------


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.01)


def leave_a_mark(completion: str) -> float:
    Path(completion).touch()
    return 1.0


def test_a_group_is_scored_while_later_ones_are_still_to_come(tmp_path: Path) -> None:
    marks = [tmp_path / name for name in "abc"]
    with make_scorer(leave_a_mark) as scorer, scorer.begin(3) as scoring:
        for p in (2, 0, 1):
            scoring.add(p, make_group([str(marks[p])]))
            wait_for(marks[p])  # the workers are served while this thread does nothing for them
        assert_equal(scoring.result().rewards, [[1], [1], [1]])


def test_finished_groups_are_told_once_while_others_are_still_to_come(tmp_path: Path) -> None:
    marks = [tmp_path / name for name in "ab"]
    with make_scorer(leave_a_mark, Reward(len_of, weight=0)) as scorer, scorer.begin(2) as scoring:
        told = []
        for p in (1, 0):
            scoring.add(p, make_group([str(marks[p]), str(marks[p])]))
            while not (found := scoring.finished()):
                time.sleep(0.01)
            told += found
        assert scoring.finished() == []
        whole = scoring.result()
    assert [p for p, _ in told] == [1, 0]
    for p, scores in told:
        assert_equal(scores.rewards, whole.rewards[p : p + 1].tolist())
        assert_equal(scores.values["len_of"], [[len(str(marks[p]))] * 2])


def len_of(completions: list[str]) -> list[float]:
    return [float(len(each)) for each in completions]


def test_groups_that_come_in_any_order_have_the_scores_of_groups_that_come_together() -> None:
    def lengths(completions: list[str]) -> list[float | None]:
        return [None if len(each) == 2 else float(len(each)) for each in completions]

    texts = [["a", "loop", "ccc"], ["exit", "a", "bb"], ["aa", "aa", "aa"], ["a", "bb", "ccc"], ["dddd", "", "f"]]
    groups = [make_group(each, row=row) for row, each in enumerate(texts)]
    rewards = (Reward(naughty), Reward(lengths, weight=0.5), Reward(accuracy))
    with make_scorer(*rewards, num_workers=2, timeout_seconds=2.0) as scorer:
        together = scorer.score(groups)
        with scorer.begin(len(groups)) as scoring:
            for p in (3, 0, 4, 1, 2):
                scoring.add(p, groups[p])
            apart = scoring.result()
    assert (together.num_timeouts, together.num_crashes) == (apart.num_timeouts, apart.num_crashes) == (1, 1)
    assert_equal(apart.rewards, together.rewards.tolist())
    for name, values in together.values.items():
        assert_equal(apart.values[name], values.tolist())
    # group 3 by hand, where nothing goes wrong: 1 + 0.5, unknown, 3 + 1.5
    assert_equal(apart.rewards[3:4], [[1.5, nan, 4.5]])


def test_a_bug_surfaces_with_the_next_group_and_not_only_at_the_end() -> None:
    def buggy(completion: str) -> float:
        return 1 / len(completion)

    with make_scorer(buggy) as scorer:
        with scorer.begin(1000) as scoring, pytest.raises(RewardError, match="ZeroDivisionError"):  # noqa: PT012
            scoring.add(0, make_group(["a"]))
            scoring.add(1, make_group([""]))
            for p in range(2, 1000):
                time.sleep(0.01)
                scoring.add(p, make_group(["a"]))
        assert_equal(scorer.score([make_group(["aa"])]).rewards, [[0.5]])


def test_an_error_while_sampling_gives_up_the_calls_at_once_and_leaves_the_workers_usable() -> None:
    with make_scorer(naughty, timeout_seconds=60) as scorer:
        started = time.perf_counter()
        with pytest.raises(ZeroDivisionError), scorer.begin(2) as scoring:  # noqa: PT012
            scoring.add(0, make_group(["loop"]))
            time.sleep(0.3)
            raise ZeroDivisionError
        assert_equal(scorer.score([make_group(["a", "bb"])]).rewards, [[1, 2]])
        assert time.perf_counter() - started < 40


def test_an_errand_that_was_never_left_holds_up_neither_the_next_nor_the_end_of_the_program(tmp_path: Path) -> None:
    """A signal's handler may raise in between `begin` and `with`."""
    with make_scorer(naughty, timeout_seconds=60) as scorer:
        scorer.begin(1).add(0, make_group(["loop"]))
        assert_equal(scorer.score([make_group(["a"])]).rewards, [[1]])
    script, _ = start_script(tmp_path / "train.py", "scorer.begin(1).add(0, group('hang')); raise SystemExit(3)")
    assert script.wait(timeout=50) == 3


def test_a_replaced_worker_outlives_the_call_that_it_was_replaced_in() -> None:
    """It would not, if the thread that started it ended: Linux then sends it the signal of its parent's death."""
    with make_scorer(naughty, pid_of) as scorer:
        assert scorer.score([make_group(["exit", "a"])]).num_crashes == 1
        pids = []
        for _ in range(2):
            pids.append(scorer.score([make_group(["a"])]).values["pid_of"].item())
            time.sleep(0.2)
    assert pids[0] == pids[1]


def test_the_time_in_the_workers_is_measured() -> None:
    def nap(completion: str) -> float:
        began = time.perf_counter()
        time.sleep(0.4)
        return time.perf_counter() - began

    with make_scorer(nap, num_workers=2) as scorer:
        scorer.score([make_group(["a"])])  # the pipes are warm from here on
        scores = scorer.score([make_group(["a"] * 4)])
        asleep = scores.rewards.sum().item()
        assert asleep <= scores.seconds < 1.8 * asleep  # of both workers, and none twice


# ---- checking the data -----------------------------------------------------------------------------------------------


def test_check_rows_gives_the_reason_for_each_row_that_cannot_be_graded() -> None:
    rows = [{"question": "?", "answer": answer} for answer in ("18", "\\frac{1}{2", "\\sqrt{2}", "")]
    with make_scorer(accuracy, format) as scorer:
        reasons = scorer.check_rows(rows)
    assert [reason is None for reason in reasons] == [True, False, True, False]
    assert "it is empty" in str(reasons[3])
    with make_scorer(Reward(accuracy, args={"source": "last_number"})) as scorer:
        assert "only finds plain numbers" in str(scorer.check_rows(rows)[2])
    with make_scorer(format) as scorer:
        assert scorer.check_rows(rows) == [None] * 4


def test_check_rows_is_bounded_in_time_and_a_bug_in_it_shows_the_row() -> None:
    def function(completion: str) -> float:
        return 0.0

    def check_row(answer: str) -> str | None:
        return {"loop": lambda: naughty("loop"), "bug": lambda: 1 / 0, "fine": lambda: None}[answer]()  # type: ignore

    function.check_row = check_row  # type: ignore[attr-defined]
    with make_scorer(function, timeout_seconds=1.0) as scorer:
        assert scorer.check_rows([{"question": "", "answer": a} for a in ("fine", "loop", "fine")]) == [
            None,
            "function ended in a timeout while checking the row",
            None,
        ]
        with pytest.raises(RewardError, match="answer: 'bug'"):
            scorer.check_rows([{"question": "", "answer": "bug"}])


def test_ten_thousand_integer_answers_are_checked_in_seconds() -> None:
    with make_scorer(accuracy, num_workers=2) as scorer:
        started = time.perf_counter()
        reasons = scorer.check_rows([{"question": "?", "answer": str(n)} for n in range(10_000)])
        assert time.perf_counter() - started < 20  # 0.4 s on a free machine, 6 s beside six others
    assert reasons == [None] * 10_000


# ---- processes -------------------------------------------------------------------------------------------------------


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_alive(pid)


def pid_of(completion: str) -> float:
    return float(os.getpid())


def test_workers_end_with_close_and_with_the_scorer() -> None:
    closed, dropped = make_scorer(pid_of), make_scorer(pid_of)
    pids = [int(scorer.score([make_group(["a"])]).rewards[0, 0]) for scorer in (closed, dropped)]
    assert all(map(is_alive, pids))
    closed.close()
    assert_gone(pids[0])
    del dropped
    gc.collect()
    assert_gone(pids[1])


SCRIPT = """
import os, signal, sys, time
from grpo.scoring.reward import Reward
from grpo.scoring.scorer import Scorer
from grpo.types import Completion, Group, Prompt

HALF = 0.5

def worker(completion):
    import threading
    assert "torch" not in sys.modules and os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["OMP_NUM_THREADS"] == "1"
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if completion == "hang":
        while True: pass
    return os.getpid() + HALF * 0

scorer = Scorer([Reward(worker)], columns=["question"], max_completion_tokens=1, num_workers=1,
                timeout_seconds=60, memory_gib=1)
group = lambda text: Group(Prompt(0, [], "", "", {"question": ""}), [Completion([], [], text, "stop")])
print(int(scorer.score([group("")]).rewards.item()), flush=True)
ENDING
"""


def start_script(path: Path, ending: str) -> tuple[subprocess.Popen[str], int]:
    """A running script without a `__main__` guard, and the process id of its worker."""
    path.write_text(SCRIPT.replace("ENDING", ending))
    root = str(Path(__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    script = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=env)
    assert script.stdout is not None
    return script, int(script.stdout.readline())


def test_a_script_without_a_main_guard_works_and_leaves_no_worker_behind(tmp_path: Path) -> None:
    script, pid = start_script(tmp_path / "train.py", "raise SystemExit(3)")
    assert script.wait(timeout=30) == 3
    assert_gone(pid)


def test_a_worker_dies_with_its_parent_even_in_the_middle_of_a_call(tmp_path: Path) -> None:
    script, pid = start_script(tmp_path / "train.py", "scorer.score([group('hang')])")
    time.sleep(0.3)
    assert is_alive(pid)
    script.kill()
    script.wait()
    assert_gone(pid)


def test_a_worker_that_cannot_load_the_functions_says_why(tmp_path: Path) -> None:
    path = tmp_path / "parent_only.py"
    path.write_text(
        "import os\nassert os.environ.get('CUDA_VISIBLE_DEVICES') != '', 'needs a GPU'\ndef f(completion): return 1"
    )
    with pytest.raises(RuntimeError, match=r"could not load the reward functions:[\s\S]*needs a GPU"):
        make_scorer(resolve_function(f"{path}:f"))


# ---- the check of gold answers, kept ---------------------------------------------------------------------------------


def checked(
    answers: list[str], monkeypatch: pytest.MonkeyPatch, reward: Reward | None = None
) -> tuple[list[str | None], int]:
    """What `check_rows` says, and how many calls it made."""
    made = 0
    with make_scorer(reward or accuracy) as scorer:
        run = scorer._pool.run

        def counted(calls: list[Call]) -> list[Outcome]:
            nonlocal made
            made += len(calls)
            return run(calls)

        monkeypatch.setattr(scorer._pool, "run", counted)
        reasons = scorer.check_rows([{"question": "?", "answer": answer} for answer in answers])
    return reasons, made


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "grpo" / "graded-rows"


def test_a_second_start_on_the_same_answers_asks_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = checked(["7", ""], monkeypatch)
    assert first[1] == 2
    assert first[0][0] is None
    assert first[0][1] is not None
    assert checked(["7", ""], monkeypatch) == (first[0], 0)


def test_what_a_verdict_depends_on_is_in_its_key(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(["7"], monkeypatch)
    assert checked(["8"], monkeypatch)[1] == 1  # another answer
    other = Reward(accuracy, args={"source": "boxed"})
    assert checked(["7"], monkeypatch, other)[1] == 1  # other arguments
    monkeypatch.setattr(verdict_cache, "_environment", lambda: b"another version, another source")
    assert checked(["7"], monkeypatch)[1] == 1


def test_the_source_of_the_rewards_and_the_versions_make_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = set()
    monkeypatch.setattr(verdict_cache, "_package_folder", lambda: tmp_path)
    for text in ("a = 1", "a = 2"):
        (tmp_path / "accuracy.py").write_text(text)
        found.add(verdict_cache._environment.__wrapped__())
    monkeypatch.setattr(verdict_cache, "distributions", lambda: [])
    found.add(verdict_cache._environment.__wrapped__())
    assert len(found) == 3


def test_a_check_from_elsewhere_is_asked_every_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(completion: str, answer: str) -> float:
        return 1.0

    own.check_row = lambda answer: None  # type: ignore[attr-defined]
    assert [checked(["7"], monkeypatch, Reward(own))[1] for _ in range(2)] == [1, 1]
    assert not cache.exists()


def test_verdicts_of_calls_that_did_not_end_are_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_scorer(accuracy) as scorer:
        monkeypatch.setattr(scorer._pool, "run", lambda calls: [Outcome("timeout") for _ in calls])
        assert "timeout" in str(scorer.check_rows([{"question": "?", "answer": "7"}]))
    assert checked(["7"], monkeypatch) == ([None], 1)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"num_rows": 2, "reasons": {}}', '{"num_rows": 1, "reasons": {"0": 5}}']
)
def test_a_damaged_file_is_as_good_as_none(cache: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    assert checked(["7"], monkeypatch) == ([None], 1)
    (file,) = cache.iterdir()
    file.write_text(content)
    assert checked(["7"], monkeypatch) == ([None], 1)


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert checked(["7"], monkeypatch) == ([None], 1)


def test_a_long_check_says_how_far_it_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo.scoring.scorer.ROWS_PER_CHECK", 2)
    monkeypatch.setattr("grpo.scoring.scorer.QUICK_SECONDS", 0.0)
    added: list[int] = []
    with make_scorer(accuracy) as scorer:
        rows = [{"question": "?", "answer": answer} for answer in ("1", "2", "3", "", "5")]
        reasons = scorer.check_rows(rows, add=added.append)
    assert added == [2, 2, 1]
    assert [reason is None for reason in reasons] == [True, True, True, False, True]


def test_the_prompts_of_a_conversational_function_are_its_turns() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]

    def listed(completions: list, prompts: list, **_: Any) -> list[float]:
        return [float(prompt == turns) for prompt in prompts]

    columns = {"question": "1+1?", "answer": "2", "question_messages": turns}
    prompt = Prompt(0, [1], "...", "", columns, messages=turns)
    group = Group(prompt, [Completion([1], [0.0], "2", "stop")])
    with make_scorer(listed, columns=list(columns)) as scorer:
        assert scorer.score([group]).rewards.tolist() == [[1.0]]


@pytest.mark.parametrize("kind", ["read from a file", "made by hand", "of a process of multiprocessing"])
def test_a_function_of_a_module_that_a_worker_cannot_import_is_sent_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    text = "BASE = 3\ndef longer(completion): return float(len(completion) + BASE)\n"
    name = "__mp_main__" if kind == "of a process of multiprocessing" else "not_on_the_path"
    (tmp_path / "elsewhere.py").write_text(text)
    if kind == "made by hand":
        module = types.ModuleType(name)
        exec(text, module.__dict__)
    else:
        spec = importlib.util.spec_from_file_location(name, tmp_path / "elsewhere.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, name, module)
    sent = pickled(module.longer, "reward longer", own=module.longer)
    done = subprocess.run(
        [sys.executable, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer)('ab'))"],
        input=sent,
        capture_output=True,
    )
    assert done.stdout == b"5.0\n", done.stderr.decode()


def test_a_function_of_a_module_is_sent_by_its_name():
    assert len(pickled(textwrap.dedent, "reward", own=textwrap.dedent)) < 100
    assert len(pickled(accuracy, "reward", own=accuracy)) < 100
