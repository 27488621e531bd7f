"""A recipe for fewer GPUs: the ratios stay, the estimates are near what was measured, and what cannot work is refused."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import warm
import yaml
from helpers import ROOT, TINY
from transformers import Qwen2Config

from grpo.check import scale_supervised
from grpo.check.scale import (
    GPUS,
    Hardware,
    Layout,
    Shape,
    Work,
    as_yaml,
    memory_gib,
    memory_of,
    phase_seconds,
    scale_down,
    shape_of,
)
from grpo.config import Config, DistributedConfig, SupervisedConfig

PAPER = ROOT / "configs" / "r1_zero_paper.yaml"
DAPO = ROOT / "configs" / "recipes" / "dapo-32b.yaml"
SIMPLE = ROOT / "configs" / "recipes" / "simplerl-zoo-0.5b.yaml"
HALF = Shape("0.5b", 494_032_768, 24, 896, 151_936, 24 * 2 * 2 * 64 * 2, 32_768)
ONE_AND_A_HALF = Shape("1.5b", 1_543_714_304, 28, 1536, 151_936, 28 * 2 * 2 * 128 * 2, 32_768)
THREE = Shape("3b", 3_085_938_688, 36, 2048, 151_936, 36 * 2 * 2 * 128 * 2, 32_768)
SEVEN = Shape("7b", 7_615_616_512, 28, 3584, 152_064, 28 * 2 * 4 * 128 * 2, 32_768)


def test_a_models_shape_is_read_from_its_configuration(tmp_path: Path):
    """Qwen2.5-0.5B's; 494,032,768 weights, the embedding counted once."""
    sizes = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "vocab_size": 151_936}
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    Qwen2Config(**sizes, **heads, max_position_embeddings=32_768).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert shape == Shape(str(tmp_path), *[getattr(HALF, name) for name in list(vars(HALF))[1:]])
    assert shape_of(str(TINY / "model")).layers == 3
    with pytest.raises(ValueError, match=r"--model is '.*nowhere'; neither a directory nor the hub gave the config"):
        shape_of(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("text", ["{}", '{"model_type": "unheard-of"}', '{"model_type": "t5"}', "no JSON"])
def test_what_is_no_causal_language_model_is_refused_by_name(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"^--model is '{tmp_path}'; neither .*\. Correct the name") as caught:
        shape_of(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "gpus", "stage", "measured"),
    [(HALF, 1, 2, 14.7), (ONE_AND_A_HALF, 1, 2, 41.3), (ONE_AND_A_HALF, 2, 2, 28.9), (ONE_AND_A_HALF, 2, 3, 29.5)],
)
def test_memory_is_within_a_tenth_of_what_docs_performance_measured(
    shape: Shape, gpus: int, stage: int, measured: float
):
    """The fixed workload: 256 completions of 512 tokens after prompts of up to 199, passes of 32,768 tokens, a reference."""
    layout = Layout(stage, offload=False, pass_tokens=32_768, sequences=256)
    options = {"reference": True, "samples": True, "sequence_tokens": 199 + 512, "chunk_tokens": 4096}
    parts = memory_gib(shape, layout, gpus=gpus, **options)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.1)


def test_with_released_keys_and_values_the_larger_phase_counts():
    """docs/performance.md, Memory: 10.50 GiB while sampling and 11.88 in the update of the fixed workload."""
    kept = Layout(2, offload=False, pass_tokens=32_768, sequences=256)
    options = {"reference": True, "samples": True, "sequence_tokens": 199 + 512, "chunk_tokens": 4096}
    beside, update, sampling = (
        memory_gib(HALF, layout, gpus=1, **options)
        for layout in (kept, replace(kept, releases=True), replace(kept, releases=True, sequences=1024))
    )
    assert update == {name: size for name, size in beside.items() if name != "keys and values"}
    assert 11.88 <= sum(update.values()) <= 1.15 * 11.88  # gradients have fewer than 6 bytes a weight on one GPU
    assert set(sampling) == {"policy", "reference", "optimizer", "keys and values", "sampling"}
    assert sampling["keys and values"] == 4 * beside["keys and values"]
    assert sampling["sampling"] == 1024 * 151_936 * 8 / 2**30  # a step's logits, twice in float32
    of_256 = sum(sampling.values()) - 3 * beside["keys and values"] - sampling["sampling"] + 16_384 * 896 * 34 / 2**30
    assert of_256 == pytest.approx(10.50, rel=0.1)
    shards = memory_gib(HALF, replace(kept, releases=True, sequences=1024, zero_stage=3), gpus=1, **options)
    assert shards["gradients"] == beside["gradients"]  # DeepSpeed keeps a share of them from update to update


