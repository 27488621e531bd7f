"""A Generator whose completions call tools or are answered by an environment: sample to the end of a turn, make its calls or have
it answered, append what came of that, sample on.

Token in, token out. The tokens of a result are appended to the very sequence that was sampled, and nothing is ever made from
text again, so what is trained is what was sampled. Which tokens the model wrote is kept as they come (`Completion.trained`). The
calls of a sequence are made as soon as the generator hands it on, while others are still being sampled. The native engine keeps
what it has read of the sequence, and goes on with it when its calls are made; other engines read it again from its beginning.

No clock may decide when that is where a run is to be repeatable: how many sequences are sampled side by side decides how sums
are rounded. So sequences that were answered wait there until nothing that somebody waits for is left to sample, and otherwise
go on at once.

A turn that has no calls is the environment's to answer, where there is one. It says something, and the model takes another turn;
or the episode is over. An episode that a limit ends is told so, and gives its last reward then.

With `rollout.carry_over` the completions of later questions take turns beside those of the batch, and wait like them. When the
batch is whole, those that have been asked for are answered, and every conversation is kept as a draft: its tokens, its turns and
the objects that others have for it (training/carry_over.py).

The limit of a completion is of all its tokens, results included. One that has no room for a result ends with finish_reason
"length", one that asks for a tool after `max_calls` calls with "calls", one that has had all its turns with "turns"; each ends
with what the model wrote last.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import cast

from transformers import PreTrainedTokenizerBase

from grpo.config import ToolsConfig
from grpo.data.prompts import prefill_of
from grpo.rollout.grouping import Grouping
from grpo.rollout.stop_criteria import token_limit
from grpo.scoring.worker import FunctionBug
from grpo.scoring.worker_pool import Errand
from grpo.system import progress
from grpo.turns.episode import Action
from grpo.turns.form import Appended, Form, ReplyForm
from grpo.turns.toolbox import Answer, Ask, Request, States, Toolbox
from grpo.types import (
    Ahead,
    Completion,
    Dialogue,
    Draft,
    Episode,
    FinishReason,
    Generator,
    Group,
    OnGroup,
    Prompt,
    Reply,
    Sampling,
    Start,
    ToolCall,
    Turn,
    TurnTakingGenerator,
)


@dataclass
class Conversation:
    """A completion under way."""

    place: int  # in the call of `sample`
    prompt: Prompt
    seed: str
    limit: int  # tokens, results included
    step: int  # of training, whose weights sample
    later: bool = False  # nobody waits for it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # the training step of each token
    turns: list[Turn] = field(default_factory=list)
    states: States = field(default_factory=dict)
    num_calls: int = 0
    asked: list[Request | Ask | Answer | Reply] = field(default_factory=list)  # of the last turn
    num_on_their_way: int = 0  # of these, calls that are being made
    written: str = ""  # by the model since the environment last spoke
    prefill: str = ""  # what the environment's words end with that already belongs to the turn
    replies: list[Reply] = field(default_factory=list)  # the environment's
    reason: FinishReason | None = None  # for which it ends, once the environment has given its last reward
    ended: FinishReason | None = None

    @property
    def open_calls(self) -> list[int]:
        """Which calls of the turn are to be made next: of those of one object, the first, since it changes the object."""
        waiting = {n: each for n, each in enumerate(self.asked) if isinstance(each, (Request, Ask))}
        objects = [each.object if isinstance(each, Request) else None for each in waiting.values()]
        return [n for place, n in enumerate(waiting) if objects[place] is None or objects[place] not in objects[:place]]

    def say(self, turn: Completion) -> None:
        """Take a turn of the model's."""
        said = Turn(turn.text, len(turn.token_ids))
        self._append(said, turn.token_ids, turn.logprobs, Draft.of(turn, self.step).steps)

    def read(self, results: Appended, calls: list[ToolCall]) -> None:
        """Take what tools have answered."""
        self._append_of_others(results, Turn(results.text, len(results.token_ids), "tool", results.said, tuple(calls)))

    def hear(self, reply: Appended) -> None:
        """Take what the environment has said."""
        self._append_of_others(reply, Turn(reply.text, len(reply.token_ids), "user", reply.said))

    def ask(self, action: Action) -> None:
        """Have the environment make a step."""
        seed = random.Random(f"{self.seed} {len(self.turns)} environment").getrandbits(62)
        self.asked = [Ask(action, self.written, seed)]

    def _append_of_others(self, said: Appended, turn: Turn) -> None:
        self._append(turn, said.token_ids, [0.0] * turn.num_tokens, [self.step] * turn.num_tokens)

    def _append(self, turn: Turn, token_ids: list[int], logprobs: list[float], steps: list[int]) -> None:
        is_own = turn.role == "assistant"
        self.turns.append(turn)
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.steps += steps
        self.own += [is_own] * turn.num_tokens
        self.written = self.written + turn.text if is_own else "" if turn.role == "user" else self.written
        self.prefill = self.prefill if is_own else prefill_of(turn.text)

    def take_up(self, draft: Draft) -> Draft:
        """Go on from what an earlier step has left; what there is of the turn under way."""
        done = draft.dialogue
        if done is None:
            return draft
        start = 0
        for turn in done.turns:
            part = slice(start, start + turn.num_tokens)
            self._append(turn, draft.tokens[part], draft.logprobs[part], draft.steps[part])
            self.num_calls += len(turn.calls)
            start = part.stop
        self.states, self.replies, self.ended = dict(done.states), [*done.replies], done.ended
        self.reason = None if done.ended == "stop" else done.ended
        return Draft(draft.tokens[start:], draft.logprobs[start:], draft.steps[start:])

    def draft(self, under_way: Draft) -> Draft:
        """What a later step goes on from."""
        assert not self.asked, "what it asked for has been answered"
        return Draft(
            self.token_ids + under_way.tokens,
            self.logprobs + under_way.logprobs,
            self.steps + under_way.steps,
            Dialogue(tuple(self.turns), dict(self.states), tuple(self.replies), self.ended),
        )

    def next_prompt(self) -> Prompt:
        """To go on from. What it draws is a function of the conversation's seed and the turn, whatever is sampled beside it."""
        return replace(
            self.prompt,
            token_ids=[*self.prompt.token_ids, *self.token_ids],
            prefill=self.prefill,
            max_tokens=self.limit - len(self.token_ids),
            seed=random.Random(f"{self.seed} {len(self.turns)}").getrandbits(62),
        )

    def completion(self, reason: FinishReason, episode: Episode | None) -> Completion:
        text = "".join(turn.text for turn in self.turns if turn.role == "assistant")
        trained = None if all(self.own) else self.own
        ages = [self.step - step for step in self.steps]
        return Completion(
            self.token_ids,
            self.logprobs,
            text,
            reason,
            trained=trained,
            ages=ages if any(ages) else None,
            turns=self.turns,
            episode=episode,
        )


