"""Results of an earlier step, read back from the files of its batch for a step that is run alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssx_mpi import dials_compat
from ssx_mpi.images.experiment_maker import ExperimentMaker
from ssx_mpi.images.frames import BadImage
from ssx_mpi.records.batch_files import IMAGES, Batch, read_numbers
from ssx_mpi.records.files import DamagedFileError
from ssx_mpi.stages.still_results import (
    Crystals,
    Failure,
    ImageNumbers,
    Indexed,
    LatticeNumbers,
    Spots,
    Still,
    identify,
    short_reason,
)
from ssx_mpi.stages.stills import unread


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Whatever DIALS says of a file of an earlier step is that it is damaged."""
    try:
        yield
    except (MemoryError, DamagedFileError):
        raise
    except Exception as error:  # DIALS raises whatever comes up below it
        newer = dials_compat.newer_table(path)
        raise DamagedFileError(newer or f"{path} is damaged ({short_reason(error)})") from error


class StoredSteps:
    """Loads one still at a time; the files of the last batch stay in memory.

    Parameters
    ----------
    maker
        Makes the experiment of an image.
    directory
        Folder of the run.
    batch_size
        Images in a batch.
    """

    def __init__(self, maker: ExperimentMaker, directory: Path, batch_size: int) -> None:
        self._maker = maker
        self._directory = directory
        self._batch_size = batch_size
        self._loaded: tuple[int, bool] | None = None
        self._numbers: dict[int, dict[str, Any]] = {}
        self._table: Any = None
        self._experiments: list[Any] = []
        self._first: dict[str, int] = {}

    def load(self, image: int, indexed: bool) -> Still:
        """What became of `image` so far, with its strong spots or, with `indexed`, its indexed lattices."""
        batch = image // self._batch_size + 1
        if self._loaded != (batch, indexed):
            self._load_batch(batch, indexed)
        with _whole(self._directory / f"batch_{batch}" / IMAGES):
            numbers = self._numbers[image]
            lattices = tuple(LatticeNumbers(**{**v, "cell": tuple(v["cell"])}) for v in numbers["lattices"])
            still = Still(
                image,
                # older runs did not measure
                Spots(numbers["n_spots"], numbers["hit"], numbers=ImageNumbers(**numbers.get("measured", {}))),
                Indexed(lattices, None) if indexed else None,
                failures=tuple(Failure(*f) for f in numbers["failures"]),
                seconds=numbers["seconds"],
            )
        if not still.hit or (indexed and not lattices):
            return still
        try:
            self._maker.check_data(image)
            experiment = self._maker.experiment(image)
        except BadImage as error:
            # it was there when its spots were found
            return still.failed(unread(error))
        if indexed:
            crystals = self._crystals(image, experiment, len(lattices))
            return replace(
                still, spots=replace(still.spots, experiment=experiment), indexed=Indexed(lattices, crystals)
            )
        table = self._own_rows(self._first[self._maker.images.identifier(image)], 1)
        return replace(still, spots=replace(still.spots, experiment=experiment, table=table))

    def _load_batch(self, batch: int, indexed: bool) -> None:
        from dials.array_family import flex
        from dxtbx.model.experiment_list import ExperimentListFactory

        folder = self._directory / f"batch_{batch}"
        first = (batch - 1) * self._batch_size
        stop = min(first + self._batch_size, len(self._maker.images))
        self._numbers = {n["image"]: n for n in read_numbers(Batch(batch, first, stop, folder))}
        reflections = folder / ("indexed.refl" if indexed else "strong.refl")
        models = folder / "indexed.expt"
        self._experiments = []
        with _whole(reflections):
            # read as what it is: of a file that is something else dials would load whatever is pickled there
            self._table = flex.reflection_table.from_msgpack_file(str(reflections)) if reflections.exists() else None
        if indexed and self._table is not None:
            with _whole(models):
                self._experiments = list(ExperimentListFactory.from_json_file(str(models), check_format=False))
        # by identifier: images that could not be read, took too long or were set aside have no experiment at all
        names = self._table.experiment_identifiers() if self._table is not None else {}
        self._first = {str(name): int(row) for row, name in zip(names.keys(), names.values())}
        self._loaded = (batch, indexed)

    def _own_rows(self, first: int, count: int):
        """Rows of experiments `first` to `first` + `count` - 1, counted from zero."""
        from dials.array_family import flex

        ids = self._table["id"]
        own = self._table.select((ids >= first) & (ids < first + count))
        names = [own.experiment_identifiers()[first + i] for i in range(count)]
        own["id"] -= first
        own["imageset_id"] = flex.int(len(own), 0)
        identify(own, names)
        return own

    def _crystals(self, image: int, experiment, n_lattices: int) -> Crystals:
        from dxtbx.model import Experiment, ExperimentList

        first = self._first[self._maker.images.identifier(image, 0)]
        own = ExperimentList()
        for stored in self._experiments[first : first + n_lattices]:
            own.append(
                Experiment(
                    imageset=experiment.imageset,
                    beam=experiment.beam,
                    detector=experiment.detector,
                    crystal=stored.crystal,
                    identifier=stored.identifier,
                )
            )
        return Crystals(own, self._own_rows(first, n_lattices))
