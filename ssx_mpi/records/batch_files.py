"""The folder of one batch: its journal while images are being finished, its final files once all of them are."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ssx_mpi.records import joined_experiments
from ssx_mpi.records.files import DamagedFileError, read_state, replacing, storing, write_json
from ssx_mpi.records.joined_tables import TablePart, write_joined
from ssx_mpi.records.journal import DamagedJournalError, Entry, Journal, identity_of

SUMMARY = "batch.json"
IMAGES = "images.json"
_JOURNAL = "journal"
# which files a step writes: experiments and reflections by their names in a record
_OUTPUT = {
    "find_spots": ("imported", "imported.expt", "strong", "strong.refl"),
    "index": ("indexed", "indexed.expt", "indexed", "indexed.refl"),
    "integrate": ("integrated", "integrated_1.expt", "integrated", "integrated_1.refl"),
}
_INTERMEDIATE = ("find_spots", "index")
_SUMMARY_FORMS = {"identity": dict, "left_out": list, "first": int, "stop": int, "steps": list, "statistics": dict}


@dataclass(frozen=True)
class Batch:
    """Images `first` to `stop` - 1 of the run, written to `folder`."""

    number: int
    first: int
    stop: int
    folder: Path


def batches(directory: Path, n_images: int, batch_size: int) -> list[Batch]:
    """The batches of a run, in order, numbered from one."""
    return [
        Batch(k + 1, first, min(first + batch_size, n_images), directory / f"batch_{k + 1}")
        for k, first in enumerate(range(0, n_images, batch_size))
    ]


def read_summary(batch: Batch, identity: dict[str, Any]) -> dict[str, Any] | None:
    """What ``batch.json`` says of a finished batch of this run, None where there is none.

    Raises
    ------
    DamagedFileError
        When the file is there and not what this program writes.
    """
    path = batch.folder / SUMMARY
    if not path.exists():
        return None
    content = read_state(path, _SUMMARY_FORMS)
    return content if content["identity"] == identity else None


def read_numbers(batch: Batch) -> list[dict[str, Any]]:
    """The numbers of the images of a finished batch, in their order.

    Raises
    ------
    DamagedFileError
        When its ``images.json`` is not what this program writes.
    """
    path = batch.folder / IMAGES
    try:
        content = json.loads(path.read_bytes())
        good = all(batch.first <= each["image"] < batch.stop and isinstance(each["lattices"], list) for each in content)
    except FileNotFoundError:
        raise DamagedFileError(f"{path} is missing") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        good = False
    if not good:
        raise DamagedFileError(f"{path} is damaged")
    return content


def run_of(folder: Path) -> str | None:
    """The run that the summary or the journal in the `folder` of a batch belongs to; None where neither says."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, DamagedJournalError):
        found = identity_of(folder / _JOURNAL) or {}
    with contextlib.suppress(OSError, DamagedFileError):
        found = read_state(folder / SUMMARY, {"identity": dict})
    identity = found.get("identity")
    return str(identity["run"]) if isinstance(identity, dict) and "run" in identity else None


