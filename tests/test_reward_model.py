"""A sequence classifier of the hub as reward: a real tiny one, built here, in the process and in a worker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grpo.rewards import reward_model
from helpers import TINY, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from grpo import Trainer
from grpo.config import RewardConfig
from grpo.scoring.binding import bind
from grpo.scoring.reward import Reward, resolve_rewards
from grpo.scoring.scorer import Scorer
from grpo.system.jsonl import read_jsonl, read_metrics
from grpo.types import Completion, Group, Prompt

QUESTION = "What is 1+2?"
TEXTS = ["3", "<think> 1+2=3\n</think> <answer> 3 </answer>", "It is 3.", "I guess 5.\nThe answer is 5."]


def save(directory: Path, *, num_labels: int = 1, pad_token_id: int | None = None, positions: int = 128) -> Path:
    """A random decoder with a scalar head and the tiny tokenizer."""
    shutil.copytree(TINY / "model", directory)
    (directory / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(AutoTokenizer.from_pretrained(directory)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=positions,
        num_labels=num_labels,
        pad_token_id=pad_token_id,
        initializer_range=0.3,
    )
    Qwen2ForSequenceClassification(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("reward") / "model")


def test_an_unknown_argument_of_a_configuration_is_told_beside_those_that_it_is_made_with(model: Path):
    (mistaken,) = resolve_rewards([RewardConfig(function="reward_model", args={"model": str(model), "batch_token": 9})])
    with pytest.raises(
        ValueError, match=r"sets 'batch_token'; .*, revision, where; did you mean batch_tokens\? Remove it"
    ):
        bind(mistaken, ["question"], {})


def by_hand(directory: Path, text: str, other: str | None = None, *, add_special_tokens: bool = True) -> float:
    """One text by itself, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    read = tokenizer(text, other, return_tensors="pt", add_special_tokens=add_special_tokens)
    with torch.inference_mode():
        return float(model(**read).logits.reshape(()))


def scores(own: Any, texts: list[str] = TEXTS, **also: Any) -> list[float | None]:
    return own(texts, [f"User: {QUESTION}\nAssistant:"] * len(texts), [QUESTION] * len(texts), **also)


def test_a_batch_scores_as_each_text_alone_in_the_models_own_chat_template(model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}], tokenize=False
        )
        for text in TEXTS
    ]
    expected = [by_hand(model, text, add_special_tokens=False) for text in rendered]
    assert len(set(expected)) == 4
    for batch_tokens in (1, 60, 16384):
        assert scores(reward_model(str(model), batch_tokens=batch_tokens)) == pytest.approx(expected, abs=1e-5)


def test_the_last_token_is_read_also_where_the_text_ends_with_what_pads(tmp_path: Path):
    """transformers takes the last token that is not padding: of an end token that pads as well, the one before it."""
    own = save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(own)
    texts = ["3<|endoftext|>", "It is 3, I think.<|endoftext|>"]
    assert tokenizer("3<|endoftext|>")["input_ids"][-1] == tokenizer.pad_token_id
    expected = [by_hand(own, text) for text in texts]
    found = reward_model(str(own), format="text")(texts, ["", ""], [QUESTION] * 2)
    assert found == pytest.approx(expected, abs=1e-5)
    assert found != pytest.approx([by_hand(own, text.removesuffix("<|endoftext|>")) for text in texts], abs=1e-3)


def test_the_model_may_read_one_text_or_the_answer_alone_or_a_whole_conversation(model: Path):
    prompt = f"User: {QUESTION}\nAssistant:"
    expected = [by_hand(model, prompt + text) for text in TEXTS]
    assert scores(reward_model(str(model), format="text")) == pytest.approx(expected, abs=1e-5)
    assert scores(reward_model(str(model), part="answer"))[1] == pytest.approx(
        scores(reward_model(str(model)))[0], abs=1e-5
    )
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": QUESTION},
    ]
    rendered = AutoTokenizer.from_pretrained(model).apply_chat_template(
        [*turns, {"role": "assistant", "content": "3"}], tokenize=False
    )
    found = scores(reward_model(str(model)), ["3"], question_messages=[turns])
    assert found == pytest.approx([by_hand(model, rendered, add_special_tokens=False)], abs=1e-5)


def test_an_encoder_reads_a_pair_with_its_two_kinds_of_text(tmp_path: Path):
    own = tmp_path / "bert"
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(own)
    written = json.loads((own / "tokenizer_config.json").read_text())
    written |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    (own / "tokenizer_config.json").write_text(json.dumps(written))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        initializer_range=0.3,
    )
    BertForSequenceClassification(config).save_pretrained(own)
    assert set(AutoTokenizer.from_pretrained(own)(QUESTION, "3")["token_type_ids"]) == {0, 1}
    expected = [by_hand(own, QUESTION, text) for text in TEXTS]
    assert len({round(each, 4) for each in expected}) == 4
    assert scores(reward_model(str(own))) == pytest.approx(expected, abs=1e-5)


