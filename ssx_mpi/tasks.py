"""The two kinds of work that are dispatched over the ranks: the first crystals, and all images in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.params import STEPS, InputError
from ssx_mpi.records.batches import Batch, BatchRecords, read_summary
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.stages import beam_centre
from ssx_mpi.stages.stills import StillProcessor, StillResult
from ssx_mpi.stages.stored import StoredSteps

# names of bad images in the log for one batch; the summary of the batch has them all
_MOST_NAMED = 50


class FirstCrystals:
    """Spots and lattices of the first images, kept by the rank that found them.

    The value of an image is its number of lattices, so that the dispatch can tell when there are enough.
    """

    def __init__(self, comm: Communicator, processor: StillProcessor, stopping: Callable[[], bool], show) -> None:
        self._rank = comm.rank
        self.processor = processor
        self.stopping = stopping
        self._show = show
        self.results: dict[int, StillResult] = {}

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, StillResult]:
        result = self.processor.find_spots(item)
        breathe()
        self.processor.index(result)
        # the pixels are not wanted again, and a blank keeps nothing at all
        result.experiment = result.frame = None
        if not result.hit:
            result.strong = None
        return len(result.lattices), result

    def keeper(self, item: int) -> int:
        return self._rank

    def keep(self, item: int, result: StillResult) -> None:
        self.results[item] = result

    def news(self, content: Any) -> None:
        raise AssertionError("the first crystals send no news")

    def progress(self, done: int) -> None:
        self._show(done)


class FirstHits(FirstCrystals):
    """Strong spots of the first hits, kept by the rank that found them; the value of an image is one for a hit."""

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, StillResult]:
        result = self.processor.find_spots(item)
        result.frame = None
        enough = result.n_spots >= beam_centre.MIN_SPOTS
        if not enough:
            result.experiment = result.strong = None
        return int(enough), result


@dataclass(frozen=True)
class BatchNews:
    """What the keeper of a finished batch tells rank 0."""

    number: int
    statistics: Statistics
    bad_images: list[tuple[str, str, str]]


@dataclass(frozen=True)
class BatchKeeping:
    """How the batches of a run are kept on disk; the same on every rank."""

    batches: list[Batch]
    batch_size: int
    identity: dict[str, Any]
    common: dict[str, Any]
    keep_intermediate: bool
    size: int

    def number_of(self, image: int) -> int:
        return image // self.batch_size + 1

    def keeper(self, number: int) -> int:
        """The rank that keeps batch `number`: spread over the ranks, the coordinator last."""
        return self.size - 1 - (number - 1) % self.size

    def records(self, number: int, steps: tuple[str, ...]) -> BatchRecords:
        """Open the journal of a batch."""
        return BatchRecords(self.batches[number - 1], self.identity, steps, self.common, self.keep_intermediate)


@dataclass(frozen=True)
class Survey:
    """What is left to do, found by the keepers; the same on every rank but for `records`.

    Attributes
    ----------
    steps
        Steps to do of every batch that is not finished, by its number.
    done
        Steps done before, by the number of the batch.
    pending
        Ranges of images to process.
    finished
        News of batches that were finished before, in this order.
    records
        Journals that this rank keeps and that were begun before.
    """

    steps: dict[int, tuple[str, ...]]
    done: dict[int, tuple[str, ...]]
    pending: list[tuple[int, int]]
    finished: list[BatchNews]
    records: dict[int, BatchRecords]


def survey(comm: Communicator, keeping: BatchKeeping, steps: tuple[str, ...]) -> Survey:
    """Look at what earlier runs left of each batch; every rank looks at those that it keeps. Collective.

    Raises
    ------
    InputError
        On every rank, when a step lacks the files of the one before.
    """
    own = Survey({}, {}, [], [], {})
    error: InputError | None = None
    try:
        for batch in keeping.batches:
            if keeping.keeper(batch.number) == comm.rank:
                _look_at(own, keeping, batch, steps)
    except InputError as caught:
        error = caught
    parts = comm.allgather((own.steps, own.done, own.pending, own.finished, error))
    for *_, found in parts:
        if found is not None:
            raise found
    return Survey(
        {n: s for part in parts for n, s in part[0].items()},
        {n: s for part in parts for n, s in part[1].items()},
        sorted(r for part in parts for r in part[2]),
        sorted((n for part in parts for n in part[3]), key=lambda n: n.number),
        own.records,
    )


def _look_at(own: Survey, keeping: BatchKeeping, batch: Batch, steps: tuple[str, ...]) -> None:
    summary = read_summary(batch, keeping.identity)
    done = tuple(summary["steps"]) if summary else ()
    to_do = tuple(s for s in steps if s not in done)
    if not to_do:
        assert summary is not None
        own.finished.append(BatchNews(batch.number, Statistics.from_json(summary["statistics"]), []))
        return
    before = STEPS[STEPS.index(to_do[0]) - 1] if to_do[0] != STEPS[0] else None
    if before is not None and before not in done:
        raise InputError(f"steps={to_do[0]}: batch {batch.number} in {batch.folder} has no results of {before} yet")
    own.done[batch.number] = done
    begun = BatchRecords.begun(batch)
    if begun and set(begun) <= set(done):
        # a kill came between the files and the removal of the journal
        BatchRecords.discard(batch)
        begun = ()
    if begun and begun != to_do:
        raise InputError(
            f"steps={'+'.join(to_do)}: batch {batch.number} in {batch.folder} was begun with steps={'+'.join(begun)}: "
            "finish it with these first, or use restart=True to begin anew"
        )
    if begun:
        records = keeping.records(batch.number, to_do)
        if records.complete:
            # a kill came between the last record and the files
            own.finished.append(finish(records, done + to_do))
            return
        own.records[batch.number] = records
        own.pending.extend(records.missing)
    else:
        own.pending.append((batch.first, batch.stop))
    own.steps[batch.number] = to_do


@dataclass
class Batches:
    """All images of the batches that are not finished; each batch is kept by one rank."""

    comm: Communicator
    keeping: BatchKeeping
    survey: Survey
    processor: StillProcessor
    stored: StoredSteps
    stopping: Callable[[], bool]
    hear: Callable[[BatchNews], None]
    progress: Callable[[int], None]

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, bytes]:
        steps = self.survey.steps[self.keeping.number_of(item)]
        if "find_spots" in steps:
            result = self.processor.find_spots(item)
        else:
            result = self.stored.load(item, indexed="index" not in steps)
        breathe()
        if "index" in steps:
            self.processor.index(result)
            breathe()
        if "integrate" in steps:
            self.processor.integrate(result)
        return len(result.lattices), self.processor.record(result, steps, self.keeping.common)

    def keeper(self, item: int) -> int:
        return self.keeping.keeper(self.keeping.number_of(item))

    def keep(self, item: int, result: bytes) -> BatchNews | None:
        number = self.keeping.number_of(item)
        steps = self.survey.steps[number]
        if number not in self.survey.records:
            self.survey.records[number] = self.keeping.records(number, steps)
        records = self.survey.records[number]
        records.add(result)
        if not records.complete:
            return None
        del self.survey.records[number]
        return finish(records, self.survey.done[number] + steps)

    def news(self, content: BatchNews) -> None:
        self.hear(content)


def finish(records: BatchRecords, steps_done: tuple[str, ...]) -> BatchNews:
    """Write the files of a complete batch and sum it up."""
    numbers = records.numbers
    statistics = Statistics()
    for image in numbers:
        statistics.add_image(image)
    records.finish(statistics.as_json(), list(steps_done))
    return BatchNews(records.batch.number, statistics, _bad_images(numbers))


def _bad_images(numbers: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, stage and reason of the images that could not be read or searched, for the log."""
    bad = [
        (image["name"], stage, reason)
        for image in numbers
        for stage, reason in image["failures"]
        if stage in ("read", "find_spots")
    ]
    return bad[:_MOST_NAMED]