def test_what_a_pass_over_prompts_works_with_counts_while_sampling():
    """By hand, in GiB: 2**30 weights are 2 of policy, 2 of reference, and 6 of gradients; the optimizer is offloaded.

    Keys and values: 50 sequences x 2**15 tokens x 2**12 bytes = 6.25. Prompts are read 2**14 tokens at a time, with 34 bytes x
    2**10 for each: 0.53125, where logits of 50 sequences are 0.0004. So sampling takes 6.78125 beside the weights, and the update
    6 + 2**14 tokens x (2 x 2 + 34) x 2**10 + 2**12 x 2**10 x 2 = 6.6015625: less, but more than keys and values alone.
    """
    shape = Shape("by hand", 2**30, layers=2, hidden=2**10, vocabulary=2**10, kv_bytes=2**12, positions=None)
    layout = Layout(2, offload=True, pass_tokens=2**14, sequences=50, releases=True)
    options = {"reference": True, "samples": True, "sequence_tokens": 2**15, "chunk_tokens": 2**12}
    assert memory_gib(shape, layout, gpus=1, **options) == {
        "policy": 2,
        "reference": 2,
        "optimizer": 0,
        "keys and values": 6.25,
        "sampling": 0.53125,
    }
    update = memory_gib(shape, replace(layout, sequences=48), gpus=1, **options)  # 6 + 0.53125 are less than 6.6015625
    assert sum(update.values()) == 2 + 2 + 6.6015625


def test_keys_and_values_are_released_where_a_run_does_not_fit_otherwise(tmp_path: Path):
    hardware, own = Hardware(2, 24, "h100"), changed_recipe(tmp_path, memory={"release_kv_cache": True})

    def scaled(source: Path, gib: float) -> Config:
        found = scale_down(Config.load(source), ONE_AND_A_HALF, replace(hardware, memory_gib=gib),
                           max_tokens=2048, hours=1000)  # fmt: skip
        text = as_yaml(found, source, run_dir="runs/my", out=tmp_path / "my.yaml", num_questions=None)
        assert (found.layout.releases, "took 11.9 GiB" in text) == (("release_kv_cache: true" in text),) * 2
        return Config(**yaml.safe_load(text))

    small, large, asked = scaled(PAPER, 24), scaled(PAPER, 80), scaled(own, 80)
    assert small.memory.release_kv_cache
    assert not small.distributed.offload_optimizer  # which each update would wait for
    assert small.distributed.zero_stage == 2
    assert not large.memory.release_kv_cache
    assert asked.memory.release_kv_cache


@pytest.mark.parametrize(
    ("shape", "prompts", "phases"),
    [
        (HALF, 32, {"rollout": 0.95, "logprobs": 0.34, "update": 1.36}),
        (ONE_AND_A_HALF, 32, {"rollout": 1.66, "logprobs": 0.81, "update": 3.19}),
        (HALF, 128, {"rollout": 128 * 8 * 512 / 252_000}),
    ],
)
def test_time_is_within_a_fifth_of_what_docs_performance_measured(shape: Shape, prompts: int, phases: dict[str, float]):
    lengths = {"prompt_tokens": 145, "mean_tokens": 512, "max_tokens": 512}
    work = Work(prompts, prompts * 8, sequences=prompts * 8, num_forwards=1, **lengths)
    found = phase_seconds(shape, GPUS["h200"], work)
    assert sum(found[phase] for phase in phases) == pytest.approx(sum(phases.values()), rel=0.2)


