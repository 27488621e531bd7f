"""Whole runs of the tiny model: does it learn, repeat itself, stop and resume?"""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import warm
from helpers import ROOT, TINY, FixedGenerator, clean_environment, launch_script, number_in_text, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from grpo import Reward, Trainer
from grpo.observe.console import LineSink, short
from grpo.observe.rundir import DirectoryLock, claim
from grpo.run import checkpoint
from grpo.scoring.reward import resolve_function
from grpo.system.distributed import Processes
from grpo.system.jsonl import append_jsonl, read_jsonl, rewind_jsonl
from grpo.types import Group, OnGroup, Prompt

CLOCKS = ("time/", "throughput/", "memory/")


def steps_of(run: Path) -> list[dict]:
    """The step rows of metrics.jsonl without what a clock measured."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "time/step" in row]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows]


def starts_at_once(completion: str) -> float:
    """Begins with the first calculation instead of a guess."""
    return float(re.match(r" <think> \d", completion) is not None)


def test_the_tiny_model_learns_what_is_rewarded(tmp_path: Path):
    config = tiny_config(
        tmp_path / "run",
        rollout={"num_prompts": 8, "group_size": 8, "max_completion_tokens": 6},
        algorithm={"kl_coef": 0.001},
        run={"steps": 12},
    )
    trainer = Trainer(config, rewards=[starts_at_once])
    rewards = [trainer.train_step()["reward/mean"] for _ in range(12)]
    trainer.close()
    assert sum(rewards[:2]) / 2 < 0.5  # a fifth of the base model's answers begin so
    assert sum(rewards[-3:]) / 3 > 0.9


def test_two_runs_with_the_same_seed_are_identical_and_another_seed_is_not(tmp_path: Path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        Trainer(tiny_config(tmp_path / name, run={"seed": seed})).train()
    assert steps_of(tmp_path / "a") == steps_of(tmp_path / "b")
    assert read_jsonl(tmp_path / "a" / "completions.jsonl") == read_jsonl(tmp_path / "b" / "completions.jsonl")
    assert steps_of(tmp_path / "a") != steps_of(tmp_path / "c")


SEVERAL_UPDATES = {
    "algorithm": {"kl_coef": 0.05, "num_minibatches": 2},
    "optimizer": {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 3},
    "checkpoint": {"every_steps": 2, "keep": 3},
}


def test_four_steps_equal_two_steps_a_save_a_resume_and_two_more(tmp_path: Path):
    Trainer(tiny_config(tmp_path / "whole", **SEVERAL_UPDATES, run={"steps": 4})).train()
    first = Trainer(tiny_config(tmp_path / "halves", **SEVERAL_UPDATES, run={"steps": 4, "resume": "auto"}))
    for _ in range(2):
        first.train_step()
    first.save()
    first.train_step()  # lost when the run is stopped here; done again after the resume
    first.close()
    Trainer(tiny_config(tmp_path / "halves", **SEVERAL_UPDATES, run={"steps": 4, "resume": "auto"})).train()
    assert steps_of(tmp_path / "halves") == steps_of(tmp_path / "whole")
    assert read_jsonl(tmp_path / "halves/completions.jsonl") == read_jsonl(tmp_path / "whole/completions.jsonl")
    superseded = read_jsonl(tmp_path / "halves/metrics.superseded.jsonl")
    assert [row["step"] for row in superseded] == [3]


def test_the_reference_becomes_the_policy_after_so_many_optimizer_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = tiny_config(tmp_path / "run", algorithm={"kl_coef": 0.05, "reference_refresh_steps": 2}, run={"steps": 5})
    Trainer(config).train()
    # one update per rollout: the KL is measured before it, and each second update ends with policy and reference equal
    divergence = [row["policy/kl"] for row in steps_of(tmp_path / "run")]
    assert [value == 0 for value in divergence] == [True, False, True, False, True]
    said = re.findall("the reference is the policy after optimizer step (.) from here on", capsys.readouterr().out)
    assert said == ["2", "4"]


def test_a_moved_reference_survives_two_resumes_without_a_refresh_between(tmp_path: Path):
    algorithm = {"kl_coef": 0.05, "reference_refresh_steps": 2}
    Trainer(tiny_config(tmp_path / "whole", algorithm=algorithm, run={"steps": 4})).train()
    for num_steps in (2, 1):  # the reference moves after the second step; the third is saved from what was restored
        part = Trainer(tiny_config(tmp_path / "parts", algorithm=algorithm, run={"steps": 4, "resume": "auto"}))
        for _ in range(num_steps):
            part.train_step()
        part.save()
        part.close()
    Trainer(tiny_config(tmp_path / "parts", algorithm=algorithm, run={"steps": 4, "resume": "auto"})).train()
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")


def test_the_reference_moves_even_if_a_step_without_known_rewards_skips_the_multiple(tmp_path: Path):
    settings = {"kl_coef": 0.05, "num_minibatches": 2, "reference_refresh_steps": 2, "max_sampling_gap": 100}
    trainer = Trainer(tiny_config(tmp_path / "run", algorithm=settings), rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    trainer.state.optimizer_steps = 1  # as if one minibatch before had not one known reward
    trainer.train_step()
    trainer.close()
    assert trainer.state.optimizer_steps == 3
    assert trainer.policy.reference_moved


def test_steps_by_hand_go_on_past_the_last_and_nothing_precedes_the_first_any_more(tmp_path: Path):
    config = tiny_config(
        tmp_path / "run",
        run={"steps": 2},
        optimizer={"learning_rate": 1e-3, "schedule": "linear", "final_rate_share": 0.5},
        preflight={"num_questions": 2, "on_failure": "warn"},
        evaluation={"num_questions": 1},
    )
    trainer = Trainer(config, eval_dataset=[{"question": "1+1?", "answer": "2"}])
    rates = [trainer.train_step()["optimizer/learning_rate"] for _ in range(4)]
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.5e-3])
    trainer.train()
    assert not (tmp_path / "run/preflight.json").exists()
    assert {row["step"] for row in read_jsonl(tmp_path / "run/evaluations.jsonl")} == {4}


def test_resuming_a_finished_run_adds_nothing(tmp_path: Path):
    config = tiny_config(tmp_path / "run", run={"resume": "auto"})
    Trainer(config).train()
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert Trainer(config).train() == tmp_path / "run/checkpoints/step-00000002"
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_a_used_directory_is_left_alone_without_resume(tmp_path: Path):
    Trainer(tiny_config(tmp_path / "run")).train()
    before = (tmp_path / "run/metrics.jsonl").read_text()
    last = Trainer(tiny_config(tmp_path / "run")).train()
    assert last == tmp_path / "run-2/checkpoints/step-00000002"
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


KILLED_WHILE_SAVING = """
import os, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers import tiny_config
from grpo import Trainer
from grpo.run import checkpoint

