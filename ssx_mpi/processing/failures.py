"""Failures of images: how one becomes a value, how they are counted, and when there are too many of one kind."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ssx_mpi.processing.watch import ImageAbandoned, Watch
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.report.text import duration
from ssx_mpi.stages.still_results import Failure, Still

logger = logging.getLogger("ssx_mpi")

# so many images, hits or indexed images are needed to tell that too many of them fail
_FEWEST_TO_JUDGE = 200
# reasons of failures that are listed
_MOST_REASONS = 8


class WatchedJob:
    """Base of the jobs over images: each image is done under the eyes of the rank's watch."""

    watch: Watch

    def attempt(self, image: int, work: Callable[[], Still]) -> Still | None:
        """The result of `work`, or a failure as the result; None when it was abandoned because the job is to stop."""
        if image in self.watch.set_aside:
            return Still(image, failures=(Failure("crash", self.watch.set_aside[image]),))
        try:
            return self.watch.image(image, work)
        except ImageAbandoned:
            if self.watch.stopping():
                return None
            return Still(image, failures=(Failure("timeout", "took longer than image_timeout"),))

    def stopping(self) -> bool:
        """Whether this rank wants the whole job to stop."""
        return self.watch.stopping()

    def waiting(self) -> None:
        """Tell the watch that this rank waits for others."""
        self.watch.waiting()

    def silent(self, rank: int, seconds: float) -> None:
        """Warn that nothing was heard of `rank` for so long."""
        host, image, since = self.watch.whereabouts(rank)
        at = "" if image is None or since is None else f", at image {self.name_of(image)} for {duration(since)}"
        logger.warning("Nothing heard of rank %d on %s for %s%s", rank, host or "?", duration(seconds), at)

    def name_of(self, image: int) -> str:
        """Name of an image for the log."""
        raise NotImplementedError


@dataclass(frozen=True)
class Outcome:
    """What rank 0 is told of a finished image.

    Attributes
    ----------
    hit, indexed
        Whether it had enough spots, and a lattice.
    failure
        "stage: reason" of the failure that left it with nothing; empty when it gave a crystal or was a blank.
    traceback
        Of the first failure with this reason on the rank that did the image; empty otherwise.
    n_crystals
        Integrated crystals.
    line
        Number of the image and its line for ``live.jsonl``, where that is asked for.
    """

    hit: bool
    indexed: bool
    failure: str = ""
    traceback: str = ""
    n_crystals: int = 0
    line: tuple[int, str] | None = None

    @classmethod
    def of(cls, still: Still) -> Outcome:
        """The outcome of a processed still."""
        lost = still.failures[0] if still.failures and not still.n_crystals else None
        traceback = next((f.traceback for f in still.failures if f.traceback), "")
        failure = f"{lost.stage}: {lost.reason}" if lost else ""
        return cls(still.hit, bool(still.n_lattices), failure, traceback, still.n_crystals)


@dataclass
class FailureShare:
    """Counts failures by reason on rank 0, and finds out when a reason has more than its share.

    A share is taken of the images that came to the stage: blank images and images without a lattice are no failures
    of integration.

    Attributes
    ----------
    most
        Largest share of images that may fail for one reason.
    verdict
        What to tell the user once it is too many; empty before.
    """

    most: float
    images: Counter = field(default_factory=Counter)
    failed: Counter = field(default_factory=Counter)
    verdict: str = ""

    def add(self, outcome: Outcome) -> None:
        """Count an image."""
        self.images.update({"images": 1, "hits": int(outcome.hit), "indexed images": int(outcome.indexed)})
        failure = outcome.failure
        if not failure or self.verdict:
            return
        self.failed[failure] += 1
        stage = failure.partition(":")[0]
        of = {"index": "hits", "integrate": "indexed images"}.get(stage, "images")
        count, total = self.failed[failure], self.images[of]
        if total >= _FEWEST_TO_JUDGE and count > self.most * total:
            self.verdict = f"{count} of {total} {of} failed in one way ({failure}), over max_failures={self.most:g}"


def log_failures(statistics: Statistics) -> None:
    """List the most frequent reasons in the log."""
    for reason, count in statistics.failures.most_common(_MOST_REASONS):
        logger.info("  %d x %s", count, reason)


def advice(statistics: Statistics) -> str:
    """What to try where no crystal came out."""
    if statistics.unread == statistics.counts["images"]:
        return "No image could be read: look at the reasons above."
    if not statistics.counts["hits"]:
        return "No image had enough spots: look at the images, at min_spots and at spotfinding.min_spot_size."
    return "There were hits: check the beam centre and distance (starting_geometry=), the wavelength and the cell."
