"""The native engine's bookkeeping: nothing is lost, and no page belongs to two."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest

from grpo.rollout.paged import PAGE, num_pages_for
from grpo.rollout.slots import Prefix, Sequence, Slots


def make_slots(lens: list[tuple[int, int]], *, group: int, num_slots: int, num_pages: int) -> Slots:
    """Groups of `group` sequences, of (prompt length, limit)."""
    prefixes = [
        Prefix(deque(Sequence(i * group + g, [i] * length, limit, seed=0) for g in range(group)))
        for i, (length, limit) in enumerate(lens)
    ]
    pages_each = max(num_pages_for(length + limit) for length, limit in lens)
    return Slots(prefixes, num_slots=num_slots, pages=range(1, num_pages + 1), pages_each=pages_each)


def owners(slots: Slots, prefixes: set[Prefix]) -> Counter[int]:
    pages: Counter[int] = Counter(slots._free)
    for sequence in (*slots.running, *slots.set_aside, *slots.returning):
        pages.update(sequence.own)
        prefixes.add(sequence.prefix)
    for prefix in prefixes | set(slots.ready):
        pages.update(prefix.pages)
    return pages


def run(slots: Slots, *, num_pages: int, rng: random.Random, num_steps: int = 4) -> tuple[list[int], int]:
    """Play the device: every running sequence takes its steps or ends early; the order of ends, and the most that ran."""
    ended, most = [], 0
    prefixes: set[Prefix] = set()
    while slots:
        while taken := slots.read_ahead(1000):
            prefixes.update(taken)
        slots.start(num_steps)
        slots.grow(num_steps)
        assert owners(slots, prefixes) == Counter(range(1, num_pages + 1)), "a page is lost or has two owners"
        assert slots.running, "nothing runs, and nothing ever will"
        most = max(most, len(slots.running))
        finished = []
        for sequence in slots.running:
            steps = min(num_steps, sequence.remaining)
            pages = sequence.shared + sequence.own
            assert len(pages) * PAGE >= sequence.num_cached + steps, "a step without a page"
            sequence.tokens += [7] * steps
            if not sequence.remaining or rng.random() < 0.02:
                finished.append(sequence)
        slots.finish(finished)
        ended += [sequence.index for sequence in finished]
    return ended, most


@pytest.mark.parametrize("num_pages", [40, 80, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_every_sequence_ends_once_whatever_the_memory(num_pages: int, seed: int):
    rng = random.Random(seed)
    lens = [(rng.randint(1, 300), rng.randint(1, 400)) for _ in range(60)]
    slots = make_slots(lens, group=5, num_slots=16, num_pages=num_pages)
    ended, most = run(slots, num_pages=num_pages, rng=rng)
    assert sorted(ended) == list(range(300))
    assert most <= 16
    if num_pages == 2000:
        assert (most, slots.num_preempted) == (16, 0)
    if num_pages == 40:
        assert slots.num_preempted > 0


@pytest.mark.parametrize("num_pages", [40, 80, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_sequences_that_wait_for_words_keep_their_pages_while_nobody_needs_them(num_pages: int, seed: int):
    rng = random.Random(seed)
    lens = [(rng.randint(1, 300), rng.randint(100, 400)) for _ in range(30)]
    slots = make_slots(lens, group=4, num_slots=16, num_pages=num_pages)
    prefixes: set[Prefix] = set()
    waiting: list[tuple[Sequence, int]] = []  # with the limit of all its tokens
    over, num_read, most = [], 0, 0
    while slots or waiting:
        while taken := slots.read_ahead(1000):
            for prefix in taken:
                length = len(prefix.tokens)
                assert prefix.num_kept <= length <= len(prefix.pages) * PAGE
                num_read += length - prefix.num_kept
                if not any(prefix.waiting[0] is each for each in slots.running):
                    prefixes.add(prefix)
        slots.start(4)
        slots.grow(4)
        assert owners(slots, prefixes) == Counter(range(1, num_pages + 1)), "a page is lost or has two owners"
        assert slots.running or waiting, "nothing runs, and nothing ever will"
        most = max(most, len(slots.running))
        for sequence in [*slots.running]:
            assert len(sequence.shared + sequence.own) * PAGE >= sequence.num_cached + min(4, sequence.remaining)
            sequence.tokens += [7] * min(4, sequence.remaining)
            if sequence.remaining and rng.random() > 0.1:
                continue
            sequence.num_kept = sequence.num_cached
            slots.set_down(sequence)
            waiting.append((sequence, len(sequence.prompt) + sequence.limit))
        for sequence, end in [each for each in waiting if rng.random() < 0.3 or not slots]:
            waiting.remove((sequence, end))
            words = rng.choice([1, 3, 70])
            so_far = [*sequence.prompt, *sequence.tokens, *[9] * words]
            if len(so_far) >= end:
                slots.let_go(sequence)
                over.append(sequence.index)
            else:
                slots.take_up(sequence, Sequence(sequence.index, so_far, end - len(so_far), seed=0))
    assert sorted(over) == list(range(120))
    assert most <= 16
    assert Counter(slots._free) == Counter(range(1, num_pages + 1))
    if num_pages == 2000:
        assert slots.num_preempted == 0
    if num_pages == 40:
        assert slots.num_preempted > 0


def test_pages_are_not_taken_from_those_that_wait_where_that_is_not_enough():
    slots = make_slots([(4 * PAGE, 4 * PAGE)] * 5, group=1, num_slots=8, num_pages=50)
    while slots.read_ahead(10**6):
        slots.start(4)
    runs, waits = slots.running[:-1], slots.running[-1]
    for sequence in runs:
        sequence.tokens += [7] * (3 * PAGE)
    slots.grow(4)
    waits.num_kept = waits.num_cached
    slots.set_down(waits)
    free = slots.num_free_pages
    slots.unread.append(Prefix(deque([Sequence(9, [1] * (10 * PAGE), 8 * PAGE, seed=0)])))
    assert slots.read_ahead(10**6) == []
    assert (slots.set_aside, slots.num_free_pages) == ([waits], free)
    slots.unread.clear()
    slots.take_up(waits, Sequence(4, [*waits.prompt, 1, 2], 9, seed=0))
    (back,) = slots.read_ahead(10**6)
    assert (back.num_kept, len(back.tokens)) == (4 * PAGE - 1, 4 * PAGE + 1)


def test_a_prefix_that_only_those_who_wait_hold_is_room_for_another():
    slots = make_slots([(20 * PAGE, PAGE)], group=2, num_slots=8, num_pages=64)
    slots.read_ahead(10**6)
    slots.start(4)
    for sequence in [*slots.running]:
        slots.set_down(sequence)
    slots.unread.append(Prefix(deque([Sequence(9, [1] * (30 * PAGE), 1, seed=0)])))
    (taken,) = slots.read_ahead(10**6)
    assert len(taken.pages) == 30  # and the reserve for a sequence of full length is what those who wait would give up
    assert slots.num_preempted == 0


def test_the_keys_of_those_that_return_together_are_bounded():
    slots = make_slots([(40 * PAGE, PAGE)] * 6, group=1, num_slots=8, num_pages=2000)
    while slots.read_ahead(10**6):
        slots.start(4)
    for sequence in [*slots.running]:
        sequence.num_kept = sequence.num_cached
        slots.set_down(sequence)
        slots.take_up(sequence, Sequence(sequence.index, [*sequence.prompt, 1, 2], 9, seed=0))
    sizes = [len(taken) for taken in iter(lambda: slots.read_ahead(21 * PAGE), [])]  # 84 pages of keys, of 40 each
    assert sizes == [2] * 3


def test_a_prompt_is_read_once_and_its_full_pages_are_shared():
    slots = make_slots([(2 * PAGE + 10, 20)], group=3, num_slots=8, num_pages=30)
    (prefix,) = slots.read_ahead(1000)
    assert len(prefix.tokens) == 2 * PAGE + 9
    copies = slots.start(4)
    assert slots.read_ahead(1000) == []
    assert [sequence.shared for sequence in slots.running] == [prefix.pages[:2]] * 3
    assert copies == [(prefix.pages[2], sequence.own[0]) for sequence in slots.running]
    assert len({sequence.own[0] for sequence in slots.running}) == 3


def test_a_prompt_that_fills_its_pages_needs_no_copy():
    slots = make_slots([(PAGE + 1, 20)], group=2, num_slots=8, num_pages=30)
    slots.read_ahead(1000)
    assert slots.start(4) == []


def test_a_sequence_that_gave_up_its_place_is_read_again_with_its_tokens():
    slots = make_slots([(10, 100), (10, 100)], group=1, num_slots=2, num_pages=6)
    slots.read_ahead(1000)
    slots.start(4)
    short, long = slots.running
    for sequence, drawn in ((short, 3), (long, 60)):
        sequence.tokens += [9] * drawn
    taken = slots._take(len(slots._free))
    slots.grow(8)
    assert slots.running == [long]
    assert slots.num_preempted == 1
    slots._free += taken
    (again,) = slots.read_ahead(1000)
    assert again.tokens == [*short.prompt, 9, 9]  # without the last, which is read by its first step
    slots.start(4)
    assert (short.num_cached, short.newest, short.remaining) == (12, 9, 97)


def test_a_sequence_that_ended_while_it_had_no_place_is_not_started_again():
    slots = make_slots([(10, 100), (10, 100)], group=1, num_slots=2, num_pages=6)
    slots.read_ahead(1000)
    slots.start(4)
    first, second = slots.running
    slots._preempt(second)
    slots.finish([second, first])
    assert not slots


@pytest.mark.parametrize("num_pages", [40, 80])
@pytest.mark.parametrize("seed", range(5))
def test_a_sequence_can_be_cancelled_wherever_it_is(num_pages: int, seed: int):
    """Unread, read, running, or where it gave its pages up; others join meanwhile. In the end every page is free."""
    rng = random.Random(seed)
    slots = make_slots(
        [(rng.randint(1, 200), rng.randint(1, 300)) for _ in range(12)], group=3, num_slots=8, num_pages=num_pages
    )
    slots.pages_each = num_pages // 3
    everyone = [sequence for prefix in slots.unread for sequence in prefix.waiting]
    prefixes, ended, num_cancelled = set[Prefix](), set[Sequence](), 0
    while slots:
        if len(everyone) < 60 and rng.random() < 0.3:
            prompt = [1] * rng.randint(1, 200)
            own = [Sequence(len(everyone) + n, prompt, 90, seed=0) for n in range(2)]
            everyone += own
            slots.unread.append(Prefix(deque(own)))
        while taken := slots.read_ahead(1000):
            prefixes.update(taken)
        slots.start(4)
        slots.grow(4)
        for sequence in rng.sample(everyone, 2):
            if sequence not in ended:
                slots.cancel(sequence)
                ended.add(sequence)
                num_cancelled += 1
        for sequence in slots.running:
            sequence.tokens += [7] * min(4, sequence.remaining)
        finished = [sequence for sequence in slots.running if not sequence.remaining]
        slots.finish(finished)
        ended.update(finished)
        assert owners(slots, prefixes) == Counter(range(1, num_pages + 1)), "a page is lost or has two owners"
    assert len(ended) == len(everyone) > num_cancelled > 10
    assert slots.num_free_pages == num_pages
