"""Integrated crystals into memory: every rank its own share, none of them all.

Crystals are numbered through in the order of the files. A rank takes a contiguous range of numbers, reads the files
in which it lies, one at a time, and keeps the columns that reduction needs. The experiment lists are read as the JSON
that they are: a crystal's axes, identifier, wavelength and image are all that is wanted of them, and making models of a
thousand experiments takes longer than scaling them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssx_mpi.images.experiment_maker import WAVELENGTH_TOLERANCE
from ssx_mpi.kernels.ewald_width import EwaldWidth, ProfileBins, fit_width
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.parallel.collective import on_every_rank, on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.records.files import natural_key
from ssx_mpi.reduction.crystal_list import Crystals
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.stages.intensities import reflection_data as stage

# crystals of which the width of reflections is found
_SAMPLED = 500


@dataclass(frozen=True)
class Source:
    """A pair of files from integration."""

    experiments: Path
    reflections: Path


@dataclass(frozen=True)
class Loaded:
    """What a rank has read, and what all ranks know about the whole.

    Parameters
    ----------
    crystals, observations
        Of this rank.
    space_group
        Hall symbol, of all crystals.
    n_total
        Crystals of all ranks.
    first_number
        (n_sources + 1,) int64, number of the first crystal of each source.
    selection
        Under which the observations were taken.
    without_background
        Share of all reflections for which integration found no background; they are left out.
    """

    crystals: Crystals
    observations: Observations
    space_group: str
    n_total: int
    first_number: np.ndarray
    selection: stage.Selection
    without_background: float


def find_sources(files: Iterable[Path], directories: Iterable[Path] = (), scaled: bool = False) -> list[Source]:
    """Pairs of integrated experiments and reflections, in the order given.

    Parameters
    ----------
    files
        Any of the two files of each pair, or both; or a folder of such, as one of the batches of a run.
    directories
        Output folders of earlier runs: what is in their ``batch_*`` or, without these, ``DataFiles``; or folders of
        such files.
    scaled
        In directories, look for what was scaled rather than for what was integrated.

    Raises
    ------
    InputError
        When a file or its partner is not there, or nothing was found.
    """
    given = [path for file in files for path in _of_folder(file, scaled)]
    for directory in directories:
        if not directory.is_dir():
            raise InputError(f"{directory} is not a folder")
        kind = "scaled" if scaled else "integrated"
        places = ("DataFiles/", "") if scaled else ("batch_*/", "DataFiles/", "")
        patterns = [f"{place}{kind}*.expt" for place in places]
        found = next(filter(None, (sorted(directory.glob(p), key=natural_key) for p in patterns)), None)
        if found is None:
            raise InputError(f"{directory} holds no {' or '.join(patterns)}")
        given.extend(found)
    pairs: dict[tuple[Path, Path], Source] = {}
    for path in given:
        if path.suffix not in (".expt", ".refl"):
            raise InputError(f"{path}: not an .expt or .refl file")
        source = Source(path.with_suffix(".expt").absolute(), path.with_suffix(".refl").absolute())
        for part in (source.experiments, source.reflections):
            if not part.is_file():
                raise InputError(f"{part} is not there" + ("" if part.suffix == path.suffix else f" to go with {path}"))
        # DataFiles holds links to the batches
        pairs.setdefault((source.experiments.resolve(), source.reflections.resolve()), source)
    if not pairs:
        raise InputError("no integrated data given: name .expt and .refl files or directory=")
    return list(pairs.values())


def _of_folder(path: Path, scaled: bool) -> list[Path]:
    # the integrated (or scaled) experiments of a folder; a file is itself
    if not path.is_dir():
        return [path]
    pattern = "scaled*.expt" if scaled else "integrated*.expt"
    found = sorted(path.glob(pattern), key=natural_key)
    if not found:
        raise InputError(f"{path} holds no {pattern}: give the folder of a run as directory={path}")
    return found


def share(n_total: int, size: int, rank: int) -> tuple[int, int]:
    """First number, and that after the last, of the crystals of a rank; ranks differ by one crystal at most."""
    return n_total * rank // size, n_total * (rank + 1) // size


def load(
    comm: Communicator,
    sources: list[Source],
    selection: stage.Selection,
    scaled: bool = False,
    find_width: bool = True,
) -> Loaded:
    """Read this rank's share of the crystals. Collective.

    Parameters
    ----------
    selection
        Which observations to take.
    find_width
        Have the intensities tell the width of reflections, from which partialities follow, where they can.
    scaled
        Take intensities that were scaled before, divided by their scale factors.

    Raises
    ------
    InputError
        On all ranks, when files do not match or cannot be reduced together.
    """
    counts = _count_crystals(comm, sources)
    first_number = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    n_total = int(first_number[-1])
    if n_total == 0:
        raise InputError("the files hold no crystals")
    begin, end = share(n_total, comm.size, comm.rank)
    shares: list[tuple[Source, Crystals]] = []
    groups: list[str] = []
    with on_every_rank(comm, InputError):
        for number, source in enumerate(sources):
            low, high = max(begin, first_number[number]), min(end, first_number[number + 1])
            if low >= high:
                continue
            offset = int(first_number[number])
            crystals, found = _read_crystals(source, number, int(low) - offset, int(high) - offset, offset)
            groups.extend(found)
            shares.append((source, crystals))
    if find_width and not scaled:
        selection = replace(selection, width=_ewald_width(comm, shares, n_total, selection))
    parts: list[tuple[Crystals, Observations]] = []
    background = np.zeros(2, dtype=np.int64)
    with on_every_rank(comm, stage.ReflectionFileError, InputError):
        for source, crystals in shares:
            path = str(source.reflections)
            observations, counted = stage.read_observations(
                path, crystals.identifier, crystals.position, selection, scaled, crystals.beam
            )
            parts.append((crystals, observations))
            background += counted
    crystals, observations = _joined(parts)
    _refuse_twice(comm, sources, crystals)
    n_reflections, n_without = comm.sum(background)
    return Loaded(
        *(crystals, observations, _agree_on_models(comm, crystals, groups), n_total, first_number, selection),
        without_background=float(n_without / max(n_reflections, 1)),
    )


def _ewald_width(
    comm: Communicator, shares: list[tuple[Source, Crystals]], n_total: int, selection: stage.Selection
) -> EwaldWidth | None:
    """The width of reflections that the intensities of a sample of the crystals show. Collective."""
    every = max(1, n_total // _SAMPLED)
    found: list[tuple[np.ndarray, ...]] = []
    known = True
    with on_every_rank(comm, stage.ReflectionFileError, InputError):
        for source, crystals in shares:
            sampled = np.flatnonzero(crystals.number % every == 0)
            if not len(sampled):
                continue
            identifiers = tuple(crystals.identifier[row] for row in sampled)
            arrays = stage.read_excitation(str(source.reflections), identifiers, crystals.position[sampled], selection)
            known &= arrays is not None
            if arrays is not None:
                found.append(arrays)
    d_star_sq, excitation, intensity = (
        np.concatenate([arrays[k] for arrays in found]) if found else np.zeros(0) for k in range(3)
    )
    unknown, *largest = comm.max(
        np.array([float(not known), *(float(np.abs(x).max(initial=0.0)) for x in (d_star_sq, excitation, intensity))])
    )
    if unknown or not min(largest):
        return None
    bins = ProfileBins.up_to(*largest[:2])
    # rounded so far that their squares can be summed exactly, too
    step = 2.0 ** np.ceil(np.log2(largest[2]) - 14)
    rounded = np.rint(intensity / step)
    sums = comm.sum(bins.sums(d_star_sq, excitation, rounded))
    return fit_width(bins, sums)


def _refuse_twice(comm: Communicator, sources: list[Source], crystals: Crystals) -> None:
    """Make sure that no crystal comes from two sources, as in two runs over the same images. Collective."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in crystals.identifier)
    parts = comm.gather((np.frombuffer(digests, np.uint64), crystals.source))

    def look() -> None:
        assert parts is not None
        name, source = (np.concatenate(column) for column in zip(*parts))
        order = np.argsort(name, kind="stable")
        (again,) = np.nonzero(name[order][1:] == name[order][:-1])
        if len(again):
            one, other = (sources[source[order[k]]].experiments for k in (again[0], again[0] + 1))
            raise InputError(
                f"{len(again)} crystals are there twice, as in {one} and {other}: leave one of the two out"
            )

    on_root(comm, look, InputError)


