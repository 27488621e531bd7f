"""Nobody waits in vain: a process ends when another has failed or is not heard from, or when all wait for each other.

A collective waits inside C for all processes. If one of them dies, the others mostly get an error with gloo, but wait until the
group's timeout with NCCL; and where there are several machines, the launcher of one does not watch the processes of another. If
one is in another collective than the rest, all wait until the timeout. So threads of each process talk to the others through a
store in rank 0, which outlives the launcher and its store. This ends a process with exit code `PEER_LOST` and a line that names
the rank:

- Another failed with an exception. It says so itself, before its traceback; only the first of several is heard.
- Another has not been heard from: it was killed, its machine is gone, or it is frozen.
- The store itself is gone or does not answer, and with it rank 0.
- No process makes progress (`progress.stalled`). Each says where it is, the first also where all others are.

The first three take `LIMIT_SECONDS` and four beats at most. Being slow ends nothing: a beat needs no more than Python's lock (the
GIL) once within the limit, whatever the main thread waits for or computes. Seconds are counted in a process's own beats, not by
the clock, so a run that is frozen as a whole, as by Ctrl-Z, goes on afterwards. A process that has left is not missed.
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
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from grpo.system import progress, terminal

if TYPE_CHECKING:
    from torch.distributed import TCPStore

BEAT_SECONDS = 3.0
LIMIT_SECONDS = 40.0
PEER_LOST = 76
"""The exit code of a process that ends because another one did."""

START = timedelta(minutes=10)  # for all to arrive, which have just met to form their group
NOBODY, LEFT = "nobody", "left"  # said before a failure; and instead of a beat

_current: Heartbeat | None = None
_num_started = 0  # a second one finds other names in the same store


@dataclass(frozen=True)
class Limits:
    """Seconds: between beats, of silence, without progress on any process, and the same once a signal asked for a stop."""

    beat: float = BEAT_SECONDS
    silence: float = LIMIT_SECONDS
    stall: float = progress.STALL_SECONDS
    stop: float = progress.STOP_SECONDS


def start(*, rank: int, world_size: int, limits: Limits = Limits()) -> None:
    """Begin to beat and to listen, unless this process is alone or does so already. Every process calls it."""
    global _current, _num_started
    if world_size > 1 and _current is None:
        _num_started += 1
        progress.watch_this_thread()
        _current = Heartbeat(rank, world_size, limits)


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

    def __init__(self, rank: int, world_size: int, limits: Limits) -> None:
        self.rank = rank
        self._limits = limits
        self._max_missed = limits.silence / limits.beat
        self._store = _meet(rank)
        self._address = f"{self._store.host}:{self._store.port}"
        self._keys = [f"pulse/{peer}" for peer in range(world_size)]
        self._store.compare_set("failure", "", NOBODY)
        self._store.set(self._keys[rank], socket.gethostname())
        self._hosts = [host.decode() for host in self._store.multi_get(self._keys)]  # waits until all are there
        self._said = list(self._hosts)
        self._unanswered = 0  # beats
        self._over = threading.Event()
        self._ending = threading.RLock()
        self._speaking = threading.Lock()
        self._previous_hook = sys.excepthook
        sys.excepthook = self._on_uncaught
        atexit.register(stop)
        for work in (self._listen, self._watch_store, self._say_where):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def leave(self) -> None:
        """Stop listening. After a failure of this process the others have a few beats to hear of it, otherwise time to finish."""
        if sys.excepthook == self._on_uncaught:
            sys.excepthook = self._previous_hook
        atexit.unregister(stop)
        failed = self._over.is_set()
        self._over.set()
        with contextlib.suppress(RuntimeError):  # the store may have ended, and with it whoever would miss this process
            self._wave(3 * self._limits.beat if failed else self._limits.silence)

    def _wave(self, seconds: float, *, stays: bool = False) -> None:
        """Say goodbye. The store lies in rank 0, which therefore stays until all have done so, or for so many seconds.

        Args: stays: any other does so too.
        """
        with self._speaking:
            self._store.set(self._keys[self.rank], LEFT)
        deadline = time.monotonic() + seconds
        while (stays or self.rank == 0) and time.monotonic() < deadline:
            if all(said == LEFT.encode() for said in self._store.multi_get(self._keys)):
                return
            time.sleep(0.05)

    def announce(self, reason: str) -> str | None:
        """Say that this process fails, unless another has said so before; None, or what that one said."""
        mine = f"{self._name(self.rank)} has failed: {_first_line(reason)}"
        first = self._store.compare_set("failure", NOBODY, mine).decode()
        if first != mine:
            return first
        self._over.set()
        return None

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _listen(self) -> None:
        """Beat, and judge the others by what they say."""
        silent: Counter[int] = Counter()
        observer = progress.Observer(self._limits.beat)
        while not self._over.wait(self._limits.beat):
            try:
                with self._speaking:
                    if self._over.is_set():  # nothing may follow the goodbye
                        return
                    self._store.set(self._keys[self.rank], str(observer.beat()))
                *said, failure = (value.decode() for value in self._store.multi_get([*self._keys, "failure"]))
            except RuntimeError as error:
                if self._over.is_set() or self._said[0] == LEFT:
                    self._over.set()  # the store has ended with rank 0, and nobody is to miss its answers
                    return
                self._end(f"the store at {self._address}, in rank 0, is gone: {_first_line(str(error))}")
            self._unanswered = 0
            if failure == NOBODY:
                failure = self._silence(silent, said) or self._stall(said) or NOBODY
            if failure != NOBODY and not self._over.is_set():
                self._tell_and_end(failure)
            self._said = said

    def _silence(self, silent: Counter[int], said: list[str]) -> str | None:
        """Of whom nothing is heard; `silent` counts the beats since each was."""
        for peer, (before, now) in enumerate(zip(self._said, said, strict=True)):
            silent[peer] = silent[peer] + 1 if now == before != LEFT else 0
            if silent[peer] > self._max_missed:
                return (
                    f"{self._name(peer)} has died: nothing was heard from it for {self._limits.silence:g} s, so it was "
                    "killed, its machine is gone, or it is frozen"
                )
        return None

    def _stall(self, said: list[str]) -> str | None:
        """Why those that are still there will never go on, if they will not."""
        pulses = [progress.Pulse.of(text) for text in said if text != LEFT]
        return progress.stalled(pulses, stall_seconds=self._limits.stall, stop_seconds=self._limits.stop)

    def _watch_store(self) -> None:
        """A store in a frozen process, or behind a broken network, lets `_listen` wait for ever."""
        while not self._over.wait(self._limits.beat):
            self._unanswered += 1
            if self._unanswered > self._max_missed + 1:
                self._end(
                    f"the store at {self._address}, in rank 0, has not answered for {self._limits.silence:g} s: "
                    f"{self._name(0)} is frozen, or its machine or the network is gone"
                )

    def _say_where(self) -> None:
        """Not in `_listen`: the line of code is read from a disk that may be slow, and a beat waits for nothing."""
        with contextlib.suppress(RuntimeError):  # without the store there is nobody to tell
            while not self._over.wait(self._limits.beat):
                self._store.set(_place_key(self.rank), progress.describe())

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Only the process that failed first shows a traceback."""
        if not self._over.is_set():
            if _lost_connection(error):  # by the end of this sleep `_listen` knows who died, and has ended this process
                seconds = self._limits.silence + 3 * self._limits.beat
                with progress.busy("waiting to hear who has died", 2 * seconds):
                    time.sleep(seconds)
            own = _first_line(f"{kind.__name__}: {error}")
            before = self.announce(own)
            if before is not None:
                self._tell_and_end(before if own in before else f"{before} (and then here: {own})")
            terminal.say_at_once(f"error: {self._name(self.rank)} has failed; the others end with it")
        self._previous_hook(kind, error, trace)

    def _tell_and_end(self, why: str) -> NoReturn:
        """End this process, and let the others know the same reason, whether or not they have found it out."""
        self._ending.acquire()  # for good: said once
        places = ""
        with contextlib.suppress(RuntimeError):  # the store may end at the same moment
            self._store.compare_set("failure", NOBODY, why)
            if why.startswith(progress.STALLED) and self._store.add("table", 1) == 1:
                places = self._places()
        self._say(why, places)
        with contextlib.suppress(RuntimeError):
            # at the end of one, an error of the others' collectives would hide where they were
            self._wave(3 * self._limits.beat, stays=why.startswith(progress.STALLED))
        os._exit(PEER_LOST)

    def _places(self) -> str:
        """Where all processes are, a line for each; one of them prints it, so that one log tells it all."""
        lines = [f"  {self._name(rank)}: {self._place_of(rank)}\n" for rank in range(len(self._keys))]
        return "".join(["where each of them is:\n", *lines])

    def _place_of(self, rank: int) -> str:
        return (
            self._store.get(_place_key(rank)).decode() if self._store.check([_place_key(rank)]) else "it has just begun"
        )

    def _end(self, why: str) -> NoReturn:
        """End this process even if its main thread waits for ever inside a collective. Reward workers die with it."""
        self._ending.acquire()
        self._say(why)
        os._exit(PEER_LOST)

    def _say(self, why: str, places: str = "") -> None:
        """Why this process ends; if all wait for each other, also where it is, and what remains."""
        terminal.wipe()
        said = f"error: rank {self.rank} ends, because {why}"
        if why.startswith(progress.STALLED):
            stacks = "".join(f"[rank{self.rank}] {line}\n" for line in progress.stacks().splitlines())
            said += f"; it is in phase {progress.describe()}; {progress.what_remains()}\n{places}{stacks}".rstrip("\n")
        terminal.say_at_once(said)
        terminal.flush_within(2)  # the main thread may hold its lock


def _meet(rank: int) -> TCPStore:
    """A store in rank 0. Where it is, is said at the one at which the processes met to form their group.

    That one may lie in the launcher, and what is to end a run must not depend on whether the launcher lives.
    """
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    met = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=START)
    key = f"heartbeat/{_num_started}"
    if rank == 0:
        own = TCPStore(_address_for_others(host, port), 0, is_master=True, wait_for_workers=False, timeout=START)
        met.set(key, f"{own.host} {own.port}")
        return own
    there, its_port = met.get(key).decode().split()  # waits for it
    return TCPStore(there, int(its_port), is_master=False, wait_for_workers=False, timeout=START)


def _address_for_others(host: str, port: int) -> str:
    """Under which they reach this process: MASTER_ADDR if that is this machine, else the address from which it reaches that."""
    with socket.create_connection((host, port)) as connection:
        own, peer = connection.getsockname()[0], connection.getpeername()[0]
    return host if own == peer or ip_address(own).is_loopback else own


def _place_key(rank: int) -> str:
    return f"place/{rank}"


def _lost_connection(error: BaseException) -> bool:
    """Whether an error says no more than that another process is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:500]
