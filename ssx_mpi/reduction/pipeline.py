"""The story of a reduction: load, filter, resolve the ambiguity, scale, merge, write; the same on every rank."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssx_mpi.kernels import ambiguity, merging
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction import cells, filters, groups, loading, output, references, resolve, scale
from ssx_mpi.reduction.crystals import FATE_TEXT, Crystals, Fate
from ssx_mpi.reduction.errors import InputError, NothingLeftError, raise_together
from ssx_mpi.reduction.loading import Source
from ssx_mpi.reduction.merge import MergedData, merge
from ssx_mpi.reduction.parameters import ReductionParameters
from ssx_mpi.reduction.scale import Scaled
from ssx_mpi.report import merging as report
from ssx_mpi.report.crystfel import CellType
from ssx_mpi.stages import dials_reduction
from ssx_mpi.stages import reduction as stage
from ssx_mpi.stages.reduction import Selection

logger = logging.getLogger(__name__)

_RADIAL_SHELLS = 20
_COSYM_CRYSTALS = 500


@dataclass(frozen=True)
class Summary:
    """What came out, for the end of the log and for programs.

    Parameters
    ----------
    fates
        Number of crystals by what became of them.
    cell, space_group, wavelength
        Of the merged data; angstrom and degrees.
    noise
        Error model.
    deviations_rms
        Root mean square normalised deviation, 1 where the error model holds.
    merged
        By name: the statistics of each merged set.
    """

    fates: dict[str, int]
    cell: tuple[float, ...]
    space_group: str
    wavelength: float
    noise: Noise
    deviations_rms: float
    merged: dict[str, MergedData]


@dataclass(frozen=True)
class _Frame:
    """What all steps refer to: the symmetry, the table of unique reflections, and the settings."""

    cell: tuple[float, ...]
    space_group: str
    unique: UniqueReflections
    shells: Shells
    settings: np.ndarray


def reduce(comm: Communicator, sources: list[Source], parameters: ReductionParameters, folder: Path) -> Summary:
    """Reduce integrated crystals to merged intensities. Collective.

    Parameters
    ----------
    sources
        Integrated files, the same on all ranks.
    folder
        Where ``DataFiles``, ``LogFiles`` and ``data_reduction`` go.

    Raises
    ------
    InputError
        On all ranks, when the input cannot be reduced.
    NothingLeftError
        On all ranks, when no crystal is left to merge.
    """
    previous = None if parameters.append is None else output.read_previous(parameters.append)
    if previous is not None:
        sources = [*previous.sources, *(source for source in sources if source not in previous.sources)]
    grouping = None if parameters.grouping is None else groups.read_grouping(parameters.grouping)

    loaded = loading.load(comm, sources, parameters.partiality_threshold, parameters.d_min, parameters.d_max)
    crystals, observations = loaded.crystals, loaded.observations
    _say(comm, "%d crystals in %d files", loaded.n_total, len(sources))
    fate = np.zeros(len(crystals), dtype=np.int64)
    fate[np.diff(observations.start) < parameters.scaling.min_observations] = Fate.NO_REFLECTIONS
    _require_some(comm, fate)

    fate, centre = _filter_cells(comm, crystals, fate, loaded.n_total, parameters)
    frame = _frame(comm, observations, fate == Fate.KEPT, centre, loaded.space_group, parameters)
    reference = references.load(comm, parameters, frame.cell, frame.space_group, frame.unique)

    known, earlier = np.zeros(len(crystals), dtype=bool), None
    if previous is not None:
        known, earlier = output.previous_results(previous, sources, crystals)
    as_indexed = resolve.index_in_settings(
        observations, frame.unique, frame.settings, np.zeros(len(crystals), dtype=np.int64)
    )
    start, expected = scale.radial_means(comm, observations, as_indexed, fate == Fate.KEPT, frame.unique, frame.shells)
    noise = Noise(1.0, 0.1)
    current = None
    if previous is not None and earlier is not None:
        noise = previous.noise
        current = references.place(previous.hkl, previous.intensity, previous.weight, frame.unique)
        if not np.allclose(previous.settings, frame.settings):
            raise InputError(f"append={parameters.append}: the lattice now has other symmetries than it had then")

    setting, fate = _resolve(
        comm, observations, crystals, fate, loaded.n_total, frame, start, expected, reference or current, parameters,
        known, earlier,
    )  # fmt: skip
    _require_some(comm, fate)

    if parameters.check_with_cosym and len(frame.settings) > 1:
        _compare_with_cosym(comm, crystals, setting, fate, loaded, sources, frame, parameters, folder)
    if parameters.engine == "dials":
        _dials_engine(comm, crystals, setting, fate, loaded, sources, frame, parameters, folder)
        return _summary(comm, crystals, fate, frame, Noise(), float("nan"), {})

    indexed = resolve.index_in_settings(observations, frame.unique, frame.settings, setting)
    if earlier is not None and current is not None:
        start = scale.join_scales(
            observations, indexed, fate == Fate.KEPT, start, earlier.scales, known, noise, current, frame.unique
        )
        expected = np.where(current.weight > 0, np.maximum(current.intensity, 0.0), expected)
    scaled = scale.scale(
        comm, observations, indexed, fate == Fate.KEPT, frame.unique, start, expected, parameters.scaling, noise
    )
    fate[(fate == Fate.KEPT) & ~scaled.include] = Fate.NOT_SCALED
    _require_some(comm, fate)
    fate, scaled = filters.filter_crystals(
        comm, observations, indexed, fate, scaled, frame.unique, frame.shells, parameters
    )
    _require_some(comm, fate)
    _say(
        comm,
        "scaled in %d rounds; error model a = %.3f, b = %.4f; rms normalised deviation %.3f",
        scaled.rounds, scaled.noise.a, scaled.noise.b, scaled.deviations.overall,
    )  # fmt: skip

    merged = _merge_all(comm, observations, indexed, crystals, fate, scaled, frame, reference, grouping, parameters)
    summary = _summary(comm, crystals, fate, frame, scaled.noise, scaled.deviations.overall, merged)
    _write(comm, summary, scaled, setting, fate, crystals, loaded, sources, frame, parameters, folder)
    return summary


def _summary(
    comm: Communicator,
    crystals: Crystals,
    fate: np.ndarray,
    frame: _Frame,
    noise: Noise,
    deviations_rms: float,
    merged: dict[str, MergedData],
) -> Summary:
    fates = comm.sum(np.bincount(fate, minlength=len(Fate)))
    return Summary(
        {FATE_TEXT[f]: int(fates[f]) for f in Fate if fates[f]},
        frame.cell,
        stage.space_group_symbol(frame.space_group),
        float(cells.median(comm, crystals.wavelength[:, None])[0]),
        noise,
        deviations_rms,
        merged,
    )


def _filter_cells(
    comm: Communicator, crystals: Crystals, fate: np.ndarray, n_total: int, parameters: ReductionParameters
) -> tuple[np.ndarray, np.ndarray]:
    usable = fate == Fate.KEPT
    filtered = cells.filter_cells(comm, crystals.cell[usable], crystals.number[usable], n_total, parameters.cells)
    for number, cluster in enumerate(filtered.clusters[:5]):
        _say(comm, "cell cluster %d: %d sampled, median %s", number + 1, len(cluster.members), _cell(cluster.median))
    fate = fate.copy()
    fate[np.flatnonzero(usable)[~filtered.keep]] = Fate.CELL
    gone = comm.sum(np.array([np.count_nonzero(~filtered.keep)]))[0]
    _say(comm, "central cell %s; %d crystals further away than the tolerances", _cell(filtered.centre), gone)
    _require_some(comm, fate)
    return fate, filtered.centre


def _frame(
    comm: Communicator,
    observations: Observations,
    include: np.ndarray,
    centre: np.ndarray,
    space_group: str,
    parameters: ReductionParameters,
) -> _Frame:
    cell = stage.symmetric_cell(centre, space_group)
    rows = np.repeat(include, np.diff(observations.start))
    highest = comm.max(np.array([stage.largest_d_star_sq(cell, observations.hkl[rows])]))[0]
    d_min = max(highest**-0.5 * (1 - 1e-6), parameters.d_min or 0.0)
    unique = stage.unique_table(cell, space_group, d_min)
    settings = stage.reindexing_settings(cell, space_group, parameters.lattice_symmetry_max_delta)
    shells = merging.resolution_shells(unique.d_star_sq, _RADIAL_SHELLS)
    return _Frame(cell, space_group, unique, shells, settings)


def _resolve(
    comm: Communicator,
    observations: Observations,
    crystals: Crystals,
    fate: np.ndarray,
    n_total: int,
    frame: _Frame,
    scales: Scales,
    expected: np.ndarray,
    reference: Merged | None,
    parameters: ReductionParameters,
    known: np.ndarray,
    earlier: output.CrystalResults | None,
) -> tuple[np.ndarray, np.ndarray]:
    setting = np.zeros(len(crystals), dtype=np.int64)
    if len(frame.settings) == 1:
        _say(comm, "no indexing ambiguity in %s with this cell", stage.space_group_symbol(frame.space_group))
        return setting, fate
    include = fate == Fate.KEPT
    data = resolve.normalised(observations, include, frame.unique, frame.settings, scales, expected)
    if reference is not None:
        normal = references.normalised(reference, frame.unique, frame.shells)
        resolved = resolve.resolve_against(comm, data, include, normal, parameters.ambiguity)
    else:
        table = ambiguity.composition_table(frame.settings, frame.unique.rotations)
        resolved = resolve.resolve(
            comm, data, include, crystals.number, n_total, len(frame.unique), table, parameters.ambiguity
        )
    setting, decided = resolved.setting, resolved.decided
    if earlier is not None:
        setting = np.where(known, earlier.setting, setting)
        decided = decided | known
    fate = fate.copy()
    fate[include & ~decided] = Fate.AMBIGUOUS
    undecided = comm.sum(np.array([np.count_nonzero(include & ~decided)]))[0]
    margin = cells.median(comm, np.minimum(resolved.margin[include], 1e6)[:, None])[0]
    _say(
        comm,
        "indexing ambiguity: %d settings (%s), crystals in each: %s; %d undecided; median log-likelihood margin %.1f",
        len(frame.settings),
        ", ".join(stage.reindexing_symbol(matrix) for matrix in frame.settings),
        ", ".join(str(count) for count in resolved.counts),
        undecided,
        margin,
    )
    if len(resolved.start_agreement):
        shares = ", ".join(f"{100 * share:.1f}%" for share in resolved.start_agreement)
        _say(comm, "random starts that agree with the best one, share of crystals: %s", shares)
    return setting, fate


def _compare_with_cosym(
    comm: Communicator,
    crystals: Crystals,
    setting: np.ndarray,
    fate: np.ndarray,
    loaded: loading.Loaded,
    sources: list[Source],
    frame: _Frame,
    parameters: ReductionParameters,
    folder: Path,
) -> None:
    """Let dials.cosym set up to 500 crystals, as they were indexed, and say how many it sets alike. Collective."""
    every = max(1, -(-loaded.n_total // _COSYM_CRYSTALS))
    sampled = np.where((fate == Fate.KEPT) & (crystals.number % every == 0), Fate.KEPT, Fate.CELL)
    ours = output.CrystalResults(Scales.unit(len(crystals)), np.zeros(len(crystals), dtype=np.int64), sampled)
    selection = Selection(parameters.partiality_threshold, parameters.d_min, parameters.d_max)
    written = []
    for number, of_file in output.collect_by_file(comm, crystals, ours, loaded.first_number, loaded.n_total).items():
        kept = output.kept_crystals(of_file, frame.settings)
        if kept:
            output.write_selected(sources[number], kept, folder / "data_reduction" / f"cosym_{number + 1}", selection)
            written.append(number)
    chosen = {crystals.identifier[row]: int(setting[row]) for row in np.flatnonzero(sampled == Fate.KEPT)}
    written = sorted(number for part in comm.allgather(written) for number in part)
    gathered = comm.gather(chosen)
    if gathered is None:
        return
    expected = {name: row for part in gathered for name, row in part.items()}
    stems = [folder / "data_reduction" / f"cosym_{number + 1}" for number in written]
    try:
        matrices = dials_reduction.cosym_settings(
            dials_reduction.read(stems), frame.space_group, parameters.lattice_symmetry_max_delta,
            parameters.partiality_threshold, parameters.ambiguity.seed,
        )  # fmt: skip
    except dials_reduction.DialsReductionError as error:
        logger.warning("comparison with dials.cosym failed: %s", error)
        return
    finally:
        _remove(folder, "cosym", written)
    table = ambiguity.composition_table(frame.settings, frame.unique.rotations)
    names = [name for name in expected if name in matrices]
    theirs = np.array(
        [ambiguity.find_setting(matrices[name], frame.settings, frame.unique.rotations) for name in names]
    )
    known = theirs >= 0
    alike = ambiguity.relative_agreement(np.array([expected[name] for name in names])[known], theirs[known], table)
    logger.info("dials.cosym sets %d of %d crystals alike", alike.max(initial=0), len(expected))


def _merge_all(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    crystals: Crystals,
    fate: np.ndarray,
    scaled: Scaled,
    frame: _Frame,
    reference: Merged | None,
    grouping: groups.Grouping | None,
    parameters: ReductionParameters,
) -> dict[str, MergedData]:
    kept = fate == Fate.KEPT

    def merged(include: np.ndarray, d_min: float | None) -> MergedData:
        return merge(
            comm, observations, indexed, include, crystals.number, scaled.scales, scaled.noise, scaled.merged,
            frame.unique, parameters.merging, d_min, reference,
        )  # fmt: skip

    sets = {"merged": merged(kept, parameters.d_min)}
    _report(comm, "all crystals", sets["merged"])
    chosen = None
    if parameters.dose_series_repeat is not None:
        chosen = groups.dose_series(crystals, parameters.dose_series_repeat)
    elif grouping is not None:
        chosen = groups.by_metadata(comm, crystals, grouping)
    if chosen is not None:
        for number, (name, description) in enumerate(zip(chosen.names, chosen.descriptions)):
            members = kept & (chosen.of_crystal == number)
            if comm.sum(np.array([np.count_nonzero(members)]))[0] == 0:
                _say(comm, "%s (%s): no crystals", name, description)
                continue
            sets[name] = merged(members, parameters.d_min)
            _report(comm, f"{name} ({description})", sets[name])
    return sets


def _report(comm: Communicator, title: str, data: MergedData) -> None:
    how = " (where CC1/2 falls to the cutoff)" if data.d_min_estimated else ""
    _say(comm, "\n%s: %d crystals merged to %.2f angstrom%s", title, data.n_crystals, data.d_min, how)
    _say(comm, "%s", report.shell_table(data.cut))


def _write(
    comm: Communicator,
    summary: Summary,
    scaled: Scaled,
    setting: np.ndarray,
    fate: np.ndarray,
    crystals: Crystals,
    loaded: loading.Loaded,
    sources: list[Source],
    frame: _Frame,
    parameters: ReductionParameters,
    folder: Path,
) -> None:
    results = output.CrystalResults(scaled.scales, setting, fate)
    files = output.collect_by_file(comm, crystals, results, loaded.first_number, loaded.n_total)
    state, data_files = folder / "data_reduction", folder / "DataFiles"
    selection = Selection(parameters.partiality_threshold, parameters.d_min, parameters.d_max)
    export, written = parameters.export, []
    for number, of_file in files.items():
        output.write_scales(state, number, of_file)
        kept = output.kept_crystals(of_file, frame.settings)
        if not kept:
            continue
        source = sources[number]
        if export.scaled or export.unmerged_mtz or export.unmerged_mmcif:
            stem = data_files / f"scaled_{number + 1}"
            output.write_scaled(source, kept, stem, selection, frame.unique, scaled.merged, scaled.noise)
            written.append(number)
        if export.stream:
            cell_type = CellType(*stage.lattice_type(frame.space_group))
            output.write_stream(source, kept, data_files / f"crystals_{number + 1}.stream", cell_type)
    if comm.rank == 0:
        output.write_index(state, sources, scaled.noise, frame.settings, frame.unique, scaled.merged)
        for name, data in summary.merged.items():
            _write_merged(name, data, summary, frame, parameters, folder)
    written = sorted(number for part in comm.allgather(written) for number in part)
    if comm.rank == 0 and (export.unmerged_mtz or export.unmerged_mmcif):
        try:
            dials_reduction.export_unmerged(
                dials_reduction.read([data_files / f"scaled_{number + 1}" for number in written]),
                parameters.partiality_threshold,
                data_files / "scaled_unmerged.mtz" if export.unmerged_mtz else None,
                data_files / "scaled_unmerged.cif" if export.unmerged_mmcif else None,
            )
        except dials_reduction.DialsReductionError as error:
            logger.warning("%s", error)
    comm.barrier()


def _dials_engine(
    comm: Communicator,
    crystals: Crystals,
    setting: np.ndarray,
    fate: np.ndarray,
    loaded: loading.Loaded,
    sources: list[Source],
    frame: _Frame,
    parameters: ReductionParameters,
    folder: Path,
) -> None:
    """Scale and merge with DIALS on rank 0 what passed the cell filter, in the settings that were found. Collective."""
    results = output.CrystalResults(Scales.unit(len(crystals)), setting, fate)
    selection = Selection(parameters.partiality_threshold, parameters.d_min, parameters.d_max)
    written = []
    for number, of_file in output.collect_by_file(comm, crystals, results, loaded.first_number, loaded.n_total).items():
        kept = output.kept_crystals(of_file, frame.settings)
        if kept:
            stem = folder / "data_reduction" / f"selected_{number + 1}"
            output.write_selected(sources[number], kept, stem, selection)
            written.append(number)
    written = sorted(number for part in comm.allgather(written) for number in part)
    message = None
    if comm.rank == 0:
        try:
            _scale_and_merge_by_dials(
                [folder / "data_reduction" / f"selected_{number + 1}" for number in written], parameters, folder
            )
        except dials_reduction.DialsReductionError as error:
            message = str(error)
    raise_together(comm, message)
    _remove(folder, "selected", written)


def _scale_and_merge_by_dials(stems: list[Path], parameters: ReductionParameters, folder: Path) -> None:
    data_files = folder / "DataFiles"
    data_files.mkdir(parents=True, exist_ok=True)
    scaled = dials_reduction.scale(
        dials_reduction.read(stems), parameters.partiality_threshold, parameters.anomalous, parameters.scaling_phil
    )
    scaled.experiments.as_file(str(data_files / "scaled.expt"))
    scaled.reflections.as_file(str(data_files / "scaled.refl"))
    content: dict = {}
    threshold, anomalous = parameters.partiality_threshold, parameters.anomalous

    def merged(path: Path) -> None:
        content.update(
            dials_reduction.merge(scaled, str(path), threshold, anomalous, parameters.d_min, parameters.merging_phil)
        )

    output.write_atomically(data_files / "merged.mtz", merged)
    output.write_atomically(
        folder / "LogFiles" / "dials.merge.json", lambda path: path.write_text(json.dumps(content, indent=2))
    )


def _write_merged(
    name: str, data: MergedData, summary: Summary, frame: _Frame, parameters: ReductionParameters, folder: Path
) -> None:
    def write_mtz(path: Path, d_min: float | None) -> None:
        output.write_atomically(
            path,
            lambda beside: stage.write_merged_mtz(
                str(beside), frame.cell, frame.space_group, summary.wavelength, frame.unique, data.sums,
                data.half_sums, d_min, parameters.anomalous,
            ),
        )  # fmt: skip

    write_mtz(folder / "DataFiles" / f"{name}.mtz", data.d_min)
    if parameters.d_min is None:
        write_mtz(folder / "DataFiles" / f"{name}_full.mtz", None)
    wilson_b = stage.wilson_b(frame.cell, frame.space_group, frame.unique, data.merged, data.d_min)
    logger.info("%s: Wilson B %s", name, "unknown" if wilson_b is None else f"{wilson_b:.1f} square angstrom")
    content = report.merge_json(data.cut, summary.wavelength, wilson_b)
    suffix = "" if name == "merged" else f".{name}"
    output.write_atomically(
        folder / "LogFiles" / f"dials.merge{suffix}.json", lambda path: path.write_text(json.dumps(content, indent=2))
    )


def _remove(folder: Path, name: str, numbers: list[int]) -> None:
    for number in numbers:
        for suffix in (".expt", ".refl"):
            (folder / "data_reduction" / f"{name}_{number + 1}{suffix}").unlink(missing_ok=True)


def _require_some(comm: Communicator, fate: np.ndarray) -> None:
    counts = comm.sum(np.bincount(fate, minlength=len(Fate)))
    if counts[Fate.KEPT]:
        return
    reasons = ", ".join(f"{counts[f]} {FATE_TEXT[f]}" for f in Fate if counts[f])
    raise NothingLeftError(f"no crystal is left to merge: {reasons}")


def _cell(cell: np.ndarray) -> str:
    return " ".join(f"{x:.2f}" for x in cell[:3]) + "  " + " ".join(f"{x:.2f}" for x in cell[3:])


def _say(comm: Communicator, message: str, *values: object) -> None:
    if comm.rank == 0:
        logger.info(message, *values)
