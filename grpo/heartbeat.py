"""Nobody waits for the dead: a process ends when one of the others has failed or is not heard from.

A collective waits inside C for all processes. If one of them dies, the others mostly get an error with gloo, but wait until the
group's timeout with NCCL; and where there are several machines, the launcher of one does not watch the processes of another. So
two threads of each process talk to the others through the store at which they met, over a connection of their own. This ends a
process with exit code `PEER_LOST` and one line that names the rank, at most `LIMIT_SECONDS` and four beats after the fact:

- Another failed with an exception. It says so itself, before its traceback; only the first of several is heard.
- Another has not been heard from: it was killed, its machine is gone, or it is frozen.
- The store itself is gone or does not answer. It lives in the launcher on the first machine, or in rank 0.

Being slow ends nothing: a beat needs no more than Python's lock (the GIL) once within the limit, whatever the main thread waits
for or computes. Silence is counted in a process's own beats, not by the clock, so a run that is frozen as a whole, as by Ctrl-Z,
goes on afterwards. A process that has left is not missed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from types import TracebackType
from typing import NoReturn

from grpo import terminal

BEAT_SECONDS = 3.0
LIMIT_SECONDS = 40.0
PEER_LOST = 76
"""The exit code of a process that ends because another one did."""

START = timedelta(minutes=10)  # for all to arrive, which have just met to form their group
NOBODY, LEFT = "nobody", "left"  # said before a failure; and instead of a beat

_current: Heartbeat | None = None
_num_started = 0  # a second one finds other names in the same store


def start(
    *, rank: int, world_size: int, beat_seconds: float = BEAT_SECONDS, limit_seconds: float = LIMIT_SECONDS
) -> None:
    """Begin to beat and to listen, unless this process is alone or does so already. Every process calls it."""
    global _current, _num_started
    if world_size > 1 and _current is None:
        _num_started += 1
        _current = Heartbeat(rank, world_size, beat_seconds=beat_seconds, limit_seconds=limit_seconds)


def stop() -> None:
    """From here on the others do not miss this process, unless an error is what brought it here. Python's end calls it too."""
    global _current
    if _current is not None:
        error = sys.exception()
        if isinstance(error, Exception):
            _current.announce(f"{type(error).__name__}: {error}")
        _current.leave()
        _current = None


def announce(reason: str) -> str | None:
    """Tell the other processes that this one fails, so that they end too; None, or which other has failed before."""
    return None if _current is None else _current.announce(reason)


