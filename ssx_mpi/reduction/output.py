"""What a reduction leaves on disk: scaled files per input file, scales to continue from, exports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssx_mpi.kernels.ewald_width import EwaldWidth
from ssx_mpi.kernels.orientation import N_AXES, rotation_matrix
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Merged, Noise, Scales, Trend
from ssx_mpi.records.files import placing, write_json
from ssx_mpi.reduction import crystfel
from ssx_mpi.reduction.crystal_list import Crystals, Fate
from ssx_mpi.reduction.crystfel import CellType
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.reduction.job import Frame, Job
from ssx_mpi.reduction.loading import Source
from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.reflection_data import ScaledCrystal, Selection

INDEX_NAME = "scales.json"
_SCALES = ("log_k", "b_factor", "width")


@dataclass(frozen=True)
class CrystalResults:
    """Results per crystal of one rank, (n_crystals,) each: scales, row in the settings, its margin, fate and rotation.

    The margin is the log-likelihood by which the setting is above the second best, infinite where there is one. The
    rotation, (n_crystals, 2) radians about the axes across the beam, is that from where integration had the crystal.
    """

    scales: Scales
    setting: np.ndarray
    margin: np.ndarray
    fate: np.ndarray
    rotation: np.ndarray

    @classmethod
    def unscaled(cls, setting: np.ndarray, fate: np.ndarray) -> CrystalResults:
        """Crystals in their settings, before anything is known about their scales."""
        return cls(Scales.unit(len(setting)), setting, np.full(len(setting), np.inf), fate, _not_rotated(len(setting)))


@dataclass(frozen=True)
class FileResults:
    """Results of all crystals of one input file, in its order."""

    identifier: tuple[str, ...]
    position: np.ndarray
    log_k: np.ndarray
    b_factor: np.ndarray
    width: np.ndarray
    setting: np.ndarray
    margin: np.ndarray
    fate: np.ndarray
    rotation: np.ndarray
    beam: np.ndarray


@dataclass(frozen=True)
class Previous:
    """Where an earlier reduction ended.

    Parameters
    ----------
    sources
        Its input files.
    files
        For each source, where its scales are.
    noise, trend, settings
        Error model, trend of the widths, and the settings that crystals were put into.
    width
        That gave the partialities; None where integration gave them.
    hkl, intensity, weight
        Merged intensities.
    """

    sources: tuple[Source, ...]
    files: tuple[Path, ...]
    noise: Noise
    trend: Trend
    settings: np.ndarray
    width: EwaldWidth | None
    hkl: np.ndarray
    intensity: np.ndarray
    weight: np.ndarray


def collect_by_file(job: Job, results: CrystalResults) -> dict[int, FileResults]:
    """Bring the results of each input file together on the rank that has its first crystal. Collective.

    Returns
    -------
    files : dict of int to FileResults
        For the files that this rank is to write, by their number.
    """
    comm, crystals, loaded = job.comm, job.crystals, job.loaded
    send: list[list[tuple[int, FileResults]]] = [[] for _ in range(comm.size)]
    for source in np.unique(crystals.source):
        rows = np.flatnonzero(crystals.source == source)
        send[_owner(int(loaded.first_number[source]), loaded.n_total, comm.size)].append(
            (
                int(source),
                FileResults(
                    tuple(crystals.identifier[row] for row in rows),
                    crystals.position[rows],
                    results.scales.log_k[rows],
                    results.scales.b_factor[rows],
                    results.scales.width[rows],
                    results.setting[rows],
                    results.margin[rows],
                    results.fate[rows],
                    results.rotation[rows],
                    crystals.beam[rows],
                ),
            )
        )
    pieces: dict[int, list[FileResults]] = {}
    for part in comm.alltoall(send):
        for source, piece in part:
            pieces.setdefault(source, []).append(piece)
    return {source: _joined(parts) for source, parts in sorted(pieces.items())}


def kept_crystals(results: FileResults, settings: np.ndarray) -> list[ScaledCrystal]:
    """The crystals of a file that are merged."""
    return [
        ScaledCrystal(
            results.identifier[row],
            int(results.position[row]),
            settings[results.setting[row]],
            float(results.log_k[row]),
            float(results.b_factor[row]),
            float(results.width[row]),
            results.rotation[row],
            results.beam[row],
        )
        for row in np.flatnonzero(results.fate == Fate.KEPT)
    ]


def write_experiments(source: Source, crystals: list[ScaledCrystal], path: Path, space_group: str) -> None:
    """Write the experiments of some crystals of a file, in the common setting and a space group."""
    content = json.loads(source.experiments.read_bytes())
    selected = select_experiments(content, crystals)
    # thousands of crystals have one symbol or two
    symbols = {crystal["space_group_hall_symbol"] for crystal in selected["crystal"]}
    others = {symbol for symbol in symbols if not stage.same_space_group(f"Hall: {symbol}", space_group)}
    asked = stage.hall_symbol(space_group)
    for crystal in selected["crystal"]:
        if crystal["space_group_hall_symbol"] in others:
            crystal["space_group_hall_symbol"] = asked
    write_json(path, selected)


def write_scaled(
    source: Source,
    crystals: list[ScaledCrystal],
    stem: Path,
    selection: Selection,
    frame: Frame,
    merged: Merged,
    noise: Noise,
    trend: Trend,
) -> None:
    """Write ``stem.expt`` and ``stem.refl`` with the merged crystals of an input file and their scaled intensities."""
    with placing(stem.with_suffix(".refl")) as path:
        stage.write_scaled_reflections(
            str(source.reflections), str(path), crystals, selection, frame.unique, merged, noise, trend
        )
    write_experiments(source, crystals, stem.with_suffix(".expt"), frame.space_group)


def write_selected(
    source: Source, crystals: list[ScaledCrystal], stem: Path, selection: Selection, space_group: str
) -> None:
    """Write ``stem.expt`` and ``stem.refl`` with some crystals as integrated, in the common setting."""
    with placing(stem.with_suffix(".refl")) as path:
        stage.write_selected_reflections(str(source.reflections), str(path), crystals, selection)
    write_experiments(source, crystals, stem.with_suffix(".expt"), space_group)


def write_stream(
    source: Source, crystals: list[ScaledCrystal], path: Path, cell_type: CellType, width: EwaldWidth | None
) -> None:
    """Write crystals of a file as a CrystFEL stream, in the common setting."""
    content = json.loads(source.experiments.read_bytes())
    selected = select_experiments(content, crystals)
    spots = stage.read_integrated(str(source.reflections), crystals)
    # in 1/nm, at 3 angstrom
    radius = {} if width is None else {"profile_radius": 10.0 * float(np.sqrt(width.at(np.array(1 / 9))))}
    stream = crystfel.stream(selected, spots, cell_type, **radius)
    with placing(path) as beside:
        beside.write_text(stream)


def select_experiments(content: dict, crystals: list[ScaledCrystal]) -> dict:
    """An experiment list, as JSON, with some of its experiments, their crystals reindexed and rotated.

    Indices become ``hkl @ T``, so the direct axes, rows of a matrix, become ``T.T @ axes``. Models that no
    experiment refers to any more are left out.
    """
    chosen = [dict(content["experiment"][crystal.position]) for crystal in crystals]
    result = {"__id__": content.get("__id__", "ExperimentList"), "experiment": chosen}
    for kind, models in content.items():
        if not isinstance(models, list) or kind == "experiment":
            continue
        used: dict[int, int] = {}
        for experiment in chosen:
            if kind in experiment:
                experiment[kind] = used.setdefault(experiment[kind], len(used))
        result[kind] = [models[number] for number in used]
    for experiment, scaled in zip(chosen, crystals):
        as_indexed = np.array_equal(scaled.setting, np.eye(3))
        if as_indexed and not np.any(scaled.rotation):
            continue
        crystal = dict(result["crystal"][experiment["crystal"]])
        axes = scaled.setting.T @ np.array([crystal[f"real_space_{axis}"] for axis in "abc"])
        if np.any(scaled.rotation):
            beam = -np.array(result["beam"][experiment["beam"]]["direction"], dtype=np.float64)
            axes = axes @ rotation_matrix(beam, scaled.rotation).T
        crystal["real_space_a"], crystal["real_space_b"], crystal["real_space_c"] = axes.tolist()
        # errors of parameters in the setting that is no more
        for name in () if as_indexed else ("B_covariance", "cell_covariance"):
            crystal.pop(name, None)
        result["crystal"][experiment["crystal"]] = crystal
    return result


def write_scales(folder: Path, number: int, results: FileResults) -> None:
    """The scales of the crystals of an input file, for a later reduction to continue from."""

    with placing(folder / f"scales_{number + 1}.npz") as path:
        np.savez(
            path,
            identifier=np.array(results.identifier),
            log_k=results.log_k,
            b_factor=results.b_factor,
            width=results.width,
            setting=results.setting,
            margin=results.margin,
            fate=results.fate,
            rotation=results.rotation,
        )


def write_index(
    folder: Path,
    sources: list[Source],
    noise: Noise,
    trend: Trend,
    settings: np.ndarray,
    width: EwaldWidth | None,
    unique: UniqueReflections,
    merged: Merged,
) -> None:
    """What belongs to the whole of a reduction that a later one continues from."""
    index = {
        "sources": [[str(source.experiments), str(source.reflections)] for source in sources],
        "noise": [noise.a, noise.b, noise.c],
        "trend": [trend.knots.tolist(), trend.values.tolist()],
        "settings": settings.tolist(),
        "ewald_width": None if width is None else [width.common, width.growth],
    }
    with placing(folder / "merged.npz") as path:
        np.savez(path, hkl=unique.hkl, intensity=merged.intensity, weight=merged.weight)
    write_json(folder / INDEX_NAME, index)


def read_previous(output: Path) -> Previous:
    """Read what :func:`write_index` left in the output folder of an earlier reduction.

    Raises
    ------
    InputError
        When there is nothing to continue from.
    """
    folder = output / "data_reduction"
    try:
        index = json.loads((folder / INDEX_NAME).read_text())
        with np.load(folder / "merged.npz") as arrays:
            hkl, intensity, weight = arrays["hkl"], arrays["intensity"], arrays["weight"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"append={output}: no earlier reduction is there to continue from") from None
    sources = tuple(Source(Path(expt), Path(refl)) for expt, refl in index["sources"])
    files = tuple(folder / f"scales_{number + 1}.npz" for number in range(len(sources)))
    trend = Trend(*(np.array(values) for values in index["trend"]))
    width = index.get("ewald_width")
    return Previous(
        sources,
        files,
        Noise(*index["noise"]),
        trend,
        np.array(index["settings"]),
        None if width is None else EwaldWidth(*width),
        *(hkl, intensity, weight),
    )


def previous_results(
    previous: Previous, sources: list[Source], crystals: Crystals
) -> tuple[np.ndarray, CrystalResults]:
    """Earlier results of the crystals of this rank that were there already.

    Returns
    -------
    known : (n_crystals,) bool
        Kept then; only those have results.
    results : CrystalResults
    """
    n = len(crystals)
    known = np.zeros(n, dtype=bool)
    scales = Scales(np.zeros(n), np.zeros(n), np.zeros(n), previous.trend)
    results = CrystalResults(
        *(scales, np.zeros(n, dtype=np.int64), np.full(n, np.inf), np.zeros(n, dtype=np.int64), _not_rotated(n))
    )
    where = dict(zip(previous.sources, previous.files))
    for number in np.unique(crystals.source):
        path = where.get(sources[number])
        if path is None or not path.is_file():
            continue
        with np.load(path) as arrays:
            row_of = {str(identifier): row for row, identifier in enumerate(arrays["identifier"])}
            columns = {name: arrays[name] for name in (*_SCALES, "setting", "margin", "fate")}
            # earlier releases left crystals where they were
            rotation = arrays["rotation"] if "rotation" in arrays else _not_rotated(len(columns["fate"]))
        for here in np.flatnonzero(crystals.source == number):
            there = row_of.get(crystals.identifier[here])
            if there is None or columns["fate"][there] != Fate.KEPT:
                continue
            known[here] = True
            for name in _SCALES:
                getattr(results.scales, name)[here] = columns[name][there]
            results.setting[here] = columns["setting"][there]
            results.margin[here] = columns["margin"][there]
            results.rotation[here] = rotation[there]
    return known, results


def _owner(number: int, n_total: int, size: int) -> int:
    # inverse of loading.share
    rank = number * size // max(n_total, 1)
    while n_total * (rank + 1) // size <= number:
        rank += 1
    while n_total * rank // size > number:
        rank -= 1
    return rank


def _joined(parts: list[FileResults]) -> FileResults:
    return FileResults(
        sum((part.identifier for part in parts), ()),
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("position", *_SCALES, "setting", "margin", "fate", "rotation", "beam")
        ),
    )


def _not_rotated(n_crystals: int) -> np.ndarray:
    return np.zeros((n_crystals, N_AXES))
