"""Which sequences run, and which pages are theirs: the bookkeeping of the native engine, without tensors.

A prompt is read once into pages of its own (a `Prefix`) and its completions start from them. The prompt's last token is left
out: a completion reads that itself, as the first step of decoding, and so draws its first token like every other one. It lists
the prompt's full pages and owns a copy of the last, part-filled one.

When pages run out, the running sequence with the fewest tokens gives its place up, those that nobody waits for before all
others, and is later read again, prompt and tokens, as a prefix of its own. The space for one sequence of full length is never
given to prefixes, so the last one running always ends.

A sequence that waits for others' words (`set_down`) has no place, and keeps its pages for as long as nobody else needs them.
Taken up again, it goes on from them, or is read from its beginning if they are gone.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from grpo.rollout.paged import PAGE, num_pages_for

FEWEST_SEQUENCES = 3
"""Sequences of full length that the pages must hold: one that runs, one that is read again, and the reserve."""

READ_AHEAD = 0.125
"""Share of the pages that prompts may take before a completion of theirs can start, so that many are read in one pass."""


KEYS_PER_TOKEN = 4
"""Keys and values that are copied together for a pass over the ends of sequences, for each token that a pass may have."""


@dataclass(eq=False)
class Sequence:
    """One completion under way."""

    index: int  # its place among all completions of the call
    prompt: list[int]
    limit: int  # most tokens it may have
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)  # the training step whose weights drew each token
    later: bool = False  # nobody waits for it
    shared: list[int] = field(default_factory=list)  # pages of its prefix
    own: list[int] = field(default_factory=list)
    prefix: Prefix | None = None
    num_kept: int = 0  # tokens whose keys and values its pages hold, when it is taken up

    @property
    def newest(self) -> int:
        return (self.tokens or self.prompt)[-1]

    @property
    def num_cached(self) -> int:
        """Tokens, prompt included, whose keys and values are kept; the newest token's are not yet."""
        return len(self.prompt) + len(self.tokens) - 1

    @property
    def remaining(self) -> int:
        return self.limit - len(self.tokens)

    def missing(self, num_steps: int) -> int:
        """Pages that its next steps need beyond those it has."""
        return max(
            num_pages_for(self.num_cached + min(num_steps, self.remaining)) - len(self.shared) - len(self.own), 0
        )


@dataclass(eq=False)
class Prefix:
    """Tokens that are read at once, and the sequences that go on from them."""

    waiting: deque[Sequence]
    pages: list[int] = field(default_factory=list)
    num_kept: int = 0  # of its tokens, those that have been read before
    end: int | None = None  # it is read up to here in the next pass, and not yet started; None: to its end
    num_users: int = 0  # sequences that hold its pages

    @property
    def later(self) -> bool:
        """Whether nobody waits for its sequences."""
        return self.waiting[0].later

    @property
    def tokens(self) -> list[int]:
        """All known tokens of its sequences but the last: the prompt, or all of a sequence that had to give up its place."""
        first = self.waiting[0]
        return [*first.prompt, *first.tokens][:-1]


def _priority(sequence: Sequence) -> tuple[bool, int]:
    """Of two, the one to keep running has more: what is waited for, then what has more tokens."""
    return not sequence.later, len(sequence.tokens)


def _first_later(queue: deque[Prefix]) -> int:
    """The place of the first that nobody waits for; all that is waited for stands before it."""
    return next((place for place, prefix in enumerate(queue) if prefix.later), len(queue))


