"""MPI without MPI: ranks as threads of which one runs at a time, messages that take their time, and a fake clock.

What happens follows from a seed alone: which rank runs next, how long a message is under way, and the time, which goes
on only when all ranks sleep. Minutes of silence pass in no time, and a run of which the ranks no longer get anywhere
ends with an error instead of a hang.
"""

from __future__ import annotations

import pickle
import sys
import threading
import types
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import Any
from unittest import mock

from ssx_mpi.parallel import dispatch, message_loop
from ssx_mpi.parallel.communicator import MpiCommunicator

# turns and seconds after which ranks that do not come to an end are a fault of what is tested
_MOST_TURNS = 400_000
_LONGEST = 50_000.0


class Stuck(AssertionError):
    """The ranks wait for each other."""


class _Left(BaseException):
    """Another rank failed."""


@dataclass
class _Message:
    tag: int
    source: int
    content: bytes
    arrives: float
    received: bool = False


class _Status:
    def __init__(self) -> None:
        self.message: _Message | None = None

    def Get_count(self, datatype) -> int:
        return len(self.message.content)

    def Get_tag(self) -> int:
        return self.message.tag

    def Get_source(self) -> int:
        return self.message.source


class World:
    """The ranks, their messages and the time."""

    def __init__(self, size: int, seed: int, latency: float) -> None:
        self.size, self.latency = size, latency
        self.random = Random(seed)
        self.now = 0.0
        self.turns = 0
        self.under_way: dict[tuple[int, int], deque[_Message]] = defaultdict(deque)
        self.entered: dict[int, set[int]] = defaultdict(set)
        self.slots: dict[int, dict[int, bytes]] = defaultdict(dict)
        self.error: BaseException | None = None
        self._here = threading.local()
        self._wakes = dict.fromkeys(range(size), 0.0)
        self._turn = [threading.Semaphore(0) for _ in range(size)]

    @property
    def rank(self) -> int:
        return self._here.rank

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def live(rank: int) -> None:
            self._here.rank = rank
            self._turn[rank].acquire()
            try:
                if self.error is None:
                    results[rank] = function(rank)
            except _Left:
                pass
            except BaseException as error:
                self.error = self.error or error
            del self._wakes[rank]
            self._next()

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        self._turn[self.random.randrange(self.size)].release()
        for thread in threads:
            thread.join(120.0)
        assert not any(thread.is_alive() for thread in threads), "a rank is stuck outside MPI"
        if self.error is not None:
            raise self.error
        return results

    def _next(self) -> None:
        """Give the turn to another rank, or to the same."""
        self.turns += 1
        if self._wakes:
            awake = [rank for rank, wakes in self._wakes.items() if wakes <= self.now]
            if not awake:
                self.now = min(self._wakes.values())
                awake = [rank for rank, wakes in self._wakes.items() if wakes <= self.now]
            if self.error is None and (self.turns > _MOST_TURNS or self.now > _LONGEST):
                self.error = Stuck(f"no end after {self.turns} turns and {self.now:.0f} s")
            self._turn[self.random.choice(awake) if self.error is None else next(iter(self._wakes))].release()

    def let_others(self, seconds: float = 0.0) -> None:
        """This rank sleeps for a while."""
        rank = self.rank
        self._wakes[rank] = self.now + seconds
        self._next()
        self._turn[rank].acquire()
        if self.error is not None:
            raise _Left

    def wait_until(self, condition: Callable[[], bool], look_again: float) -> None:
        """This rank sleeps until `condition`, at which it looks every `look_again` seconds."""
        while not condition():
            self.let_others(look_again)


class _Request:
    def __init__(self, world: World, through: Callable[[], bool]) -> None:
        self._world, self._through = world, through

    def Test(self) -> bool:
        self._world.let_others()
        return self._through()


class _Matched:
    def __init__(self, message: _Message) -> None:
        self._message = message

    def Recv(self, buffer) -> None:
        buffer[0][:] = self._message.content
        self._message.received = True


@dataclass
class Comm:
    """What the dispatch asks of an mpi4py communicator, on one rank."""

    world: World
    rank: int
    _n_collective: int = 0
    _n_barriers: int = 0
    freed: bool = field(default=False)

    @property
    def size(self) -> int:
        return self.world.size

    def Dup(self) -> Comm:
        return Comm(self.world, self.rank, 1_000_000)

    def Free(self) -> None:
        self.freed = True

    def allgather(self, obj: Any) -> list[Any]:
        number, self._n_collective = self._n_collective, self._n_collective + 1
        slots = self.world.slots[number]
        slots[self.rank] = pickle.dumps(obj)
        self.world.wait_until(lambda: len(slots) == self.size, 1e-4)
        return [pickle.loads(slots[rank]) for rank in range(self.size)]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self.allgather(obj)[root]

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        found = self.allgather(obj)
        return found if self.rank == root else None

    def Issend(self, buffer, to: int, tag: int) -> _Request:
        world = self.world
        earlier = world.under_way[self.rank, to]
        # messages between two ranks do not overtake each other
        arrives = max(world.now + world.random.uniform(0.0, world.latency), earlier[-1].arrives if earlier else 0.0)
        message = _Message(int(tag), self.rank, bytes(buffer[0]), arrives)
        earlier.append(message)
        return _Request(world, lambda: message.received)

    def Improbe(self, source: int, tag: int, status: _Status) -> _Matched | None:
        world = self.world
        world.let_others()
        arrived = [
            queue
            for (_, to), queue in world.under_way.items()
            if to == self.rank and queue and queue[0].arrives <= world.now
        ]
        if not arrived:
            return None
        status.message = world.random.choice(arrived).popleft()
        return _Matched(status.message)

    def Ibarrier(self) -> _Request:
        number, self._n_barriers = self._n_barriers, self._n_barriers + 1
        entered = self.world.entered[number]
        entered.add(self.rank)
        return _Request(self.world, lambda: len(entered) == self.size)


class Clock:
    """Stands for the module `time`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now

    perf_counter = monotonic

    def sleep(self, seconds: float) -> None:
        self._world.let_others(seconds)


@contextmanager
def _in_place_of_mpi(world: World) -> Iterator[None]:
    module = types.ModuleType("mpi4py")
    module.MPI = types.SimpleNamespace(  # type: ignore[attr-defined]
        BYTE="byte", ANY_SOURCE=-1, ANY_TAG=-1, Status=_Status, pickle=pickle
    )
    before = sys.modules.get("mpi4py")
    sys.modules["mpi4py"] = module
    clock = Clock(world)
    try:
        with mock.patch.object(message_loop, "time", clock), mock.patch.object(dispatch, "time", clock):
            yield
    finally:
        if before is None:
            del sys.modules["mpi4py"]
        else:
            sys.modules["mpi4py"] = before


def on_simulated_ranks(
    size: int,
    function: Callable[[MpiCommunicator, Clock], Any],
    seed: int = 0,
    latency: float = 1e-3,
) -> tuple[list[Any], World]:
    """What ``function(comm, clock)`` returns on each of `size` ranks, and their world.

    Raises
    ------
    Stuck
        When the ranks do not come to an end.
    """
    world = World(size, seed, latency)
    with _in_place_of_mpi(world):
        results = world.run(lambda rank: function(MpiCommunicator(Comm(world, rank)), Clock(world)))
    left = [message for queue in world.under_way.values() for message in queue]
    assert not left, f"{len(left)} messages were sent and not received"
    return results, world
