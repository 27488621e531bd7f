import pytest

from grpo.config import OptimizerConfig
from grpo.schedule import learning_rate


def rates(num_steps: int, **settings) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [learning_rate(config, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_warm_up_rises_linearly_to_the_peak_and_stays():
    assert rates(5, warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_linear_and_cosine_fall_from_the_peak_towards_zero():
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_rate_never_falls_below_zero_nor_rises_again(schedule: str):
    config = OptimizerConfig(learning_rate=1.0, schedule=schedule)
    assert learning_rate(config, step=9, num_steps=4) == pytest.approx(0.0)


def test_decay_starts_after_warm_up():
    assert rates(6, schedule="linear", warmup_steps=2) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
