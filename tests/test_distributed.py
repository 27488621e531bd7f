"""The update must not depend on how it was split: micro-batches, processes, ZeRO stages. On CPUs with gloo."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUESTIONS, TINY, launch, launch_script, read_json, steps_of, tiny_config
from safetensors.torch import load_file
from transformers import AutoConfig

from grpo import Trainer
from grpo.policy.policy import Policy
from grpo.policy.sequence_parallel import check_heads, repeats
from grpo.policy.tokenizer import load_tokenizer
from grpo.system import distributed
from grpo.system.jsonl import read_jsonl

COMPARED = (
    "optimizer/grad_norm",
    "optimizer/loss",
    "policy/kl",
    "policy/entropy",
    "policy/ratio_mean",
    "policy/clip_fraction",
    "policy/clip_fraction_low",
    "policy/sampling_gap",
    "reward/mean",
    "reward/std",
    "completion/length_mean",
)
OF_THE_FAMILY = ("policy/selected", "policy/importance_mean", "policy/importance_bounded", "policy/kl_penalty")
TINY_PARAMETERS = 496_128


def update(out: Path, *options: str, zero: int, processes: int, budget: int) -> Path:
    out.mkdir()
    launch("worker_update.py", str(out), "--zero", str(zero), "--budget", str(budget), *options, processes=processes)
    return out


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything in one pass on one process, without ZeRO."""
    return update(tmp_path_factory.mktemp("reference") / "out", zero=0, processes=1, budget=100_000)