def _count_crystals(comm: Communicator, sources: list[Source]) -> np.ndarray:
    counts = np.zeros(len(sources), dtype=np.int64)
    with on_every_rank(comm, InputError):
        for number in range(comm.rank, len(sources), comm.size):
            counts[number] = len(_read_json(sources[number].experiments)["experiment"])
    return comm.sum(counts)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
        if "experiment" not in content:
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(f"{path} is not an experiment list") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    return content


def _read_crystals(source: Source, number: int, begin: int, end: int, offset: int) -> tuple[Crystals, list[str]]:
    content = _read_json(source.experiments)
    experiments = content["experiment"][begin:end]
    if any("crystal" not in experiment for experiment in experiments):
        raise InputError(f"{source.experiments} holds experiments without a crystal: not integrated data")
    models = [content["crystal"][experiment["crystal"]] for experiment in experiments]
    images = [_image(content, experiment) for experiment in experiments]
    position = np.arange(begin, end)
    crystals = Crystals(
        number=offset + position.astype(np.int64),
        source=np.full(end - begin, number, dtype=np.int32),
        position=position.astype(np.int32),
        identifier=tuple(experiment["identifier"] for experiment in experiments),
        cell=np.array([_cell(model) for model in models]).reshape(-1, 6),
        wavelength=np.array([content["beam"][e["beam"]]["wavelength"] for e in experiments], dtype=np.float64),
        # dxtbx keeps the direction from the sample to the source
        beam=np.array([[-x for x in content["beam"][e["beam"]]["direction"]] for e in experiments]).reshape(-1, 3),
        image=tuple(path for path, _ in images),
        image_number=np.array([image_number for _, image_number in images], dtype=np.int64),
    )
    return crystals, ["Hall: " + model["space_group_hall_symbol"] for model in models]


