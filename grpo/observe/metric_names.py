"""Every metric's name and formula, and which names a reward cannot have.

docs/metrics.md shows METRICS as a table; a test keeps the two the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

LOSS = "supervised/loss"

METRICS = {
    "reward/mean": "mean of the weighted reward over all of the step's sampled completions whose reward is known",
    "reward/std": "standard deviation of the same rewards over the step",
    "reward/<function>": "mean of that function's unweighted value over the sampled completions it gave a verdict on",
    "reward/unknown": 'share of completions whose reward is unknown ("can\'t tell"); they are not trained on',
    "logged/<name>": "mean of the numbers that reward functions gave to log_metric under that name in the step",
    "group/with_signal": "share of the sampled groups whose known rewards are not all equal; others do nothing in the surrogate "
    "(with algorithm.pass_at, nor do those with too few wrong answers)",
    "group/passed_over": "turns passed over in the step, of solved or hopeless questions and of those it had asked "
    "already; this only with rollout.solved_share or hopeless_share below 1",
    "group/sampled": "groups that were sampled; this and the next six only with rollout.max_oversampling above 1",
    "group/replaced": "of them, those with no signal in rollout.signal_from that are not in the batch",
    "group/surplus": "of them, those with that signal that the batch had no room for",
    "completion/dropped_tokens": "completion tokens of the replaced and the surplus groups, which nothing is trained on",
    "rollout/draws": "times that the step sampled before its batch was full, or rollout.max_oversampling was reached",
    "batch/with_signal": "share of the groups of the batch that have that signal; below 1 the limit came before it was full",
    "batch/reward_mean": "mean reward over the batch, which is a choice; how good the policy is, reward/mean says",
    "completion/length_mean": "mean number of tokens of completions that the model wrote, the end-of-sequence token included",
    "completion/length_max": "largest number of completion tokens",
    "completion/truncated": "share of completions cut off at rollout.max_completion_tokens",
    "completion/repetition": "share of the runs of 8 tokens in completions that the same completion had before",
    "completion/length_<kind>": "the mean over completions that ended by themselves and are `right`, or `wrong`",
    "verdict/right": "share of completions with a verdict that are right; where scoring.verdict names several",
    "outcome/right": "share of completions that ended by themselves and are right; all `outcome/...` add up to 1",
    "outcome/right_first": "share that are right at the first trial, by the reward `countdown_trials`; they are not in "
    "outcome/right. This and the next only with that reward",
    "outcome/right_later": "share that are right after several trials, by the same",
    "outcome/wrong": "share that ended by themselves and are wrong",
    "outcome/truncated": "share that were cut off at rollout.max_completion_tokens; they are neither right nor wrong here",
    "outcome/unknown": "share that ended by themselves and have no verdict",
    "answer/judged": "share of completions that have a verdict, and whose question has a gold answer in words or signs; this and "
    "the next two not for `code`, `countdown` and `reasoning_gym`",
    "answer/right": "share of these completions that are right",
    "answer/<form>": "share of these right completions whose answer has a form of answer_forms.py: `arithmetic`, `several`, ...",
    "completion/other_script": "mean over completions of the share of their words in another script than the question's",
    "language/consistency": "mean over completions of the share of the thought's words that are in the question's script",
    "language/consistency/<question_kind>": "the same over questions of a kind (data.kind_column)",
    "language/mixed": "share of completions, of those with words, that have words of another script and not of the question",
    "language/mixed/<question_kind>": "the same over questions of a kind",
    "aha/<list>": "mean number of words of that list (aha.py) in a completion; those that the question has too do not count",
    "aha/<list>_per_1k": "such words per 1,000 tokens: 1000 * their number / number of tokens, of all completions together",
    "aha/<list>_share": "share of completions with at least one such word",
    "aha/<list>_per_1k_<kind>": "that rate of `right` or `wrong` completions that ended by themselves, and of `truncated` ones",
    "aha/<list>_share_<kind>": "that share of the same",
    "policy/entropy": "mean over trained tokens of the entropy of the policy's next-token distribution, in nats",
    "policy/entropy_coef": "weight of the entropy bonus in the step; with algorithm.entropy_target",
    "policy/kl": "mean over trained tokens of the KL estimator between policy and reference; in the reward, before the update",
    "policy/ratio_mean": "mean over trained tokens of pi / pi_old, or of their completion's; 1 when every update is on-policy",
    "policy/ratio_max": "largest of these ratios",
    "policy/clip_fraction": "share of trained tokens whose surrogate (or, with algorithm.clip weight, ratio) is at a bound",
    "policy/clip_fraction_low": "the same at 1 - algorithm.clip_low",
    "policy/clip_fraction_high": "the same at 1 + algorithm.clip_high",
    "policy/importance_mean": "mean over trained tokens of pi_old / pi_rollout (or of their completion's) before its bounds",
    "policy/importance_max": "largest of these weights",
    "policy/importance_bounded": "share of trained tokens whose weight was beyond a bound, and was truncated or masked",
    "policy/selected": "share of trained tokens whose surrogate counts: not left out by algorithm.top_entropy or clip_cov",
    "policy/kl_penalty": "mean over the batch's completions of what the KL takes from their reward, with algorithm.kl_in reward",
    "policy/sampling_gap": "mean over trained tokens that this step's weights drew of |log-probability in the trainer - when "
    "sampled|, before an update",
    "policy/sampling_gap_max": "largest of these gaps",
    LOSS: "mean over the step's trained tokens of the rows of -log p(token), in nats, before the update",
    "supervised/accuracy": "share of these tokens that the model found likeliest, given what comes before them in the row",
    "supervised/tokens": "trained tokens of the step",
    "supervised/rows": "rows of the step",
    "supervised/held_out_loss": "the loss of the rows that were set aside, over all their trained tokens",
    "supervised/held_out_accuracy": "the accuracy of the same",
    "optimizer/loss": "mean over the step's optimizer steps of the loss, with what it has of KL and entropy, over all processes",
    "optimizer/grad_norm": "mean over the step's optimizer steps of the gradient's global L2 norm before clipping",
    "optimizer/learning_rate": "learning rate of the step's last optimizer step",
    "optimizer/steps": "optimizer steps since the start of the run",
    "optimizer/skipped": "optimizer steps left out because loss or gradient was not finite; they count in no loss and no norm",
    "rollout/slots": "most completions that a process of the native engine sampled at once; mean over processes and draws",
    "rollout/kv_gib": "GiB that a process of the native engine holds for keys and values; mean over processes and draws",
    "rollout/occupancy": "share of the native engine's decoded places (slots x decoding steps) that gave a token of a completion",
    "rollout/decoding_steps": "decoding steps of a process of the native engine; mean over processes and draws",
    "rollout/read_tokens": "tokens that a process of the native engine read before it sampled from them: prompts, each once, and "
    "what had been begun; mean over processes and draws",
    "rollout/staleness": "mean over the batch's tokens of training steps since the weights that drew them; rollout.carry_over",
    "rollout/staleness_max": "largest of these; at most rollout.max_staleness",
    "rollout/carried": "share of the batch's tokens that were drawn in earlier steps",
    "rollout/ahead": "completion tokens of later questions that all processes have ready at the end of the step's sampling",
    "rollout/preempted": "completions that the native engine set aside for want of memory; mean over processes and draws",
    "tools/calls": "mean number of calls of a completion that were answered",
    "tools/used": "share of completions with at least one",
    "tools/failed": "share of the calls that gave no result: unreadable, refused, an error, out of time, a dead process",
    "tools/seconds": "mean seconds of a call in its worker process",
    "tools/result_tokens": "mean number of tokens that tools have put into a completion; no other metric counts them",
    "tools/out_of_calls": "share of completions that ended because they asked for more than tools.max_calls calls",
    "tools/wait": "seconds of a draw in which all that was left waited for tools or environment; mean over processes and draws",
    "environment/turns": "mean number of turns of a completion that its environment answered or judged",
    "environment/ended": "share of completions that the environment ended; the others came to a limit",
    "environment/out_of_turns": "share of those that came to environment.max_turns",
    "environment/failed": "share whose environment took too long or whose process died; their environment reward is unknown",
    "environment/reply_tokens": "mean number of tokens that the environment has put into a completion, counted nowhere else",
    "environment/seconds": "mean seconds that the steps of a completion took in worker processes",
    "batch/padding": "share of forward passes that a process ran without work, to keep in step with the others",
    "batch/shared": "share of the tokens of prompts and completions that need no pass, because completions share their prompt",
    "batch/imbalance": "share of the update's passes that the processes would wait for the longest, by tokens and attention",
    "scoring/timeouts": "reward calls that were killed at scoring.timeout_seconds",
    "scoring/crashes": "reward calls whose worker died or ran out of memory",
    "time/checkpoint": "seconds that the main process waited before the step for the checkpoint after the last one: to write it "
    "or, in the background, to copy it; only where one was saved",
    "time/step": "seconds of the whole step on the main process",
    "time/rollout": "seconds of it spent sampling",
    "time/scoring": "seconds of it that scoring took beyond sampling, alongside which it runs",
    "time/logprobs": "seconds of it spent on dealing sequences to processes, and on old and reference log-probabilities",
    "time/update": "seconds of it spent in forward and backward passes and optimizer steps",
    "memory/step": "most GPU memory in GiB that tensors took at once in the step, on the fullest process; CUDA only. "
    "Keys and values count until memory.release_kv_cache gives them back",
    "memory/rollout": "the same while sampling; what vLLM takes beside PyTorch's allocator is not in it",
    "memory/scoring": "the same while waiting for scores",
    "memory/logprobs": "the same while computing old and reference log-probabilities",
    "memory/update": "the same in forward and backward passes and optimizer steps",
    "throughput/rollout": "completion tokens of all processes per second of sampling",
    "throughput/scoring": "completions scored per second that a reward worker was busy; sampling on the same cores slows it down",
    "throughput/update": "tokens (of each completion and its prompt) of all processes per second of updating",
    "schedule/<setting>": "the value of a setting that follows a schedule (schedules), in this step",
    "watchdog/alarms": "rules of the watchdog that had something to say after the step",
    "progress/epoch": "questions (those passed over, too), or rows of supervised training, dealt so far, as a multiple of the "
    "training set",
    "progress/solved": "share of the training questions that are solved, as the answers say that each had last; with "
    "rollout.solved_share or hopeless_share below 1",
    "progress/hopeless": "share of them of which not one of these answers was right",
    "kind/<question_kind>/reward": "reward/mean over the completions of questions of a kind (data.kind_column)",
    "kind/<question_kind>/length": "mean number of completion tokens of the same",
    "kind/<question_kind>/<function>": "reward/<function> over the same; absent where the function gave no verdict",
    "kind/<question_kind>/eval_<function>": "eval/<function> over the held-out questions of the kind",
    "language/eval_consistency": "language/consistency of the held-out answers",
    "language/eval_consistency/<question_kind>": "the same over questions of a kind",
    "language/eval_mixed": "language/mixed of the held-out answers",
    "language/eval_mixed/<question_kind>": "the same over questions of a kind",
    "eval/<function>": "mean of that function's value over the held-out questions it gave a verdict on",
    "eval/<function>_stderr": "standard error of that mean over questions, each with the mean of its samples",
    "eval/pass@<k>": "probability that one of k = 1, 2, 4, ... samples of a question is right, unbiased (Chen et al. 2021)",
    "eval/pass@<k>_low": "lower bound of its 95 % interval: bootstrap over questions",
    "eval/pass@<k>_high": "upper bound of it",
    "eval/cons@<n>": "share of questions whose most frequent answer is right; with the reward `vote` and more than one sample",
    "eval/length_mean": "mean number of completion tokens in the evaluation",
    "eval/truncated": "share of the evaluation's completions that were cut off",
    "aha/eval_<list>_per_1k": "aha/<list>_per_1k of the held-out answers",
    "aha/eval_<list>_share": "aha/<list>_share of the held-out answers",
}
"""Formula of each metric. `<function>` stands for the name of a reward function; `<list>` for that of a word list: `reflection`,
`verification`, `backtracking`, `subgoals`, or one of logging.reflection_words; `<question_kind>` for a value of
data.kind_column. Right is a verdict of 1, of the reward that says what is right (docs/rewards.md). Trained tokens are those
of completions with a known reward in groups of the batch, less what algorithm.filter_truncated leaves out; where the others
make no gradient and no pass reads them (AlgorithmConfig.every_token_counts), only of those whose advantage is not 0, if any."""


def check_reward_names(names: Iterable[str]) -> None:
    """Raises ValueError if the metric of a reward would be another metric, or could not be told from one."""
    for name in names:
        others = [f"{prefix}/{name}" for prefix in ("reward", "eval") if _is_own(f"{prefix}/{name}")]
        if others:
            raise ValueError(
                f"rewards.*.name is {name!r}; {others[0]} is another metric of the run (docs/metrics.md). Set another name."
            )
        if not name.isprintable() or name != name.strip():
            raise ValueError(
                f"rewards.*.name is {name!r}; it cannot be shown. Set a name of letters and other visible signs."
            )


BOUNDS = re.compile(r"eval/(.+_stderr|pass@\d+_(low|high))")


def is_bound(metric: str) -> bool:
    """Whether a metric says how sure a held-out value is, beside which it is told: its standard error, or an end of its interval.

    An ending alone says nothing: policy/clip_fraction_low and a reward called `my_low` are values of their own. The names that
    match are no reward's, as `check_reward_names` sees to it.
    """
    return BOUNDS.fullmatch(metric) is not None


def _is_own(metric: str) -> bool:
    """Whether a metric in whose name no reward stands has this name."""
    return _own_names().fullmatch(metric) is not None


@cache
def _own_names() -> re.Pattern[str]:
    own = (name for name in METRICS if "<function>" not in name or name.endswith("_stderr"))
    return re.compile(
        "|".join(
            re.escape(name).replace("<function>", ".+").replace("<k>", r"\d+").replace("<n>", r"\d+") for name in own
        )
    )