def assert_same_update(out: Path, reference: Path) -> None:
    for ours, theirs in zip(read_json(out / "metrics.json"), read_json(reference / "metrics.json"), strict=True):
        assert ours.keys() == theirs.keys()
        for name in [*COMPARED, *(name for name in OF_THE_FAMILY if name in theirs)]:
            # float32 sums in another order; they differ by 2e-7 relative, and the second step starts from such weights
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5, abs=1e-6), name
    weights, expected = load_file(out / "weights.safetensors"), load_file(reference / "weights.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-6)  # a fifth of one step of 1e-5


@pytest.mark.parametrize(
    ("zero", "processes", "budget", "options"),
    [
        (0, 1, 120, []),  # a sequence or two per pass
        (0, 2, 256, []),
        (1, 2, 256, []),
        (2, 2, 256, []),
        (3, 2, 256, []),
        (2, 3, 120, []),  # minibatches of 3 questions over 3 processes
        (
            2,
            4,
            1,
            [],
        ),  # a pass for each of 9 sequences, on 4 processes: some are spare; and one process samples nothing
        (2, 2, 256, ["--offload", "optimizer"]),
        (3, 2, 256, ["--offload", "optimizer", "parameters"]),
        (3, 4, 64, ["--sequence-parallel", "4"]),  # more than there are key heads
    ],
)
def test_the_update_does_not_depend_on_how_it_is_split(
    tmp_path: Path, reference: Path, zero: int, processes: int, budget: int, options: list[str]
):
    out = update(tmp_path / "out", *options, zero=zero, processes=processes, budget=budget)
    assert_same_update(out, reference)
    assert all((row["batch/padding"] > 0) == (budget == 1) for row in read_json(out / "metrics.json"))
    if "--sequence-parallel" in options:
        own, whole = (read_json(each / "widths.json") for each in (out, reference))
        assert max(own) <= budget
        assert sum(own) < sum(whole) / 2, "a process reads a fourth of the tokens, and prompts again in each pass"
    held = read_json(out / "held.json")
    assert held == TINY_PARAMETERS / (processes if zero == 3 else 1)


@pytest.fixture(scope="module")
def adapted_reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return update(tmp_path_factory.mktemp("adapted") / "out", "--lora", "4", zero=0, processes=1, budget=100_000)


@pytest.mark.parametrize("zero", [2, 3])
def test_adapters_do_not_depend_on_how_the_update_is_split(tmp_path: Path, adapted_reference: Path, zero: int):
    together = ["--sequence-parallel", "2"] if zero == 3 else []
    out = update(tmp_path / "out", "--lora", "4", *together, zero=zero, processes=2, budget=256)
    assert_same_update(out, adapted_reference)
    base = load_file(TINY / "model/model.safetensors")
    moved = load_file(out / "weights.safetensors")
    # what was compared to 2e-6 moved by more than that
    assert max((weight - base[name]).abs().max() for name, weight in moved.items()) > 1e-4


def test_what_looks_at_whole_completions_minibatches_or_groups_does_not_depend_on_the_split_either(tmp_path: Path):
    whole = update(tmp_path / "whole", "--family", zero=0, processes=1, budget=100_000)
    parts = update(tmp_path / "parts", "--family", zero=3, processes=2, budget=120)
    shared = update(tmp_path / "shared", "--family", "--sequence-parallel", "2", zero=2, processes=4, budget=60)
    for row in read_json(whole / "metrics.json"):
        assert 0.2 < row["policy/selected"] < 0.295, "the highest 0.3 in entropy, less some of high covariance"
        assert 0 < row["policy/importance_bounded"] < 1
    assert (
        read_json(whole / "metrics.json")[1]["policy/kl_penalty"] != 0
    )  # the reference is the policy in the first step
    assert_same_update(parts, whole)
    assert_same_update(shared, whole)


@pytest.mark.parametrize(
    ("zero", "options"),
    [
        (2, ["--offload", "optimizer"]),
        (3, ["--offload", "optimizer", "parameters"]),
        (3, ["--lora", "4"]),
    ],
)
def test_a_sharded_run_resumes_where_it_stopped(tmp_path: Path, zero: int, options: list[str]):
    launch("worker_resume.py", str(tmp_path), "--zero", str(zero), *options, processes=2)
    whole, halves = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    drop = ("time/", "throughput/", "memory/")
    clean = [[{k: v for k, v in row.items() if not k.startswith(drop)} for row in rows] for rows in (whole, halves)]
    assert [row["step"] for row in clean[0]] == [0, 1, 2, 3, 4, 4]
    assert clean[0][1:] == clean[1]  # the half that was stepped by hand did not evaluate the base model
    assert clean[0][2]["policy/kl"] > 2 * clean[0][3]["policy/kl"] > 0  # the reference became the policy after step 2
    evaluated = read_jsonl(tmp_path / "whole/evaluations.jsonl")
    assert [(row["step"], row["row"]) for row in evaluated] == [(step, row) for step in (0, 4) for row in range(5)]
    sampled = [row["completion"] for row in read_jsonl(tmp_path / "whole/completions.jsonl") if row["step"] == 1]
    assert len(sampled) == 16
    assert sampled[:8] != sampled[8:]
    # steps of 1e-3 move log-probabilities by tenths: weights that sampling had not taken over would show
    assert all(row["policy/sampling_gap_max"] < 1e-3 for row in clean[0] if "policy/sampling_gap_max" in row)


ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
num_processes: {processes}
num_machines: 1
machine_rank: 0
main_process_port: 0
mixed_precision: 'no'
use_cpu: false
deepspeed_config: {{zero_stage: {zero}, gradient_accumulation_steps: 1, gradient_clipping: 1.0}}
"""


def launch_with_config_file(tmp_path: Path, *, zero: int, processes: int) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "accelerate.yaml"
    path.write_text(ACCELERATE_CONFIG.format(zero=zero, processes=processes))
    settings = ["evaluation.num_questions=0", "distributed.zero_stage=2", f"run.dir={tmp_path / 'run'}"]
    settings += [f"data.name={QUESTIONS}", "rollout.num_prompts=4"]
    return launch_script(*settings, launcher=("--config_file", str(path)))


def test_accelerates_own_configuration_file_may_set_the_number_of_processes(tmp_path: Path):
    done = launch_with_config_file(tmp_path, zero=2, processes=2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((tmp_path / "run/environment.json").read_text())["processes"] == 2
    assert done.stdout.count("training questions") == 1  # one process speaks


def test_a_zero_stage_that_accelerates_file_contradicts_is_refused(tmp_path: Path):
    done = launch_with_config_file(tmp_path, zero=3, processes=1)
    assert done.returncode != 0
    assert (
        "error: distributed.zero_stage is 2; accelerate's own configuration file or option says zero_stage 3"
        in done.stderr
    )


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "optimizer.max_grad_norm is 1.0; .* says gradient_clipping 0.5"),
        (
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
            "cpu",
            "distributed.offload_optimizer is False; .* says offload_optimizer_device cpu",
        ),
        (
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
            "cpu",
            "distributed.offload_parameters is False; .* says offload_param_device cpu",
        ),
        ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "ds.json", "says config_file ds.json"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "says gradient_accumulation_steps 4"),
        ("ACCELERATE_USE_FSDP", "true", r"ask for FSDP; .* Set distributed\.zero_stage"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "ask for Megatron-LM"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", r"mixed_precision is bf16; .* float32 .* Set model\.dtype to bfloat16"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision is fp16; .* Launch without --mixed_precision"),
    ],
)
def test_nothing_in_accelerates_file_is_ignored_in_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=message):
        distributed.start(tiny_config(tmp_path), dtype=torch.float32)


def test_accelerates_file_may_offload_what_the_configuration_offloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    variable = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
    config = tiny_config(tmp_path, distributed={"zero_stage": 1, "offload_optimizer": True})
    monkeypatch.setenv(variable, "nvme")
    with pytest.raises(ValueError, match=r"distributed.offload_optimizer is True; .* offload_optimizer_device nvme"):
        distributed.start(config, dtype=torch.float32)
    monkeypatch.setenv(variable, "cpu")
    distributed.start(config, dtype=torch.float32)


def test_options_that_accelerate_hands_on_to_nobody_are_refused():
    """Without --use_deepspeed, accelerate itself forgets how many gradients to accumulate."""
    done = launch_script(launcher=("--gradient_accumulation_steps", "4"), forked=False)
    assert done.returncode != 0
    assert "says gradient_accumulation_steps 4, and the two must agree" in done.stderr


@pytest.mark.parametrize("offloaded", [set(), {"optimizer"}, {"param"}, {"optimizer", "param"}])
def test_deepspeed_is_told_what_to_offload(tmp_path: Path, offloaded: set[str]):
    ours = {"offload_optimizer": "optimizer" in offloaded, "offload_parameters": "param" in offloaded}
    config = tiny_config(tmp_path, distributed={"zero_stage": 3, **ours})
    zero = distributed.deepspeed_config(config, dtype=torch.float32)["zero_optimization"]
    devices = {name.removeprefix("offload_"): zero[name]["device"] for name in zero if name.startswith("offload_")}
    assert devices == dict.fromkeys(offloaded, "cpu")


def test_an_offloaded_update_is_torchs_own_and_nothing_is_compiled(tmp_path: Path):
    config = tiny_config(tmp_path, distributed={"zero_stage": 2, "offload_optimizer": True})
    policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))
    assert policy.engine.zero_offload_optimizer().device == "cpu"
    assert type(policy.engine.basic_optimizer) is torch.optim.AdamW


@pytest.mark.parametrize("zero", [2, 3])
def test_a_process_may_leave_its_group_and_train_in_another(tmp_path: Path, zero: int):
    config = tiny_config(tmp_path, distributed={"zero_stage": zero})
    for _ in range(2):
        policy = Policy(config, load_tokenizer(config.model), distributed.start(config, dtype=torch.float32))
        assert policy.processes.world_size == 1
        distributed.stop()
        assert not torch.distributed.is_initialized()


def test_the_host_of_a_gpu_gets_few_threads_unless_the_environment_says_how_many(monkeypatch: pytest.MonkeyPatch):
    before = torch.get_num_threads()
    try:
        for given, number in (("8", 8), (None, distributed.MOST_THREADS)):
            monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            if given:
                monkeypatch.setenv("OMP_NUM_THREADS", given)
            torch.set_num_threads(8)
            distributed.limit_threads()
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "processes", "number"), [(None, 1, 8), ("1", 1, 1), (None, 2, 4), ("1", 2, 4), ("3", 2, 3), ("1", 16, 1)]
)
def test_an_optimizer_on_the_host_gets_its_share_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, given: str | None, processes: int, number: int
):
    """torchrun, accelerate and `grpo train` leave each of several processes one thread, with which 7B take half a minute."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {*range(8)})  # and not how many the machine has
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", str(processes))  # as DeepSpeed's launcher says it
    assert distributed.num_local_processes() == processes
    monkeypatch.setenv("LOCAL_SIZE", "99")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        torch.set_num_threads(int(given or 1))
        distributed.share_threads()
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("offload", [True, False])
def test_a_run_with_its_optimizer_on_the_host_takes_them(
    offload: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    taken: list[bool] = []
    monkeypatch.setattr(distributed, "share_threads", lambda: taken.append(True))
    settings = {"zero_stage": 2, "offload_optimizer": offload}
    distributed.start(tiny_config(tmp_path, distributed=settings), dtype=torch.float32)
    assert taken == [True] * offload


def test_a_small_model_trains_on_one_thread_of_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("a CPU is not what trains here")
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        Trainer(tiny_config(tmp_path / "run")).close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_accelerates_cpu_switch_does_not_drop_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes = distributed.start(tiny_config(tmp_path), dtype=torch.float32)
    assert processes.accelerator.distributed_type == "DEEPSPEED"


def test_nothing_is_compiled_at_the_start_on_a_cpu(tmp_path: Path):
    from deepspeed import ops

    distributed.start(tiny_config(tmp_path), dtype=torch.float32)
    assert ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_processes_with_different_numbers_of_chunks_of_logits_stay_in_step_under_zero_3(tmp_path: Path):
    """ZeRO-3 gathers the output layer at each call: a process with a chunk more would wait for it for ever."""
    counts, rows = {}, {}
    for chunk in (10, 1000):
        output = launch("worker_chunks.py", str(tmp_path), str(chunk), processes=2, timeout=200)
        counts[chunk] = re.findall(r"(\d+) passes with different numbers of chunks", output)
        rows[chunk] = read_jsonl(tmp_path / f"chunks-of-{chunk}" / "metrics.jsonl")
    assert int(counts[10][0]) > 0
    assert counts[1000] == ["0"]
    for many, one in zip(rows[10], rows[1000], strict=True):
        for name in COMPARED:
            assert many[name] == pytest.approx(one[name], rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize(("recomputed", "torchs_own"), [(1, "True"), (0.5, "False")])
def test_zero_3_does_not_gather_in_the_backward_pass_what_it_could_have_kept(
    tmp_path: Path, recomputed: float, torchs_own: str
):
    """DeepSpeed remembers what the check of the model's forward pass, which has no backward pass, let go of. Its own linear
    layers are for those that are not computed again in the backward pass."""
    output = launch("worker_gathers.py", str(tmp_path), str(recomputed), processes=2)
    assert f"torch's own linear layers: {torchs_own}" in output
    forward, again = re.findall(r"(\d+) layers gathered in forward passes, (\d+) in backward passes", output)[0]
    assert int(forward) > 0
    assert again == "0"


@pytest.mark.parametrize(
    ("settings", "own"),
    [({}, False), ({"memory": {"activation_checkpointing": 0.9}}, True), ({"lora": {"rank": 4}}, True)],
)
def test_zero_3_has_torchs_linear_layers_where_they_keep_no_weight_for_the_backward_pass(
    tmp_path: Path, settings: dict[str, Any], own: bool
):
    settings = {"memory": {"activation_checkpointing": 1}, "distributed": {"zero_stage": 3}} | settings
    config = tiny_config(tmp_path / "run", **settings)
    zero = distributed.deepspeed_config(config, dtype=torch.float32)["zero_optimization"]
    assert zero["memory_efficient_linear"] is own


def test_processes_about_to_run_other_numbers_of_passes_are_told_instead_of_waiting_for_each_other():
    class Two(distributed.Processes):
        def gather(self, value: object) -> list[object]:
            return [value, [3, 3]]

    two = Two(0, 2, torch.device("cpu"))
    two.check_same("numbers of passes", [3, 3])
    with pytest.raises(RuntimeError, match=r"numbers of passes differ between the processes: \[\[3, 2\], \[3, 3\]\]"):
        two.check_same("numbers of passes", [3, 2])


def test_groups_that_do_not_come_out_even_are_refused():
    with pytest.raises(
        ValueError, match=r"sequence_parallel is 2; 3 processes were launched.* Launch a multiple of 2 "
    ):
        distributed._sequence_group(0, 3, 2)
    config = AutoConfig.from_pretrained(TINY / "model")
    with pytest.raises(ValueError, match=r"is 3; the model has 4 attention heads.* Set it to 1, 2 or 4\."):
        check_heads(config, 3)


@pytest.mark.parametrize(("num_kv_heads", "size", "times"), [(2, 2, 1), (2, 4, 2), (2, 3, 3), (4, 6, 3), (4, 7, 7)])
def test_key_heads_are_repeated_until_they_can_be_shared_out(num_kv_heads: int, size: int, times: int):
    """Both divide the number of query heads, and so does what comes out."""
    assert repeats(num_kv_heads, size) == times


TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two processes over NCCL need two GPUs"),
]
ON_GPUS = ["bfloat16", "on GPUs"]


@pytest.mark.parametrize(
    "options",
    [["float32"], ["bfloat16"], ["float32", "teacher", "together"], pytest.param(ON_GPUS, marks=TWO_GPUS)],
    ids=" ".join,
)
def test_a_sharded_model_that_no_process_holds_whole_is_the_same(tmp_path: Path, options: list[str]):
    """Its own, unpacked pass in the model's precision and in float32, two updates, the reference or a teacher, what the tripwire
    finds, exported files; also where two processes run each pass together.

    On GPUs the copy has transformers' own kernels, and the model that is trained has fused ones.
    """
    dtype, has_other_kernels = options[0], options == ON_GPUS
    launch("worker_scattered.py", str(tmp_path), *options, processes=2)
    for rank in (0, 1):
        whole, scattered = read_json(tmp_path / f"numbers-{rank}.json").values()
        assert scattered.pop("held") < 0.51 * TINY_PARAMETERS < TINY_PARAMETERS < whole.pop("held")
        assert whole.pop("rounding") == pytest.approx(scattered.pop("rounding"), rel=2 if has_other_kernels else 1e-3)
        assert whole.pop("causes") == pytest.approx(scattered.pop("causes"), abs=1 if has_other_kernels else 0.02)
        assert whole == scattered
        whole, scattered = torch.load(tmp_path / f"said-{rank}.pt").values()
        assert whole.keys() == scattered.keys()
        assert len(whole) > 4 or rank == 1, "the main process has the weights"
        for name, value in whole.items():
            # a matrix product of other strides sums in another order
            tolerance = 0.0 if name.startswith("weight") else 1e-5 if dtype == "float32" or "float32" in name else 0.02
            tolerance *= 10 if has_other_kernels else 1
            torch.testing.assert_close(scattered[name], value, rtol=0, atol=tolerance, msg=name)
    assert steps_of(tmp_path / "Trainer") == steps_of(tmp_path / "ScatteredTrainer")
    one, other = (sorted((tmp_path / kind).rglob("hf/*")) for kind in ("Trainer", "ScatteredTrainer"))
    assert [path.name for path in one] == [path.name for path in other]
    assert "model.safetensors" in [path.name for path in one]
    for path, twin in zip(one, other, strict=True):
        assert path.read_bytes() == twin.read_bytes(), path.name
