"""The two kinds of work that are dispatched over the ranks: the first crystals, and all images in batches."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import STEPS
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.watch import ImageAbandoned, Watch
from ssx_mpi.records.batch_files import Batch, BatchRecords, read_summary
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.report.text import duration
from ssx_mpi.stages.fast import beam_search
from ssx_mpi.stages.still_results import Failure
from ssx_mpi.stages.stills import StillProcessor, StillResult
from ssx_mpi.stages.stored_steps import StoredSteps

logger = logging.getLogger("ssx_mpi")

# names of bad images in the log for one batch; the summary of the batch has them all
_MOST_NAMED = 50
# stages at which the whole image is lost, in the order in which they may fail
_IMAGE_LOST = ("crash", "timeout", "read", "find_spots")
# so many images, hits or indexed images are needed to tell that too many of them fail
_FEWEST_TO_JUDGE = 200


class _Watched:
    """What every job over images does in the same way: it lets the watch look at each of them."""

    watch: Watch

    def attempt(self, image: int, work: Callable[[], StillResult]) -> StillResult | None:
        """The result of `work`, or a failure as the result; None when it was abandoned because the job is to stop."""
        if image in self.watch.set_aside:
            return StillResult(image, failures=[Failure("crash", self.watch.set_aside[image])])
        try:
            return self.watch.image(image, work)
        except ImageAbandoned:
            if self.watch.stopping():
                return None
            return StillResult(image, failures=[Failure("timeout", "took longer than image_timeout")])

    def stopping(self) -> bool:
        return self.watch.stopping()

    def waiting(self) -> None:
        self.watch.waiting()

    def silent(self, rank: int, seconds: float) -> None:
        host, image, since = self.watch.whereabouts(rank)
        at = "" if image is None or since is None else f", at image {self.name_of(image)} for {duration(since)}"
        logger.warning("Nothing heard of rank %d on %s for %s%s", rank, host or "?", duration(seconds), at)

    def name_of(self, image: int) -> str:
        raise NotImplementedError


class FirstCrystals(_Watched):
    """Spots and lattices of the first images, kept by the rank that found them.

    The value of an image is its number of lattices, so that the dispatch can tell when there are enough.
    """

    def __init__(self, comm: Communicator, processor: StillProcessor, watch: Watch, show) -> None:
        self._rank = comm.rank
        self.processor = processor
        self.watch = watch
        self._show = show
        self.results: dict[int, StillResult] = {}

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, StillResult] | None:
        result = self.attempt(item, lambda: self._index(item, breathe))
        return None if result is None else (len(result.lattices), result)

    def _index(self, item: int, breathe: Callable[[], None]) -> StillResult:
        result = self.processor.find_spots(item)
        self.watch.breathing(breathe)
        self.processor.index(result)
        # the pixels are not wanted again, and a blank keeps nothing at all
        result.experiment = result.frame = None
        if not result.hit:
            result.strong = None
        return result

    def note(self, value: int) -> int:
        return value

    def name_of(self, image: int) -> str:
        return self.processor.maker.images.name(image)

    def keeper(self, item: int) -> int:
        return self._rank

    def keep(self, item: int, result: StillResult) -> None:
        self.results[item] = result

    def news(self, content: Any) -> None:
        raise AssertionError("the first crystals send no news")

    def progress(self, done: int) -> None:
        self._show(done)


class FirstHits(FirstCrystals):
    """Strong spots of the first hits, kept by the rank that found them; the value of an image is one for a hit.

    Only hits with enough spots to tell the beam centre count.
    """

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, StillResult] | None:
        result = self.attempt(item, lambda: self._spots(item))
        return None if result is None else (int(_tells_centre(result)), result)

    def _spots(self, item: int) -> StillResult:
        result = self.processor.find_spots(item)
        result.frame = None
        if not result.hit:
            result.strong = None
        if not _tells_centre(result):
            result.experiment = None
        return result

    def hits(self, end: int) -> dict[int, StillResult]:
        """Those that this rank found before image `end`, by image."""
        return {image: result for image, result in self.results.items() if image < end and _tells_centre(result)}


def _tells_centre(result: StillResult) -> bool:
    return result.strong is not None and result.n_spots >= beam_search.MIN_SPOTS


@dataclass(frozen=True)
class BatchNews:
    """What the keeper of a finished batch tells rank 0; `merged` is what it adds to the merged data, if asked for."""

    number: int
    statistics: Statistics
    bad_images: list[tuple[str, str, str]]
    merged: Any = None


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


def check_steps(comm: Communicator, all_batches: list[Batch], identity: dict[str, Any], steps: tuple[str, ...]) -> None:
    """Make sure that each batch has what the first of `steps` begins with. Collective.

    Raises
    ------
    InputError
        On every rank, when a step lacks the files of the one before.
    """
    error: InputError | None = None
    try:
        for batch in all_batches[comm.rank :: comm.size]:
            _steps_left(batch, identity, steps)
    except InputError as caught:
        error = caught
    _raise_first(comm.allgather(error))


def _steps_left(
    batch: Batch, identity: dict[str, Any], steps: tuple[str, ...]
) -> tuple[dict[str, Any] | None, tuple[str, ...], tuple[str, ...]]:
    """Summary of `batch`, steps done and steps to do."""
    summary = read_summary(batch, identity)
    done = tuple(summary["steps"]) if summary else ()
    to_do = tuple(s for s in steps if s not in done)
    before = STEPS[STEPS.index(to_do[0]) - 1] if to_do and to_do[0] != STEPS[0] else None
    if before is not None and before not in done:
        raise InputError(f"steps={to_do[0]}: batch {batch.number} in {batch.folder} has no results of {before} yet")
    return summary, done, to_do


def _raise_first(errors: list[InputError | None]) -> None:
    for error in errors:
        if error is not None:
            raise error


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
    _raise_first([found for *_, found in parts])
    return Survey(
        {n: s for part in parts for n, s in part[0].items()},
        {n: s for part in parts for n, s in part[1].items()},
        sorted(r for part in parts for r in part[2]),
        sorted((n for part in parts for n in part[3]), key=lambda n: n.number),
        own.records,
    )


def _look_at(own: Survey, keeping: BatchKeeping, batch: Batch, steps: tuple[str, ...]) -> None:
    summary, done, to_do = _steps_left(batch, keeping.identity, steps)
    if not to_do:
        assert summary is not None
        left_out = [(name, stage, reason) for name, stage, reason in summary["left_out"]]
        own.finished.append(BatchNews(batch.number, Statistics.from_json(summary["statistics"]), left_out))
        BatchRecords.discard(batch)
        return
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
        try:
            records = keeping.records(batch.number, to_do)
        except ValueError as error:
            raise InputError(f"{error}: use restart=True to begin anew") from None
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
class FailureShare:
    """On rank 0, how images fail and whether too many do so in one way; `most` is the largest share that is let pass.

    A share is taken of the images that came to the stage: blank images and images without a lattice are no failures
    of integration.
    """

    most: float
    images: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    #: what to tell the user once it is too many
    verdict: str = ""

    def add(self, hit: bool, indexed: bool, failure: str) -> None:
        """Count an image; `failure` is "stage: reason" or empty."""
        self.images.update({"images": 1, "hits": int(hit), "indexed images": int(indexed)})
        if not failure or self.verdict:
            return
        self.failed[failure] += 1
        stage = failure.partition(":")[0]
        of = {"index": "hits", "integrate": "indexed images"}.get(stage, "images")
        count, total = self.failed[failure], self.images[of]
        if total >= _FEWEST_TO_JUDGE and count > self.most * total:
            self.verdict = f"{count} of {total} {of} failed in one way ({failure}), over max_failures={self.most:g}"


def _outcome(result: StillResult) -> tuple[bool, bool, str]:
    """What rank 0 counts of a finished image: hit, indexed, and the failure that left it with nothing."""
    lost = bool(result.failures) and not result.crystals
    first = result.failures[0] if lost else None
    return result.hit, bool(result.lattices), f"{first.stage}: {first.reason}" if first else ""


@dataclass
class Batches(_Watched):
    """All images of the batches that are not finished; each batch is kept by one rank."""

    comm: Communicator
    keeping: BatchKeeping
    survey: Survey
    processor: StillProcessor
    stored: StoredSteps
    watch: Watch
    failures: FailureShare
    hear: Callable[[BatchNews], None]
    progress: Callable[[int], None]
    #: what a finished batch adds to the merged data, from its folder
    merge: Callable[[Path], Any] | None = None

    @property
    def pending(self) -> list[tuple[int, int]]:
        """Ranges of images to process, those that may have ended an earlier run last."""
        ranges: list[tuple[int, int]] = []
        last: list[tuple[int, int]] = []
        for start, stop in self.survey.pending:
            for image in sorted(i for i in self.watch.suspects if start <= i < stop):
                ranges.append((start, image))
                last.append((image, image + 1))
                start = image + 1
            ranges.append((start, stop))
        return [(start, stop) for start, stop in ranges + last if stop > start]

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[tuple[bool, bool, str], bytes] | None:
        steps = self.survey.steps[self.keeping.number_of(item)]
        result = self.attempt(item, lambda: self._process(item, steps, lambda: self.watch.breathing(breathe)))
        if result is None:
            return None
        return _outcome(result), self.processor.record(result, steps, self.keeping.common)

    def _process(self, item: int, steps: tuple[str, ...], breathe: Callable[[], None]) -> StillResult:
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
        return result

    def note(self, value: tuple[bool, bool, str]) -> int:
        self.failures.add(*value)
        if self.failures.verdict:
            self.watch.ask(f"because {self.failures.verdict}")
        return 0

    def name_of(self, image: int) -> str:
        return self.processor.maker.images.name(image)

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
        news = finish(records, self.survey.done[number] + steps)
        return news if self.merge is None else replace(news, merged=self.merge(records.batch.folder))

    def news(self, content: BatchNews) -> None:
        self.hear(content)


def finish(records: BatchRecords, steps_done: tuple[str, ...]) -> BatchNews:
    """Write the files of a complete batch and sum it up."""
    numbers = records.numbers
    statistics = Statistics()
    for image in numbers:
        statistics.add_image(image)
    left_out = _bad_images(numbers)
    records.finish(statistics.as_json(), list(steps_done), left_out)
    return BatchNews(records.batch.number, statistics, left_out)


def _bad_images(numbers: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Name, stage and reason of the images that could not be read or searched, for the log."""
    bad = [
        (image["name"], stage, reason)
        for image in numbers
        for stage, reason in image["failures"]
        if stage in _IMAGE_LOST
    ]
    return bad[:_MOST_NAMED]
