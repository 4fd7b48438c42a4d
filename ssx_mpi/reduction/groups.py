"""Groups of crystals that are scaled together and merged apart: dose series, and metadata of images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssx_mpi.parallel.collective import on_every_rank
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction.crystal_list import Crystals
from ssx_mpi.reduction.errors import InputError


@dataclass(frozen=True)
class Groups:
    """Names of the groups, a description of each, and the group of each crystal of this rank (-1: none)."""

    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    of_crystal: np.ndarray


@dataclass(frozen=True)
class Grouping:
    """What a grouping.yml asks for.

    Parameters
    ----------
    values
        Names of the metadata to group by.
    tolerances
        Of each of them: values no further apart than this from one to the next are one group.
    metadata
        For each name, what each image file has: a number, ``repeat=n``, or ``file:/path/to/array``.
    """

    values: tuple[str, ...]
    tolerances: tuple[float, ...]
    metadata: dict[str, dict[str, str | float]]


def dose_series(crystals: Crystals, repeat: int) -> Groups:
    """Crystals by image number: image n, counted from 1, is dose point (n - 1) mod repeat + 1."""
    return Groups(
        tuple(f"dose_{k + 1}" for k in range(repeat)),
        tuple(f"images {k + 1}, {k + 1 + repeat}, {k + 1 + 2 * repeat}, ..." for k in range(repeat)),
        (crystals.image_number - 1) % repeat,
    )


def read_grouping(path: Path) -> Grouping:
    """Read and check a grouping.yml.

    Raises
    ------
    InputError
        Naming what is wrong in it.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise InputError(f"grouping {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"grouping {path} is not YAML: {str(error).splitlines()[0]}") from None
    try:
        merge_by = content["grouping"]["merge_by"]
        values = tuple(merge_by["values"])
        metadata = {name: dict(content["metadata"][name]) for name in values}
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"grouping {path} needs grouping: merge_by: values, and metadata: for each of these values"
        ) from None
    tolerances = tuple(float(t) for t in merge_by.get("tolerances", [0.1] * len(values)))
    if len(tolerances) != len(values):
        raise InputError(f"grouping {path} has {len(values)} values but {len(tolerances)} tolerances")
    return Grouping(values, tolerances, metadata)


def by_metadata(comm: Communicator, crystals: Crystals, grouping: Grouping) -> Groups:
    """Crystals by the metadata of their images. Collective.

    Raises
    ------
    InputError
        On all ranks, when a file of images has no metadata, or an array is missing or too short.
    """
    columns = np.zeros((len(crystals), len(grouping.values)))
    with on_every_rank(comm, InputError):
        for number, name in enumerate(grouping.values):
            columns[:, number] = _metadata(crystals, name, grouping.metadata[name])
    labels, centres = [], []
    for number, tolerance in enumerate(grouping.tolerances):
        label, centre = _bin(comm, columns[:, number], tolerance)
        labels.append(label)
        centres.append(centre)
    combined = np.stack(labels, axis=1) if labels else np.zeros((len(crystals), 0), dtype=np.int64)
    used = sorted({tuple(row) for part in comm.allgather(np.unique(combined, axis=0)) for row in part.tolist()})
    number_of = {row: number for number, row in enumerate(used)}
    descriptions = tuple(
        ", ".join(f"{name} = {centres[k][row[k]]:g}" for k, name in enumerate(grouping.values)) for row in used
    )
    return Groups(
        tuple(f"group_{k + 1}" for k in range(len(used))),
        descriptions,
        np.array([number_of[tuple(row)] for row in combined.tolist()], dtype=np.int64),
    )


def _bin(comm: Communicator, values: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    # values that differ by no more than the tolerance are one; only distinct values travel
    distinct = np.unique(np.concatenate(comm.allgather(np.unique(values))))
    gaps = np.diff(distinct) > tolerance
    group = np.concatenate([[0], np.cumsum(gaps)]) if len(distinct) else np.zeros(0, dtype=np.int64)
    centres = np.array([distinct[group == k].mean() for k in range(group[-1] + 1)]) if len(distinct) else np.zeros(0)
    return group[np.searchsorted(distinct, values)], centres


def _metadata(crystals: Crystals, name: str, of_file: dict[str, str | float]) -> np.ndarray:
    values = np.empty(len(crystals))
    arrays: dict[str, np.ndarray] = {}
    known = {_as_template(path): value for path, value in of_file.items()}
    for row, (image, number) in enumerate(zip(crystals.image, crystals.image_number)):
        value = known.get(_as_template(image))
        if value is None:
            raise InputError(f"grouping by {name}: nothing is said about {image}")
        if isinstance(value, (int, float)):
            values[row] = value
        elif value.startswith("repeat="):
            values[row] = (number - 1) % int(value[len("repeat=") :])
        else:
            if value not in arrays:
                arrays[value] = _read_array(name, value)
            if number > len(arrays[value]):
                raise InputError(f"grouping by {name}: {value} has {len(arrays[value])} values, no. {number} is wanted")
            values[row] = arrays[value][number - 1]
        if not math.isfinite(values[row]):
            raise InputError(f"grouping by {name}: the value for image {number} of {image} is not a number")
    return values


def _read_array(name: str, where: str) -> np.ndarray:
    import h5py

    path, _, item = where.rpartition(":")
    try:
        with h5py.File(path, "r") as file:
            return np.asarray(file[item][()], dtype=np.float64).reshape(-1)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"grouping by {name}: cannot read {where}: {error}") from None


def _as_template(path: str) -> str:
    # image_00012.cbf and image_#####.cbf are the same set of images; a file of many images is itself
    target = Path(path)
    stem = target.stem
    if target.suffix not in (".h5", ".nxs", ".hdf5"):
        digits = len(stem) - len(stem.rstrip("0123456789"))
        stem = stem[: len(stem) - digits] + "#" * digits
    return str(target.parent.absolute() / (stem + target.suffix))