class BatchRecords:
    """The records of one batch while it is being finished, on the rank that keeps them.

    Parameters
    ----------
    batch
        Which batch.
    identity
        Of the run, as in :class:`~ssx_mpi.records.journal.Journal`.
    steps
        Steps whose results the records hold.
    common
        Detector and beam that all images share, as dicts.
    keep_intermediate
        Whether strong spots and indexed crystals are written too.
    """

    def __init__(
        self,
        batch: Batch,
        identity: dict[str, Any],
        steps: tuple[str, ...],
        common: dict[str, Any],
        keep_intermediate: bool = True,
    ) -> None:
        self.batch = batch
        self._identity = identity
        self._steps = steps
        self._common = common
        self._keep_intermediate = keep_intermediate
        self._journal = Journal(batch.folder / _JOURNAL, {"identity": identity, "steps": list(steps)})

    @staticmethod
    def begun(batch: Batch) -> tuple[str, ...]:
        """The steps that the journal of `batch` was begun with; none without a journal.

        Raises
        ------
        DamagedJournalError
            When there is one that does not say.
        """
        path = batch.folder / _JOURNAL
        identity = identity_of(path)
        if identity is None:
            return ()
        if not isinstance(identity.get("steps"), list):
            raise DamagedJournalError(f"{path} is damaged at its beginning")
        return tuple(identity["steps"])

    @staticmethod
    def discard(batch: Batch) -> None:
        """Remove the journal of a finished `batch`, left by a kill between its last file and this."""
        with storing(batch.folder / _JOURNAL):
            (batch.folder / _JOURNAL).unlink(missing_ok=True)

    @staticmethod
    def set_aside(batch: Batch) -> Path:
        """Give the damaged journal of `batch` another name, which is returned: it may be somebody's."""
        path = batch.folder / _JOURNAL
        other = path.with_suffix(".damaged")
        with storing(path):
            path.replace(other)
        return other

    @property
    def numbers(self) -> list[dict[str, Any]]:
        """The numbers of the finished images, in the order of the images."""
        return [self._journal.entries[image].content["numbers"] for image in sorted(self._journal.entries)]

    @property
    def missing(self) -> list[tuple[int, int]]:
        """Ranges (start, stop) of images that are not finished."""
        ranges: list[tuple[int, int]] = []
        for image in range(self.batch.first, self.batch.stop):
            if image in self._journal.entries:
                continue
            if ranges and ranges[-1][1] == image:
                ranges[-1] = (ranges[-1][0], image + 1)
            else:
                ranges.append((image, image + 1))
        return ranges

    @property
    def damaged(self) -> str:
        """What is to be said of damaged records; empty where there are none."""
        n = self._journal.n_damaged
        places = "a damaged record" if n == 1 else f"damaged records in {n} places"
        return f"{self._journal.path} has {places}: those images are done again" if n else ""

    @property
    def table_versions(self) -> set[int]:
        """Versions of the form of DIALS's reflection tables that its records have."""
        return self._journal.table_versions

    @property
    def n_done(self) -> int:
        """How many images are finished."""
        return len(self._journal.entries)

    @property
    def complete(self) -> bool:
        return len(self._journal.entries) == self.batch.stop - self.batch.first

    def add(self, record: bytes) -> None:
        """Append the record of an image to the journal."""
        self._journal.append(record)

    def finish(self, statistics: dict[str, Any], steps_done: list[str], left_out: list[tuple[str, str, str]]) -> None:
        """Write the final files of the complete batch, its summary last, and remove the journal."""
        entries = [self._journal.entries[image] for image in sorted(self._journal.entries)]
        for step in self._steps:
            if self._keep_intermediate or step not in _INTERMEDIATE or step == self._steps[-1]:
                self._write_step(entries, *_OUTPUT[step])
        write_json(self.batch.folder / IMAGES, self.numbers)
        summary = {"first": self.batch.first, "stop": self.batch.stop, "steps": steps_done, "statistics": statistics}
        write_json(self.batch.folder / SUMMARY, {"identity": self._identity, "left_out": left_out, **summary})
        self._journal.close()
        self.discard(self.batch)

    def _write_step(self, entries: list[Entry], models: str, models_name: str, table: str, table_name: str) -> None:
        parts, lists, n_experiments, n_imagesets = [], [], 0, 0
        for entry in entries:
            own = entry.content["experiments"].get(models)
            if own is None:
                continue
            if table in entry.tables:
                read = partial(self._journal.column, entry)
                parts.append(TablePart(entry.tables[table], read, n_experiments, n_imagesets))
            lists.append(joined_experiments.with_common(own, self._common))
            n_experiments += len(own["experiment"])
            n_imagesets += len(own["imageset"])
        if not any(p.layout.n_rows for p in parts):
            # nothing came out: no file, as newer versions of DIALS have it
            return
        with replacing(self.batch.folder / table_name) as file:
            write_joined(file, parts)
        with replacing(self.batch.folder / models_name) as file:
            file.write(json.dumps(joined_experiments.join(lists), indent=1).encode())

    def close(self) -> None:
        """Leave the journal for the next run."""
        self._journal.sync()
        self._journal.close()