@pytest.mark.parametrize(
    ("shape", "gpus", "memory"),
    [(HALF, 1, 24), (HALF, 1, 80), (ONE_AND_A_HALF, 1, 80), (THREE, 1, 80), (SEVEN, 8, 80)],
)
def test_ratios_are_kept_and_it_fits_and_ends_in_time(shape: Shape, gpus: int, memory: float, tmp_path: Path):
    paper = Config.load(PAPER)
    scaled = scale_down(paper, shape, Hardware(gpus, memory, "h100"), max_tokens=2048, hours=24)
    out = tmp_path / "my.yaml"
    out.write_text(as_yaml(scaled, PAPER, run_dir="runs/my", out=out, num_questions=None))
    config = Config.load(out)
    algorithm = config.algorithm
    assert algorithm == paper.algorithm  # 16 updates per rollout, a reference every 400 updates, which are 25 rollouts
    assert config.rollout.group_size == 16
    assert config.rollout.num_prompts == 16 * scaled.prompts_per_update
    assert config.prompts_per_minibatch == scaled.prompts_per_update <= 32
    assert config.run.steps % 25 == 0
    assert 100 <= config.run.steps <= 650
    assert config.rollout.max_completion_tokens == 2048
    (changes,) = [each.points for each in config.schedules.values()]
    assert list(changes.values()) == [1024, 2048]  # 32,768 : 65,536
    assert max(changes) / config.optimizer_steps == pytest.approx(8200 / 10_400, abs=1e-3)
    needed = sum(memory_of(paper, shape, scaled.layout, gpus=gpus, max_tokens=2048).values())
    assert needed <= 0.92 * memory
    paper.rollout.weights = "fp8"
    in_8_bits = sum(memory_of(paper, shape, scaled.layout, gpus=gpus, max_tokens=2048).values())
    assert in_8_bits - needed == pytest.approx(shape.weights / 2**30)
    (hours,) = re.findall(r"^# Time    ([\d.]+) hours", out.read_text(), re.MULTILINE)
    assert float(hours) <= 24


def test_what_is_derived_has_its_reason_beside_it(tmp_path: Path):
    scaled = scale_down(Config.load(PAPER), ONE_AND_A_HALF, Hardware(1, 80, "h100"), max_tokens=2048, hours=12)
    text = as_yaml(scaled, PAPER, run_dir="runs/my", out=tmp_path / "my.yaml", num_questions=38_400)
    before, after = yaml.safe_load(PAPER.read_text()), yaml.safe_load(text)
    changed = [
        name
        for section, values in after.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if before.get(section, {}).get(name) != value
    ]
    for name in changed:
        assert re.search(rf"^  {name}:(?: .*)? # \S", text, re.MULTILINE), name
    questions = scaled.rollouts * 16 * scaled.prompts_per_update
    assert f"{questions:,} questions, {16 * questions:,} completions; {questions / 38_400:.2f} epochs" in text


