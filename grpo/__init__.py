"""GRPO with verifiable rewards, and supervised training: `from grpo import Trainer, SupervisedTrainer, Reward, Callback`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo.algorithm.own_loss import LossInputs
    from grpo.config import Config, SupervisedConfig
    from grpo.scoring.reward import Reward
    from grpo.sft.trainer import SupervisedTrainer
    from grpo.trainer import Trainer
    from grpo.training.callback import Callback

__all__ = ["Callback", "Config", "LossInputs", "Reward", "SupervisedConfig", "SupervisedTrainer", "Trainer"]

_HOMES = {
    "Callback": "grpo.training.callback",
    "Config": "grpo.config",
    "LossInputs": "grpo.algorithm.own_loss",
    "Reward": "grpo.scoring.reward",
    "SupervisedConfig": "grpo.config",
    "SupervisedTrainer": "grpo.sft.trainer",
    "Trainer": "grpo.trainer",
}


# grpo.rewards is a subpackage in a wheel. In a checkout its folder, rewards/, lies beside this one.
if not Path(__file__).with_name("rewards").is_dir():
    __path__.append(str(Path(__file__).resolve().parents[1]))


def __getattr__(name: str) -> Any:
    """Import on first use: a reward worker imports this package and must not wait for torch."""
    if name not in _HOMES:
        from grpo.config.elsewhere import CLASSES

        if name in CLASSES:  # no AttributeError, of which `from grpo import ...` says no word
            raise ImportError(f"{name} is a class of TRL; here it is {CLASSES[name]}.")
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    import warnings
    from importlib import import_module

    warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, in a notebook without ipywidgets
    return getattr(import_module(_HOMES[name]), name)
