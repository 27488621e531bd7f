"""A Generator whose completions call tools: sample to the end of a turn, make its calls, append what came of them, sample on.

Token in, token out. The tokens of a result are appended to the very sequence that was sampled, and nothing is ever made from
text again, so what is trained is what was sampled. Which tokens the model wrote is kept as they come (`Completion.trained`). The
calls of a sequence are made as soon as the generator hands it on, while others are still being sampled. Between two turns the
sequence is read again from its beginning.

The limit of a completion is of all its tokens, results included. One that has no room for a result ends with finish_reason
"length", one that asks for a tool after `max_calls` calls with "calls"; either ends with what the model wrote last.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from grpo.config import ToolsConfig
from grpo.rollout.grouping import Grouping
from grpo.rollout.stop_criteria import token_limit
from grpo.scoring.worker import FunctionBug, Outcome
from grpo.scoring.worker_pool import Errand
from grpo.system import progress
from grpo.system.stopping import RunError
from grpo.turns.form import Form
from grpo.turns.toolbox import Answer, Request, States, Toolbox
from grpo.types import Completion, FinishReason, Generator, Group, OnGroup, Prompt, Sampling, ToolCall, Turn


@dataclass
class Conversation:
    """A completion under way."""

    place: int  # in the call of `sample`
    prompt: Prompt
    seed: str
    limit: int  # tokens, results included
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    states: States = field(default_factory=dict)
    num_calls: int = 0
    asked: list[Request | Answer] = field(default_factory=list)  # the calls of the last turn

    @property
    def open_calls(self) -> list[int]:
        """Which calls of the turn are to be made next: of those of one object, the first, since it changes the object."""
        waiting = {n: each for n, each in enumerate(self.asked) if isinstance(each, Request)}
        objects = [each.tool.runner if each.tool.method else None for each in waiting.values()]
        return [n for place, n in enumerate(waiting) if objects[place] is None or objects[place] not in objects[:place]]

    def say(self, turn: Completion) -> None:
        """Take a turn of the model's."""
        self._append(turn.token_ids, turn.logprobs, own=True)
        self.turns.append(Turn(turn.text, len(turn.token_ids)))

    def read(self, text: str, token_ids: list[int], calls: list[ToolCall]) -> None:
        """Take what tools have answered."""
        self._append(token_ids, [0.0] * len(token_ids), own=False)
        self.turns.append(Turn(text, len(token_ids), tuple(calls)))

    def _append(self, token_ids: list[int], logprobs: list[float], *, own: bool) -> None:
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.own += [own] * len(token_ids)

    def next_prompt(self) -> Prompt:
        """To go on from. What it draws is a function of the conversation's seed and the turn, whatever is sampled beside it."""
        return replace(
            self.prompt,
            token_ids=[*self.prompt.token_ids, *self.token_ids],
            prefill="",
            max_tokens=self.limit - len(self.token_ids),
            seed=random.Random(f"{self.seed} {len(self.turns)}").getrandbits(62),
        )

    def completion(self, reason: FinishReason) -> Completion:
        text = "".join(turn.text for turn in self.turns if not turn.calls)
        trained = None if all(self.own) else self.own
        return Completion(self.token_ids, self.logprobs, text, reason, trained=trained, turns=self.turns)


class Calls:
    """Calls of turns, on their way to the workers."""

    def __init__(self, toolbox: Toolbox, errand: Errand) -> None:
        self.toolbox, self.errand = toolbox, errand
        self.made: list[tuple[Conversation, int, Request]] = []

    def make(self, conversation: Conversation) -> None:
        """Hand on the calls of a conversation that can be made now, and return at once.

        Raises:
            RunError: as take_in, of a call that was handed on before.
        """
        for number in conversation.open_calls:
            request = conversation.asked[number]
            assert isinstance(request, Request), "it is open"
            try:
                self.errand.add([self.toolbox.call(request, conversation.states, conversation.prompt.columns)])
            except FunctionBug as bug:
                raise self._unusable(bug) from None
            self.made.append((conversation, number, request))

    def take_in(self) -> None:
        """Wait for them, and put each answer in its request's place.

        Raises:
            RunError: a class's object cannot be made, begun or kept.
        """
        with progress.busy("waiting for tools", math.inf):  # each call has its time limit
            outcomes = self._outcomes()
        for (conversation, number, request), outcome in zip(self.made, outcomes, strict=True):
            conversation.asked[number] = self.toolbox.answer(request, outcome, conversation.states)

    def _outcomes(self) -> list[Outcome]:
        try:
            return self.errand.result()
        except FunctionBug as bug:
            raise self._unusable(bug) from None

    def _unusable(self, bug: FunctionBug) -> RunError:
        tool = self.made[bug.call][2].tool
        return RunError(
            f"Tool {tool.name} cannot be used: its object cannot be made, its `reset` raised an exception, or the object "
            f"cannot be kept between two calls (pickle).\n{bug.worker_traceback}"
        )


