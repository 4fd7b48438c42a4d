"""One table of all images of a run, ``images.h5``: a column for each number, one row for each image.

Rank 0 writes the rows of a batch when it is finished, so that the table can be read while the run is at work. All of it
comes from the ``images.json`` of the batches: a table that is damaged, or lacks batches, is made again from these.

With pandas: ``pandas.DataFrame({name: column[:] for name, column in h5py.File("images.h5")["images"].items()})``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from ssx_mpi.records.batch_files import IMAGES, Batch, read_numbers
from ssx_mpi.records.files import DamagedFileError, make_sure_of_room, replacing

NAME = "images.h5"
VERSION = 2
_GROUP = "images"
_CHUNK = 16384
# what HDF5 adds, at most: a node of its index to a column, to the lists of names, and to a name
_NODE, _HEAPS, _REFERENCE = 2200, 20480, 128
# chunks that a node is for; where there are more, one may be split and get another above it
_CHUNKS_OF_NODE = 64
# lists of names that the columns `file` and `reason` count in
_LISTS = ("files", "reasons")
# name: dtype, value of a row that is not there, unit, meaning
COLUMNS: dict[str, tuple[type, Any, str, str]] = {
    "finished": (np.uint8, 0, "", "1 where the image is done; other columns mean nothing where it is 0"),
    "file": (np.int32, -1, "", "row of the dataset /files with the name of its file"),
    "frame": (np.int32, 0, "", "number in that file, counted from one; 0 where the file is the image"),
    "hit": (np.uint8, 0, "", "whether there were min_spots strong spots"),
    "n_spots": (np.int32, 0, "", "strong spots"),
    "n_lattices": (np.int16, 0, "", "indexed lattices"),
    "n_indexed": (np.int32, 0, "", "strong spots on these"),
    "n_crystals": (np.int16, 0, "", "integrated crystals"),
    "n_reflections": (np.int32, 0, "", "integrated reflections"),
    "a": (np.float32, np.nan, "angstrom", "cell of the first crystal, or lattice"),
    "b": (np.float32, np.nan, "angstrom", ""),
    "c": (np.float32, np.nan, "angstrom", ""),
    "alpha": (np.float32, np.nan, "degrees", ""),
    "beta": (np.float32, np.nan, "degrees", ""),
    "gamma": (np.float32, np.nan, "degrees", ""),
    "rmsd": (np.float32, np.nan, "pixels", "between spots and predictions of the first lattice"),
    "d_min": (np.float32, np.nan, "angstrom", "of the indexed spots of the first lattice"),
    "mosaicity": (np.float32, np.nan, "degrees", "of the first crystal"),
    "i_over_sigma": (np.float32, np.nan, "", "mean of the first crystal"),
    "background": (np.float32, np.nan, "counts", "mean of the pixels between the spots"),
    "ice": (np.float32, np.nan, "", "relative excess of the strongest ring of ice over the background beside it"),
    "ice_spots": (np.float32, np.nan, "", "share of the strong spots on rings of ice; 0.06 to 0.08 by chance"),
    "n_saturated": (np.int32, -1, "", "pixels above the trusted range; -1 where that is not known"),
    "spots_d_min": (np.float32, np.nan, "angstrom", "resolution within which 95% of the strong spots lie"),
    "wavelength": (np.float32, np.nan, "angstrom", ""),
    "cpu_seconds": (np.float32, 0.0, "s", "of all stages"),
    "reason": (np.int16, -1, "", "row of the dataset /reasons: why the image gave no crystal, or not all"),
}
_CELL = ("a", "b", "c", "alpha", "beta", "gamma")


class ImageTable:
    """The table of a run with `n_images` images in `directory`; one process writes it."""

    def __init__(self, directory: Path, n_images: int) -> None:
        self.path = directory / NAME
        self._n_images = n_images
        # as they stand in the file, which is not read again for every batch
        self._names: dict[str, dict[str, int]] | None = None

    def complete(self, batches: Iterable[Batch]) -> list[str]:
        """Make it the table of the finished `batches`: add rows that are not there, take back those of other batches.

        What a batch had before a further step of it began is not its outcome. Returned is what is to be said of batches
        whose numbers are damaged: their rows are not there.
        """
        batches = list(batches)
        if not self._usable():
            self._create()
        with self._open("r") as file:
            finished = file[_GROUP]["finished"][:]
        missing = [batch for batch in batches if not finished[batch.first]]
        kept = np.zeros_like(finished)
        for batch in batches:
            kept[batch.first : batch.stop] = finished[batch.first : batch.stop]
        if not np.array_equal(kept, finished):
            with self._writing(range(self._n_images), ["finished"]) as file:
                file[_GROUP]["finished"][:] = kept
        damaged = []
        for batch in missing:
            try:
                self.add(batch)
            except DamagedFileError as error:
                damaged.append(f"{error}: {NAME} lacks the images of batch {batch.number}")
        return damaged

    def add(self, batch: Batch) -> None:
        """Write the rows of a finished batch.

        Raises
        ------
        DamagedFileError
            When its ``images.json`` is not what this program writes.
        """
        images = read_numbers(batch)
        if not self._usable():
            self._create()
        rows_of_batch = range(batch.first, batch.stop)
        # all names in it, and more
        names_size = (batch.folder / IMAGES).stat().st_size + len(rows_of_batch) * _REFERENCE
        with self._writing(rows_of_batch, COLUMNS, names_size) as file:
            if self._names is None:
                self._names = {list_: {n: k for k, n in enumerate(file[list_].asstr()[:])} for list_ in _LISTS}
            try:
                rows = [_row(image, self._names) for image in images]
            except (KeyError, TypeError, AttributeError, IndexError, ValueError):
                self._names = None
                raise DamagedFileError(f"{batch.folder / IMAGES} is damaged") from None
            numbers = np.array([image["image"] for image in images])
            for list_, known in self._names.items():
                _append(file[list_], known)
            for name, (dtype, nothing, _, _) in COLUMNS.items():
                if name == "finished":
                    continue
                values: Any = np.full(batch.stop - batch.first, nothing, dtype)
                values[numbers - batch.first] = [row.get(name, nothing) for row in rows]
                file[_GROUP][name][batch.first : batch.stop] = values
            # last: what a reader goes by
            file.flush()
            file[_GROUP]["finished"][batch.first : batch.stop] = 1

    def _usable(self) -> bool:
        try:
            with self._open("r") as file:
                return file.attrs["version"] == VERSION and len(file[_GROUP]["finished"]) == self._n_images
        except (OSError, KeyError):
            return False

    def _create(self) -> None:
        self._names = None
        # in memory: without rows it is small, and a full disk is found when the whole of it is written
        with h5py.File(NAME, "w", driver="core", backing_store=False) as file:
            file.attrs.update(version=VERSION, NX_class="NXroot", default=_GROUP)
            group = file.create_group(_GROUP)
            group.attrs["NX_class"] = "NXcollection"
            for name, (dtype, nothing, unit, meaning) in COLUMNS.items():
                chunk = (min(_CHUNK, self._n_images),)
                column = group.create_dataset(
                    name, (self._n_images,), dtype, chunks=chunk, fillvalue=nothing, compression="gzip", shuffle=True
                )
                column.attrs.update(units=unit, long_name=meaning)
            for name in _LISTS:
                file.create_dataset(name, (0,), h5py.string_dtype(), maxshape=(None,), chunks=(256,))
            file.flush()
            content = file.id.get_file_image()
        with replacing(self.path) as written:
            written.write(content)

    @contextmanager
    def _writing(self, rows: range, columns: Iterable[str], names_size: int = 0) -> Iterator[h5py.File]:
        """The file, to write these rows of these columns, and names of so many bytes.

        HDF5 keeps what it writes until the file is closed, and ends the process at its end where the disk is full then.
        """
        chunk = min(_CHUNK, self._n_images)
        n_chunks = (rows.stop - 1) // chunk - rows.start // chunk + 1
        index = _NODE if self._n_images <= _CHUNKS_OF_NODE * chunk else 3 * _NODE
        sizes = [np.dtype(COLUMNS[name][0]).itemsize for name in columns]
        make_sure_of_room(self.path, sum(n_chunks * chunk * size + index for size in sizes) + _HEAPS + names_size)
        with self._open("r+") as file:
            yield file

    def _open(self, mode: str) -> h5py.File:
        # readers are not to keep the run from writing, nor is a lock that a killed run left
        return h5py.File(self.path, mode, locking=False)


def _append(dataset: h5py.Dataset, names: dict[str, int]) -> None:
    """Add the names to a list in the file that are not there yet."""
    written = len(dataset)
    if len(names) > written:
        dataset.resize((len(names),))
        dataset[written:] = list(islice(names, written, None))


def _row(image: dict[str, Any], names: dict[str, dict[str, int]]) -> dict[str, Any]:
    files, reasons = (names[list_] for list_ in _LISTS)
    file, _, frame = image["name"].rpartition(":")
    if not frame.isdigit():
        file, frame = image["name"], "0"
    lattices, crystals = image["lattices"], image["crystals"]
    row: dict[str, Any] = {
        "file": files.setdefault(file, len(files)),
        "frame": int(frame),
        "hit": image["hit"],
        "n_spots": image["n_spots"],
        "n_lattices": len(lattices),
        "n_indexed": sum(lattice["n_indexed"] for lattice in lattices),
        "n_crystals": len(crystals),
        "n_reflections": sum(crystal["n_reflections"] for crystal in crystals),
        "cpu_seconds": sum(image["seconds"].values()),
    }
    row.update((name, value) for name, value in image.get("measured", {}).items() if value is not None)
    if lattices:
        row["rmsd"] = math.hypot(lattices[0]["rmsd_x"], lattices[0]["rmsd_y"])
        row["d_min"] = lattices[0]["d_min"]
    if crystals:
        row["mosaicity"] = crystals[0]["mosaicity"] or math.nan
        row["i_over_sigma"] = crystals[0]["i_over_sigma"]
    if lattices or crystals:
        row.update(zip(_CELL, (crystals or lattices)[0]["cell"]))
    if image["failures"]:
        row["reason"] = reasons.setdefault(": ".join(image["failures"][0]), len(reasons))
    return row


def read_columns(directory: Path) -> dict[str, Any] | None:
    """The columns of the finished images, their numbers as ``image``, and the lists ``files`` and ``reasons``.

    None where there is no table.
    """
    path = directory / NAME
    if not path.exists():
        return None
    with h5py.File(path, "r", locking=False) as file:
        (finished,) = np.nonzero(file[_GROUP]["finished"][:])
        columns: dict[str, Any] = {}
        for name, (dtype, nothing, _, _) in COLUMNS.items():
            # a table of an older version has fewer columns
            known = name in file[_GROUP]
            columns[name] = file[_GROUP][name][:][finished] if known else np.full(len(finished), nothing, dtype)
        del columns["finished"]
        columns["image"] = finished
        for name in _LISTS:
            columns[name] = list(file[name].asstr()[:])
    return columns
