"""Handing out work over the ranks, and bringing the results to where they are kept.

Rank 0 coordinates: it hands out ranges of items, in order, long at first and shrinking towards the end. Every rank
can work out which range is its first, and takes it without asking: thousands of requests at the start would wait for
each other. A rank asks for its next range when it begins the last one that it has, so that the answer is there before
it is needed. Results go straight to the rank that keeps them, never through the coordinator. Small numbers about
finished items travel with the requests. From some thousands of ranks on, each group of a thousand has a coordinator of
its own; the items go to the groups in turn, a stretch at a time, and the coordinators tell rank 0 once a second what
was finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from ssx_mpi.parallel.communicator import Communicator, MpiCommunicator, SerialCommunicator
from ssx_mpi.parallel.message_loop import Loop, MpiLoop, SerialLoop
from ssx_mpi.parallel.telemetry import Traffic


class Job(Protocol):
    """What is dispatched; the dispatch never looks into it."""

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[Any, Any] | None:
        """Do `item`; return its value for the coordinator (a small thing) and its result, None if it was not finished.

        Long work calls `breathe` now and then, so that other ranks need not wait for answers from this one.
        """

    def note(self, value: Any) -> int:
        """Rank 0: an item was finished with `value`; returns how much it counts towards what is wanted."""

    def waiting(self) -> None:
        """This rank has nothing to do but to wait for others."""

    def silent(self, rank: int, seconds: float) -> None:
        """Nothing was heard of `rank` for so long, though it has items in hand; on rank 0, or of it on the next one."""

    def keeper(self, item: int) -> int:
        """The rank that keeps the result of `item`."""

    def keep(self, item: int, result: Any) -> Any:
        """Keep a result on its keeper; what is returned, unless None, is news for rank 0 (see :class:`JobWithNews`)."""

    def progress(self, done: int) -> None:
        """Rank 0, every now and then: items finished so far."""

    def stopping(self) -> bool:
        """True once this rank wants the whole job to stop: items in hand are finished, no others begun."""


class JobWithNews(Job, Protocol):
    """A job of which some results are news."""

    def news(self, content: Any) -> None:
        """Rank 0: something was kept."""


def run(
    comm: Communicator,
    job: Job,
    pending: list[tuple[int, int]],
    wanted: int | None = None,
    longest: int = 64,
) -> tuple[int, bool, Traffic]:
    """Do the `pending` items of `job` over all ranks; collective.

    Parameters
    ----------
    comm
        The ranks.
    job
        What to do; the same on every rank.
    pending : list of (start, stop)
        Items to do in the order in which they are begun; the same on every rank.
    wanted : int, optional
        Stop as soon as the values of the first items, in order, add up to this.
    longest : int
        Most items handed out at once.

    Returns
    -------
    end : int
        Items before this one count; the same on every rank.
    stopped : bool
        Whether a rank asked to stop and items were left undone.
    traffic : Traffic
        What the dispatch cost on this rank.
    """
    began = time.monotonic()
    if isinstance(comm, MpiCommunicator):
        loop: Loop = MpiLoop(comm, job, pending, wanted, longest)
    elif isinstance(comm, SerialCommunicator) and comm.size == 1:
        loop = SerialLoop(job, pending, wanted)
    else:
        # on another communicator every rank would do every item
        raise TypeError(f"work cannot be dispatched over a {type(comm).__name__}")
    loop.run()
    loop.traffic.seconds = time.monotonic() - began
    left = loop.prefix.cutoff is None and loop.done < sum(stop - start for start, stop in pending)
    end, stopped = comm.bcast((loop.prefix.end, loop.stopped and left))
    return end, stopped, loop.traffic