def test_less_time_means_fewer_questions_per_update_and_then_fewer_rollouts():
    found = [
        scale_down(Config.load(PAPER), HALF, Hardware(1, 80, "h200"), max_tokens=1024, hours=hours)
        for hours in (1000, 6, 1)
    ]
    assert (found[0].prompts_per_update, found[0].rollouts) == (32, 650)
    sizes = [each.prompts_per_update for each in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(32 % size == 0 for size in sizes)
    assert sizes[-1] < 32


def test_another_recipe_scales_with_its_warm_up_and_its_overlong_buffer(tmp_path: Path):
    recipe = Config.load(DAPO)
    scaled = scale_down(recipe, ONE_AND_A_HALF, Hardware(1, 80, "h100"), max_tokens=2048, hours=24)
    out = tmp_path / "dapo.yaml"
    out.write_text(as_yaml(scaled, DAPO, run_dir="runs/dapo", out=out, num_questions=None))
    config = Config.load(out)
    assert "# overlong's buffer: the same share" in out.read_text()
    assert config.rewards[1].args == {"buffer": 409}  # a fifth, as 4,096 of 20,480
    assert config.optimizer.warmup_steps == round(160 * scaled.rollouts / 330)
    assert config.algorithm == recipe.algorithm
    assert scaled.rollouts >= 100
    assert not scaled.layout.offload
    assert not config.distributed.offload_optimizer  # the recipe's 32B has it


def yaml_of(path: Path, *, gpus: int = 1, max_tokens: int = 1024) -> str:
    scaled = scale_down(Config.load(path), HALF, Hardware(gpus, 80, "h100"), max_tokens=max_tokens, hours=1000)
    return as_yaml(scaled, path, run_dir="runs/my", out=path, num_questions=None)


def changed_recipe(tmp_path: Path, **sections: Any) -> Path:
    settings = yaml.safe_load(SIMPLE.read_text())
    for section, values in sections.items():
        settings[section] = {**settings.get(section, {}), **values} if isinstance(values, dict) else values
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "recipe.yaml"


def test_what_the_layout_decides_is_written_over_the_recipes_own(tmp_path: Path):
    own = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    recipe = changed_recipe(tmp_path, distributed=own, memory={"kv_cache_gib": 40})
    config = Config(**yaml.safe_load(yaml_of(recipe)))
    assert config.distributed == DistributedConfig(zero_stage=2)
    assert config.memory.kv_cache_gib is None


def test_points_of_a_schedule_do_not_fall_together_or_beyond_the_end(tmp_path: Path):
    """100 rollouts of 4 updates become 50 of 4."""
    points = {0: 0.001, 1: 0.0008, 2: 0.0005, 200: 0.0001, 399: 0.0}
    schedules = {"algorithm.kl_coef": {"points": points}}
    recipe = changed_recipe(tmp_path, algorithm={"kl_coef": 0.001}, schedules=schedules)
    scaled = scale_down(Config.load(recipe), HALF, Hardware(1, 80, "h100"), max_tokens=1024, hours=1000)
    text = as_yaml(replace(scaled, rollouts=50), recipe, run_dir="runs/my", out=recipe, num_questions=None)
    config = Config(**yaml.safe_load(text))
    assert config.schedules["algorithm.kl_coef"].points == {0: 0.001, 1: 0.0008, 2: 0.0005, 100: 0.0001, 199: 0.0}


def test_a_recipe_that_sets_the_largest_limit_of_its_schedule_scales_with_it(tmp_path: Path):
    schedules = {"rollout.max_completion_tokens": {"points": {0: 4096, 200: 8192}}}
    recipe = changed_recipe(tmp_path, rollout={"max_completion_tokens": 8192}, schedules=schedules)
    assert Config(**yaml.safe_load(yaml_of(recipe))).rollout.max_completion_tokens == 1024


def test_an_overlong_reward_without_a_buffer_is_left_as_it_is(tmp_path: Path):
    recipe = changed_recipe(tmp_path, rewards=[{"function": "accuracy"}, {"function": "overlong"}])
    assert Config(**yaml.safe_load(yaml_of(recipe))).rewards[1].args == {}


def test_dynamic_sampling_is_taken_to_sample_twice_as_much(tmp_path: Path):
    hours = []
    for most in (1, 30):
        recipe = changed_recipe(tmp_path, rollout={"max_oversampling": most})
        hours.append(re.findall(r"^# Time    ([\d.]+) hours", yaml_of(recipe), re.MULTILINE)[0])
    assert 1.2 < float(hours[1]) / float(hours[0]) < 2


@pytest.mark.parametrize(
    ("sections", "gpus", "tokens", "message"),
    [
        ({}, 1, 8193, "--max-tokens is 8193; the recipe has 8192"),
        ({"rollout": {"num_prompts": 16}}, 32, 1024, "--gpus is 32; each needs a question of every rollout"),
        ({"lora": {"rank": 16}}, 1, 1024, "lora.rank is 16; what is known"),
        ({"rollout": {"engine": "vllm"}}, 1, 1024, "rollout.engine is 'vllm'; what is known"),
    ],
)
def test_what_is_no_scaling_down_of_what_was_measured_is_refused(
    tmp_path: Path, sections: dict, gpus: int, tokens: int, message: str
):
    with pytest.raises(ValueError, match=re.escape(message)):
        yaml_of(changed_recipe(tmp_path, **sections), gpus=gpus, max_tokens=tokens)


def test_the_script_scales_no_length_up_and_leaves_no_file_where_it_fails(tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [str(ROOT / "scripts" / "scale_down.py"), "--model", str(TINY / "model")]
        return warm.run([*script, *arguments], cwd=ROOT, timeout=120)

    lengths = {"rollout": {"max_completion_tokens": 256}, "data": {"max_prompt_tokens": 512}}
    recipe, out = changed_recipe(tmp_path, **lengths), tmp_path / "my.yaml"
    done = run("--config", str(recipe), "--out", str(out), "--hours", "1000")
    assert "  max_completion_tokens: 256 # as the recipe" in done.stdout.splitlines(), done.stderr
    assert Config.load(out).rollout.max_completion_tokens == 256
    done = run("--config", str(recipe), "--out", str(tmp_path / "nowhere" / "my.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --out is "), done.stderr


@pytest.mark.parametrize(
    ("shape", "hardware", "tokens", "hours", "parts"),
    [
        (
            SEVEN,
            Hardware(1, 64, "h100"),
            2048,
            24,
            [
                "--gpu-memory is 64; 7b with 7.62 billion weights needs",
                "even with",
                "offload_optimizer",
                "Give more --gpus",
            ],
        ),
        (
            HALF,
            Hardware(1, 80, "h100"),
            32_000,
            24,
            ["--max-tokens is 32000", "knows 32768 positions", "Lower --max-tokens"],
        ),
        (
            THREE,
            Hardware(1, 80, "a100"),
            2048,
            0.5,
            ["--hours is 0.5", "fewest rollouts", "100, take", "Give more --hours"],
        ),
    ],
)
def test_what_cannot_work_is_refused(shape: Shape, hardware: Hardware, tokens: int, hours: float, parts: list[str]):
    with pytest.raises(ValueError, match=r".") as caught:
        scale_down(Config.load(PAPER), shape, hardware, max_tokens=tokens, hours=hours)
    for part in parts:
        assert part in str(caught.value)
    if "needs" in parts[0]:
        (needed,) = re.findall(r"needs (\d+) GiB", str(caught.value))
        assert int(needed) > hardware.memory_gib
        assert math.isfinite(
            scale_down(
                Config.load(PAPER), shape, Hardware(1, int(needed) + 1, "h100"), max_tokens=tokens, hours=1000
            ).rollouts
        )


# ---- supervised training ---------------------------------------------------------------------------------------------

SFT = ROOT / "configs" / "r1" / "50_sft.yaml"


def test_a_supervised_recipe_keeps_its_rows_and_takes_what_fits(tmp_path: Path):
    recipe = SupervisedConfig.load(SFT)
    one, two = (Hardware(n, 24, "h100") for n in (1, 2))
    large = scale_supervised.layout_for(recipe, HALF, two, max_tokens=8192)
    assert large == Layout(2, offload=False, pass_tokens=65_536, sequences=0)
    small = scale_supervised.layout_for(recipe, ONE_AND_A_HALF, one, max_tokens=8192)
    assert small.offload  # 20 bytes a weight are 29 GiB
    assert sum(scale_supervised.memory_of(recipe, ONE_AND_A_HALF, small, one).values()) < 0.92 * 24
    shards = replace(large, zero_stage=3)
    asks = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"num_questions": 8})})
    silent = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"num_questions": 0})})
    whole, share = (scale_supervised.memory_of(each, HALF, shards, two)["policy"] for each in (asks, silent))
    assert whole == pytest.approx(3 * share), "a copy beside a half, for who answers questions"
    text = scale_supervised.as_yaml(
        recipe, SFT, ONE_AND_A_HALF, one, max_tokens=4096, run_dir="runs/my", out=tmp_path / "my.yaml"
    )
    scaled = SupervisedConfig(**yaml.safe_load(text))
    assert (scaled.training, scaled.optimizer) == (recipe.training, recipe.optimizer)
    assert (scaled.data.max_tokens, scaled.distributed.offload_optimizer, scaled.run.dir) == (4096, True, "runs/my")
    seconds = 6 * 1_543_714_304 * 1e6 / (310e12 * 3.35 / 4.8 * 4.8 / 3.35)  # the H100 multiplies as fast as the H200
    assert f"{seconds:.0f} s for a million tokens of rows, in each of 2 epochs" in text