class Heartbeat:
    """The threads of one process."""

    def __init__(self, rank: int, world_size: int, *, beat_seconds: float, limit_seconds: float) -> None:
        from torch.distributed import TCPStore

        self.rank = rank
        self._beat_seconds = beat_seconds
        self._limit_seconds = limit_seconds
        self._max_missed = limit_seconds / beat_seconds
        self._address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=START)
        self._keys = [f"heartbeat/{_num_started}/{peer}" for peer in range(world_size)]
        self._failure_key = f"heartbeat/{_num_started}/failure"
        self._store.compare_set(self._failure_key, "", NOBODY)
        self._store.set(self._keys[rank], socket.gethostname())
        self._hosts = [host.decode() for host in self._store.multi_get(self._keys)]  # waits until all are there
        self._said = list(self._hosts)
        self._unanswered = 0  # beats
        self._over = threading.Event()
        self._ending = threading.RLock()
        self._previous_hook = sys.excepthook
        sys.excepthook = self._on_uncaught
        atexit.register(stop)
        for work in (self._listen, self._watch_store):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def leave(self) -> None:
        """Stop listening. After a failure of this process the others have a few beats to hear of it, otherwise time to finish."""
        if sys.excepthook == self._on_uncaught:
            sys.excepthook = self._previous_hook
        atexit.unregister(stop)
        failed = self._over.is_set()
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may have ended, and with it whoever would miss this process
            self._wave(3 * self._beat_seconds if failed else self._limit_seconds)

    def _wave(self, seconds: float) -> None:
        """Say goodbye. The store may lie in rank 0, which therefore stays until all have done so, or for so many seconds."""
        self._store.set(self._keys[self.rank], LEFT)
        deadline = time.monotonic() + seconds
        while self.rank == 0 and time.monotonic() < deadline:
            if all(said == LEFT.encode() for said in self._store.multi_get(self._keys)):
                return
            time.sleep(0.05)

    def announce(self, reason: str) -> str | None:
        """Say that this process fails, unless another has said so before; None, or what that one said."""
        mine = f"{self._name(self.rank)} has failed: {_first_line(reason)}"
        first = self._store.compare_set(self._failure_key, NOBODY, mine).decode()
        if first != mine:
            return first
        self._over.set()
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _listen(self) -> None:
        """Beat, and judge the others by what they say."""
        silent: Counter[int] = Counter()
        beats = 0
        while not self._over.wait(self._beat_seconds):
            beats += 1
            try:
                self._store.set(self._keys[self.rank], str(beats))
                *said, failure = (value.decode() for value in self._store.multi_get([*self._keys, self._failure_key]))
            except RuntimeError as error:
                if self._over.is_set() or self._said[0] == LEFT:
                    return
                self._end(
                    f"the store at {self._address}, in rank 0 or its launcher, is gone: {_first_line(str(error))}"
                )
            self._unanswered = 0
            if failure != NOBODY and not self._over.is_set():
                self._tell_and_end(failure)
            for peer, (before, now) in enumerate(zip(self._said, said, strict=True)):
                silent[peer] = silent[peer] + 1 if now == before != LEFT else 0
                if silent[peer] > self._max_missed and not self._over.is_set():
                    self._tell_and_end(
                        f"{self._name(peer)} has died: nothing was heard from it for {self._limit_seconds:g} s, so it was "
                        "killed, its machine is gone, or it is frozen"
                    )
            self._said = said

    def _watch_store(self) -> None:
        """A store in a frozen process, or behind a broken network, lets `_listen` wait for ever."""
        while not self._over.wait(self._beat_seconds):
            self._unanswered += 1
            if self._unanswered > self._max_missed + 1:
                self._end(
                    f"the store at {self._address}, in rank 0 or its launcher, has not answered for {self._limit_seconds:g} s: "
                    f"{self._name(0)} is frozen, or its machine or the network is gone"
                )

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Only the process that failed first shows a traceback."""
        if not self._over.is_set():
            if _lost_connection(error):  # by the end of this sleep `_listen` knows who died, and has ended this process
                time.sleep(self._limit_seconds + 3 * self._beat_seconds)
            own = _first_line(f"{kind.__name__}: {error}")
            before = self.announce(own)
            if before is not None:
                self._tell_and_end(before if own in before else f"{before} (and then here: {own})")
            _write(f"error: {self._name(self.rank)} has failed; the others end with it\n")
        self._previous_hook(kind, error, trace)

    def _tell_and_end(self, why: str) -> NoReturn:
        """End this process, and let the others know the same reason, whether or not they have found it out."""
        self._ending.acquire()  # for good: said once
        with contextlib.suppress(RuntimeError):  # the store may end at the same moment
            self._store.compare_set(self._failure_key, NOBODY, why)
            self._wave(3 * self._beat_seconds)
        self._end(why)

    def _end(self, why: str) -> NoReturn:
        """End this process even if its main thread waits for ever inside a collective. Reward workers die with it."""
        self._ending.acquire()
        terminal.wipe()
        _write(f"error: rank {self.rank} ends, because {why}\n")
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # the main thread may hold its lock
        flush.start()
        flush.join(2)
        os._exit(PEER_LOST)


def _lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:500]


def _write(text: str) -> None:
    """Past Python's buffers and their locks, and in one piece beside what other processes write."""
    os.write(2, text.encode())