class ToolGenerator:
    """Samples with `inner`, and lets completions call tools."""

    def __init__(
        self,
        inner: Generator,
        toolbox: Toolbox,
        form: Form,
        tokenizer: PreTrainedTokenizerBase,
        limits: ToolsConfig,
    ) -> None:
        self.inner, self.toolbox, self.form, self.tokenizer = inner, toolbox, form, tokenizer
        self.limits = limits
        self._metrics: dict[str, float] = {}

    def sync(self) -> None:
        self.inner.sync()

    def halve(self) -> str | None:
        """See Generator."""
        return self.inner.halve()

    def metrics(self) -> dict[str, float]:
        """See Generator."""
        return self._metrics

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """See Generator."""
        call = Call(self, prompts, sampling, num_completions=num_completions, seed=seed, on_group=on_group)
        call.run()
        self._metrics = call.metrics()
        return call.grouping.groups()


class Call:
    """One call of `sample`: rounds in which every conversation that has not ended takes a turn."""

    def __init__(
        self,
        generator: ToolGenerator,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None,
    ) -> None:
        self.generator, self.prompts, self.num_completions, self.seed = generator, prompts, num_completions, seed
        self.sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *generator.form.stop))))
        self.grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        self.conversations = [
            Conversation(
                place,
                prompt,
                f"{seed} {place}" if prompt.seed is None else f"{prompt.seed} {place % num_completions}",
                token_limit(prompt, sampling),
            )
            for place, prompt in enumerate(self.grouping.prompts)
        ]
        self.rounds: list[tuple[int, dict[str, float]]] = []  # sequences of each, and the generator's metrics
        self.seconds_waited = 0.0

    def run(self) -> None:
        """The first round samples the prompts as they are, so that a prompt is read once for all its completions."""
        everyone = self.conversations
        waiting = self._round(self.prompts, everyone, num_completions=self.num_completions)
        while waiting:
            prompts = [conversation.next_prompt() for conversation in waiting]
            waiting = self._round(prompts, waiting, num_completions=1)

    def _round(
        self, prompts: list[Prompt], speaking: list[Conversation], *, num_completions: int
    ) -> list[Conversation]:
        """Let conversations take a turn each; those that are to take another, with the results of their calls."""
        calling: list[Conversation] = []
        with self.generator.toolbox.begin() as errand:
            calls = Calls(self.generator.toolbox, errand)

            def on_group(p: int, group: Group) -> None:
                for g, turn in enumerate(group.completions):
                    conversation = speaking[p * num_completions + g]
                    if self._has_calls(conversation, turn):
                        calling.append(conversation)
                        calls.make(conversation)

            self.generator.inner.sample(
                prompts, self.sampling, num_completions=num_completions, seed=self.seed, on_group=on_group
            )
            self.rounds.append((len(speaking), self.generator.inner.metrics()))
            began = time.perf_counter()
            calls.take_in()
        while any(conversation.open_calls for conversation in calling):
            with self.generator.toolbox.begin() as errand:
                calls = Calls(self.generator.toolbox, errand)
                for conversation in calling:
                    calls.make(conversation)
                calls.take_in()
        self.seconds_waited += time.perf_counter() - began
        calling.sort(key=lambda conversation: conversation.place)  # in whatever order they came
        return [conversation for conversation in calling if self._goes_on(conversation)]

    def _has_calls(self, conversation: Conversation, turn: Completion) -> bool:
        """Take a turn; whether it ends with calls that may be made. If not, the conversation ends."""
        conversation.say(turn)
        asked = self.generator.form.calls(turn.text, turn.token_ids) if turn.finish_reason == "stop" else []
        if not asked:
            self._end(conversation, turn.finish_reason)
        elif conversation.num_calls + len(asked) > self.generator.limits.max_calls:
            self._end(conversation, "calls")
        elif len(conversation.token_ids) >= conversation.limit:
            self._end(conversation, "length")
        else:
            conversation.num_calls += len(asked)
            conversation.asked = [self.generator.toolbox.read(text) for text in asked]
            return True
        return False

    def _goes_on(self, conversation: Conversation) -> bool:
        """Append the results of a turn's calls; False if there is no room for them and a word after them."""
        generator, answers = self.generator, [each for each in conversation.asked if isinstance(each, Answer)]
        text, token_ids = generator.form.results(
            [answer.text for answer in answers], generator.tokenizer, most=generator.limits.max_result_tokens
        )
        if len(conversation.token_ids) + len(token_ids) >= conversation.limit:
            self._end(conversation, "length")
            return False
        conversation.read(text, token_ids, [answer.call for answer in answers])
        return True

    def _end(self, conversation: Conversation, reason: FinishReason) -> None:
        self.grouping.add(conversation.place, conversation.completion(reason))
        conversation.states, conversation.asked = {}, []  # of many conversations, for as long as the longest of them

    def metrics(self) -> dict[str, float]:
        """The generator's, over the rounds: the most sequences at once, all that were set aside, and means of the rest."""
        found: dict[str, float] = {"tools/wait": self.seconds_waited}
        total = sum(size for size, _ in self.rounds)
        for name in self.rounds[0][1]:
            values = [(size, metrics[name]) for size, metrics in self.rounds if name in metrics]
            if name in OVER_ROUNDS:
                found[name] = OVER_ROUNDS[name](value for _, value in values)
            else:
                found[name] = sum(size * value for size, value in values) / total
        return found


OVER_ROUNDS: dict[str, Callable[[Iterable[float]], float]] = {"rollout/slots": max, "rollout/preempted": sum}
