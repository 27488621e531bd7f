"""The section `algorithm`: the objective and what is made of rewards; and what may not be combined in it."""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from grpo.algorithm.objective import AdvantageRule, EntropyControl, Objective
from grpo.config.sections import Section


class AlgorithmConfig(Section):
    """docs/algorithms.md has the settings of each published algorithm; loss.py the expression that they go into."""

    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is subtracted from a reward: its group's mean (GRPO), or the mean of the group's others (RLOO)."""
    normalize_by_std: bool | Literal["batch"] = True
    """Divide centred rewards by the group's standard deviation (GRPO). false: Dr. GRPO. batch: by that of all centred rewards of
    the batch, so that a group counts by how much its rewards differ (REINFORCE++)."""
    normalize_by_mean: bool = False
    """Divide centred rewards by the group's mean instead: of rewards that are 0 or 1 this is the gradient of the logarithm of the
    share of right answers, in which a hard question counts more (MaxRL). Rewards below 0 end the run."""
    pass_at: PositiveInt = 1
    """What counts is the best of so many completions (Pass@k training; with baseline leave_one_out PKPO). Raising it rewards what
    is seldom right, and leaves groups alone in which nearly all are."""
    separate_rewards: bool = False
    """Centre and divide each reward by itself before their weighted sum (GDPO, which has normalize_by_std batch besides)."""
    aggregation: Literal["sequence", "token", "constant"] = "sequence"
    """Weight of a token in the loss: 1/length (GRPO), 1/all tokens (DAPO), 1/max_completion_tokens (Dr. GRPO)."""
    filter_truncated: bool = False
    """Do not train on completions that were cut off, though they stay in their group's baseline (DAPO's overlong filtering)."""
    top_entropy: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each minibatch's tokens, those of highest entropy, whose surrogate counts (arXiv 2506.01939: 0.2). Below 1 it
    takes a forward pass before the update, also where every update is on-policy."""
    ratio: Literal["token", "sequence"] = "token"
    """Whether a token's ratio pi / pi_old is its own (GRPO), or the geometric mean of its completion's (GSPO)."""
    clip: Literal["surrogate", "weight", "soft", "divergence"] = "surrogate"
    """What the bounds below do. surrogate: a token beyond has no gradient (PPO, GRPO). weight: the ratio within its bounds
    weights the token's log-probability, which always has one (CISPO). soft: there are none; a gate closes as the ratio leaves 1
    (SAPO). divergence: they are of the token's probability, less what it was when it was drawn (DPPO)."""
    clip_low: PositiveFloat | None = 0.2
    """The ratio is clipped below at 1 - clip_low. null: it has no bound below."""
    clip_high: PositiveFloat | None = 0.2
    """The ratio is clipped above at 1 + clip_high. DAPO raises it to 0.28; DeepSeek-R1's first stage used 10. null: no bound."""
    clip_dual: Annotated[float, Field(gt=1)] | None = None
    """With a negative advantage, a token whose ratio is above this has no gradient (Dual-clip PPO: 3). null: no such bound."""
    soft_positive: PositiveFloat = 1.0
    """Temperature of the gate of clip soft, for positive advantages. Raising it closes the gate sooner."""
    soft_negative: PositiveFloat = 1.05
    """The same for negative advantages."""
    importance: Literal["none", "truncate", "mask"] = "none"
    """Weight each token's surrogate with pi_old / pi_rollout, where what samples is not quite what is trained: truncated to the
    bounds below (TIS), or 0 beyond them (IcePop)."""
    importance_level: Literal["token", "sequence", "geometric"] = "token"
    """Whether that weight is the token's own, or the product over its completion: unbiased, and far from 1 for long ones; or the
    geometric mean over it, which is neither."""
    importance_low: PositiveFloat | None = None
    """Lower bound of the importance weight (TIS: none; IcePop: 0.5)."""
    importance_high: PositiveFloat | None = None
    """Upper bound of the importance weight (TIS: 2; IcePop: 5)."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL penalty to the reference model (beta). 0: no reference model is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token KL estimator; see grpo/algorithm/loss.py. The paper's is k3."""
    kl_weighted: bool = False
    """Multiply the estimate by pi / pi_old: unbiased, with an unbiased gradient, where the policy has moved since it sampled
    (DeepSeek-V3.2)."""
    kl_in: Literal["loss", "reward"] = "loss"
    """loss: a term of its own for every token. reward: each completion's sum of k1 is subtracted from its reward, before the
    advantage."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of a bonus for the entropy of the next-token distribution, of every token. Raising it keeps the policy exploring;
    too much of it makes noise of the completions."""
    entropy_target: PositiveFloat | None = None
    """Entropy in nats (policy/entropy) below which the bonus grows: entropy_coef is then where its weight begins, and
    policy/entropy_coef what it is (Skywork-OR1: 0.2). null: the weight stays."""
    entropy_step: PositiveFloat = 0.0001
    """By how much entropy_target changes that weight after each training step. Raising it answers sooner, and overshoots more."""
    entropy_max: PositiveFloat = 0.005
    """Largest weight that entropy_target raises the bonus to. Raising it lets the bonus outweigh the rewards where the
    entropy stays below the target."""
    clip_cov: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each minibatch's tokens whose surrogate is left out because their covariance of log-probability and advantage is
    within the bounds below; chosen at random of these (Clip-Cov, arXiv 2505.22617: 0.0002). Such tokens take most of the entropy
    away. 0: none. Otherwise it takes a forward pass before the update, also where every update is on-policy."""
    clip_cov_low: float = 1.0
    """Least covariance of such a token."""
    clip_cov_high: float = 5.0
    """Largest covariance of such a token."""
    reference_refresh_steps: NonNegativeInt = 0
    """After every so many optimizer steps the reference becomes the current policy (the paper: 400). 0: it stays the starting
    model. Lowering it lets the policy move further from its start."""
    max_sampling_gap: PositiveFloat | None = None
    """Stop when sampled tokens' log-probabilities and the trainer's own of the same tokens differ by more than this, in nats on
    average: one of them is wrong. null: 0.001 in float32, and in bfloat16 0.04, or three times what rounding makes of this model
    if that is more, measured on the first rollout; with rollout.weights fp8 three times what 8 bits make of it, at most 0.6;
    divided by a temperature below 1. Raise it for an engine whose rounding is known to be coarser."""
    num_minibatches: PositiveInt = 1
    """Parts of a rollout that have an optimizer step each (the paper: 16). With 1 of them and of num_epochs every update is
    strictly on-policy."""
    num_epochs: PositiveInt = 1
    """Times that the minibatches of a rollout are trained on, in the same order (mu in DeepSeekMath's algorithm 1). Raising it
    makes more of a rollout, ever further off-policy."""

    @property
    def advantage_rule(self) -> AdvantageRule:
        """How advantages are made."""
        return AdvantageRule(**{field.name: getattr(self, field.name) for field in fields(AdvantageRule)})

    @property
    def objective(self) -> Objective:
        """What the loss is made of."""
        return Objective(**{field.name: getattr(self, field.name) for field in fields(Objective)})

    @property
    def updates_per_rollout(self) -> int:
        return self.num_minibatches * self.num_epochs

    @property
    def kl_in_loss(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "loss"

    @property
    def every_token_counts(self) -> bool:
        """Whether the update has a use for completions whose advantage is 0: a gradient, or their place among the entropies."""
        return self.kl_in_loss or self.has_entropy_bonus or self.selects

    @property
    def has_entropy_bonus(self) -> bool:
        """At some time of the run."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def selects(self) -> bool:
        """Whether the surrogate of some tokens is left out, for what all tokens of the minibatch are before the update."""
        return self.top_entropy < 1 or self.clip_cov > 0

    @property
    def entropy_control(self) -> EntropyControl | None:
        """What changes the weight of the entropy bonus; None: nothing does."""
        return (
            None
            if self.entropy_target is None
            else EntropyControl(self.entropy_target, self.entropy_step, self.entropy_max)
        )


def check_objective(algorithm: AlgorithmConfig) -> None:
    """Nothing in it contradicts the rest, or has no effect."""
    _check_advantage(algorithm)
    if algorithm.baseline == "leave_one_out" and algorithm.normalize_by_std:
        whose, same = (
            ("batch's", "of the baseline mean") if algorithm.normalize_by_std == "batch" else ("group's", "GRPO's")
        )
        why = f"divided by the {whose} standard deviation it would be the advantage {same} again, up to a constant"
        if algorithm.pass_at > 1:
            why = f"with algorithm.pass_at {algorithm.pass_at} its advantages are PKPO's, which are not divided by any deviation"
        raise ValueError(f"algorithm.baseline is 'leave_one_out'; {why}. Set algorithm.normalize_by_std to false.")
    if algorithm.clip == "weight" and algorithm.clip_low is None and algorithm.clip_high is None:
        raise ValueError(
            "algorithm.clip is 'weight'; without clip_low and clip_high there is no bound, and surrogate has the same gradient. "
            "Set algorithm.clip_high, or remove algorithm.clip."
        )
    if algorithm.clip == "divergence" and (algorithm.ratio == "sequence" or algorithm.importance != "none"):
        name = "ratio" if algorithm.ratio == "sequence" else "importance"
        raise ValueError(
            f"algorithm.clip is 'divergence'; its ratio is a token's, to the policy that drew it, and algorithm.{name} "
            f"{getattr(algorithm, name)} has no place beside it. Remove one of the two."
        )
    if algorithm.clip == "divergence" and algorithm.clip_low is None and algorithm.clip_high is None:
        raise ValueError(
            "algorithm.clip is 'divergence'; without clip_low and clip_high there is no bound. Set them, such as to 0.2, "
            "or remove algorithm.clip."
        )
    for name, clip in (("clip_dual", "surrogate"), ("soft_positive", "soft"), ("soft_negative", "soft")):
        if algorithm.clip != clip:
            why = f"it has no effect with algorithm.clip {algorithm.clip}. Set that to {clip}, or remove it."
            _refuse_idle(algorithm, [name], why)
    if algorithm.kl_coef == 0:
        why = "there is no KL, because algorithm.kl_coef is 0. Remove it, or set algorithm.kl_coef > 0."
        _refuse_idle(algorithm, ["kl_in", "kl_estimator", "kl_weighted"], why)
    if algorithm.kl_in == "reward" and algorithm.normalize_by_std:
        where = "batch whose groups are" if algorithm.normalize_by_std == "batch" else "group that is"
        raise ValueError(
            f"algorithm.kl_in is 'reward'; divided by the standard deviation the KL would be as large as any reward in every "
            f"{where} all right or all wrong, however small kl_coef is. Set algorithm.normalize_by_std to false."
        )
    if algorithm.kl_in == "reward" and algorithm.kl_weighted:
        raise ValueError(
            "algorithm.kl_weighted is true; in the reward the KL is taken before the policy moves. Remove it, or set "
            "algorithm.kl_in to loss."
        )
    if algorithm.kl_in == "reward" and algorithm.kl_estimator != "k1":
        raise ValueError(
            f"algorithm.kl_estimator is {algorithm.kl_estimator!r}; in the reward only k1 has the gradient of the KL. Set "
            "algorithm.kl_estimator to k1, or algorithm.kl_in to loss."
        )
    if algorithm.entropy_target is None:
        why = "it has no effect while algorithm.entropy_target is null. Set that, or remove it."
        _refuse_idle(algorithm, ["entropy_step", "entropy_max"], why)
    if algorithm.entropy_target is not None and algorithm.entropy_coef > algorithm.entropy_max:
        raise ValueError(
            f"algorithm.entropy_coef is {algorithm.entropy_coef:g}; with algorithm.entropy_target it is where the weight begins, "
            f"which is at most algorithm.entropy_max, {algorithm.entropy_max:g}. Lower the one or raise the other."
        )
    if algorithm.clip_cov == 0:
        why = "it has no effect while algorithm.clip_cov is 0. Set that, such as to 0.0002, or remove it."
        _refuse_idle(algorithm, ["clip_cov_low", "clip_cov_high"], why)
    if algorithm.clip_cov_low >= algorithm.clip_cov_high:
        raise ValueError(
            f"algorithm.clip_cov_low is {algorithm.clip_cov_low:g} and clip_cov_high {algorithm.clip_cov_high:g}; no covariance "
            "lies between them. Set clip_cov_low below clip_cov_high."
        )
    if algorithm.importance == "none":
        why = "it has no effect while algorithm.importance is none. Set that to truncate or mask, or remove it."
        _refuse_idle(algorithm, ["importance_level", "importance_low", "importance_high"], why)
    low, high = algorithm.importance_low or 0.0, algorithm.importance_high
    if algorithm.importance != "none" and (high is None or not low < 1 < high):
        raise ValueError(
            f"algorithm.importance_high is {high} and importance_low {low:g}; with algorithm.importance {algorithm.importance} "
            "they are bounds of a weight that is 1 where nothing is wrong, so 1 must lie between them. Set them, such as to 2 "
            "and null (TIS), or 5 and 0.5 (IcePop)."
        )


def _refuse_idle(algorithm: AlgorithmConfig, names: list[str], why: str) -> None:
    """Raises ValueError for one of these settings, which have no effect, that somebody has set."""
    for name in names:
        value = getattr(algorithm, name)
        if value != AlgorithmConfig.model_fields[name].default:
            raise ValueError(f"algorithm.{name} is {value!r}; {why}")


def _check_advantage(algorithm: AlgorithmConfig) -> None:
    """What is made of rewards in another way than GRPO's goes together."""
    if algorithm.separate_rewards and not algorithm.normalize_by_std:
        raise ValueError(
            "algorithm.separate_rewards is true; without division the sum of centred rewards is the centred sum, so it has no "
            "effect. Set algorithm.normalize_by_std to batch (GDPO) or true, or remove it."
        )
    if algorithm.normalize_by_mean and algorithm.normalize_by_std:
        raise ValueError(
            f"algorithm.normalize_by_mean is true and normalize_by_std {algorithm.normalize_by_std}; centred rewards are divided "
            "by one of the two. Set algorithm.normalize_by_std to false."
        )
    kinds = {
        "separate_rewards": algorithm.separate_rewards,
        "normalize_by_mean": algorithm.normalize_by_mean,
        "pass_at": algorithm.pass_at if algorithm.pass_at > 1 else None,
        "kl_in": "reward" if algorithm.kl_in == "reward" else None,
    }
    others = [f"algorithm.{name} is {value}" for name, value in kinds.items() if value]
    if len(others) > 1:
        raise ValueError(f"{' and '.join(others)}; there is no advantage that is both. Remove one of the two.")
    if algorithm.baseline == "leave_one_out" and (algorithm.separate_rewards or algorithm.normalize_by_mean):
        name = "separate_rewards" if algorithm.separate_rewards else "normalize_by_mean"
        raise ValueError(f"algorithm.{name} is true; it subtracts the mean. Set algorithm.baseline to mean.")
