"""Handing out work over the ranks, and bringing the results to where they are kept: the one message loop.

Rank 0 coordinates: it hands out ranges of items, in order, long at first and shrinking towards the end. Every rank
can work out which range is its first, and takes it without asking: thousands of requests at the start would wait for
each other. A rank asks for its next range when it begins the last one that it has, so that the answer is there before
it is needed. Results go straight to the rank that keeps them, never through the coordinator. Small numbers about
finished items travel with the requests. From some thousands of ranks on, each group of a thousand has a coordinator of
its own, which hands out every so-manieth stretch of items and tells rank 0 once a second what was finished.

The end is found by the non-blocking consensus of Hoefler et al. (2010, PPoPP, "Scalable communication protocols for
dynamic sparse data exchange"): results are sent with synchronous sends; a rank whose sends have all been received and
that gets no more work enters a non-blocking barrier, and goes on receiving until all ranks are in it. A message may be
answered by another one (a result by news), so this is done twice.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol

from ssx_mpi.parallel.communicator import Communicator, MpiCommunicator

#: from this size on, rank 0 only coordinates: one rank in 64 costs less than the others would wait for it
DEDICATED_FROM = 64
#: ranks to one coordinator; with twice as many or more there are several
RANKS_PER_COORDINATOR = 1024
# items that go to one coordinator before the next has its turn, and how often those tell rank 0, in seconds
_STRETCH = 1024
_TELL = 1.0
# a waiting rank looks for messages this often, in seconds; MPI's own waiting would keep a core busy
_POLL = 0.001
# a rank that has sent nothing for so many seconds tells rank 0 that it is there, whenever it can
_BEAT = 20.0
# one of which nothing was heard for so many seconds is named, then again after twice the time, and so on
_SILENT = 60.0
# results that may wait for their keeper before a rank waits for it too; each is a few megabytes
_MOST_UNSENT = 16


class Tag(IntEnum):
    """What a message is."""

    REQUEST = 1
    WORK = 2
    RESULT = 3
    NEWS = 4
    REPORT = 5
    STOP = 6
    BEAT = 7
    FINISHED = 8
    SILENT = 9


@dataclass(frozen=True)
class Work:
    """Answer of the coordinator: items `start` to `stop` - 1, or none any more when they are equal."""

    start: int
    stop: int


def asks_ahead(work: Work, dedicated: bool) -> bool:
    """Whether a rank that begins `work` asks for more, or waits until it is done.

    At the end of a run an item that waits behind a long one would be the last of all. A coordinator that does nothing
    else answers single items at once; one that works too lets others wait for longer than most items take.
    """
    return not dedicated or work.stop - work.start > 1


class Ranges:
    """Pending items, handed out in order in ranges that shrink towards the end (guided self-scheduling).

    Parameters
    ----------
    pending : iterable of (start, stop)
        Items to do, in ranges that do not overlap.
    workers : int
        Ranks that ask.
    longest : int
        Most items in one range.
    """

    def __init__(self, pending: Iterable[tuple[int, int]], workers: int, longest: int) -> None:
        self._pending = deque((start, stop) for start, stop in pending if stop > start)
        self.remaining = sum(stop - start for start, stop in self._pending)
        self._workers = workers
        self._longest = longest

    def next(self) -> Work | None:
        """The next range, None when all are handed out."""
        if not self._pending:
            return None
        start, stop = self._pending.popleft()
        # a rank holds a range and the one after it, so each gets a quarter of its share at the most
        length = max(1, min(self._longest, self.remaining // (4 * self._workers), stop - start))
        if start + length < stop:
            self._pending.appendleft((start + length, stop))
        self.remaining -= length
        return Work(start, start + length)

    def clear(self) -> None:
        """Hand out nothing more."""
        self._pending.clear()
        self.remaining = 0


@dataclass(frozen=True)
class Group:
    """Ranks `first` to `stop` - 1, of which the first coordinates the others; number `number` of `count` groups."""

    number: int
    count: int
    first: int
    stop: int

    @classmethod
    def of(cls, rank: int, size: int, count: int) -> Group:
        """The group of `rank` when `size` ranks form `count` groups."""
        number = ((rank + 1) * count - 1) // size
        return cls(number, count, number * size // count, (number + 1) * size // count)

    @property
    def dedicated(self) -> bool:
        """Whether the coordinator does nothing else."""
        return self.stop - self.first >= DEDICATED_FROM

    @property
    def workers(self) -> range:
        """Ranks that work."""
        return range(self.first + self.dedicated, self.stop)

    def share(self, pending: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The items of this group: of stretches in turn, so that all groups get of every part of the data."""
        if self.count == 1:
            return list(pending)
        own, position = [], 0
        for start, stop in pending:
            while start < stop:
                length = min(_STRETCH - position % _STRETCH, stop - start)
                if position // _STRETCH % self.count == self.number:
                    own.append((start, start + length))
                start, position = start + length, position + length
        return own