def test_what_is_too_long_is_cannot_tell(model: Path):
    logged: list[tuple[str, float]] = []
    texts = ["3", "1+2=3 " * 60]
    found = scores(reward_model(str(model)), texts, log_metric=lambda name, value: logged.append((name, value)))
    assert found[1] is None
    assert found[0] == pytest.approx(scores(reward_model(str(model)))[0], abs=1e-5)
    assert logged == [("reward_model_too_long", 0.0), ("reward_model_too_long", 1.0)]
    assert scores(reward_model(str(model), max_tokens=3), ["3"]) == [None]


@pytest.mark.parametrize("where", ["worker", "process"])
def test_it_scores_the_same_in_a_worker_and_in_the_process(model: Path, where: str):
    own = reward_model(str(model), where=where)
    expected = scores(reward_model(str(model)))
    columns = {"question": QUESTION, "answer": "3"}
    group = Group(
        Prompt(0, [1], f"User: {QUESTION}\nAssistant:", "", columns),
        [Completion([2], [0.0], text, "stop") for text in TEXTS],
    )
    with Scorer(
        [Reward(own)],
        columns=["question", "answer"],
        max_completion_tokens=9,
        num_workers=1,
        timeout_seconds=0.5,
        memory_gib=4,
    ) as scorer:
        assert (own._loaded is not None) == (where == "process")  # at start, and where it is used
        found = scorer.score([group])
    assert found.values["reward_model"].tolist()[0] == pytest.approx(expected, abs=1e-5)
    assert found.num_timeouts == 0  # a CPU may read a group for longer than a rule takes


def test_a_model_without_a_scalar_head_is_refused_by_name(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"reward_model is '.*model', a Qwen2ForCausalLM; it has no scalar head\. Name a model"
    ):
        reward_model(str(TINY / "model"))
    two = save(tmp_path / "two", num_labels=2)
    with pytest.raises(ValueError, match=r"two'; it has 2 outputs \(LABEL_0, LABEL_1\), and a reward model has one"):
        reward_model(str(two))
    with pytest.raises(ValueError, match=r"none'; it cannot be read: .* Name a directory or a model of the hub"):
        reward_model(str(tmp_path / "none"))
    bare = save(tmp_path / "bare")
    body = AutoModelForSequenceClassification.from_pretrained(bare)
    torch.save(
        {name: value for name, value in body.state_dict().items() if "score" not in name}, bare / "pytorch_model.bin"
    )
    (bare / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"bare'; its files lack weights for score\.weight, which would be random"):
        reward_model(str(bare)).load()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"where": "gpu"},
            r"^where reward_model runs is 'gpu'; it is worker or process\. Correct rewards\.\*\.args\.where",
        ),
        ({"format": "chatml"}, r"^the format of reward_model is 'chatml'; it is chat, pair, text or null"),
        ({"part": "thought"}, r"^the part of reward_model is 'thought'; it is all or answer"),
    ],
)
def test_arguments_that_cannot_be_are_refused(model: Path, changed: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        reward_model(str(model), **changed)


def test_a_chat_format_without_a_template_is_refused(tmp_path: Path):
    own = save(tmp_path / "model")
    (own / "chat_template.jinja").unlink()
    with pytest.raises(
        ValueError, match=r"^the format of reward_model is 'chat'; the tokenizer of .* has no chat template"
    ):
        reward_model(str(own), format="chat").load()


def test_a_run_is_paid_by_a_reward_model_named_in_its_configuration(model: Path, tmp_path: Path):
    config = tiny_config(
        tmp_path / "run",
        rewards=[{"function": "reward_model", "args": {"model": str(model), "where": "process", "part": "all"}}],
        run={"steps": 1},
    )
    Trainer(config).train()
    (step,) = (each for each in read_metrics(tmp_path / "run" / "metrics.jsonl") if "time/step" in each)
    rows = read_jsonl(tmp_path / "run" / "completions.jsonl")
    assert step["logged/reward_model_too_long"] == 0
    assert step["reward/reward_model"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
    own = [reward_model(str(model))([row["completion"]], [""], [row["question"]])[0] for row in rows[:2]]
    assert [row["reward"] for row in rows[:2]] == pytest.approx(own, abs=1e-5)


def test_a_run_with_a_model_that_is_none_ends_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("grpo.policy.policy.load_lm", lambda *_, **__: pytest.fail("the model was loaded"))
    config = tiny_config(
        tmp_path / "run", rewards=[{"function": "reward_model", "args": {"model": str(TINY / "model")}}]
    )
    with pytest.raises(ValueError, match="it has no scalar head"):
        Trainer(config)
