"""Feedback while batches finish, on rank 0: the log, ``ssx_mpi.json``, and links to what is ready."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from ssx_mpi.records.files import link, write_json
from ssx_mpi.report import text
from ssx_mpi.report.progress import Progress
from ssx_mpi.report.statistics import Statistics

logger = logging.getLogger("ssx_mpi")


class LiveReport:
    """Adds up the batches and tells the user.

    Parameters
    ----------
    directory
        Folder of the run.
    n_images, n_ranks
        Size of the run.
    shown
        Whether this rank tells anything.
    facts
        What ``ssx_mpi.json`` says besides the numbers: version, parameters, geometry.
    """

    def __init__(self, directory: Path, n_images: int, n_ranks: int, shown: bool, facts: dict[str, Any]) -> None:
        self._directory = directory
        self._n_images = n_images
        self._n_ranks = n_ranks
        self._facts = facts
        self.total = Statistics()
        self._batches: dict[int, Statistics] = {}
        self._bad: list[tuple[str, str, str]] = []
        self._began = time.monotonic()
        self._done = self._done_before = 0
        self._progress = Progress("images", n_images, shown)

    def add_finished(self, number: int, statistics: Statistics, bad: list[tuple[str, str, str]]) -> None:
        """Count a batch that an earlier run finished."""
        self._batches[number] = statistics
        self._bad += bad
        self.total += statistics
        self._link(number)

    def start(self, done_before: int) -> None:
        """Processing begins; `done_before` images need none."""
        self._began = time.monotonic()
        self._done_before = done_before
        self._progress.start(done_before)
        if done_before:
            logger.info("%d of %d images are finished already", done_before, self._n_images)

    def show(self, done: int) -> None:
        """`done` images are finished since the start."""
        self._done = done
        self._progress.show(done)

    def hear(self, number: int, statistics: Statistics, bad: list[tuple[str, str, str]]) -> None:
        """A batch is finished."""
        self._batches[number] = statistics
        self.total += statistics
        self._bad += bad
        for name, stage, reason in bad:
            logger.warning("%s left out at %s: %s", name, stage, reason)
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        left = self._n_images - self._done_before - self._done
        title = f"\nBatch {number} of {self._batches_in_all}"
        logger.info(text.progress_block(title, statistics, self.total, rate, left / rate if rate else None))
        self._link(number)
        self._write("running")

    @property
    def _batches_in_all(self) -> int:
        return int(self._facts["n_batches"])

    def _link(self, number: int) -> None:
        for suffix in (".expt", ".refl"):
            target = self._directory / f"batch_{number}" / f"integrated_1{suffix}"
            if target.exists():
                link(self._directory / "DataFiles" / f"integrated_{number}{suffix}", target)

    def _write(self, state: str, **more: Any) -> None:
        content = {
            **self._facts,
            "state": state,
            "n_images": self._n_images,
            "ranks": self._n_ranks,
            "total": self.total.as_json(),
            "batches": {str(n): _short(s) for n, s in sorted(self._batches.items())},
            "left_out": self._bad,
            **more,
        }
        write_json(self._directory / "ssx_mpi.json", content)

    def conclude(self, state: str, seconds: float, dispatch: dict[str, Any]) -> None:
        """Processing has ended; `state` is done, stopped or nothing_found."""
        self._progress.close()
        logger.info("\n%s", text.final_block(self.total, seconds, self._n_ranks))
        logger.info(
            "Dispatch: %.1f messages and %.0f bytes an image; coordinator busy with it for %.1f%% of the time, "
            "ranks waiting for %.1f%%",
            *(dispatch["messages_per_image"], dispatch["bytes_per_image"]),
            *(100 * dispatch["coordinator_busy"], 100 * dispatch["waiting"]),
        )
        self._write(state, seconds=round(seconds, 3), dispatch=dispatch)


def _short(statistics: Statistics) -> dict[str, Any]:
    content = statistics.as_json()
    del content["histograms"]
    return content