def power_cut(directory, record):
    if "step-00000002" in str(directory):
        os.kill(os.getpid(), 9)
    write_state(directory, record)

write_state, checkpoint._write_state = checkpoint._write_state, power_cut
Trainer(tiny_config(Path({run!r}), run={{"steps": 3}}, checkpoint={{"every_steps": 1}})).train()
"""


def test_a_kill_while_saving_leaves_the_checkpoint_before_and_the_run_resumes_from_it(tmp_path: Path):
    code = KILLED_WHILE_SAVING.format(tests=str(ROOT / "tests"), run=str(tmp_path / "run"))
    killed = warm.run(["-c", code], timeout=300, env={**clean_environment(), "PYTHONPATH": str(ROOT)})
    assert killed.returncode == -9, killed.stderr[-3000:]
    saved = tmp_path / "run/checkpoints"
    assert {path.name for path in saved.iterdir()} == {"step-00000001", "step-00000002.partial"}
    config = tiny_config(tmp_path / "run", run={"steps": 3, "resume": "auto"}, checkpoint={"every_steps": 1})
    trainer = Trainer(config)
    assert trainer.state.step == 1
    trainer.train()
    Trainer(tiny_config(tmp_path / "whole", run={"steps": 3}, checkpoint={"every_steps": 1})).train()
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    assert [path.name for path in checkpoint.complete_checkpoints(saved)] == ["step-00000002", "step-00000003"]


def test_resuming_with_other_settings_is_refused_by_the_setting(tmp_path: Path):
    Trainer(tiny_config(tmp_path / "run")).train()
    changed = tiny_config(tmp_path / "run", rollout={"temperature": 0.5}, run={"resume": "auto"})
    with pytest.raises(ValueError, match=re.escape("rollout.temperature is 0.5;")):
        Trainer(changed)


@pytest.mark.usefixtures("pictures")
def test_a_run_leaves_everything_it_should_behind(tmp_path: Path):
    config = tiny_config(
        tmp_path / "run",
        data={"eval_name": str(TINY / "test.jsonl")},
        evaluation={"num_questions": 6},
        rewards=[{"function": "accuracy"}, {"function": "format", "weight": 0.5}],
    )
    last = Trainer(config).train()
    run = tmp_path / "run"
    model = AutoModelForCausalLM.from_pretrained(last / "hf")
    tokenizer = AutoTokenizer.from_pretrained(last / "hf")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "report.html").read_text().endswith("</html>\n")
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 2]
    assert {"eval/accuracy", "eval/accuracy_stderr", "eval/format"} <= rows[0].keys()
    completions = read_jsonl(run / "completions.jsonl")
    assert len(completions) == 2 * 4 * 4
    one = completions[0]
    assert one["reward"] == pytest.approx(one["rewards"]["accuracy"] + 0.5 * one["rewards"]["format"])
    mean = sum(row["reward"] for row in completions if row["step"] == 1) / 16
    assert mean == pytest.approx(rows[1]["reward/mean"])
    assert len(read_jsonl(run / "evaluations.jsonl")) == 2 * 6
    assert json.loads((run / "environment.json").read_text())["processes"] == 1


def scores_in(path: Path, code: str) -> str:
    path.write_text(code)
    return str(path)


def test_rewards_come_from_the_library_a_file_and_python(tmp_path: Path):
    spec = scores_in(tmp_path / "mine.py", "def short(completion, limit):\n    return float(len(completion) < limit)\n")
    rewards = [{"function": f"{spec}:short", "args": {"limit": 30}}, {"function": "format", "name": "well_formed"}]
    trainer = Trainer(tiny_config(tmp_path / "a", rewards=rewards))
    metrics = trainer.train_step()
    trainer.close()
    assert {"reward/short", "reward/well_formed"} <= metrics.keys()

    def in_trl_form(completions, answer, **kwargs):
        return [float(gold in completion[0]["content"]) for completion, gold in zip(completions, answer, strict=True)]

    many = {"num_prompts": 16, "group_size": 8}  # of which the untrained model has some right
    trainer = Trainer(
        tiny_config(tmp_path / "b", rollout=many), rewards=[in_trl_form, Reward(len_of, weight=0.0, name="chars")]
    )
    metrics = trainer.train_step()
    trainer.close()
    assert 0 < metrics["reward/in_trl_form"] < 1
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/in_trl_form"])
    assert metrics["reward/chars"] > 1


def len_of(completion: str) -> float:
    return float(len(completion))


def test_rows_are_taken_from_python(tmp_path: Path):
    rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(8)]
    trainer = Trainer(tiny_config(tmp_path / "run", data={"name": None}), train_dataset=rows)
    trainer.train_step()
    trainer.close()
    questions = {row["question"] for row in read_jsonl(tmp_path / "run/completions.jsonl")}
    assert len(questions) == 4
    assert questions <= {row["question"] for row in rows}


def test_a_gold_answer_that_cannot_be_graded_is_dropped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(6)] + [{"question": "?", "answer": ""}]
    trainer = Trainer(tiny_config(tmp_path / "run"), train_dataset=rows)
    trainer.close()
    assert len(trainer.prompts.prompts) == 6
    assert "6 training questions; 1 dropped: answer cannot be graded" in capsys.readouterr().out


def test_unknown_rewards_are_neither_rewarded_nor_counted_as_wrong(tmp_path: Path):
    def undecided(completion: str) -> float | None:
        value = float(completion)
        return None if value < 0.5 else value

    trainer = Trainer(tiny_config(tmp_path / "run", algorithm={"max_sampling_gap": 100}), rewards=[undecided])
    trainer.collector.generator = FixedGenerator()
    metrics = trainer.train_step()
    trainer.close()
    rows = read_jsonl(tmp_path / "run/completions.jsonl")
    known = [row["reward"] for row in rows if row["reward"] is not None]
    assert 0 < len(known) < len(rows)
    assert all(value >= 0.5 for value in known)
    assert metrics["reward/mean"] == pytest.approx(sum(known) / len(known), rel=1e-6)
    assert metrics["reward/unknown"] == pytest.approx(1 - len(known) / len(rows))


def test_a_step_without_one_known_reward_leaves_the_weights_alone(tmp_path: Path):
    def nothing(completion: str) -> float | None:
        return None

    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[nothing])
    before = {name: weight.clone() for name, weight in trainer.policy.lm.named_parameters()}
    metrics = trainer.train_step()
    trainer.close()
    assert metrics["reward/unknown"] == 1.0
    assert "reward/mean" not in metrics
    assert all(torch.equal(before[name], weight) for name, weight in trainer.policy.lm.named_parameters())


def test_rows_without_a_held_out_part_cannot_be_evaluated_on(tmp_path: Path):
    with pytest.raises(ValueError, match=r"data.eval_name is missing; the training questions .* have no held-out"):
        Trainer(tiny_config(tmp_path / "run", evaluation={"num_questions": 4}))


def test_a_sequence_longer_than_the_models_positions_is_refused(tmp_path: Path):
    sections = {"rollout": {"max_completion_tokens": 5000}, "memory": {"micro_batch_tokens": 6000}}
    with pytest.raises(
        ValueError, match=r"rollout.max_completion_tokens is 5000; .* 5096 tokens, .* knows \d+ positions"
    ):
        Trainer(tiny_config(tmp_path / "run", **sections))


def test_an_unknown_reward_is_refused_before_a_model_is_loaded(tmp_path: Path):
    config = tiny_config(tmp_path / "run", model={"name": "/nowhere"}, rewards=[{"function": "acuracy"}])
    with pytest.raises(ValueError, match=r"acuracy.*accuracy"):
        Trainer(config)


def test_wandb_without_a_login_goes_on_offline_with_curves_config_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    Trainer(tiny_config(tmp_path / "run", logging={"wandb": "online"})).train()
    assert "no login found" in capsys.readouterr().out
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    assert list(offline.glob("files/media/table/samples/completions*"))


def test_the_script_trains_and_says_where_the_results_lie(tmp_path: Path):
    done = launch_script(f"run.dir={tmp_path / 'run'}", "evaluation.num_questions=4")
    assert done.returncode == 0, done.stderr[-3000:]
    for part in (
        "4,000 training questions",
        "completions per step   128 (16 x 8)",
        "held-out, step 0:",
        "held-out, step 1:",
    ):
        assert part in done.stdout
    for name in ("metrics.jsonl", "curves.png", "checkpoints/step-00000001/hf"):
        assert str(tmp_path / "run" / name) in done.stdout
        assert (tmp_path / "run" / name).exists()


def test_the_script_refuses_a_bad_setting_in_one_line(tmp_path: Path):
    done = launch_script(f"run.dir={tmp_path / 'run'}", "rollout.group_sise=3")
    assert done.returncode != 0
    assert "error: rollout.group_sise is not a setting. Did you mean rollout.group_size?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_sampling_logprob_stops_the_run(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()  # says -1 of every token, which is not what the policy says
    with pytest.raises(
        RuntimeError, match=r"policy/sampling_gap is .* nats in step 1, above 0.001 \(algorithm.max_sampling_gap"
    ):
        trainer.train_step()
    trainer.close()


def test_updates_that_are_not_finite_stop_the_run_after_the_third(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 9}), rewards=[number_in_text])
    with torch.no_grad():
        trainer.policy.lm.model.norm.weight.mul_(float("nan"))
    trainer.collector.generator = FixedGenerator()
    with pytest.raises(
        RuntimeError, match=r"watchdog.not_finite, step 3: the loss or the gradient was not finite in each of 3"
    ):
        trainer.train()
    trainer.close()
    assert trainer.state.optimizer_steps == 0
    assert not (tmp_path / "run/checkpoints").exists()


def test_starting_again_without_a_checkpoint_evaluates_the_base_model_again(tmp_path: Path):
    sections = {
        "data": {"eval_name": str(TINY / "test.jsonl")},
        "evaluation": {"num_questions": 3},
        "run": {"resume": "auto"},
    }
    stopped = Trainer(tiny_config(tmp_path / "run", **sections))
    stopped._evaluate_if_due()
    stopped.close()
    again = Trainer(tiny_config(tmp_path / "run", **sections))
    assert again.log.evaluation(0) == []
    again.close()
    assert len(read_jsonl(tmp_path / "run/evaluations.superseded.jsonl")) == 3


def test_two_runs_started_together_do_not_share_a_directory(tmp_path: Path):
    config = tiny_config(tmp_path / "run").run
    assert [claim(config, DirectoryLock()).name for _ in range(3)] == ["run", "run-2", "run-3"]


def test_line_ends_of_other_alphabets_do_not_tear_a_row(tmp_path: Path):
    rows = [{"step": 1, "text": "a\u2028b\u2029c\u0085d\ne"}, {"step": 2, "text": ""}]
    append_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    rewind_jsonl(tmp_path / "rows.jsonl", 1)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows[:1]
    assert read_jsonl(tmp_path / "rows.superseded.jsonl") == rows[1:]


def test_a_last_line_that_a_kill_cut_short_is_set_aside(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\n{"step": 2, "te')
    rewind_jsonl(tmp_path / "rows.jsonl", 5)
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"step": 1}]


UNUSUAL = {
    "rollout": {"num_prompts": 4, "group_size": 3, "max_completion_tokens": 24},
    "algorithm": {
        "normalize_by_std": False,
        "aggregation": "constant",
        "clip_low": 0.05,
        "clip_high": 0.4,
        "kl_coef": 0.5,
        "kl_estimator": "k2",
        "num_minibatches": 2,
        "max_sampling_gap": 100,
    },
    "optimizer": {
        "learning_rate": 2e-3,
        "beta1": 0.5,
        "beta2": 0.8,
        "weight_decay": 0.3,
        "warmup_steps": 3,
        "schedule": "linear",
        "max_grad_norm": 0.05,
    },
}


def test_every_setting_of_the_algorithm_reaches_the_update(tmp_path: Path):
    """Two steps of two minibatches against the formulas written out, one sequence at a time, with plain AdamW."""
    trainer = Trainer(tiny_config(tmp_path / "run", **UNUSUAL), rewards=[number_in_text])
    trainer.collector.generator = FixedGenerator()
    model = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(TINY / "model", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.8), weight_decay=0.3)

    def logprobs(lm, group, completion):
        ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
        chosen = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1)
        return chosen[len(group.prompt.token_ids) - 1 :]

    rates = iter([2e-3 / 3, 4e-3 / 3, 2e-3, 2e-3])  # three warm-up steps, then the first of one that decays
    clipped = 0
    for _ in range(2):
        order = trainer.prompts.position
        groups = trainer.collector.generator.sample(
            [trainer.prompts._at(order + i) for i in range(4)], trainer.config.sampling, num_completions=3, seed=0
        )
        with torch.no_grad():
            old = [[logprobs(model, g, c) for c in g.completions] for g in groups]
            ref = [[logprobs(reference, g, c) for c in g.completions] for g in groups]
        norms: list[float] = []
        losses: list[float] = []
        for half in (slice(0, 2), slice(2, 4)):
            loss = torch.zeros(())
            for group, old_rows, ref_rows in zip(groups[half], old[half], ref[half], strict=True):
                rewards = [float(completion.text) for completion in group.completions]
                for reward, completion, old_row, ref_row in zip(
                    rewards, group.completions, old_rows, ref_rows, strict=True
                ):
                    advantage = reward - sum(rewards) / 3
                    now = logprobs(model, group, completion)
                    ratio = (now - old_row).exp()
                    bounded = ratio.clamp(0.95, 1.4)
                    clipped += int((ratio != bounded).sum())
                    surrogate = torch.minimum(ratio * advantage, bounded * advantage)
                    loss = loss + (-surrogate + 0.5 * (now - ref_row) ** 2 / 2).sum() / (6 * 24)
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
            losses.append(loss.item())
            optimizer.param_groups[0]["lr"] = next(rates)
            optimizer.step()
        metrics = trainer.train_step()
        # Adam and the norm's bound hide the size of the gradient, these do not
        assert metrics["optimizer/loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)
        assert metrics["optimizer/grad_norm"] == pytest.approx(sum(norms) / 2, rel=1e-3)
    trainer.close()
    assert clipped > 0, "no ratio reached a bound, so the bounds were not tested"
    for (name, actual), expected in zip(trainer.policy.lm.named_parameters(), model.parameters(), strict=True):
        # float32 sums in another order, and Adam divides small gradients by their own size: a twentieth of a step
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("slots", [None, 256.0])
def test_the_console_shows_slots_only_of_an_engine_that_has_them(
    slots: float | None, capsys: pytest.CaptureFixture[str]
):
    sink = LineSink(num_steps=2, reward_names=["accuracy"])
    rollout = {} if slots is None else {"rollout/slots": slots, "rollout/kv_gib": 2.85}
    sink.log(1, {"time/step": 3.2, "throughput/rollout": 108_234.0, **rollout})
    sink.close()
    header, row = capsys.readouterr().out.splitlines()[:2]
    shown = dict(
        zip(header.replace("cut off", "cut_off").replace("KV GiB", "KV_GiB").split(), row.split(), strict=False)
    )
    assert shown["tok/s"] == "108234"
    assert (shown.get("slots"), shown.get("KV_GiB")) == ((None, None) if slots is None else ("256", "2.850"))


def test_rewards_whose_names_begin_alike_have_columns_of_different_titles(capsys: pytest.CaptureFixture[str]):
    names = ["countdown", "countdown_search", "countdown_trials", "countdowning_late"]
    LineSink(num_steps=2, reward_names=names).log(1, {"time/step": 3.2})
    header = capsys.readouterr().out.splitlines()[0]
    titles = header.replace("cut off", "cut_off").replace("time left", "time_left").split()
    assert titles[:6] == ["step", "reward", *names]
    assert short(names, 9) == ["countdown", "…search", "…trials", "…late"]
    assert short(["environment", "accuracy"], 9) == ["environm…", "accuracy"]
    names = [
        "accuracy_math",
        "accuracy_code_math",
        "accuracy_geo_math",
        *(f"accuracy_of_a_{n}_kind_of_math" for n in range(12)),
    ]
    assert len(set(short(names, 9))) == len(names)
    assert max(map(len, short(names, 9))) <= 9


def test_the_console_shows_names_of_rewards_as_they_are(capsys: pytest.CaptureFixture[str]):
    sink = LineSink(num_steps=2, reward_names=["a[/b]", "[red]c"])
    sink.log(
        1, {"time/step": 3.2, "throughput/rollout": 1.0, "reward/a[/b]": 0.5, "eval/a[/b]": 0.25, "eval/[red]c": 1.0}
    )
    shown = capsys.readouterr().out
    assert "a[/b]" in shown.splitlines()[0]
    assert "[red]c" in shown.splitlines()[0]
    assert "a[/b] 0.250  [red]c 1.000" in shown


def test_what_a_reward_logs_is_in_the_runs_files_and_it_knows_how_far_the_run_is(tmp_path: Path):
    def logging(completions, answer, trainer_state, log_metric, log_extra, **kwargs):  # type: ignore[no-untyped-def]
        log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
        log_extra("gold", answer)
        return [float(i) for i in range(len(completions))]

    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[logging])
    trainer.train()
    rows = [json.loads(line) for line in (trainer.log.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["logged/progress"] for row in rows if "logged/progress" in row] == [0.0, 0.5]
    completions = [json.loads(line) for line in (trainer.log.directory / "completions.jsonl").read_text().splitlines()]
    assert all(row["extra"] == {"logging": {"gold": row["answer"]}} for row in completions)


def test_the_vote_of_a_conversation_is_taken_of_texts(tmp_path: Path):
    rewards = [Reward(lambda completion: 1.0, name="accuracy"), Reward(resolve_function("vote"), weight=0)]
    trainer = Trainer(tiny_config(tmp_path / "run", run={"steps": 1}), rewards=rewards)
    assert trainer.prompts.prompts[0].messages is not None
    trainer.train_step()
    trainer.close()


@pytest.mark.parametrize("resize", [False, True])
def test_tokens_without_an_embedding_are_refused_or_given_one(tmp_path: Path, resize: bool):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    rows = AutoConfig.from_pretrained(TINY / "model").vocab_size
    tokenizer.add_tokens([f"<new {i}>" for i in range(rows - len(tokenizer) + 1)])
    shutil.copytree(TINY / "model", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    new = tokenizer.convert_ids_to_tokens(rows)
    data = [{"question": f"{new} What is {i}+1?", "answer": str(i + 1)} for i in range(4)]
    model = {"name": str(tmp_path / "model"), "resize_embeddings": resize}
    config = tiny_config(tmp_path / "run", model=model, algorithm={"kl_coef": 0.01}, run={"steps": 1})
    if not resize:
        with pytest.raises(
            ValueError, match=rf"has its tokenizer's token {rows} \('{new}'\), and its embedding matrix has {rows} rows"
        ):
            Trainer(config, train_dataset=data)
        return
    trainer = Trainer(config, train_dataset=data)
    assert trainer.train_step()["policy/kl"] == pytest.approx(0, abs=1e-9)  # the reference has the same new row
    trainer.train()
    saved = AutoConfig.from_pretrained(trainer.log.directory / "checkpoints/step-00000001/hf")
    assert saved.vocab_size == rows + 1
    plain = tiny_config(tmp_path / "other", model={"resize_embeddings": True})
    with pytest.raises(ValueError, match=r"model.resize_embeddings is true; .* it has no effect"):
        Trainer(plain)


class PatientGenerator(FixedGenerator):
    """Samples a group only when the one before has been scored."""

    def sample(self, prompts: list[Prompt], *arguments: Any, on_group: OnGroup, **options: Any) -> list[Group]:
        groups = super().sample(prompts, *arguments, **options)
        for p, group in enumerate(groups):
            on_group(p, group)
            deadline = time.monotonic() + 30
            while not Path(f"scored {group.completions[-1].text}").exists():
                assert time.monotonic() < deadline, "nothing is scored while the generator samples"
                time.sleep(0.01)
        return groups


def test_a_step_and_an_evaluation_score_groups_while_they_sample_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def marked(completion: str) -> float:
        Path(f"scored {completion}").touch()
        return float(completion)

    monkeypatch.chdir(tmp_path)
    evaluation = {"data": {"eval_name": str(TINY / "test.jsonl")}, "evaluation": {"num_questions": 3}}
    config = tiny_config(tmp_path / "run", **evaluation, algorithm={"kl_coef": 0.0, "max_sampling_gap": 100})
    trainer = Trainer(config, rewards=[marked])
    trainer.collector.generator = PatientGenerator()
    metrics = trainer.train_step()
    trainer._evaluate_if_due()
    trainer.close()
    rows = read_jsonl(tmp_path / "run/completions.jsonl")
    assert metrics["reward/mean"] == pytest.approx(sum(float(row["completion"]) for row in rows) / len(rows))


PEAKS: dict[str, float] = {"rollout": 7.0, "scoring": 1.0, "logprobs": 2.0, "update": 3.0}


def test_the_peak_of_each_phase_is_a_metric_and_the_steps_is_the_largest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[lambda completion: 1.0])
    log: list[str] = []
    monkeypatch.setattr(Processes, "reset_peak_memory", lambda self: log.append(trainer.clock.phase))
    # the phase that began last; after the update, the step itself ends with what taking over the weights took
    monkeypatch.setattr(Processes, "peak_memory_gib", lambda self: PEAKS[trainer.clock.phase])
    metrics = trainer.train_step()
    trainer.close()
    assert log == ["step", "rollout", "scoring", "logprobs", "step", "update"]
    assert {name: metrics[f"memory/{name}"] for name in PEAKS} == PEAKS
    assert metrics["memory/step"] == 7.0


def test_without_a_gpu_there_is_no_peak(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run"), rewards=[lambda completion: 1.0])
    metrics = trainer.train_step()
    trainer.close()
    assert torch.cuda.is_available() == any(name.startswith("memory/") for name in metrics)


def test_out_of_memory_while_sampling_goes_on_with_half_as_many_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for engine in ("hf", "native"):
        trainer = Trainer(tiny_config(tmp_path / engine, rollout={"engine": engine}, memory={"max_sequences": 16}))
        short_above(trainer, 4)
        rewards = trainer.train_step()
        trainer.close()
        assert trainer.collector.generator.max_sequences == 4
        said = re.findall(
            r"out of memory while sampling, process 0: CUDA out of memory.*\n(.*)", capsys.readouterr().out
        )
        assert [re.findall(r"going on with (\d+) completions at once", line) for line in said] == [["8"], ["4"]]
        assert rewards["completion/length_mean"] > 0
        assert len(read_jsonl(tmp_path / engine / "completions.jsonl")) == 16  # each once, whatever was tried before


def short_above(trainer: Trainer, enough: int) -> None:
    """As if memory were enough for so many completions at once: more fail once the first of them have ended."""
    own = trainer.collector.generator.sample

    def sample(*arguments, on_group, **options):
        def fails(p: int, group) -> None:
            on_group(p, group)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

        short = trainer.collector.generator.max_sequences > enough
        return own(*arguments, **options, on_group=fails if short else on_group)

    trainer.collector.generator.sample = sample


def test_out_of_memory_with_one_completion_at_a_time_is_an_error(tmp_path: Path):
    trainer = Trainer(tiny_config(tmp_path / "run", memory={"max_sequences": 2}))
    short_above(trainer, 0)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train_step()
    trainer.close()