@pytest.mark.parametrize(("num_questions", "releases"), [(8, False), (8, True), (0, False)])
def test_answers_need_memory_beside_an_update_only_where_they_lie_there(
    tmp_path: Path, num_questions: int, releases: bool
):
    settings = yaml.safe_load(SFT.read_text())
    settings["evaluation"] = {"num_questions": num_questions}
    settings["data"] |= {"eval_name": "openai/gsm8k"} if num_questions else {}
    settings["data"] = {k: v for k, v in settings["data"].items() if num_questions or not k.startswith("eval_")}
    settings["memory"] = {**settings.get("memory", {}), "release_kv_cache": releases}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    recipe, hardware = SupervisedConfig.load(tmp_path / "recipe.yaml"), Hardware(1, 80, "h100")
    own = {"max_tokens": 4096, "run_dir": "runs/my", "out": tmp_path / "my.yaml"}
    text = scale_supervised.as_yaml(recipe, tmp_path / "recipe.yaml", HALF, hardware, **own)
    assert ("held-out questions need some more" in text) == (num_questions > 0 and not releases)


@pytest.mark.parametrize(
    ("shape", "hardware", "max_tokens", "said"),
    [
        (
            SEVEN,
            Hardware(1, 24, "h100"),
            8192,
            r"--gpu-memory is 24; 7b with 7.62 billion weights needs \d+ GiB on each of 1",
        ),
        (HALF, Hardware(1, 80, "h100"), 40_000, "--max-tokens is 40000; 0.5b knows 32768 positions"),
    ],
)
def test_a_supervised_recipe_that_cannot_work_is_refused(shape: Shape, hardware: Hardware, max_tokens: int, said: str):
    with pytest.raises(ValueError, match=said):
        scale_supervised.layout_for(SupervisedConfig.load(SFT), shape, hardware, max_tokens=max_tokens)


