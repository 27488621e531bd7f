"""Which rewards of a run decide what: which questions are solved, which groups have signal, and whether forms of answers tell."""

from __future__ import annotations

from collections.abc import Iterator

from grpo.config import Config
from grpo.config.sections import WatchdogConfig
from grpo.scoring.answers import can_say_right, verdict_name, verdicts_of
from grpo.scoring.reward import Reward
from grpo.text import answer_forms


def signal_from(config: Config, rewards: list[Reward]) -> tuple[list[str], list[str]]:
    """Names of the rewards by which questions count as solved, and of those by which dynamic sampling chooses groups."""
    wanted, names = config.rollout.signal_from, [reward.name for reward in rewards]
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"rollout.signal_from is {wanted!r}; the rewards of this run are {', '.join(names)}. Name one of them."
        )
    if wanted is not None:
        return [wanted], [wanted]
    named = verdicts_of(config.scoring.verdict, names)
    weighted = [reward.name for reward in rewards if reward.weight] or names
    decides = [name for name in named if name in weighted] or [verdict_name(weighted)]
    others = [name for name in can_say_right(weighted) if name not in decides]
    return decides if config.scoring.verdict is None else named, decides + others


def who_decides(config: Config, rewards: list[Reward], verdicts: list[str]) -> Iterator[str]:
    """What a user may take for otherwise.

    Args:
        verdicts: names of the rewards by which questions count as solved.
    """
    may, wanted = can_say_right(reward.name for reward in rewards), config.rollout.signal_from
    if config.scoring.verdict is None and len(may) > 1 and "accuracy" not in may:
        yield f"of {', '.join(may)} the reward {verdict_name(may)} says what is right. Set scoring.verdict to name another"
    if any(reward.only for reward in rewards if reward.name == wanted):
        yield (
            f"rollout.signal_from is {wanted!r}, which is asked about some questions only; dynamic sampling takes no others"
        )
    if config.rollout.passes_over:
        yield (
            f"the reward {' or '.join(verdicts)} decides which questions are solved or hopeless: 1 means right, a smaller value "
            "wrong"
        )


def forms_tell(config: Config, rewards: list[Reward]) -> bool:
    """Whether the forms of right answers tell something.

    Raises:
        ValueError: not, and the watchdog is to act on them.
    """
    verdicts = verdicts_of(config.scoring.verdict, [reward.name for reward in rewards])
    tell = all(answer_forms.tell_of(reward.function) for reward in rewards if reward.name in verdicts)
    action = config.watchdog.reward_hacking
    if not tell and action != WatchdogConfig.model_fields["reward_hacking"].default:
        raise ValueError(
            f"watchdog.reward_hacking is {action!r}; it has no effect where {' or '.join(verdicts)} says what is right: no form "
            "of its answers is odd. Remove it."
        )
    return tell