def n_groups(size: int, wanted: int | None) -> int:
    """How many coordinators there are; one where the first items are wanted, whose order it knows."""
    return max(1, size // RANKS_PER_COORDINATOR) if wanted is None else 1


class Prefix:
    """How far, in order, items are finished, and when their values add up to what was wanted.

    `wanted` None wants everything. The answer depends on the order of the items alone, not on who finished first.
    """

    def __init__(self, pending: list[tuple[int, int]], wanted: int | None) -> None:
        self._order = itertools.chain.from_iterable(itertools.starmap(range, pending))
        self._next = next(self._order, None)
        self._end = pending[-1][1] if pending else 0
        self._wanted = wanted
        self._total = 0
        self._values: dict[int, int] = {}
        #: items before this one make up what was wanted; None while that is open
        self.cutoff: int | None = None

    def add(self, item: int, value: int) -> bool:
        """Note that `item` is finished with `value`; True when this settles the cutoff."""
        if self._wanted is None or self.cutoff is not None:
            return False
        self._values[item] = value
        while self._next in self._values:
            self._total += self._values.pop(self._next)
            if self._total >= self._wanted:
                self.cutoff = self._next + 1
                return True
            self._next = next(self._order, None)
        return False

    @property
    def end(self) -> int:
        """One past the last item that counts."""
        return self._end if self.cutoff is None else self.cutoff


@dataclass
class Traffic:
    """What the dispatch itself cost on one rank."""

    messages: Counter = field(default_factory=Counter)
    bytes: int = 0
    waiting: float = 0.0
    answering: float = 0.0
    items: int = 0
    seconds: float = 0.0
    coordinates: bool = False


class Listening:
    """Which ranks have not been heard of for long, each named when the silence has doubled since the last time."""

    def __init__(self, ranks: Iterable[int], now: float) -> None:
        self._heard = dict.fromkeys(ranks, now)
        self._named: dict[int, float] = {}
        self._next_look = now

    def heard(self, rank: int, now: float) -> None:
        """`rank` sent something."""
        if rank in self._heard:
            self._heard[rank] = now
            self._named.pop(rank, None)

    def let_go(self, rank: int) -> None:
        """`rank` has done all that it will be given."""
        self._heard.pop(rank, None)

    def silent(self, now: float) -> list[tuple[int, float]]:
        """Ranks to name now, with the seconds of their silence."""
        if now < self._next_look:
            return []
        self._next_look = now + _SILENT / 12
        found = []
        for rank, heard in self._heard.items():
            if now - heard >= self._named.get(rank, _SILENT):
                self._named[rank] = 2 * (now - heard)
                found.append((rank, now - heard))
        return found


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
        """Keep a result on its keeper; what is returned, unless None, is news for rank 0."""

    def news(self, content: Any) -> None:
        """Rank 0: something was kept."""

    def progress(self, done: int) -> None:
        """Rank 0, every now and then: items finished so far."""

    def stopping(self) -> bool:
        """True once this rank wants the whole job to stop: items in hand are finished, no others begun."""


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
        loop: _Loop = _MpiLoop(comm, job, pending, wanted, longest)
    else:
        loop = _SerialLoop(job, pending, wanted)
    loop.run()
    loop.traffic.seconds = time.monotonic() - began
    left = loop.prefix.cutoff is None and loop.done < sum(stop - start for start, stop in pending)
    end, stopped = comm.bcast((loop.prefix.end, loop.stopped and left))
    return end, stopped, loop.traffic


class _Loop:
    prefix: Prefix
    stopped = False
    done = 0
    traffic: Traffic

    def run(self) -> None:
        raise NotImplementedError


class _SerialLoop(_Loop):
    """One process: the items in order."""

    def __init__(self, job: Job, pending: list[tuple[int, int]], wanted: int | None) -> None:
        self.job, self.pending = job, pending
        self.prefix = Prefix(pending, wanted)
        self.traffic = Traffic()

    def run(self) -> None:
        for start, stop in self.pending:
            for item in range(start, stop):
                if self.prefix.cutoff is not None:
                    return
                if self.job.stopping():
                    self.stopped = True
                    return
                outcome = self.job.work(item, _no_one_waits)
                if outcome is None:
                    continue
                value, result = outcome
                self.done += 1
                self.traffic.items += 1
                news = self.job.keep(item, result)
                if news is not None:
                    self.job.news(news)
                self.prefix.add(item, self.job.note(value))
                self.job.progress(self.done)


def _no_one_waits() -> None:
    """One process alone has nobody to answer."""


class _MpiLoop(_Loop):
    """Every rank of an MPI communicator; rank 0 coordinates and, in a small job, works as well."""

    def __init__(self, comm: MpiCommunicator, job: Job, pending, wanted: int | None, longest: int) -> None:
        self.comm = comm.comm.Dup()
        self.rank, self.size = comm.rank, comm.size
        self.job = job
        self.traffic = Traffic()
        self.group = Group.of(self.rank, self.size, n_groups(self.size, wanted))
        self.coordinator = self.group.first
        self.coordinates = self.traffic.coordinates = self.rank == self.coordinator
        self.queue: deque[Work] = deque()
        self.finished: list[tuple[int, Any]] = []
        self.asked = False
        self.no_more = self.rank not in self.group.workers
        # sends that are not known to be received; results apart, because a keeper that hangs must hold up nothing else
        self.sends: deque[tuple[Any, Any]] = deque()
        self.results: list[tuple[Any, Any]] = []
        self.reported = self.leaving = False
        self.spoke = self.told = time.monotonic()
        self.ranges = Ranges(self.group.share(pending), len(self.group.workers), longest)
        for rank in self.group.workers:
            first = self.ranges.next()
            if rank == self.rank and first is not None:
                self.queue.append(first)
        self.prefix = Prefix(pending if self.rank == 0 else [], wanted)
        # of a coordinator: ranks that have all that they will get, and what rank 0 is not told yet
        self.released = 0
        self.untold: list[tuple[int, Any]] = []
        heard_here: Iterable[int] = ()
        if self.coordinates:
            heard_here = range(self.rank + 1, self.group.stop)
        elif self.rank == self.coordinator + 1:
            heard_here = (self.coordinator,)
        self.listening = Listening(heard_here, self.spoke)

    def run(self) -> None:
        barriers: list[Any] = []
        while True:
            self.pump()
            if self.rank == 0:
                self.job.progress(self.done)
            if not self.leaving:
                self._name_silent()
                if self.job.stopping():
                    self._stop()
            item = self._next_item()
            if item is not None:
                self._do(item)
            elif not barriers and self._ready_to_leave():
                self.leaving = True
                barriers.append(self.comm.Ibarrier())
            elif barriers and self._all_received() and barriers[-1].Test():
                if len(barriers) == 2:
                    break
                barriers.append(self.comm.Ibarrier())
            else:
                self._wait()
        self.comm.Free()

    def _ready_to_leave(self) -> bool:
        if self.queue or not self.no_more:
            return False
        if not self.reported:
            self.reported = True
            self._report()
        self._tell()
        return self._all_received() and (not self.coordinates or self.released == len(self.group.workers))

    def _all_received(self) -> bool:
        return not self.sends and not self.results

    def _report(self) -> None:
        """Tell the coordinator what was finished since the last request, and that this was all."""
        finished, self.finished = self.finished, []
        if self.coordinates:
            self._note(finished)
        else:
            self._send(finished, self.coordinator, Tag.REPORT)

    def _tell(self) -> None:
        """A coordinator: tell rank 0 what was finished."""
        self.told = time.monotonic()
        if self.untold:
            untold, self.untold = self.untold, []
            self._send(untold, 0, Tag.FINISHED)

    def _name_silent(self) -> None:
        # a coordinator owes nothing but an answer
        if not self.coordinates and not self.asked:
            return
        for rank, seconds in self.listening.silent(time.monotonic()):
            if self.coordinates and self.rank != 0:
                self._send((rank, seconds), 0, Tag.SILENT)
            else:
                self.job.silent(rank, seconds)

    def _stop(self) -> None:
        """Begin nothing more here, and see to it that no rank does."""
        if self.stopped:
            return
        self.stopped = True
        self.queue.clear()
        self.ranges.clear()
        if self.rank == 0:
            for rank in range(1, self.size):
                self._send(None, rank, Tag.STOP)
        else:
            self._send(None, 0, Tag.STOP)

    def _wait(self) -> None:
        self.job.waiting()
        time.sleep(_POLL)
        self.traffic.waiting += _POLL

    def _next_item(self) -> int | None:
        """The item to do now; asks for more work when what is in hand comes to its end.

        None as well while too many results wait for their keepers.
        """
        if len(self.results) > _MOST_UNSENT:
            return None
        ahead = len(self.queue) == 1 and asks_ahead(self.queue[0], self.group.dedicated)
        if (ahead or not self.queue) and not self.asked and not self.no_more:
            self._ask()
        if not self.queue:
            return None
        work = self.queue.popleft()
        if work.start + 1 < work.stop:
            self.queue.appendleft(Work(work.start + 1, work.stop))
        return work.start

    def _ask(self) -> None:
        self.asked = True
        self.listening.heard(self.coordinator, time.monotonic())
        finished, self.finished = self.finished, []
        if self.coordinates:
            self._answer(self.rank, finished)
        else:
            self._send(finished, self.coordinator, Tag.REQUEST)

    def _do(self, item: int) -> None:
        outcome = self.job.work(item, self.pump)
        if outcome is None:
            return
        value, result = outcome
        self.traffic.items += 1
        self.finished.append((item, value))
        keeper = self.job.keeper(item)
        if keeper == self.rank:
            self._keep(item, result)
        else:
            self._send((item, result), keeper, Tag.RESULT)

    def _keep(self, item: int, result: Any) -> None:
        news = self.job.keep(item, result)
        if news is None:
            return
        if self.rank == 0:
            self.job.news(news)
        else:
            self._send(news, 0, Tag.NEWS)

    def _send(self, content: Any, to: int, tag: Tag) -> None:
        from mpi4py import MPI

        # synchronous: the request completes when the message is being received, which the consensus needs
        if to == self.coordinator:
            self.spoke = time.monotonic()
        buffer = MPI.pickle.dumps(content)
        sends = self.results if tag is Tag.RESULT else self.sends
        sends.append((self.comm.Issend([buffer, MPI.BYTE], to, tag), buffer))
        self.traffic.messages[tag.name] += 1
        self.traffic.bytes += len(buffer)

    def pump(self) -> None:
        """Receive what has come, and let go of sends that are through; never waits."""
        from mpi4py import MPI

        began = time.perf_counter()
        status = MPI.Status()
        while (message := self.comm.Improbe(MPI.ANY_SOURCE, MPI.ANY_TAG, status)) is not None:
            buffer = bytearray(status.Get_count(MPI.BYTE))
            message.Recv([buffer, MPI.BYTE])
            self._receive(Tag(status.Get_tag()), status.Get_source(), MPI.pickle.loads(buffer))
        while self.sends and self.sends[0][0].Test():
            self.sends.popleft()
        self.results = [send for send in self.results if not send[0].Test()]
        # once a rank is leaving, nothing may be under way from it any more
        now = time.monotonic()
        if not self.coordinates and not self.leaving and now - self.spoke > _BEAT:
            self._send(None, self.coordinator, Tag.BEAT)
        if self.untold and (self.leaving or now - self.told > _TELL):
            self._tell()
        self.traffic.answering += time.perf_counter() - began

    def _receive(self, tag: Tag, source: int, content: Any) -> None:
        self.listening.heard(source, time.monotonic())
        if tag is Tag.REQUEST:
            self._answer(source, content)
        elif tag is Tag.WORK:
            self._take(content)
        elif tag is Tag.RESULT:
            self._keep(*content)
        elif tag is Tag.NEWS:
            self.job.news(content)
        elif tag is Tag.REPORT:
            self._note(content)
            self.listening.let_go(source)
        elif tag is Tag.FINISHED:
            self._note(content)
        elif tag is Tag.SILENT:
            self.job.silent(*content)
        elif tag is Tag.STOP:
            self._stop()

    def _note(self, finished: list[tuple[int, Any]]) -> None:
        if self.rank != 0:
            self.untold += finished
            return
        self.done += len(finished)
        settled = [self.prefix.add(item, self.job.note(value)) for item, value in finished]
        if any(settled):
            self.ranges.clear()

    def _answer(self, rank: int, finished: list[tuple[int, Any]]) -> None:
        self._note(finished)
        work = self.ranges.next()
        if work is None:
            work = Work(0, 0)
            self.released += 1
        if rank == self.rank:
            self._take(work)
        else:
            self._send(work, rank, Tag.WORK)

    def _take(self, work: Work) -> None:
        self.asked = False
        if work.start == work.stop:
            self.no_more = True
        elif not self.stopped:
            self.queue.append(work)


def summary(traffics: list[Traffic]) -> dict[str, Any]:
    """What the dispatch cost over all ranks, rank 0 first, for the end of a run."""
    items = max(1, sum(t.items for t in traffics))
    seconds = max(1e-9, sum(t.seconds for t in traffics))
    busy = [t.answering / max(1e-9, t.seconds) for t in traffics if t.coordinates]
    return {
        "messages_per_image": sum(sum(t.messages.values()) for t in traffics) / items,
        "bytes_per_image": sum(t.bytes for t in traffics) / items,
        "coordinator_busy": max(busy, default=0.0),
        "waiting": sum(t.waiting for t in traffics) / seconds,
        "seconds": traffics[0].seconds,
        "images_of_rank": [t.items for t in traffics],
        "messages": dict(sum((t.messages for t in traffics), Counter())),
    }