class Calls:
    """Calls of turns, on their way to the workers."""

    def __init__(self, toolbox: Toolbox, errand: Errand) -> None:
        self.toolbox, self.errand = toolbox, errand
        self.under_way: dict[int, tuple[Conversation, int, Request | Ask]] = {}  # by their number in the errand
        self.num_taken = 0
        self.answered: list[Conversation] = []  # which wait for no call

    def __bool__(self) -> bool:
        return bool(self.under_way or self.answered)

    def make(self, conversation: Conversation) -> None:
        """Hand on the calls of a conversation that can be made now, and return at once.

        Raises:
            RunError: as take_in, of a call that was handed on before.
        """
        if not conversation.open_calls:  # its calls could not be read
            self.answered.append(conversation)
        for number in conversation.open_calls:
            request = conversation.asked[number]
            assert isinstance(request, (Request, Ask)), "it is open"
            self.under_way[len(self.errand.calls)] = conversation, number, request
            conversation.num_on_their_way += 1
            with self._naming_bugs():
                self.errand.add([self.toolbox.call(request, conversation.states, conversation.prompt.columns)])

    def take_in(self, *, wait: bool) -> list[Conversation]:
        """Put each answer that has come in its request's place; the conversations that wait for no other.

        Args:
            wait: for an answer, if any is on its way.

        Raises:
            RunError: a class's object cannot be made, begun or kept, or an environment has a bug.
        """
        if wait and self.under_way and not self.answered:
            with self._naming_bugs(), progress.busy("waiting for tools", math.inf):  # each call has its time limit
                self.errand.wait_for_more(self.num_taken)
        for call in [call for call in self.under_way if call in self.errand.made]:
            conversation, number, request = self.under_way.pop(call)
            outcome = self.errand.made[call]
            conversation.asked[number] = self.toolbox.answer(request, outcome, conversation.states)
            self.errand.forget(call)
            self.num_taken += 1
            conversation.num_on_their_way -= 1
            if not conversation.num_on_their_way:
                self.answered.append(conversation)
        answered, self.answered = self.answered, []
        return answered

    @contextmanager
    def _naming_bugs(self) -> Iterator[None]:
        try:
            yield
        except FunctionBug as bug:
            raise self.toolbox.unusable(self.under_way[bug.call][2], bug) from None


