"""What flows through one training step: Prompt -> Completion -> Group -> Scores -> Batch -> MicroBatch.

Shapes use one legend everywhere:

    P  prompts            G  completions per prompt      B  sequences (P * G, less those that are not trained on)
    L  all tokens of a batch (prompts and completions)   C  its completion tokens        V  vocabulary
    T  those of them that are trained on: all, but for what a tool or another speaker wrote in between
    S  places in a forward pass, shared prompts once     K  keys that its attention sees
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, is_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # a configuration needs Sampling, and nobody should wait for torch to read that a setting is wrong
    import torch
    from torch import Tensor

FinishReason = Literal["stop", "length", "calls", "turns"]
"""stop: the model ended, or its environment. length: its tokens did. calls: it asked for a tool once more than it may. turns: its
environment would have gone on, and it has had all its turns."""


@dataclass(frozen=True)
class Prompt:
    """One data row, ready for the model."""

    row: int  # its place in the (filtered) data set
    token_ids: list[int]  # what the model reads
    text: str  # the same as text, with the template filled in
    prefill: str  # the end of `text` that already belongs to the answer, such as "<think>"; often empty
    columns: dict[str, Any]  # the data row; `question` and `answer` are always there
    max_tokens: int | None = None  # a limit for its completions, where it is to be lower than that of the sampling
    seed: int | None = (
        None  # of its completions' random numbers, where they are not to follow from the call and its other prompts
    )
    messages: list[dict[str, str]] | None = None  # what the chat template was given; None: another template
    kind: str | None = None  # of question, as data.kind_column says; metrics are told apart by it


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token, and when to stop.

    Top-k, top-p and min-p choose which tokens may be drawn, in this order, each of what the one before left; a token as likely
    as the last one kept is kept too.
    """

    max_tokens: int  # per completion
    temperature: float = 1.0  # 0: greedy decoding
    top_k: int = 0  # only the k likeliest tokens; 0: all
    top_p: float = 1.0  # only the fewest likeliest tokens that have this probability together
    min_p: float = 0.0  # only tokens at least this share as likely as the likeliest
    stop: tuple[str, ...] = ()  # a completion ends with the token that completes one of these texts
    weights: Literal["policy", "fp8"] = "policy"  # as they are, or a copy in 8 bits, which the native engine can make

    @property
    def truncated(self) -> bool:
        """Whether some tokens may never be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


CallStatus = Literal["ok", "unreadable", "refused", "error", "timeout", "crash"]
"""unreadable: no call. refused: no tool takes it. error: the tool raised one. timeout: it was ended. crash: its process died."""


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asked for, and what became of it."""

    name: str  # of the tool; empty where it cannot be read
    status: CallStatus
    seconds: float = 0.0  # until it ended


@dataclass(frozen=True)
class Turn:
    """A stretch of a completion: what the model wrote, what its tools answered, or what its environment said (user)."""

    text: str  # as it stands in the sequence
    num_tokens: int
    role: Literal["assistant", "tool", "user"] = "assistant"
    said: tuple[str, ...] = ()  # of others, without what the form puts around it: a result for each call
    calls: tuple[ToolCall, ...] = ()  # whose results these are

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates have them; of a tool, one for each call."""
        if self.role == "tool":
            return [
                {"role": "tool", "name": call.name, "content": said}
                for call, said in zip(self.calls, self.said, strict=True)
            ]
        return [{"role": self.role, "content": "\n".join(self.said) if self.role == "user" else self.text}]


@dataclass(frozen=True)
class Episode:
    """What a completion's environment made of it."""

    reward: float | None  # the sum of what it gave; None: it took too long or its process died, and nobody can tell
    ended: bool  # by the environment, not by a limit
    num_turns: int  # of the model's that it answered, the last included
    seconds: float = 0.0  # that its steps took, added up
    has_tools: bool = False  # whether the model could call tools besides


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of a prompt.

    `token_ids` and `logprobs` are aligned: `logprobs[t]` is the log-probability of `token_ids[t]` given the prompt and the
    tokens before it, under softmax(logits / temperature) over the whole vocabulary: the policy of the loss, whatever top-k,
    top-p and min-p left to draw from. At temperature 0 it is that of temperature 1. With finish_reason "stop" the last token is
    an end-of-sequence token or completes a stop text. `text` is what a reader sees: no end-of-sequence token, and with the
    prompt's `prefill` put back in front, so that a reward sees the whole answer.

    Where tools or an environment answered in between, `token_ids` holds all tokens in order and `trained` is false for theirs,
    whose `logprobs` are 0 and mean nothing; `text` is what the model wrote and no more, `turns` who wrote what.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: FinishReason
    trained: list[bool] | None = None  # which tokens are trained on, where others speak in between; None: all
    ages: list[int] | None = (
        None  # training steps since the weights that drew each token; None: all by the present ones
    )
    turns: list[Turn] | None = None  # with tools or an environment, in order; the first and the last are the model's
    episode: Episode | None = None  # with an environment

    @property
    def messages(self) -> list[dict[str, str]]:
        """As TRL and chat templates have it: what the model wrote, and between it what tools and the environment answered."""
        turns = self.turns or [Turn(self.text, len(self.token_ids))]
        return [message for turn in turns for message in turn.messages]

    @property
    def own_ids(self) -> list[int]:
        """The tokens that the model wrote."""
        if self.trained is None:
            return self.token_ids
        return [token for token, is_own in zip(self.token_ids, self.trained, strict=True) if is_own]