def _cell(model: dict) -> np.ndarray:
    axes = np.array([model["real_space_a"], model["real_space_b"], model["real_space_c"]])
    a, b, c = np.linalg.norm(axes, axis=1)
    metric = axes @ axes.T
    cosines = np.array([metric[1, 2] / (b * c), metric[0, 2] / (a * c), metric[0, 1] / (a * b)])
    return np.concatenate([[a, b, c], np.degrees(np.arccos(np.clip(cosines, -1, 1)))])


def _image(content: dict, experiment: dict) -> tuple[str, int]:
    # a still is described as an image set of one image, or as one image of a sequence, by the version of DIALS
    if "imageset" not in experiment:
        return "", 0
    imageset = content["imageset"][experiment["imageset"]]
    if "template" in imageset:
        number = 1
        if "scan" in experiment:
            number = int(content["scan"][experiment["scan"]]["image_range"][0])
        return str(imageset["template"]), number
    images = imageset.get("images") or [""]
    path = str(images[0])
    if imageset.get("single_file_indices"):
        return path, int(imageset["single_file_indices"][0]) + 1
    digits = re.findall(r"\d+", Path(path).stem)
    return path, int(digits[-1]) if digits else 0


def _joined(parts: list[tuple[Crystals, Observations]]) -> tuple[Crystals, Observations]:
    if not parts:
        none = np.zeros(0)
        crystals = Crystals(
            none.astype(np.int64), none.astype(np.int32), none.astype(np.int32), (), none.reshape(0, 6), none,
            none.reshape(0, 3), (), none.astype(np.int64),
        )  # fmt: skip
        return crystals, Observations(
            np.zeros(1, np.int64), np.zeros((0, 3), np.int32), none, none, none.astype(np.float32)
        )
    tables = [crystals for crystals, _ in parts]
    data = [observations for _, observations in parts]
    crystals = Crystals(
        number=np.concatenate([t.number for t in tables]),
        source=np.concatenate([t.source for t in tables]),
        position=np.concatenate([t.position for t in tables]),
        identifier=sum((t.identifier for t in tables), ()),
        cell=np.concatenate([t.cell for t in tables]),
        wavelength=np.concatenate([t.wavelength for t in tables]),
        beam=np.concatenate([t.beam for t in tables]),
        image=sum((t.image for t in tables), ()),
        image_number=np.concatenate([t.image_number for t in tables]),
    )
    sizes = np.concatenate([np.diff(d.start) for d in data])
    observations = Observations(
        np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        np.concatenate([d.hkl for d in data]),
        np.concatenate([d.intensity for d in data]),
        np.concatenate([d.variance for d in data]),
        np.concatenate([d.offset_sq for d in data]),
        None if any(d.tilt is None for d in data) else np.concatenate([d.tilt for d in data]),
        max(d.limit for d in data),
    )
    return crystals, observations


def _agree_on_models(comm: Communicator, crystals: Crystals, groups: list[str]) -> str:
    found = sorted({group for part in comm.allgather(sorted(set(groups))) for group in part})
    if len(found) > 1:
        names = ", ".join(stage.space_group_symbol(group) for group in found)
        raise InputError(f"crystals of different space groups cannot be merged: {names}")
    limits = np.array([-np.inf, -np.inf])
    if len(crystals):
        limits = np.array([crystals.wavelength.max(), -crystals.wavelength.min()])
    longest, shortest = comm.max(limits) * (1, -1)
    if longest - shortest > WAVELENGTH_TOLERANCE * longest:
        raise InputError(
            f"crystals measured at different wavelengths cannot be merged: {shortest:.5f} to {longest:.5f} angstrom"
        )
    return found[0]