class TurnGenerator:
    """Samples with `inner`, and lets completions call tools and an environment answer them.

    Args:
        form: of calls; None: there are no tools.
        reply_form: of what the environment says; None: there is none.
        at_once: let a completion go on as soon as it is answered.
    """

    def __init__(
        self,
        inner: Generator,
        toolbox: Toolbox,
        form: Form | None,
        tokenizer: PreTrainedTokenizerBase,
        limits: ToolsConfig,
        reply_form: ReplyForm | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        self.at_once = at_once
        self.inner, self.toolbox, self.tokenizer = inner, toolbox, tokenizer
        self.form, self.reply_form, self.limits = form, reply_form, limits
        self._metrics: dict[str, float] = {}

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end a turn."""
        forms = (self.form, self.reply_form)
        return tuple(text for form in forms if form is not None for text in form.stop)

    def sync(self) -> None:
        self.inner.sync()

    def halve(self) -> str | None:
        """See Generator."""
        return self.inner.halve()

    def release_memory(self) -> None:
        """See Generator."""
        self.inner.release_memory()

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
        return self.sample_ahead(
            prompts,
            sampling,
            num_completions=num_completions,
            seed=seed,
            on_group=on_group,
            ahead=Ahead.nothing(prompts),
        )

    def sample_ahead(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
        ahead: Ahead,
    ) -> list[Group]:
        """See CarryingGenerator; with an engine that takes turns."""
        with self.toolbox.begin() as errand:
            calls = Calls(self.toolbox, errand)
            call = Call(
                self,
                calls,
                prompts,
                sampling,
                num_completions=num_completions,
                seed=seed,
                on_group=on_group,
                ahead=ahead,
            )
            call.run()
        self._metrics = call.metrics()
        return call.grouping.groups()


class Call:
    """One call of `sample`: turns of its conversations, until all have ended."""

    def __init__(
        self,
        generator: TurnGenerator,
        calls: Calls,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None,
        ahead: Ahead,
    ) -> None:
        self.ahead = ahead
        self.generator, self.prompts, self.num_completions, self.seed = generator, prompts, num_completions, seed
        self.calls = calls
        self.sampling = replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *generator.stop))))
        self.grouping = Grouping(prompts, num_completions=num_completions, on_group=on_group)
        self.conversations = [
            Conversation(
                place,
                prompt,
                f"{seed} {place}" if prompt.seed is None else f"{prompt.seed} {place % num_completions}",
                token_limit(prompt, sampling),
                ahead.step,
                later=place >= len(self.grouping.prompts),
            )
            for place, prompt in enumerate(
                [*self.grouping.prompts, *(prompt for prompt in ahead.prompts for _ in range(num_completions))]
            )
        ]
        self.over: list[int] = []  # conversations that have ended, and their listener does not know
        self.rounds: list[tuple[int, dict[str, float]]] = []  # sequences of each, and the generator's metrics
        self.seconds_waited = 0.0

    def run(self) -> None:
        inner = self.generator.inner
        if hasattr(inner, "sample_turns"):
            self._run_with(cast(TurnTakingGenerator, inner))
        else:
            assert not self.ahead.prompts, "check_carries has looked"
            self._run_in_rounds()

    # ---- for an engine that takes turns ------------------------------------------------------------------------------

    def _run_with(self, inner: TurnTakingGenerator) -> None:
        starts = [start for each in self.conversations if (start := self._start(each)) is not None]
        under_way = inner.sample_turns(starts, self.sampling, seed=self.seed, listener=self, step=self.ahead.step)
        while self.calls:  # of conversations that nobody waits for
            self.answers(wait=True)
        size, nothing = self.num_completions, Draft()
        left = [each.draft(under_way.get(each.place, nothing)) for each in self.conversations if each.later]
        self.ahead.left = [left[start : start + size] for start in range(0, len(left), size)]
        self.rounds.append((len(self.conversations), inner.metrics()))

    def _start(self, conversation: Conversation) -> Start | None:
        """Where the engine takes it up; None: it is over."""
        number = conversation.place % self.num_completions
        turn = conversation.take_up(self.ahead.start_of(conversation.place, self.num_completions))
        if conversation.ended is not None:
            self._end(conversation, conversation.ended)
            return None
        prompt, number = (conversation.next_prompt(), 0) if conversation.turns else (conversation.prompt, number)
        return Start(conversation.place, prompt, number, turn, later=conversation.later)

    def ended(self, place: int, turn: Completion) -> None:
        """See Listener."""
        conversation = self.conversations[place]
        if self._is_answered(conversation, turn):
            self.calls.make(conversation)
        else:
            self.over.append(place)

    def answers(self, *, wait: bool) -> list[tuple[int, Prompt | None]]:
        """See Listener."""
        found: list[tuple[int, Prompt | None]] = []
        began = time.perf_counter()
        at_once = self.generator.at_once
        if at_once:
            found += self._take_in(wait=False)
        while wait and self.calls and not (at_once and (found or self.over)):
            found += self._take_in(wait=True)
        assert found or self.over or not wait, "nobody has yet to answer"
        found += [(place, None) for place in self.over]
        self.over = []
        self.seconds_waited += time.perf_counter() - began if wait else 0.0
        return sorted(found, key=lambda answer: answer[0])  # in whatever order they came

    def _take_in(self, *, wait: bool) -> list[tuple[int, Prompt | None]]:
        """Those that go on; `over` has those that do not."""
        found: list[tuple[int, Prompt | None]] = []
        for conversation in self.calls.take_in(wait=wait):
            if self._goes_on(conversation):
                found.append((conversation.place, conversation.next_prompt()))
            elif conversation.asked:
                self.calls.make(conversation)
            else:
                self.over.append(conversation.place)
        return found

    # ---- for any other -----------------------------------------------------------------------------------------------

    def _run_in_rounds(self) -> None:
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

        def on_group(p: int, group: Group) -> None:
            for g, turn in enumerate(group.completions):
                self.ended(speaking[p * num_completions + g].place, turn)

        self.generator.inner.sample(
            prompts, self.sampling, num_completions=num_completions, seed=self.seed, on_group=on_group
        )
        self.rounds.append((len(speaking), self.generator.inner.metrics()))
        going_on: list[int] = []
        self.over = []
        while self.calls:
            going_on += [place for place, prompt in self.answers(wait=True) if prompt is not None]
        return [self.conversations[place] for place in sorted(going_on)]  # in whatever order they came

    # ---- what a turn leads to ----------------------------------------------------------------------------------------

    def _is_answered(self, conversation: Conversation, turn: Completion) -> bool:
        """Take a turn; whether others are to be asked now, for what it calls, or what the environment makes of it.

        If not, the conversation ends.
        """
        conversation.say(turn)
        generator, has_ended = self.generator, turn.finish_reason == "stop"
        asked = generator.form.calls(turn.text, turn.token_ids) if generator.form is not None and has_ended else []
        if asked and conversation.num_calls + len(asked) > generator.limits.max_calls:
            self._close(conversation, "calls")
        elif asked and len(conversation.token_ids) >= conversation.limit:
            self._close(conversation, "length")
        elif asked:
            conversation.num_calls += len(asked)
            conversation.asked = [generator.toolbox.read(text) for text in asked]
        elif has_ended and generator.toolbox.environment is not None:
            conversation.ask("step")
        else:
            self._close(conversation, turn.finish_reason)
        return bool(conversation.asked)

    def _goes_on(self, conversation: Conversation) -> bool:
        """Append what others have said to a turn; False if calls are still open, or the conversation ends."""
        if conversation.open_calls:
            return False
        generator, reply = self.generator, conversation.asked[0]
        if isinstance(reply, Reply):
            return self._goes_on_after(conversation, reply)
        answers = [each for each in conversation.asked if isinstance(each, Answer)]
        assert generator.form is not None, "there were calls"
        results = generator.form.results(
            [answer.text for answer in answers], generator.tokenizer, most=generator.limits.max_result_tokens
        )
        conversation.asked = []
        if len(conversation.token_ids) + len(results.token_ids) >= conversation.limit:
            self._close(conversation, "length")
            return False
        conversation.read(results, [answer.call for answer in answers])
        return True

    def _goes_on_after(self, conversation: Conversation, reply: Reply) -> bool:
        """The same of what the environment has said."""
        generator, environment = self.generator, self.generator.toolbox.environment
        assert generator.reply_form is not None, "there is an environment"
        assert environment is not None, "it has replied"
        conversation.replies.append(reply)
        conversation.asked = []
        if conversation.reason is not None:
            self._end(conversation, conversation.reason)
        elif reply.said is None:
            self._end(conversation, "stop")
        elif len(conversation.replies) == environment.config.max_turns:
            self._close(conversation, "turns")
        else:
            said = generator.reply_form.reply(
                reply.said,
                generator.tokenizer,
                most=environment.config.max_reply_tokens,
                behind=conversation.token_ids,
            )
            if len(conversation.token_ids) + len(said.token_ids) < conversation.limit:
                conversation.hear(said)
                return True
            self._close(conversation, "length")
        return False

    def _close(self, conversation: Conversation, reason: FinishReason) -> None:
        """End a conversation that a limit has ended, when its environment, if there is one, has given its last reward."""
        if self.generator.toolbox.environment is None:
            self._end(conversation, reason)
        else:
            conversation.reason = reason
            conversation.ask("reward")

    def _end(self, conversation: Conversation, reason: FinishReason) -> None:
        conversation.ended = reason
        conversation.states, conversation.asked = {}, []  # of many conversations, for as long as the longest of them
        if not conversation.later:
            self.grouping.add(conversation.place, conversation.completion(reason, self._episode(conversation)))

    def _episode(self, conversation: Conversation) -> Episode | None:
        if self.generator.toolbox.environment is None:
            return None
        replies = conversation.replies
        rewards = [reply.reward for reply in replies if reply.reward is not None]
        return Episode(
            reward=sum(rewards) if len(rewards) == len(replies) else None,
            ended=conversation.reason is None and len(rewards) == len(replies),
            num_turns=len(replies) - (conversation.reason is not None),
            seconds=sum(reply.seconds for reply in replies),
            has_tools=self.generator.form is not None,
        )

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


OVER_ROUNDS: dict[str, Callable[[Iterable[float]], float]] = {
    "rollout/slots": max,
    "rollout/preempted": sum,
    "rollout/decoding_steps": sum,
    "rollout/read_tokens": sum,
}