@dataclass(frozen=True)
class Reply:
    """What an environment made of a turn.

    Attributes:
        said: to the model; None: the episode is over.
        reward: None: nobody can tell, since the step took too long or its process died.
    """

    said: tuple[str, ...] | None
    reward: float | None
    seconds: float


@dataclass(frozen=True)
class Dialogue:
    """What a draft has besides its tokens where tools or an environment answer."""

    turns: tuple[
        Turn, ...
    ]  # those that are over; what the draft has behind their tokens is of the next, the model's own
    states: dict[int, bytes]  # the objects that tools and the environment have for it, by number; see Toolbox
    replies: tuple[Reply, ...]
    ended: FinishReason | None  # None: it is under way


@dataclass(frozen=True)
class Draft:
    """What there is of a completion before its question's turn: not a token, a beginning, or all of it."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # the training step whose weights drew each token
    dialogue: Dialogue | None = None

    @classmethod
    def of(cls, completion: Completion, step: int) -> Draft:
        """One that has ended in this step."""
        ages = completion.ages or [0] * len(completion.token_ids)
        return cls(completion.token_ids, completion.logprobs, [step - age for age in ages])

    @property
    def own_steps(self) -> list[int]:
        """Those of the tokens that the model wrote."""
        if self.dialogue is None:
            return self.steps
        own: list[int] = []
        start = 0
        for turn in self.dialogue.turns:
            own += self.steps[start : start + turn.num_tokens] if turn.role == "assistant" else []
            start += turn.num_tokens
        return own + self.steps[start:]


Drafts = dict[int, list[Draft]]
"""The place of a question in the order in which questions are dealt -> a draft of each of its completions."""


@dataclass(frozen=True)
class Group:
    """The completions of one prompt: the unit over which GRPO centres rewards."""

    prompt: Prompt
    completions: list[Completion]


@dataclass
class Ahead:
    """What an engine samples besides the questions that it is asked for, in places that these leave free.

    Attributes:
        step: number of the training step whose weights sample.
        begun: of each question of the call, and then of each of `prompts`, the drafts of its completions.
        prompts: questions whose turn comes later, in dealt order.
        left: of each of `prompts`, its drafts when the call has ended; the engine fills this in.
    """

    step: int
    begun: list[list[Draft]]
    prompts: list[Prompt]
    left: list[list[Draft]] = field(default_factory=list)

    @classmethod
    def nothing(cls, prompts: list[Prompt]) -> Ahead:
        """Of a call for these questions and no more."""
        return cls(0, [[] for _ in prompts], [])

    def start_of(self, place: int, num_completions: int) -> Draft:
        """What there is of the completion at a place of the call."""
        drafts = self.begun[place // num_completions]
        return drafts[place % num_completions] if drafts else Draft()


@dataclass(frozen=True)
class Start:
    """Where an engine takes up a turn of a completion.

    Its random numbers follow from the seed of the prompt and `number`, or from that of the call and `place`.
    """

    place: int  # of the completion, among all of the call
    prompt: Prompt
    number: int = 0  # of those that go on from the prompt
    draft: Draft = field(default_factory=Draft)  # what there is of the turn
    later: bool = False  # nobody waits for it


OnGroup = Callable[[int, Group], None]
"""Called with the place of a prompt and its group, when all completions of the group have ended."""


class Generator(Protocol):
    """What every rollout engine does."""

    def sample(
        self,
        prompts: list[Prompt],
        sampling: Sampling,
        *,
        num_completions: int,
        seed: int,
        on_group: OnGroup | None = None,
    ) -> list[Group]:
        """Sample `num_completions` continuations of each prompt.

        The result is a function of the weights and the arguments, up to rounding, which depends on the device and on how much
        runs at once; see Completion for the log-probabilities. `on_group` is called in this thread for each group as soon as it
        is whole, in whatever order they end; what it raises ends the sampling.
        """
        ...

    def sync(self) -> None:
        """Take over the policy's weights after an update. Every process calls it."""
        ...

    def halve(self) -> str | None:
        """Out of memory, sample half as many completions at once from now on; what changed, in words. None: it cannot be less."""
        ...

    def release_memory(self) -> None:
        """Give back the GPU memory that sampling alone needs, where the settings say so; the next `sample` takes it again."""
        ...

    def metrics(self) -> dict[str, float]:
        """The rollout/ metrics of the last call of `sample`; see grpo/observe/metrics.py."""
        ...


