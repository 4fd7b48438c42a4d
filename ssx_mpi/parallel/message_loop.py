"""The one message loop of the program: ranks ask for items, do them, and bring results to where they are kept."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, cast

from ssx_mpi.parallel import heartbeat
from ssx_mpi.parallel.communicator import MpiCommunicator
from ssx_mpi.parallel.consensus import Consensus
from ssx_mpi.parallel.heartbeat import Listening
from ssx_mpi.parallel.schedule import Group, Prefix, Ranges, Work, asks_ahead, n_groups
from ssx_mpi.parallel.telemetry import Traffic

if TYPE_CHECKING:
    from ssx_mpi.parallel.dispatch import Job, JobWithNews

# a coordinator tells rank 0 what was finished this often, in seconds
_TELL = 1.0
# a waiting rank looks for messages this often, in seconds; MPI's own waiting would keep a core busy
_POLL = 0.001
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


class Loop:
    prefix: Prefix
    stopped = False
    done = 0
    traffic: Traffic

    def run(self) -> None:
        raise NotImplementedError


class SerialLoop(Loop):
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
                    cast("JobWithNews", self.job).news(news)
                self.prefix.add(item, self.job.note(value))
                self.job.progress(self.done)


def _no_one_waits() -> None:
    """One process alone has nobody to answer."""


class MpiLoop(Loop):
    """Every rank of an MPI communicator; rank 0 coordinates and, in a small job, works as well."""

    def __init__(self, comm: MpiCommunicator, job: Job, pending: Any, wanted: int | None, longest: int) -> None:
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
        consensus = Consensus(self.comm)
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
            elif not consensus.begun and self._ready_to_leave():
                self.leaving = True
                consensus.enter()
            elif consensus.begun and consensus.reached(self._all_received()):
                break
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
            cast("JobWithNews", self.job).news(news)
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
        if not self.coordinates and not self.leaving and now - self.spoke > heartbeat.BEAT:
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
            cast("JobWithNews", self.job).news(content)
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
