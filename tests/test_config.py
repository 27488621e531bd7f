import re
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, tiny_config, tiny_settings, troubled

from grpo import Trainer
from grpo.cli.settings import meanings_of
from grpo.config import Config, RewardConfig, ScheduleConfig, Section, SupervisedConfig, read_yaml, setting_names
from grpo.types import Sampling

SECTIONS = {name: getattr(field.annotation, "__name__", "") for name, field in Config.model_fields.items()}
SECTIONS["rewards"] = RewardConfig.__name__
SECTIONS["schedules"] = ScheduleConfig.__name__
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.name != "stages.yaml"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path):
    settings = read_yaml(path.read_text())
    if "training" in settings:
        assert SupervisedConfig.load(path).training.epochs > 0
    elif "run" not in settings:  # questions for grpo reject
        assert Config.load_questions(path).rewards
    else:
        assert Config.load(path).optimizer_steps > 0


def test_a_configuration_of_questions_needs_no_run_and_a_training_run_does(tmp_path: Path):
    path = tmp_path / "questions.yaml"
    path.write_text("model: {name: x}\nrollout: {temperature: 0.7}\noptimizer: {warmup_steps: 500}\n")
    with pytest.raises(ValueError, match=r"^run is missing; it has no default\. Set run\.$"):
        Config.load(path)
    assert Config.load_questions(path).rollout.temperature == 0.7
    assert Config.load_questions(path, ["run.seed=3"]).run.seed == 3
    path.write_text("model: {name: x}\nrun: {dir: x, steps: 1}\n")
    assert Config.load_questions(path) == Config.load(path)
    for text, said in (("run: {stepz: 1}", r"^run\.stepz is not a setting"), ("run: 3", "^run is 3; it is a mapping")):
        path.write_text(f"model: {{name: x}}\n{text}\n")
        with pytest.raises(ValueError, match=said):
            Config.load_questions(path)


def test_there_are_configurations_to_load():
    assert {"quickstart.yaml", "qwen1.5b.yaml"} <= {path.name for path in CONFIGS}