class Listener(Protocol):
    """Whom completions speak to, and who answers their turns, while others are sampled."""

    def ended(self, place: int, turn: Completion) -> None:
        """A completion has ended a turn, in this thread; `place`: among all completions of the call."""
        ...

    def answers(self, *, wait: bool) -> list[tuple[int, Prompt | None]]:
        """The places of completions whose turns have been answered since, each with all there is of it so far, to go on from; or
        None if it is over.

        Args:
            wait: nothing is sampled that somebody waits for, so one of these at least has to be answered.
        """
        ...


class TurnTakingGenerator(Generator, Protocol):
    """An engine that keeps what it has read of a completion while others answer it."""

    def sample_turns(
        self, starts: list[Start], sampling: Sampling, *, seed: int, listener: Listener, step: int = 0
    ) -> dict[int, Draft]:
        """Sample turns of completions, until `listener` has ended all that somebody waits for.

        A completion that waits for its answer holds no place. What it draws next is that of a call of `sample` with the prompt to
        go on from, up to rounding.

        Args:
            starts: in the order of their places; those of one prompt, the same object, stand together.
            step: number of the training step whose weights sample.

        Returns:
            By its place, what there is of each turn that is under way.
        """
        ...


class CarryingGenerator(Generator, Protocol):
    """An engine that goes on with what it has begun, and begins with what comes next."""

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
        """`sample`, from the drafts of `ahead`, whose later questions are sampled as long as one of `prompts` is under way.

        Completions say how old their tokens are. What a completion draws under the same weights depends neither on when it was
        begun nor on how often it was set down, if its prompt has a seed.
        """
        ...


VOTE = "vote"
"""The reward function whose values say which completions of a question have the same answer; they are no rewards."""


@dataclass(frozen=True)
class Scores:
    """What the reward functions said of some groups.

    NaN stands for "can't tell": the completion is neither rewarded nor counted as wrong.
    """

    rewards: Tensor  # (P, G) float64, weighted sum over the functions
    values: dict[str, Tensor]  # function name -> (P, G) float64, unweighted
    num_timeouts: int  # calls that were killed for exceeding the time limit
    num_crashes: int  # calls whose worker process died or ran out of memory
    seconds: float = 0.0  # that the calls took in the worker processes, added up
    metrics: dict[str, list[float]] = field(default_factory=dict)  # what the functions logged with log_metric
    extras: list[list[dict[str, Any]]] = field(
        default_factory=list
    )  # P lists of G: of each completion, by reward, what log_extra had
    verdicts: Sequence[str] = ()  # names of the functions that say what is right; see scoring/answers.py
    is_due: dict[str, Tensor] | None = (
        None  # function name -> (P,) whether it has to tell, as in weighted_sum; None: none has
    )