def test_the_command_knows_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from grpo.cli import scale as command

    out = tmp_path / "my.yaml"
    monkeypatch.setattr("sys.argv", ["scale", "--config", str(SFT), "--model", str(TINY / "model"), "--max-tokens", "256",
                                     "--out", str(out)])  # fmt: skip
    command.main()
    assert f"grpo sft --processes 1 --config {out} --dry-run" in out.read_text()


@pytest.mark.parametrize(("name", "kind"), [("quickstart", Config), ("sft-quickstart", SupervisedConfig)])
def test_a_recipe_may_be_named_and_what_lies_beside_it_is_found(
    name: str, kind: type[Config | SupervisedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from grpo.cli import scale as command

    monkeypatch.chdir(tmp_path)
    given = ["--config", name, "--model", str(TINY / "model"), "--hours", "1000", "--out", "my.yaml"]
    monkeypatch.setattr("sys.argv", ["grpo scale", *given])
    command.main()
    assert Path("my.yaml").read_text().startswith(f"# {name}.yaml for ")
    assert kind.load("my.yaml").data.name == kind.load(name).data.name
    assert Path(str(kind.load("my.yaml").data.name)).is_file()
    for bad in ("inf", "nan", "0"):
        monkeypatch.setattr("sys.argv", ["grpo scale", *given, "--gpu-memory", bad])
        with pytest.raises(SystemExit, match="2"):
            command.main()
