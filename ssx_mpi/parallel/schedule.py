"""Which items a rank does next: ranges handed out in order, groups of ranks, and when enough of them are done.

Pure arithmetic, without messages: every rank can work out what another one does.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

#: from this size on, rank 0 only coordinates: one rank in 64 costs less than the others would wait for it
DEDICATED_FROM = 64
#: ranks to one coordinator; with twice as many or more there are several
RANKS_PER_COORDINATOR = 1024
# items that go to one coordinator before the next has its turn
_STRETCH = 1024


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
