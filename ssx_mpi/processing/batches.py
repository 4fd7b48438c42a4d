"""All images of a run, in batches over the ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssx_mpi import __version__, dials_compat
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel import dispatch, telemetry
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import REDUCE
from ssx_mpi.processing.failures import FailureShare, Outcome, WatchedJob, advice
from ssx_mpi.processing.importing import Run
from ssx_mpi.processing.reducing import say_stopped
from ssx_mpi.processing.resume import BatchKeeping, BatchNews, Survey, finish_batch, survey
from ssx_mpi.processing.watch import Watch
from ssx_mpi.records.batch_files import read_numbers
from ssx_mpi.records.files import DamagedFileError, storing
from ssx_mpi.report.run_report import LiveReport
from ssx_mpi.stages.still_results import Still
from ssx_mpi.stages.stills import StillProcessor
from ssx_mpi.stages.stored_steps import StoredSteps

# the reduction is loaded when it is due
if TYPE_CHECKING:
    from ssx_mpi.records.live_lines import LiveLines
    from ssx_mpi.reduction.live_merge import LiveMerge

logger = logging.getLogger("ssx_mpi")


@dataclass
class Batches(WatchedJob):
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
    #: rank 0 counts the outcome of each image
    tell: Callable[[Outcome], None] = lambda outcome: None
    #: the line of an image for live.jsonl, of its numbers; None where no lines are wanted
    line: Callable[[dict[str, Any]], str] | None = None

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

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[Outcome, bytes] | None:
        """Process image `item`; the value is its outcome, the result its record for the journal."""
        steps = self.survey.steps[self.keeping.number_of(item)]
        still = self.attempt(item, lambda: self._process(item, steps, lambda: self.watch.breathing(breathe)))
        if still is None:
            return None
        outcome = Outcome.of(still)
        if self.line is not None:
            outcome = replace(outcome, line=(item, self.line(self.processor.describe(still))))
        return outcome, self.processor.record(still, steps, self.keeping.common)

    def _process(self, item: int, steps: tuple[str, ...], breathe: Callable[[], None]) -> Still:
        if "find_spots" in steps:
            still = self.processor.find_spots(item)
        else:
            still = self.stored.load(item, indexed="index" not in steps)
        breathe()
        if "index" in steps:
            still = self.processor.index(still)
            breathe()
        if "integrate" in steps:
            still = self.processor.integrate(still)
        return still

    def note(self, value: Outcome) -> int:
        """Count the outcome of an image on rank 0."""
        self.failures.add(value)
        self.tell(value)
        if value.traceback:
            logger.debug("First failure of its kind on a rank: %s\n%s", value.failure, value.traceback)
        if self.failures.verdict:
            self.watch.ask(f"because {self.failures.verdict}")
        return 0

    def name_of(self, image: int) -> str:
        """Name of an image for the log."""
        return self.processor.maker.images.name(image)

    def keeper(self, item: int) -> int:
        """The rank that keeps the batch of image `item`."""
        return self.keeping.keeper(self.keeping.number_of(item))

    def keep(self, item: int, result: bytes) -> BatchNews | None:
        """Append the record of an image; news when that completes its batch."""
        number = self.keeping.number_of(item)
        steps = self.survey.steps[number]
        if number not in self.survey.records:
            self.survey.records[number] = self.keeping.records(number, steps)
        records = self.survey.records[number]
        records.add(result)
        if not records.complete:
            return None
        del self.survey.records[number]
        news = finish_batch(records, self.survey.done[number] + steps)
        return news if self.merge is None else replace(news, merged=self.merge(records.batch.folder))

    def news(self, content: BatchNews) -> None:
        """Rank 0: a batch is finished."""
        self.hear(content)


def process_batches(comm: Communicator, run: Run, geometry, began: float) -> ExitCode:
    """Process all images that are not finished yet, in batches over the ranks. Collective.

    Parameters
    ----------
    geometry
        (detector, beam) of all images.
    began
        When the run began, by the monotonic clock.
    """
    parameters = run.parameters
    keeping = _keeping(comm, run, geometry)
    found = survey(comm, keeping, parameters.image_steps)
    live = LiveReport(run.directory, len(run.images), comm.size, comm.rank == 0, _facts(run, keeping))
    merging = _live_merge(comm, run, geometry)
    if merging is not None:
        earlier = sum((merging.of_batch(folder) for folder in _own_finished(comm, keeping, found)), merging.nothing())
        merging.add(comm.sum(earlier))
    if comm.rank == 0:
        # the first rank alone writes it
        from ssx_mpi.records.image_table import ImageTable

        table = ImageTable(run.directory, len(run.images))
        with storing(table.path):
            for damage in table.complete(keeping.batches[news.number - 1] for news in found.finished):
                logger.warning("%s", damage)
        for news in found.finished:
            live.add_finished(news.number, news.statistics, news.bad_images)
        live.start(len(run.images) - sum(stop - start for start, stop in found.pending))

    lines, line = _live_lines(comm, run, keeping, found)

    def tell(outcome: Outcome) -> None:
        live.count(outcome.hit, outcome.indexed, outcome.n_crystals)
        if lines is not None and outcome.line is not None:
            lines.add(*outcome.line)

    def hear(news: BatchNews) -> None:
        with storing(table.path):
            table.add(keeping.batches[news.number - 1])
        so_far = merging.add(news.merged) if merging is not None else None
        live.hear(news.number, news.statistics, news.bad_images, so_far)

    job = Batches(
        comm=comm,
        keeping=keeping,
        survey=found,
        processor=run.processor(geometry),
        stored=StoredSteps(run.maker.with_geometry(geometry), run.directory, parameters.batch_size),
        watch=run.watch,
        failures=FailureShare(parameters.max_failures),
        hear=hear,
        progress=live.show,
        merge=merging.of_batch if merging is not None else None,
        tell=tell,
        line=line,
    )
    _, stopped, traffic = dispatch.run(comm, job, job.pending)
    for left in found.records.values():
        left.close()
    if lines is not None:
        lines.close()
    traffics = comm.gather(traffic)
    status = ExitCode.DONE
    if traffics is not None:
        status = _status(run, job, live, stopped)
        if merging is not None:
            live.merged = merging.statistics()
        live.conclude(_state(run, status), time.monotonic() - began, telemetry.summary(traffics))
        if status == ExitCode.NOTHING_FOUND:
            logger.warning("No crystal came out. %s", advice(live.total))
        if stopped:
            say_stopped(run)
    return comm.bcast(status)


def _keeping(comm: Communicator, run: Run, geometry) -> BatchKeeping:
    detector, beam = geometry
    return BatchKeeping(
        batches=run.batches,
        batch_size=run.parameters.batch_size,
        identity=run.identity,
        common={"detector": detector.to_dict(), "beam": beam.to_dict()},
        keep_intermediate=run.parameters.keep_intermediate,
        size=comm.size,
    )


def _status(run: Run, job: Batches, live: LiveReport, stopped: bool) -> ExitCode:
    if stopped:
        return ExitCode.TOO_MANY_FAILURES if job.failures.verdict else ExitCode.STOPPED
    wanted = "crystals" if "integrate" in run.parameters.steps else "hits"
    return ExitCode.DONE if live.total.counts[wanted] else ExitCode.NOTHING_FOUND


def _state(run: Run, status: ExitCode) -> str:
    """The state of the run as programs read it."""
    if status == ExitCode.DONE and REDUCE in run.parameters.steps:
        return "reducing"
    return status.name.lower()


def _live_merge(comm: Communicator, run: Run, geometry) -> LiveMerge | None:
    """What merges crystals as batches finish, where that is asked for."""
    parameters = run.parameters
    cell, space_group = parameters.unit_cell, parameters.space_group
    if not parameters.live_merge or "integrate" not in parameters.steps or cell is None or space_group is None:
        return None
    from ssx_mpi.reduction.live_merge import LiveMerge, detector_resolution

    detector, beam = geometry
    limits = (parameters.reduction.d_min, parameters.d_min, detector_resolution(detector, beam.get_s0()))
    merging = LiveMerge(cell, space_group, next(d for d in limits if d is not None), parameters.reduction)
    if comm.rank == 0 and merging.n_settings > 1:
        logger.info(
            "Crystals fit %d settings alike: until the reduction puts them into one, CC1/2 is that of the average",
            merging.n_settings,
        )
    return merging


def _live_lines(
    comm: Communicator, run: Run, keeping: BatchKeeping, found: Survey
) -> tuple[LiveLines | None, Callable[[dict[str, Any]], str] | None]:
    """On rank 0 the file of lines, and on every rank what makes one; None both where they are not asked for."""
    if not run.parameters.report.live:
        return None, None
    # loaded where it is asked for
    from ssx_mpi.records.live_lines import LiveLines, line_of

    space_group = run.parameters.space_group
    begun = comm.gather([numbers for records in found.records.values() for numbers in records.numbers])
    lines = None
    if begun is not None:
        lines = LiveLines(run.directory, len(run.images))
        for news in found.finished:
            try:
                lines.add_earlier(read_numbers(keeping.batches[news.number - 1]), space_group)
            except DamagedFileError as error:
                logger.warning("%s: live.jsonl lacks its images", error)
        for part in begun:
            lines.add_earlier(part, space_group)
    return lines, lambda numbers: line_of(numbers, space_group)


def _own_finished(comm: Communicator, keeping: BatchKeeping, found: Survey) -> list[Path]:
    """Folders of the batches that were finished before and that this rank keeps."""
    numbers = [news.number for news in found.finished if keeping.keeper(news.number) == comm.rank]
    return [keeping.batches[number - 1].folder for number in numbers]


def _facts(run: Run, keeping: BatchKeeping) -> dict[str, Any]:
    return {
        "program": f"ssx_mpi {__version__}",
        "dials": ".".join(map(str, dials_compat.dials_version())),
        "parameters": run.parameters.identity(),
        "n_batches": len(keeping.batches),
    }
