"""The first hits and the first crystals of a run: what is found before all images are processed in batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ssx_mpi.parallel import dispatch
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import CrystalSelection
from ssx_mpi.processing.failures import WatchedJob
from ssx_mpi.processing.importing import Run, image_range
from ssx_mpi.processing.watch import Watch
from ssx_mpi.report.progress import Progress
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.stages.fast import beam_search
from ssx_mpi.stages.packing import pack
from ssx_mpi.stages.still_results import Still
from ssx_mpi.stages.stills import StillProcessor

# most images handed out at once: whoever waits for the first crystals waits for the longest range
_LONGEST_RANGE = 4


class FirstImages(WatchedJob):
    """Base of the jobs over the first images: each rank keeps what it found itself."""

    def __init__(self, comm: Communicator, processor: StillProcessor, watch: Watch, show: Callable[[int], None]):
        self._rank = comm.rank
        self._show = show
        self.processor = processor
        self.watch = watch
        self.stills: dict[int, Still] = {}

    def note(self, value: int) -> int:
        """What an image counts towards the number wanted is its value."""
        return value

    def name_of(self, image: int) -> str:
        """Name of an image for the log."""
        return self.processor.maker.images.name(image)

    def keeper(self, item: int) -> int:
        """The rank that keeps the result of `item`: this one."""
        return self._rank

    def keep(self, item: int, result: Still) -> None:
        """Keep a result."""
        self.stills[item] = result

    def progress(self, done: int) -> None:
        """Show how many images are done."""
        self._show(done)

    def before(self, end: int) -> dict[int, Still]:
        """What this rank found before image `end`, by image."""
        return {image: still for image, still in self.stills.items() if image < end}


class FirstHits(FirstImages):
    """Strong spots of the first hits. The value of an image is one where its spots can tell the beam centre."""

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, Still] | None:
        """Find the spots of image `item`."""
        still = self.attempt(item, lambda: self._spots(item))
        return None if still is None else (int(tells_centre(still)), still)

    def _spots(self, item: int) -> Still:
        still = self.processor.find_spots(item)
        return still.without_pixels() if tells_centre(still) else still.without_experiment()

    def hits(self, end: int) -> dict[int, Still]:
        """Those before image `end` that can tell the beam centre, by image."""
        return {image: still for image, still in self.before(end).items() if tells_centre(still)}


class FirstCrystals(FirstImages):
    """Spots and lattices of the first images. The value of an image is its number of lattices."""

    def work(self, item: int, breathe: Callable[[], None]) -> tuple[int, Still] | None:
        """Find the spots of image `item` and index them."""
        still = self.attempt(item, lambda: self._index(item, breathe))
        return None if still is None else (still.n_lattices, still)

    def _index(self, item: int, breathe: Callable[[], None]) -> Still:
        still = self.processor.find_spots(item)
        self.watch.breathing(breathe)
        return self.processor.index(still).without_experiment()

    def index_again(self, processor: StillProcessor) -> None:
        """Index the hits that this rank holds once more, with the geometry of `processor`."""
        self.processor = processor
        for image in sorted(self.stills):
            still = self.stills[image]
            if still.hit and not self.watch.stopping():
                again = self.attempt(image, partial(processor.index_again, still))
                self.stills[image] = still if again is None else again

    def statistics(self, comm: Communicator) -> Statistics:
        """Sum over the images of all ranks, on rank 0; elsewhere over its own. Collective."""
        own = Statistics()
        for still in self.stills.values():
            own.add_image(self.processor.describe(still))
        everyone = comm.gather(own)
        return sum(everyone, Statistics()) if everyone is not None else own

    def own_lattices(self) -> list[tuple[int, dict[str, Any], bytes]]:
        """Image, experiments and reflections of each still of this rank that has lattices, packed."""
        return [
            (image, pack(still.crystals.experiments), still.crystals.reflections.as_msgpack())
            for image, still in self.stills.items()
            if still.crystals is not None
        ]

    def gather_lattices(self, comm: Communicator) -> list[tuple[int, dict[str, Any], bytes]] | None:
        """The packed lattices of all ranks in the order of their images, on rank 0; None elsewhere. Collective."""
        everyone = comm.gather(self.own_lattices())
        return (
            sorted((each for part in everyone for each in part), key=lambda x: x[0]) if everyone is not None else None
        )


def tells_centre(still: Still) -> bool:
    """Whether there are enough spots to tell the beam centre."""
    return still.spots.table is not None and still.spots.n_spots >= beam_search.MIN_SPOTS


@dataclass(frozen=True)
class SearchedImages:
    """Images whose spots are known from the search for the beam centre: those before `end`, each on one rank."""

    stills: dict[int, Still]
    end: int


@dataclass(frozen=True)
class Found:
    """The first crystals: the job that holds them, one past the last image that counts, whether it was stopped."""

    crystals: FirstCrystals
    end: int
    stopped: bool


def find_first_hits(comm: Communicator, run: Run, wanted: int) -> tuple[FirstHits, int, bool]:
    """Find the spots of images in order until `wanted` of them can tell the beam centre. Collective.

    Returns
    -------
    job
        Holds what this rank found.
    end
        One past the last image that counts.
    stopped
        Whether the job was stopped on request.
    """
    first, stop = image_range(run.images, run.parameters.geometry)
    progress = Progress("first hits", stop - first, comm.rank == 0)
    job = FirstHits(comm, run.processor(), run.watch, progress.show)
    end, stopped, _ = dispatch.run(comm, job, [(first, stop)], wanted=wanted, longest=_LONGEST_RANGE)
    progress.close()
    return job, end, stopped


def find_first_crystals(
    comm: Communicator,
    run: Run,
    selection: CrystalSelection,
    processor: StillProcessor,
    title: str,
    searched: SearchedImages | None = None,
) -> Found:
    """Index images in order until there are as many lattices as wanted; each rank keeps what it found. Collective.

    The spots of images that were `searched` are not found again.
    """
    first, stop = image_range(run.images, selection)
    start = first if searched is None else searched.end
    progress = Progress(title, stop - start, comm.rank == 0)
    job = FirstCrystals(comm, processor, run.watch, progress.show)
    end, stopped, found = start, False, 0
    if searched is not None:
        job.stills = dict(searched.stills)
        job.index_again(processor)
        stopped = comm.bcast(run.watch.stopping())
        found, end = _shortest_prefix(comm, job, selection.n_crystals, end)
    if start < stop and not stopped and found < selection.n_crystals:
        wanted = selection.n_crystals - found
        end, stopped, _ = dispatch.run(comm, job, [(start, stop)], wanted=wanted, longest=_LONGEST_RANGE)
    # what follows is not done in the time of an image
    run.watch.waiting()
    progress.close()
    job.stills = job.before(end)
    return Found(job, end, stopped)


def _shortest_prefix(comm: Communicator, job: FirstCrystals, wanted: int, end: int) -> tuple[int, int]:
    """Lattices of the first images that have `wanted` in all, and one past the last of these; `end` with fewer."""
    own = [(image, still.n_lattices) for image, still in job.stills.items()]
    found = 0
    for image, n_lattices in sorted(each for part in comm.allgather(own) for each in part):
        found += n_lattices
        if found >= wanted:
            return found, image + 1
    return found, end
