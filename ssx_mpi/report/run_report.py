"""Feedback while batches finish, on rank 0: the log, ``ssx_mpi.json``, and links to what is ready."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ssx_mpi.records.files import link, read_if_whole, write_hastily, write_json
from ssx_mpi.report import text
from ssx_mpi.report.progress import Progress
from ssx_mpi.report.statistics import Statistics

logger = logging.getLogger("ssx_mpi")

#: how far the images are, for a monitor; only there while they are being processed
PROGRESS = "progress.json"
# seconds between two of its versions
_WORD_EVERY = 2.0
_COUNTED = ("images", "hits", "indexed", "crystals")


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
        #: of all crystals so far, where they are merged as batches finish: statistics by shells, the last for all
        self.merged: Any = None
        self._growth: list[dict[str, Any]] = []
        self._began = time.monotonic()
        self._done = self._done_before = 0
        self._shown = shown
        self._progress = Progress("images", n_images, shown)
        # images, hits, indexed images and crystals, finished batches and images since the start
        self._counted = Counter[str]()
        self._last_word = 0.0

    def add_finished(self, number: int, statistics: Statistics, bad: list[tuple[str, str, str]]) -> None:
        """Count a batch that an earlier run finished."""
        self._batches[number] = statistics
        self._bad += bad
        self.total += statistics
        self._counted.update({name: statistics.counts[name] for name in _COUNTED})
        self._link(number)

    def start(self, done_before: int) -> None:
        """Processing begins; `done_before` images need none."""
        self._began = time.monotonic()
        self._done_before = done_before
        self._progress.start(done_before)
        if done_before:
            logger.info("%d of %d images are finished already", done_before, self._n_images)
        if unread := self.total.unread:
            logger.info("%d of these could not be read, and are not tried again but with restart=True", unread)
        before = read_if_whole(self._directory / "ssx_mpi.json")
        if done_before == self._n_images and "reduction" in before:
            # no image is added to what was reduced
            self._facts = {**self._facts, "reduction": before["reduction"]}

    def show(self, done: int) -> None:
        """`done` images are finished since the start."""
        self._done = done
        now = time.monotonic()
        if self._shown and now - self._last_word >= _WORD_EVERY:
            self._last_word = now
            self._say_how_far()
        self._progress.show(done)

    def count(self, hit: bool, indexed: bool, n_crystals: int) -> None:
        """An image is finished."""
        self._counted.update({"images": 1, "hits": int(hit), "indexed": int(indexed), "crystals": n_crystals})

    def _say_how_far(self) -> None:
        """What the bar shows, and other programs may read before a batch is finished."""
        counts = self._counted
        words = [f"hits {100 * counts['hits'] / max(counts['images'], 1):.0f}%"]
        if counts["hits"]:
            words.append(f"indexed {100 * counts['indexed'] / counts['hits']:.0f}%")
        words.append(text.counted(counts["crystals"], "crystal"))
        axes = [self.total.values[name].median for name in ("a", "b", "c")]
        known = [axis for axis in axes if axis is not None]
        if known:
            words.append(" ".join(f"{axis:.1f}" for axis in known))
        d_min = self.total.values["d_min"].median
        if d_min is not None:
            words.append(f"{d_min:.1f} Å")
        self._progress.note(", ".join(words))
        elapsed = time.monotonic() - self._began
        rate = self._done / elapsed if elapsed > 0 else 0.0
        left = self._n_images - self._done_before - self._done
        write_hastily(
            self._directory / PROGRESS,
            {
                "time": round(time.time(), 1),
                "n_images": self._n_images,
                "done": self._done_before + self._done,
                **{name: counts[name] for name in _COUNTED},
                "images_per_second": round(rate, 3),
                "seconds_left": round(left / rate, 1) if rate else None,
                "ranks": self._n_ranks,
            },
        )

    def hear(self, number: int, statistics: Statistics, bad: list[tuple[str, str, str]], merged: Any = None) -> None:
        """A batch is finished; `merged` says how far the merged data have come with it."""
        self._batches[number] = statistics
        self.merged = merged
        if merged is not None:
            self._growth.append({"batch": number, **_merged_so_far(merged)})
        self.total += statistics
        self._bad += bad
        for name, stage, reason in bad:
            logger.warning("%s left out at %s: %s", name, stage, reason)
        rate = self._done / max(time.monotonic() - self._began, 1e-9)
        left = self._n_images - self._done_before - self._done
        title = f"\nBatch {number} of {self._batches_in_all}"
        so_far = None if merged is None else _merged_so_far(merged)
        logger.info(text.progress_block(title, statistics, self.total, rate, left / rate if rate else None, so_far))
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
        if self.merged is not None:
            content["live_merge"] = {
                **_merged_so_far(self.merged),
                "shells": [_of_shell(self.merged, k) for k in range(len(self.merged.d_min) - 1)],
                "growth": self._growth,
            }
        write_json(self._directory / "ssx_mpi.json", content)

    def conclude(self, state: str, seconds: float, dispatch: dict[str, Any]) -> None:
        """Processing has ended; `state` is done, stopped or nothing_found."""
        self._progress.close()
        (self._directory / PROGRESS).unlink(missing_ok=True)
        logger.info("\n%s", text.final_block(self.total, self._done, seconds, self._n_ranks))
        finished = self._done_before + self._done
        if finished < self._n_images:
            logger.info("%d of %d images are finished; numbers are those of finished batches", finished, self._n_images)
        logger.info(
            "Dispatch: %.1f messages and %.0f bytes an image; coordinator busy with it for %.1f%% of the time, "
            "ranks waiting for %.1f%%",
            *(dispatch["messages_per_image"], dispatch["bytes_per_image"]),
            *(100 * dispatch["coordinator_busy"], 100 * dispatch["waiting"]),
        )
        self._write(state, seconds=round(seconds, 3), dispatch=dispatch)


def record_reduction(directory: Path, state: str, numbers: dict[str, Any] | None) -> None:
    """Put what a reduction came to into ``ssx_mpi.json``, which says of the images what it said before."""
    content = {**read_if_whole(directory / "ssx_mpi.json"), "state": state}
    if numbers is not None:
        content["reduction"] = numbers
    write_json(directory / "ssx_mpi.json", content)


def _merged_so_far(merged: Any) -> dict[str, Any]:
    return {"n_crystals": merged.n_crystals, **_of_shell(merged, -1)}


def _of_shell(merged: Any, k: int) -> dict[str, Any]:
    cc_half = float(merged.cc_half[k])
    return {
        "d_min": round(float(merged.d_min[k]), 4),
        "completeness": round(100 * float(merged.completeness[k]), 3),
        "multiplicity": round(float(merged.multiplicity[k]), 4),
        "cc_half": round(cc_half, 5) if math.isfinite(cc_half) else None,
    }


def _short(statistics: Statistics) -> dict[str, Any]:
    content = statistics.as_json()
    del content["histograms"]
    return content