def test_every_setting_is_read_in_some_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Short runs with everything switched on, watched: whatever nobody looks at has no effect."""
    read = set()

    def watched(section: Section, name: str) -> object:
        read.add((type(section).__name__, name))
        return object.__getattribute__(section, name)

    hub = [{"question": f"What is {i}+1?", "answer": str(i + 1)} for i in range(8)]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: hub)
    everything = {
        "preflight": {"num_questions": 2, "on_failure": "warn"},
        "evaluation": {"num_questions": 2},
        "logging": {"wandb": "offline"},
        "run": {"steps": 2, "push_to_hub": "me/model"},  # offline: it is said, and that is all
    }
    everything["checkpoint"] = {"every_steps": 1, "keep": 1}
    configs = [
        tiny_config(
            tmp_path / "a",
            **everything,
            model={"name": str(ROOT / "configs/quickstart-tools/model")},
            data={"name": None, "template": "none", "question_template": "User: {question}\nAssistant:"},
            rollout={"max_completion_tokens": 48},
            tools={"functions": ["calculator"]},
            environment={
                "function": "guess_number",
                "rows": {"size": 8},
                "reply_template": "\nUser: {text}\nAssistant:",
            },
            algorithm={"kl_coef": 0.1},
        ),
        tiny_config(
            tmp_path / "b",
            **everything,
            data={"name": "some/set", "eval_name": "another/set"},
            rollout={"engine": "native"},
            lora={"rank": 2},
            schedules={"rollout.temperature": {"points": {0: 1, 1: 0.9}}},
        ),
    ]
    monkeypatch.setattr(Section, "__getattribute__", watched, raising=False)
    for config in configs:
        Trainer(config).train()
    troubled(tmp_path / "c", first_bad=4, times=1).train()
    names = [
        name.split(".") for name in setting_names() if not name.startswith("vllm.")
    ]  # tests/test_vllm.py watches those
    assert [f"{section}.{name}" for section, name in names if (SECTIONS[section], name) not in read] == []


def test_an_evaluation_ends_answers_where_rollouts_do_and_draws_as_its_own_section_says(tmp_path: Path):
    rollout = {"temperature": 0.8, "top_k": 9, "top_p": 0.7, "min_p": 0.1, "stop": ["</answer>"]}
    config = tiny_config(tmp_path, rollout=rollout, evaluation={"temperature": 0.6, "top_p": 0.95})
    assert config.sampling == Sampling(24, temperature=0.8, top_k=9, top_p=0.7, min_p=0.1, stop=("</answer>",))
    assert config.eval_sampling == Sampling(24, temperature=0.6, top_p=0.95, stop=("</answer>",))


def test_every_setting_says_what_it_means():
    for section in Config.model_fields.values():
        if model_fields := getattr(section.annotation, "model_fields", {}):
            without = model_fields.keys() - meanings_of(section.annotation).keys()
            assert not without, f"{section.annotation.__name__}: {without} have no line beneath them"


def messages(tmp_path: Path, **sections) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        tiny_config(tmp_path, **sections)
    return str(caught.value)


def test_an_unknown_setting_names_the_nearest_one(tmp_path: Path):
    assert messages(tmp_path, rollout={"group_sise": 8}) == (
        "rollout.group_sise is not a setting. Did you mean rollout.group_size?"
    )


def test_an_unknown_section_names_the_nearest_one(tmp_path: Path):
    assert messages(tmp_path, algoritm={"kl_coef": 0}) == "algoritm is not a setting. Did you mean algorithm?"


def test_a_setting_in_the_wrong_section_names_the_right_one(tmp_path: Path):
    assert messages(tmp_path, rollout={"kl_coef": 0}) == (
        "rollout.kl_coef is not a setting. Did you mean algorithm.kl_coef?"
    )


@pytest.mark.parametrize("setting", ["algorithm.kl_coef", "run.steps", "rewards.0.weight", "memory.kv_cache_gib"])
def test_true_is_no_number(setting: str):
    with pytest.raises(
        ValueError, match=rf"^{setting} is True; it takes a number, not true or false\. Correct {setting}\."
    ):
        Config.load("quickstart", [f"{setting}=true"])


def test_true_is_what_it_says_where_a_number_is_no_other_way_to_say_it():
    told = Config.load("quickstart", ["algorithm.normalize_by_std=false", "checkpoint.background=true"])
    assert (told.algorithm.normalize_by_std, told.checkpoint.background) == (False, True)


def test_every_unknown_name_is_told_and_those_of_sections_that_others_have():
    theirs = ["actor_rollout_ref.actor.optim.lr=1e-6", "actor_rollout_ref.rollout.n=8", "actor_rollout_ref.other.x=1"]
    with pytest.raises(ValueError, match=r".") as caught:
        Config.load("quickstart", [*theirs, "bf16=true", "run.stepz=3", "critic.strategy=fsdp"])
    of_others = "That is a name of TRL or verl; here it is"
    lines = str(caught.value).splitlines()
    assert sorted(lines)[0:2] == [
        f"actor_rollout_ref.actor.optim.lr is not a setting here. {of_others} optimizer.learning_rate.",
        f"actor_rollout_ref.rollout.n is not a setting here. {of_others} rollout.group_size.",
    ]
    assert any(line.startswith(f"bf16 is not a setting here. {of_others} model.dtype") for line in lines)
    assert "run.stepz is not a setting. Did you mean run.steps?" in lines
    assert any(line.startswith("critic is not a setting. Known here: model, ") for line in lines)
    assert len(lines) == 5


@pytest.mark.parametrize("value", ["rollout.temperature=1", "rollout={temperature: {points: {0: 1}}}"])
def test_a_schedule_in_sections_is_told_how_it_is_written(value: str):
    with pytest.raises(
        ValueError, match=r"^schedules\.rollout is .*Write \{rollout\.temperature: \{points: "
    ) as caught:
        Config.load("quickstart", [f"schedules.{value}"])
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_reward_setting_names_the_nearest_one(tmp_path: Path):
    assert messages(tmp_path, rewards=[{"function": "accuracy", "wieght": 2}]) == (
        "rewards.0.wieght is not a setting. Did you mean rewards.0.weight?"
    )


def test_a_missing_setting_is_named(tmp_path: Path):
    settings = tiny_settings(tmp_path)
    del settings["run"]["steps"]
    with pytest.raises(ValueError, match=re.escape("run.steps is missing; it has no default. Set run.steps.")):
        Config(**settings)


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"rollout": {"group_size": 1}}, ["rollout.group_size is 1", "at least 2", "Set rollout.group_size >= 2"]),
        ({"rollout": {"num_prompts": "many"}}, ["rollout.num_prompts is 'many'", "valid integer"]),
        ({"rollout": {"temperature": 0}}, ["rollout.temperature is 0", "greater than 0"]),
        ({"rollout": {"stop": ["a", ""]}}, ['rollout.stop holds ""', "Remove it"]),
        (
            {"data": {"name": "reasoning_gym:chain_sum", "split": "test"}},
            ["data.split is 'test'", "no effect on reasoning_gym:chain_sum", "Remove it"],
        ),
        (
            {"data": {"name": "reasoning_gym:chain_sum", "eval_split": "validation"}},
            ["data.eval_split is 'validation'", "no effect"],
        ),
        (
            {"data": {"name": "reasoning_gym:chain_sum", "args": {"seed": None}}},
            ["data.args.seed is None", "a whole number of at least 0", "Correct it"],
        ),
        ({"rollout": {"top_p": 0}}, ["rollout.top_p is 0", "greater than 0"]),
        ({"evaluation": {"top_p": 0.95}}, ["evaluation.top_p is 0.95", "no effect", "set evaluation.temperature"]),
        ({"rollout": {"engine": "vlm"}}, ["rollout.engine is 'vlm'", "'auto', 'native', 'hf' or 'vllm'"]),
        ({"algorithm": {"num_minibatches": 3}}, ["algorithm.num_minibatches is 3", "rollout.num_prompts"]),
        (
            {"algorithm": {"reference_refresh_steps": 3, "num_minibatches": 2, "kl_coef": 1}},
            ["algorithm.reference_refresh_steps is 3", "2 optimizer steps", "a multiple"],
        ),
        (
            {"algorithm": {"reference_refresh_steps": 2, "num_minibatches": 2, "num_epochs": 3, "kl_coef": 1}},
            ["algorithm.reference_refresh_steps is 2", "6 optimizer steps", "a multiple"],
        ),
        ({"algorithm": {"baseline": "leave_one_out"}}, ["baseline is 'leave_one_out'", "normalize_by_std to false"]),
        (
            {"algorithm": {"baseline": "leave_one_out", "normalize_by_std": "batch"}},
            ["the batch's", "of the baseline mean again"],
        ),
        ({"algorithm": {"baseline": "leave_one_out", "pass_at": 2}}, ["pass_at 2", "PKPO's, which are not divided"]),
        (
            {"algorithm": {"normalize_by_std": "Batch"}},
            ["by_std is 'Batch'; it may be true or false. Correct algorithm.normalize_by_std.", "may be batch"],
        ),
        (
            {"checkpoint": {"background": "Auto"}},
            [
                "checkpoint.background is 'Auto'; it may be auto.",
                "it may be true or false. Correct checkpoint.background.",
            ],
        ),
        ({"algorithm": {"entropy_step": 0.1}}, ["entropy_step is 0.1", "entropy_target is null"]),
        ({"algorithm": {"entropy_max": 0.1}}, ["entropy_max is 0.1", "entropy_target is null"]),
        ({"algorithm": {"entropy_coef": 0.1, "entropy_target": 0.2}}, ["entropy_coef is 0.1", "entropy_max, 0.005"]),
        ({"algorithm": {"clip_cov_low": 0.5}}, ["clip_cov_low is 0.5", "clip_cov is 0"]),
        (
            {"algorithm": {"clip_cov": 0.1, "clip_cov_low": 6}},
            ["clip_cov_low is 6", "clip_cov_low below clip_cov_high"],
        ),
        ({"data": {"order_epochs": 2}}, ["order_epochs is 2", "order_by is null"]),
        (
            {"data": {"order_by": "level", "name": [{"name": "a", "weight": 1}, {"name": "b", "weight": 2}]}},
            ["order_by is 'level'", "has weights"],
        ),
        ({"algorithm": {"pass_at": 4}}, ["pass_at is 4", "has 4 completions", "to at most 3"]),
        ({"algorithm": {"normalize_by_mean": True}}, ["normalize_by_mean is true", "normalize_by_std to false"]),
        (
            {"algorithm": {"separate_rewards": True, "normalize_by_std": False}},
            ["separate_rewards is true", "to batch"],
        ),
        (
            {"algorithm": {"separate_rewards": True, "pass_at": 2}},
            ["separate_rewards is True and algorithm.pass_at is 2", "Remove one of the two"],
        ),
        (
            {"algorithm": {"normalize_by_mean": True, "normalize_by_std": False, "baseline": "leave_one_out"}},
            ["normalize_by_mean is true", "baseline to mean"],
        ),
        (
            {"algorithm": {"clip": "weight", "clip_low": None, "clip_high": None}},
            ["algorithm.clip is 'weight'", "no bound", "Set algorithm.clip_high"],
        ),
        ({"algorithm": {"kl_in": "reward"}}, ["algorithm.kl_in is 'reward'", "kl_coef is 0", "kl_coef > 0"]),
        ({"algorithm": {"kl_estimator": "k2"}}, ["algorithm.kl_estimator is 'k2'", "kl_coef is 0", "kl_coef > 0"]),
        (
            {"algorithm": {"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1"}},
            ["algorithm.kl_in is 'reward'", "as large as any reward", "Set algorithm.normalize_by_std to false"],
        ),
        (
            {"algorithm": {"kl_in": "reward", "kl_coef": 0.1, "kl_estimator": "k1", "normalize_by_std": "batch"}},
            ["algorithm.kl_in is 'reward'", "every batch whose groups are all right", "normalize_by_std to false"],
        ),
        (
            {"algorithm": {"kl_in": "reward", "kl_coef": 0.1, "normalize_by_std": False}},
            ["algorithm.kl_estimator is 'k3'", "only k1", "Set algorithm.kl_estimator to k1"],
        ),
        ({"algorithm": {"importance_high": 2}}, ["importance_high is 2", "no effect", "truncate or mask"]),
        (
            {"algorithm": {"clip_dual": 3.0, "clip": "weight"}},
            ["clip_dual is 3.0", "no effect with algorithm.clip weight"],
        ),
        ({"algorithm": {"soft_negative": 2.0}}, ["soft_negative is 2.0", "that to soft"]),
        (
            {"algorithm": {"clip": "divergence", "ratio": "sequence"}},
            ["clip is 'divergence'", "algorithm.ratio sequence"],
        ),
        (
            {"algorithm": {"clip": "divergence", "clip_low": None, "clip_high": None}},
            ["clip is 'divergence'", "there is no bound"],
        ),
        ({"algorithm": {"kl_weighted": True, "kl_coef": 0.0}}, ["kl_weighted is True", "there is no KL"]),
        ({"algorithm": {"importance_level": "sequence"}}, ["importance_level is 'sequence'", "no effect"]),
        ({"algorithm": {"importance": "mask"}}, ["importance_high is None", "between them", "2 and null (TIS)"]),
        (
            {"algorithm": {"importance": "mask", "importance_low": 3, "importance_high": 2}},
            ["importance_high is 2", "importance_low 3", "between them"],
        ),
        (
            {"algorithm": {"importance": "truncate", "importance_high": 0.28}},
            ["importance_high is 0.28", "weight that is 1"],
        ),
        ({"algorithm": {"top_entropy": 0}}, ["algorithm.top_entropy is 0", "greater than 0"]),
        ({"algorithm": {"reference_refresh_steps": 4}}, ["reference_refresh_steps is 4", "algorithm.kl_coef > 0"]),
        ({"algorithm": {"aggregation": "mean"}}, ["algorithm.aggregation is 'mean'", "'sequence', 'token'"]),
        ({"memory": {"micro_batch_tokens": 100}}, ["memory.micro_batch_tokens is 100", ">= 120"]),
        ({"optimizer": {"warmup_steps": 9}}, ["optimizer.warmup_steps is 9", "2 optimizer steps"]),
        (
            {"data": {"question_template": "always the same"}},
            ["data.question_template is 'always", "no column", "Name one"],
        ),
        ({"data": {"eval_answer_column": "a"}}, ["data.eval_answer_column is 'a'", "belongs to data.eval_name"]),
        (
            {"data": {"eval_name": "x", "eval_question_template": "always the same"}},
            ["data.eval_question_template is 'always", "no column", "Name one"],
        ),
        (
            {"data": {"question_template": "{nums}?", "question_column": "problem"}},
            ["data.question_column is 'problem'", "no effect", "Write {problem} there"],
        ),
        ({"data": {"template": "none", "system_prompt": "x"}}, ["data.system_prompt is 'x'", "template is 'none'"]),
        ({"data": {"template": "none", "chat_template": "x"}}, ["data.chat_template is 'x'", "template is 'none'"]),
        (
            {"data": {"template": "none", "chat_template_kwargs": {"a": 1}}},
            ["data.chat_template_kwargs is {'a': 1}", "template is 'none'"],
        ),
        (
            {"model": {"resize_embeddings": True}, "rollout": {"engine": "vllm"}},
            ["model.resize_embeddings is true", "Set rollout.engine to auto"],
        ),
        ({"distributed": {"zero_stage": 4}}, ["distributed.zero_stage is 4", "0, 1, 2 or 3"]),
        (
            {"distributed": {"offload_optimizer": True}},
            ["distributed.offload_optimizer is true", "distributed.zero_stage is 0", "to 1 or higher"],
        ),
        (
            {"distributed": {"offload_parameters": True, "zero_stage": 2}},
            ["distributed.offload_parameters is true", "distributed.zero_stage is 2", "to 3, or"],
        ),
        ({"lora": {"alpha": 16}}, ["lora.alpha is 16.0", "no effect", "Set lora.rank"]),
        ({"lora": {"target_modules": ["q_proj"]}}, ["lora.target_modules is ['q_proj']", "no effect"]),
        ({"lora": {"rank": 4, "target_modules": []}}, ["lora.target_modules is []", "nothing would be trained"]),
        (
            {"preflight": {"on_failure": "warn"}},
            ["preflight.on_failure is 'warn'", "no effect", "preflight.num_questions"],
        ),
        ({"rewards": [{"function": "format", "weight": 0}]}, ["rewards is ['format']", "weight other than 0"]),
    ],
    ids=lambda value: (
        ".".join(f"{s}.{next(iter(v))}" for s, v in value.items() if isinstance(v, dict))
        if isinstance(value, dict)
        else ""
    ),
)
def test_a_bad_value_is_refused_with_setting_value_rule_and_remedy(tmp_path: Path, sections: dict, parts: list[str]):
    message = messages(tmp_path, **sections)
    for part in parts:
        assert part in message


def test_fewer_prompts_than_processes_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape("rollout.num_prompts is 4; each of the 8 processes")):
        tiny_config(tmp_path).check_world_size(8)


def test_overrides_are_read_as_yaml_and_reach_into_lists(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text(tiny_config(tmp_path, rewards=[{"function": "accuracy"}]).to_yaml())
    overrides = ["rollout.group_size=8", "rewards.0.weight=0.5", "optimizer.learning_rate=1e-5", "model.name=/a b"]
    config = Config.load(path, [*overrides, "data.answer_regex=null", "scoring.num_workers=3"])
    assert config.rollout.group_size == 8
    assert config.rewards[0].weight == 0.5
    assert config.optimizer.learning_rate == 1e-5
    assert config.model.name == "/a b"
    assert config.scoring.num_workers == 3
    # YAML would take this pattern for a comment
    assert Config.load(path, [r"data.answer_regex=####\s*(.+)"]).data.answer_regex == r"####\s*(.+)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.group_size", "section.setting=value"),
        ("rollout.size=3", "rollout.size is not a setting"),
        ("rewards.7.weight=1", "'7' is no entry of a list of 2; entries are numbered from 0"),
        ("run.steps.x=1", "there is no 'x' to set in 2"),
        ("model.name=[", "'[' is not valid YAML"),
        ("data.answer_regex=(", "data.answer_regex is '('; it is not a regular expression"),
        ("data.answer_regex=x", "data.answer_regex is 'x'; its first group is the answer, and it has none"),
        ("data.eval_subset=main", "it belongs to data.eval_name, which is missing"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, message: str):
    path = tmp_path / "c.yaml"
    path.write_text(tiny_config(tmp_path).to_yaml())
    with pytest.raises(ValueError, match=re.escape(message)):
        Config.load(path, [override])


def test_a_key_given_twice_is_refused(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("run: {dir: a, steps: 1}\nrun: {dir: b, steps: 2}\n")
    with pytest.raises(ValueError, match=rf"key 'run' is given twice, the second time in line 2 of {path}\. Keep one"):
        Config.load(path)


def test_a_file_that_is_missing_or_no_text_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no such file"):
        Config.load(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("run: {dir: é}".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"^--config is .*latin.yaml'; the file cannot be read: .* Save it as UTF-8\.$"
    ):
        Config.load(tmp_path / "latin.yaml")


def test_the_saved_configuration_loads_as_the_same_one(tmp_path: Path):
    config = tiny_config(tmp_path, rewards=[{"function": "overlong", "args": {"buffer": 4}}])
    path = tmp_path / "c.yaml"
    path.write_text(config.to_yaml())
    assert Config.load(path) == config


def test_derived_numbers(tmp_path: Path):
    config = tiny_config(
        tmp_path,
        rollout={"num_prompts": 512, "group_size": 16},
        algorithm={"num_minibatches": 16, "kl_coef": 0.001, "reference_refresh_steps": 400},
        run={"steps": 650},
    )  # DeepSeek-R1-Zero: 8,192 completions a rollout, 16 minibatches of 32 x 16, 10,400 optimizer steps
    assert config.completions_per_step == 8192
    assert config.prompts_per_minibatch == 32
    assert config.optimizer_steps == 10_400
    summary = config.summary(num_rows=166_400, world_size=8)
    assert "332,800 = 2.00 epochs" in summary
    assert "reference refreshes    26, every 400 optimizer steps" in summary


def test_settings_of_the_ratio_are_said_to_have_no_effect_where_it_is_1(tmp_path: Path):
    algorithm = {"ratio": "sequence", "clip_high": 4e-4, "num_minibatches": 1}
    said = "no effect: algorithm.ratio, algorithm.clip_high"
    assert said in tiny_config(tmp_path, algorithm=algorithm).summary(num_rows=100, world_size=1)
    for more in ({"num_minibatches": 2}, {"num_epochs": 2}):
        config = tiny_config(tmp_path, algorithm={**algorithm, **more})
        assert "no effect" not in config.summary(num_rows=100, world_size=1)
        assert config.optimizer_steps == 4


@pytest.mark.parametrize(
    ("rank", "optimizer", "said"),
    [
        (8, {"learning_rate": 1e-6}, True),
        (8, {"learning_rate": 9.9e-6}, True),
        (8, {"learning_rate": 1e-5}, False),
        (0, {"learning_rate": 1e-6}, False),
    ],
)
def test_a_learning_rate_that_is_too_low_for_adapters_is_said_at_the_start(
    tmp_path: Path, rank: int, optimizer: dict[str, float], said: bool
):
    summary = tiny_config(tmp_path, lora={"rank": rank}, optimizer=optimizer).summary(num_rows=100, world_size=1)
    assert (f"{optimizer['learning_rate']:g}, low for adapters (lora.rank {rank}): in bfloat16 most" in summary) == said
    assert ("set optimizer.learning_rate >= 1e-05" in summary) == said


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e-3", 0.001),
        ("5E+2", 500.0),
        ("-.5", -0.5),
        ("2.", 2.0),
        ("1_000", 1000),
        ("010", 10),
        ("0x10", 16),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1e-3x", "1e-3x"),
        ("'1e-3'", "1e-3"),
        ("1.2.3", "1.2.3"),
    ],
)
def test_numbers_of_a_yaml_are_what_one_means_by_them(tmp_path: Path, written: str, meant: object):
    path = tmp_path / "own.yaml"
    settings = tiny_settings(tmp_path, rewards=[{"function": "accuracy", "args": {"x": 0}}])
    text = yaml.safe_dump(settings).replace("x: 0", f"x: {written}")
    path.write_text(text)
    config = Config.load(path)
    assert config.rewards[0].args["x"] == meant
    assert type(config.rewards[0].args["x"]) is type(meant)
    assert Config(**read_yaml(config.to_yaml())) == config
    if isinstance(meant, (int, float)):
        path.write_text(yaml.safe_dump(settings))
        assert Config.load(path, [f"rewards.0.args.x={written}"]).rewards[0].args["x"] == meant


def test_null_on_the_command_line_takes_back_what_a_file_says_of_a_setting_that_cannot_be_null():
    config = SupervisedConfig.load("sft-quickstart", ["training.epochs=null", "run.steps=10"])
    assert (config.run.steps, "epochs" in config.training.model_fields_set) == (10, False)
    assert Config.load("quickstart-game", ["environment.rows=null"]).environment.rows == {}
    assert Config.load("quickstart", ["algorithm.clip_high=null"]).algorithm.clip_high is None, "which can be null"
    with pytest.raises(ValueError, match=r"training\.epochs=null takes back what the file says"):
        SupervisedConfig.load("sft-quickstart", ["run.steps=10"])
