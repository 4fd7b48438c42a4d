"""What earlier starts left of each batch, and what there is still to do."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from ssx_mpi import dials_compat
from ssx_mpi.parallel.collective import on_every_rank
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import STEPS
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.batch_files import SUMMARY, Batch, BatchRecords, read_summary
from ssx_mpi.records.files import DamagedFileError
from ssx_mpi.records.journal import DamagedJournalError
from ssx_mpi.report.statistics import Statistics

logger = logging.getLogger("ssx_mpi")

# names of bad images in the log for one batch; the summary of the batch has them all
_MOST_NAMED = 50
# stages at which the whole image is lost, in the order in which they may fail
_IMAGE_LOST = ("crash", "timeout", "read", "find_spots")


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
        """Number of the batch of an image."""
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
    notes
        What is to be said of damaged files, and of files of another DIALS.
    """

    steps: dict[int, tuple[str, ...]]
    done: dict[int, tuple[str, ...]]
    pending: list[tuple[int, int]]
    finished: list[BatchNews]
    records: dict[int, BatchRecords]
    notes: list[str] = field(default_factory=list)


def check_steps(comm: Communicator, all_batches: list[Batch], identity: dict[str, Any], steps: tuple[str, ...]) -> None:
    """Make sure that each batch has what the first of `steps` begins with. Collective.

    Raises
    ------
    InputError
        On every rank, when a step lacks the files of the one before.
    """
    with on_every_rank(comm, InputError):
        for batch in all_batches[comm.rank :: comm.size]:
            _steps_left(batch, identity, steps)


@dataclass(frozen=True)
class _Done:
    """What the summary of a batch says was done: steps, and what came of them; `damage` says why it says nothing."""

    steps: tuple[str, ...] = ()
    news: BatchNews | None = None
    damage: str = ""


def _done(batch: Batch, identity: dict[str, Any]) -> _Done:
    try:
        summary = read_summary(batch, identity)
        if summary is None:
            return _Done()
        left_out = [(name, stage, reason) for name, stage, reason in summary["left_out"]]
        news = BatchNews(batch.number, Statistics.from_json(summary["statistics"]), left_out)
        return _Done(tuple(map(str, summary["steps"])), news)
    except DamagedFileError as error:
        return _Done(damage=str(error))
    except (KeyError, TypeError, ValueError, AttributeError):
        # its parts are not what they are to be
        return _Done(damage=f"{batch.folder / SUMMARY} is damaged (statistics)")


def _steps_left(batch: Batch, identity: dict[str, Any], steps: tuple[str, ...]) -> tuple[_Done, tuple[str, ...]]:
    """What was done of `batch`, and steps to do."""
    done = _done(batch, identity)
    to_do = tuple(s for s in steps if s not in done.steps)
    before = STEPS[STEPS.index(to_do[0]) - 1] if to_do and to_do[0] != STEPS[0] else None
    if before is not None and before not in done.steps:
        raise InputError(
            f"steps={to_do[0]}: {done.damage}; begin with find_spots, which does this batch again"
            if done.damage
            else f"steps={to_do[0]}: batch {batch.number} in {batch.folder} has no results of {before} yet"
        )
    return done, to_do


def survey(comm: Communicator, keeping: BatchKeeping, steps: tuple[str, ...]) -> Survey:
    """Look at what earlier runs left of each batch; every rank looks at those that it keeps. Collective.

    Raises
    ------
    InputError
        On every rank, when a step lacks the files of the one before.
    """
    own = Survey({}, {}, [], [], {})
    with on_every_rank(comm, InputError):
        for batch in keeping.batches:
            if keeping.keeper(batch.number) == comm.rank:
                _look_at(own, keeping, batch, steps)
    parts = comm.allgather((own.steps, own.done, own.pending, own.finished, own.notes))
    notes = [note for part in parts for note in part[4]]
    if comm.rank == 0:
        for note in notes:
            logger.warning("%s", note)
    return Survey(
        {n: s for part in parts for n, s in part[0].items()},
        {n: s for part in parts for n, s in part[1].items()},
        sorted(r for part in parts for r in part[2]),
        sorted((n for part in parts for n in part[3]), key=lambda n: n.number),
        own.records,
        notes,
    )


def _look_at(own: Survey, keeping: BatchKeeping, batch: Batch, steps: tuple[str, ...]) -> None:
    found, to_do = _steps_left(batch, keeping.identity, steps)
    if not to_do:
        assert found.news is not None
        own.finished.append(found.news)
        BatchRecords.discard(batch)
        return
    if found.damage:
        own.notes.append(f"{found.damage}: batch {batch.number} is done again")
    done = found.steps
    own.done[batch.number] = done
    try:
        begun = BatchRecords.begun(batch)
    except DamagedJournalError as error:
        kept = BatchRecords.set_aside(batch)
        own.notes.append(f"{error}: the images of batch {batch.number} are done again ({kept.name} keeps it)")
        begun = ()
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
        if records.damaged:
            own.notes.append(records.damaged)
        if records.table_versions - {dials_compat.table_version()}:
            # tables of two versions make no file
            own.notes.append(
                f"Batch {batch.number} was begun with a DIALS that writes reflections in another form: its "
                f"{records.n_done} images are done again"
            )
            records.close()
            BatchRecords.discard(batch)
            own.pending.append((batch.first, batch.stop))
        elif records.complete:
            # a kill came between the last record and the files
            own.finished.append(finish_batch(records, done + to_do))
            return
        else:
            own.records[batch.number] = records
            own.pending.extend(records.missing)
    else:
        own.pending.append((batch.first, batch.stop))
    own.steps[batch.number] = to_do


def finish_batch(records: BatchRecords, steps_done: tuple[str, ...]) -> BatchNews:
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