class Slots:
    """Takes sequences from waiting to running to finished.

    Args:
        prefixes: what to sample, in the order to start it in.
        num_slots: most sequences that run at once.
        pages: page numbers to hand out.
        pages_each: pages of the longest possible sequence; `pages` must have FEWEST_SEQUENCES times as many or more.
    """

    def __init__(self, prefixes: list[Prefix], *, num_slots: int, pages: range, pages_each: int) -> None:
        assert len(pages) >= FEWEST_SEQUENCES * pages_each, "too few pages for every sequence to come to its end"
        self.unread = deque(prefixes)
        self.ready: deque[Prefix] = deque()
        self.running: list[Sequence] = []
        self.set_aside: list[Sequence] = []  # they wait for others' words, and hold pages
        self.returning: deque[Sequence] = deque()  # they have them, and wait for a place
        self.num_slots = num_slots
        self.pages_each = pages_each
        self.num_pages = len(pages)
        self.num_preempted = 0
        self._free = list(reversed(pages))

    def __bool__(self) -> bool:
        return bool(self.unread or self.ready or self.running or self.returning)

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    def set_down(self, sequence: Sequence) -> None:
        """Take its place from a sequence, and leave it its pages."""
        if sequence.prefix is None:  # it had given up both
            self.finish([sequence])
            return
        self.running.remove(sequence)
        self.set_aside.append(sequence)

    def take_up(self, before: Sequence, after: Sequence) -> None:
        """Go on from a sequence that was set down.

        Args:
            after: it, with others' words behind the first `before.num_kept` of its tokens.
        """
        if before.prefix is None:  # its pages were needed
            self.unread.appendleft(Prefix(deque([after])))
            return
        self.set_aside.remove(before)
        after.shared, after.own, after.prefix = before.shared, before.own, before.prefix
        after.num_kept, before.prefix = before.num_kept, None
        self.returning.append(after)

    def let_go(self, sequence: Sequence) -> None:
        """Of a sequence that was set down, and is over."""
        if sequence.prefix is not None:
            self.set_aside.remove(sequence)
            self._release(sequence)

    def _make_room(self, number: int) -> bool:
        """Whether so many pages are free, if need be by taking those of sequences that have no place: of those that wait for
        others' words first, and of these of the shortest."""
        if number > len(self._free) + self._num_held:
            return False
        while number > len(self._free):
            if self.set_aside:
                shortest = min(self.set_aside, key=lambda each: each.num_cached)
                self.set_aside.remove(shortest)
                self._release(shortest)
                self.num_preempted += 1
            else:
                self._read_again(self.returning.pop())
        return number <= len(self._free)

    @property
    def _num_held(self) -> int:
        """Pages that are free once no sequence without a place holds any."""
        waiting = [*self.set_aside, *self.returning]
        users = Counter(each.prefix for each in waiting if each.prefix is not None)
        prefixes = sum(len(each.pages) for each, n in users.items() if n == each.num_users and not each.waiting)
        return prefixes + sum(len(each.own) for each in waiting)

    def _read_again(self, sequence: Sequence) -> None:
        self._release(sequence)
        self.unread.appendleft(Prefix(deque([sequence])))
        self.num_preempted += 1

    def cancel(self, sequence: Sequence) -> None:
        """Let go of a sequence that has not ended, wherever it is."""
        if sequence.prefix is not None:
            self.finish([sequence])
            return
        for queue in (self.unread, self.ready):
            prefix = next((prefix for prefix in queue if sequence in prefix.waiting), None)
            if prefix is None:
                continue
            prefix.waiting.remove(sequence)
            if not prefix.waiting:
                queue.remove(prefix)
                if not prefix.num_users:
                    self._free += prefix.pages
                    prefix.pages = []
            return
        raise AssertionError("a sequence that is nowhere was cancelled")

    def read_ahead(self, max_tokens: int) -> list[Prefix]:
        """Prefixes to read now, their pages allotted: none while enough completions are ready for the free slots, else as many
        as `max_tokens`, the memory and READ_AHEAD allow."""
        taken, num_tokens = self._take_back(max_tokens)
        while self.unread and (not self._enough_ready() or (taken and self._may_read_ahead())):
            prefix = self.unread.popleft()
            length = len(prefix.tokens)
            if (taken and num_tokens + length > max_tokens) or not self._has_room(num_pages_for(length)):
                self.unread.appendleft(prefix)
                break
            prefix.pages = self._take(num_pages_for(length))
            num_tokens += length
            taken.append(prefix)
            self.ready.insert(len(self.ready) if prefix.later else _first_later(self.ready), prefix)
        return taken

    def _has_room(self, number: int) -> bool:
        """Whether a prefix of so many pages may be read, which leaves room for a sequence of full length. Pages of sequences that
        wait are taken only if there is a place for what it begins."""
        if number + self.pages_each > len(self._free) + self._num_held:
            return False
        return number <= len(self._free) or (not self._enough_ready() and self._make_room(number))

    def _take_back(self, max_tokens: int) -> tuple[list[Prefix], int]:
        """Give places to sequences that return; what there is to read of them, and how many tokens that are."""
        taken: list[Prefix] = []
        num_tokens, num_keys = 0, 0
        while self.returning and len(self.running) < self.num_slots and num_tokens < max_tokens:
            num_keys += self.returning[0].num_cached
            if taken and num_keys > KEYS_PER_TOKEN * max_tokens:
                break
            sequence = self.returning.popleft()
            if not self._make_room(sequence.missing(1)):
                self._read_again(sequence)
                break
            sequence.own += self._take(sequence.missing(1))
            self.running.append(sequence)
            num_tokens += sequence.num_cached - sequence.num_kept
            taken.append(Prefix(deque([sequence]), [*sequence.shared, *sequence.own], sequence.num_kept))
        return taken, num_tokens

    def _enough_ready(self) -> bool:
        startable = (prefix for prefix in self.ready if not (prefix.later and self._holds_back))
        return sum(len(prefix.waiting) for prefix in startable) >= self.num_slots - len(self.running)

    @property
    def _holds_back(self) -> bool:
        """Whether what nobody waits for may not start: something else gave up its place, and needs the pages to be read again."""
        return bool(self.running and self.unread and not self.unread[0].later)

    def _may_read_ahead(self) -> bool:
        return sum(len(prefix.pages) for prefix in self.ready) < self.num_pages * READ_AHEAD

    def start(self, num_steps: int) -> list[tuple[int, int]]:
        """Fill free slots with ready completions; the pages to copy, as (source, target)."""
        copies = []
        while len(self.running) < self.num_slots:
            prefix = next((each for each in self.ready if each.end is None), None)
            if prefix is None or (prefix.later and self._holds_back):
                break
            sequence = prefix.waiting[0]
            num_shared, partial = divmod(sequence.num_cached, PAGE)
            sequence.shared = prefix.pages[:num_shared]
            needed = sequence.missing(num_steps)
            if not self._make_room(needed):
                break
            sequence.own = self._take(needed)
            sequence.prefix = prefix
            prefix.num_users += 1
            if partial:
                copies.append((prefix.pages[num_shared], sequence.own[0]))
            self.running.append(sequence)
            prefix.waiting.popleft()
            if not prefix.waiting:
                self.ready.remove(prefix)
        return copies

    def grow(self, num_steps: int) -> None:
        """Give every running sequence the pages for its next steps; if there are too few, the shortest give up their places."""
        for sequence in sorted(self.running, key=_priority, reverse=True) if self._scarce(num_steps) else self.running:
            while sequence.prefix is not None and not self._make_room(sequence.missing(num_steps)):
                self._preempt(min(self.running, key=_priority))
            if sequence.prefix is not None:
                sequence.own += self._take(sequence.missing(num_steps))

    def _scarce(self, num_steps: int) -> bool:
        return sum(sequence.missing(num_steps) for sequence in self.running) > len(self._free)

    def finish(self, finished: list[Sequence]) -> None:
        """Let go of sequences; of one that had given up its place, too."""
        gone = set(finished)
        for sequence in finished:
            if sequence.prefix is None:
                self.unread = deque(prefix for prefix in self.unread if prefix.waiting[0] is not sequence)
            else:
                self._release(sequence)
        self.running = [sequence for sequence in self.running if sequence not in gone]

    def _preempt(self, sequence: Sequence) -> None:
        """Its tokens are read again later, when the host has recorded all of them."""
        assert len(self.running) > 1, "a lone sequence always has pages"
        self.running.remove(sequence)
        self._release(sequence)
        self.unread.insert(_first_later(self.unread) if sequence.later else 0, Prefix(deque([sequence])))
        self.num_preempted += 1

    def _release(self, sequence: Sequence) -> None:
        prefix = sequence.prefix
        assert prefix is not None, "only a running sequence has pages to give back"
        self._free += sequence.own
        sequence.shared, sequence.own, sequence.prefix = [], [], None
        prefix.num_users -= 1
        if not prefix.num_users and not prefix.waiting:
            self._free += prefix.pages
            prefix.pages = []

    def _take(self, number: int) -> list[int]:
        assert number <= len(self._free), f"{number} pages asked for, {len(self._free)} free"
        taken = self._free[len(self._free) - number :]
        del self._free[len(self._free) - number :]
        return taken