@dataclass
class Batch:
    """The sequences of an optimizer step, end to end: prompt 0, completion 0, prompt 1, completion 1, ...

    For two completions `x y` and `z` of the prompt `a b`, and one completion `w` of the prompt `c`:

        tokens    a b x y a b z c w        cu_seqlens    0 4 7 9       prompt_index      0 0 1
                                           prompt_lens   2 2 1         completion_lens   2 1 1
    """

    tokens: Tensor  # (L,) int64
    cu_seqlens: Tensor  # (B + 1,) int64, where each sequence starts, and L
    prompt_lens: Tensor  # (B,) int64
    prompt_index: Tensor  # (B,) int64, the same number for the same prompt
    advantages: Tensor  # (B,)
    sampling_logprobs: Tensor  # (T,) of the trained tokens, as the generator sampled them
    trained: Tensor | None = None  # (C,) bool, which completion tokens are trained on; None: all, and T is C
    fresh: Tensor | None = None  # (T,) bool, which were drawn by the weights before this update; None: all

    @property
    def num_sequences(self) -> int:
        return len(self.prompt_lens)

    @property
    def sequence_lens(self) -> Tensor:
        return self.cu_seqlens.diff()

    @property
    def completion_lens(self) -> Tensor:
        return self.sequence_lens - self.prompt_lens

    @property
    def trained_lens(self) -> Tensor:
        """(B,) how many tokens of each completion are trained on."""
        import torch

        lens = self.completion_lens
        if self.trained is None:
            return lens
        none = lens.new_zeros(1)
        return torch.cat([none, self.trained.cumsum(0)])[lens.cumsum(0)].diff(prepend=none)

    def own_tokens(self) -> list[Tensor | slice]:
        """Which completion tokens of each sequence are trained on, as an index of them."""
        if self.trained is None:
            return [slice(None)] * self.num_sequences
        return list(self.trained.split(self.completion_lens.tolist()))


@dataclass(frozen=True)
class Packing:
    """Who attends to whom in a forward pass: runs of queries, each with the run of keys that it sees causally.

    Of the S places in a pass the first are those of the prompts. `MicroBatch` has an example.
    """

    cu_queries: Tensor  # (runs + 1,) int32, where each run of queries starts, and S
    cu_keys: Tensor  # (runs + 1,) int32, where each run of keys starts, and K
    longest_query: int
    longest_key: int
    key_index: Tensor  # (K,) the place of each key
    own_key: Tensor  # (S,) where the keys have each place as part of its own run
    shared_keys: Tensor  # (prompt tokens, G) where else they have each, for the completions that see it; -1: nowhere
    share: Any = None  # a sequence_parallel.Share, where several processes share the pass


@dataclass
class MicroBatch:
    """What one forward pass of one process reads. Completions of the same prompt share it: its tokens are there once.

    For the sequences `a b x y` and `a b z`:

        tokens         a b x y z        runs of queries    a b | x y     | z          cu_queries   0 2 4 5
        position_ids   0 1 2 3 2        runs of keys       a b | a b x y | a b z      cu_keys      0 2 6 9
        source_index   1 2 1            (the places whose hidden states predict x, y and z, which are the targets)

    Per-token fields hold the trained tokens only, in the order of the batch's sequences: what a tool wrote is read, and has no
    log-probability, no weight and no place in a mean.
    """

    tokens: Tensor  # (S,) int64
    position_ids: Tensor  # (S,)
    packing: Packing
    source_index: Tensor  # (T,)
    targets: Tensor  # (T,)
    advantages: Tensor  # (T,) each token's completion's
    weights: Tensor  # (T,) in the loss
    sampling_logprobs: Tensor  # (T,)
    num_sequence_tokens: int  # of its sequences, each with a prompt of its own
    completion_lens: Tensor  # (B,) int64, trained tokens of each of its sequences; their sum is T
    trained: Tensor | None = None  # (C,) bool, as the batch has it; None: all
    is_spare: bool = False  # run for the sake of the other processes only; all weights are 0
    old_logprobs: Tensor | None = None  # (T,) of the policy before the first update; None: strictly on-policy
    ref_logprobs: Tensor | None = None  # (T,) of the reference; None: no KL term in the loss
    selected: Tensor | None = None  # (T,) bool, whose surrogate is trained on; None: all
    fresh: Tensor | None = None  # (T,) bool, drawn by the weights before this update; None: all

    @property
    def num_pairs(self) -> float:
        """Of a token and one that it sees, itself among them: q (k - q) + q (q + 1) / 2 for q queries that end k keys."""
        q, k = self.packing.cu_queries.diff().double(), self.packing.cu_keys.diff().double()
        return float((q * (k - q) + q * (q + 1) / 2).sum())

    def to(self, device: torch.device) -> MicroBatch:
        return _moved(self, device)


def _moved(data: Any, device: torch.device) -> Any:
    """A dataclass with its tensors, and those of dataclasses in it, on the device.

    To a GPU they go from pinned memory: from any other a copy first waits for all that the GPU has been given to do, which then
    idles while the next pass is handed to it, kernel by kernel.
    """
    from torch import Tensor

    def there(tensor: Tensor) -> Tensor:
        pinned = device.type == "cuda" and tensor.device.type == "cpu"
        return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)

    fields = vars(data).items()
    return replace(
        data,
        **{k: there(v) for k, v in fields if isinstance(v, Tensor)},
        **{k: _moved(v, device) for k, v in fields if is_dataclass(v)},
    )
