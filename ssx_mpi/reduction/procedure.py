"""The story of a reduction: load, filter, resolve the ambiguity, scale, merge, write; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.kernels import ambiguity, merging
from ssx_mpi.kernels.exact_sums import exact_median
from ssx_mpi.kernels.orientation import Predicted, rotated
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction import (
    cells,
    filters,
    groups,
    loading,
    outcome,
    output,
    phil_files,
    post_refinement,
    references,
    resolve,
    scaling_rounds,
    with_dials,
)
from ssx_mpi.reduction.crystal_list import FATE_TEXT, Fate
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.reduction.job import Frame, Job, require_some, say
from ssx_mpi.reduction.loading import Loaded, Source
from ssx_mpi.reduction.merge import MergedData, merge
from ssx_mpi.reduction.outcome import Summary
from ssx_mpi.reduction.post_refinement import Orientations
from ssx_mpi.reduction.scaling_rounds import Scaled
from ssx_mpi.report import merging_report as report
from ssx_mpi.stages.intensities import reflection_data as stage

_RADIAL_SHELLS = 20
_FIRST_NOISE = Noise(a=1.0, b=0.1)


@dataclass(frozen=True)
class _Start:
    """Where scaling begins: the mean intensity by resolution, or an earlier reduction.

    Parameters
    ----------
    scales, expected
        Against the mean intensity in shells, from :func:`ssx_mpi.reduction.scaling_rounds.radial_means`.
    noise
        Error model.
    current
        Merged intensities of an earlier reduction.
    orientations
        Of the crystals, as the observations of the job have them.
    known, earlier
        Crystals (n_crystals,) bool that were in it, and their results.
    """

    scales: Scales
    expected: np.ndarray
    noise: Noise
    current: Merged | None
    known: np.ndarray
    earlier: output.CrystalResults
    orientations: Orientations


def reduce(comm: Communicator, sources: list[Source], parameters: ReductionParameters, folder: Path) -> Summary:
    """Reduce integrated crystals to merged intensities. Collective.

    Parameters
    ----------
    sources
        Integrated files, the same on all ranks; scaled ones with ``steps=merge``.
    folder
        Where ``DataFiles``, ``LogFiles`` and ``data_reduction`` go.

    Raises
    ------
    InputError
        On all ranks, when the input cannot be reduced.
    NothingLeftError
        On all ranks, when no crystal is left to merge.
    """
    parameters = phil_files.applied(comm, parameters)
    previous = None if parameters.append is None else output.read_previous(parameters.append)
    if previous is not None:
        sources = [*previous.sources, *(source for source in sources if source not in previous.sources)]
    grouping = None if parameters.grouping is None else groups.read_grouping(parameters.grouping)
    loaded = _load(comm, sources, parameters, previous)
    fate = np.where(
        loaded.observations.number_within() < parameters.scaling.min_observations, Fate.NO_REFLECTIONS, Fate.KEPT
    ).astype(np.int64)
    # one cell that is no number would make the median none, and leave out all others
    fate[~np.isfinite(loaded.crystals.cell).all(axis=1)] = Fate.CELL
    require_some(comm, fate)
    fate, centre = _filter_cells(comm, loaded, fate, parameters)
    job = Job(comm, sources, loaded, _frame(comm, loaded, fate, centre, parameters), parameters, folder)
    reference = references.load(comm, parameters, job.frame.cell, job.frame.space_group, job.frame.unique)

    (job, start), how = _start(job, fate, previous), None
    if "scale" in parameters.steps:
        setting, margin, fate, how = _resolve(job, fate, start, reference)
        if parameters.check_with_cosym and len(job.frame.settings) > 1:
            with_dials.compare_with_cosym(job, setting, fate)
        if parameters.engine == "dials":
            with_dials.scale_and_merge(job, setting, fate)
            return _summary(job, fate, None, {}, how, start.orientations)
        indexed = resolve.index_in_settings(job.observations, job.frame.unique, job.frame.settings, setting)
        indexed, fate, scaled, orientations = _scale(job, indexed, fate, start)
    else:
        setting, margin = _one_setting(len(job.crystals))
        indexed = resolve.index_in_settings(job.observations, job.frame.unique, job.frame.settings, setting).used()
        orientations = start.orientations
        scaled = scaling_rounds.as_scaled(comm, indexed.only(fate == Fate.KEPT), start.expected)

    merged: dict[str, MergedData] = {}
    members: dict[str, np.ndarray] = {}
    if "merge" in parameters.steps:
        merged, members = _merge(job, indexed, fate, scaled, reference, grouping)
    summary = _summary(job, fate, scaled, merged, how, orientations)
    results = output.CrystalResults(scaled.scales, setting, margin, fate, orientations.angles)
    outcome.write(job, summary, scaled, results)
    return outcome.write_resampled(job, summary, indexed, members, scaled)


def _load(
    comm: Communicator, sources: list[Source], parameters: ReductionParameters, previous: output.Previous | None
) -> Loaded:
    # crystals that are added get their partialities as those before them
    width = None if previous is None else previous.width
    # crystals are rotated: what is not on the Ewald sphere now may be, and that nothing is there says where it is not
    margin = post_refinement.MARGIN if _orients(parameters) else 0.0
    selection = stage.Selection(parameters.partiality_threshold, parameters.d_min, parameters.d_max, width, margin)
    scaled = "scale" not in parameters.steps
    loaded = loading.load(comm, sources, selection, scaled, find_width=previous is None)
    say(comm, "%d crystals in %d files", loaded.n_total, len(sources))
    if loaded.selection.width is not None:
        low, high = np.sqrt(loaded.selection.width.at(np.array([0.01, 0.25])))
        say(comm, "width of reflections across the Ewald sphere: %.5f / angstrom at 10 angstrom, %.5f at 2", low, high)
    return loaded


def _filter_cells(
    comm: Communicator, loaded: Loaded, fate: np.ndarray, parameters: ReductionParameters
) -> tuple[np.ndarray, np.ndarray]:
    usable = fate == Fate.KEPT
    crystals = loaded.crystals
    filtered = cells.filter_cells(
        comm, crystals.cell[usable], crystals.number[usable], loaded.n_total, parameters.cells
    )
    for number, cluster in enumerate(filtered.clusters[:5]):
        say(comm, "cell cluster %d: %d sampled, median %s", number + 1, len(cluster.members), _text(cluster.median))
    fate = fate.copy()
    fate[np.flatnonzero(usable)[~filtered.keep]] = Fate.CELL
    gone = count(comm, ~filtered.keep)
    say(comm, "central cell %s; %d crystals further away than the tolerances", _text(filtered.centre), gone)
    require_some(comm, fate)
    return fate, filtered.centre


def _check_space_group(asked: str, found: str, cell: np.ndarray) -> None:
    # alike on all ranks
    why = ""
    if not stage.same_centring(asked, found):
        why = f"the centring of {stage.space_group_symbol(found)}, in which the crystals were indexed, is another"
    elif not stage.allows_cell(asked, cell):
        why = f"it forbids the cell of the crystals, {_text(cell)}"
    if why:
        raise InputError(f"space_group={asked}: {why}")


def _frame(
    comm: Communicator, loaded: Loaded, fate: np.ndarray, centre: np.ndarray, parameters: ReductionParameters
) -> Frame:
    space_group = parameters.space_group or loaded.space_group
    if parameters.space_group is not None:
        _check_space_group(parameters.space_group, loaded.space_group, centre)
    cell = stage.symmetric_cell(centre, space_group)
    rows = np.repeat(fate == Fate.KEPT, np.diff(loaded.observations.start)) & loaded.observations.within()
    highest = comm.max(np.array([stage.largest_d_star_sq(cell, loaded.observations.hkl[rows])]))[0]
    d_min = max(highest**-0.5 * (1 - 1e-6), parameters.d_min or 0.0)
    unique = stage.unique_table(cell, space_group, d_min)
    settings = stage.reindexing_settings(cell, space_group, parameters.lattice_symmetry_max_delta)
    return Frame(cell, space_group, unique, merging.resolution_shells(unique.d_star_sq, _RADIAL_SHELLS), settings)


def _orients(parameters: ReductionParameters) -> bool:
    return parameters.scaling.orientations and parameters.engine == "fast" and "scale" in parameters.steps


def _start(job: Job, fate: np.ndarray, previous: output.Previous | None) -> tuple[Job, _Start]:
    n = len(job.crystals)
    known, earlier = np.zeros(n, dtype=bool), output.CrystalResults.unscaled(np.zeros(n, dtype=np.int64), fate)
    noise, current = _FIRST_NOISE, None
    if previous is not None:
        known, earlier, current = _earlier(job, previous)
        noise = previous.noise
    orientations = Orientations(earlier.rotation)
    job = job.with_observations(rotated(job.observations, orientations.angles))
    as_indexed = resolve.index_in_settings(
        job.observations, job.frame.unique, job.frame.settings, np.zeros(n, dtype=np.int64)
    ).only(fate == Fate.KEPT)
    as_indexed, scales, expected, orientations = _by_mean_intensity(job, as_indexed, orientations, known)
    job = job.with_observations(as_indexed.observations)
    return job, _Start(scales, expected, noise, current, known, earlier, orientations)


def _by_mean_intensity(
    job: Job, data: Indexed, orientations: Orientations, known: np.ndarray
) -> tuple[Indexed, Scales, np.ndarray, Orientations]:
    # scales, and orientations of crystals that are not known, by the mean intensities in resolution shells: no crystal
    # need be in the setting of another for that
    def means() -> tuple[Scales, np.ndarray]:
        frame, widths = job.frame, job.parameters.scaling.widths
        return scaling_rounds.radial_means(job.comm, data.used(), frame.unique, frame.shells, widths)

    scales, expected = means()
    if not (_orients(job.parameters) and post_refinement.possible(job.comm, data)):
        return data, scales, expected, orientations
    new = data.only(data.include & ~known)
    predicted, bound = Predicted.by_wilson(data, expected), job.parameters.scaling.robust_bound
    found, rotated_data = post_refinement.refine(job.comm, new, scales, _FIRST_NOISE, predicted, orientations, bound)
    if found is orientations:
        return data, scales, expected, orientations
    data = rotated_data.only(data.include)
    return data, *means(), found


def _earlier(job: Job, previous: output.Previous) -> tuple[np.ndarray, output.CrystalResults, Merged]:
    frame = job.frame
    if previous.settings.shape != frame.settings.shape or not np.allclose(previous.settings, frame.settings):
        raise InputError(f"append={job.parameters.append}: the lattice has other symmetries now than it had then")
    known, earlier = output.previous_results(previous, job.sources, job.crystals)
    say(job.comm, "%d crystals continue from %s", job.count(known), job.parameters.append)
    return known, earlier, references.place(previous.hkl, previous.intensity, previous.weight, frame.unique)


def _resolve(
    job: Job, fate: np.ndarray, start: _Start, reference: Merged | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any] | None]:
    comm, frame, crystals = job.comm, job.frame, job.crystals
    if len(frame.settings) == 1:
        say(comm, "no indexing ambiguity in %s with this cell", stage.space_group_symbol(frame.space_group))
        return *_one_setting(len(crystals)), fate, None
    include = fate == Fate.KEPT
    data = resolve.normalised(job.observations, include, frame.unique, frame.settings, start.scales, start.expected)
    known_intensities = reference or start.current
    if known_intensities is not None:
        normal = references.normalised(known_intensities, frame.unique, frame.shells)
        resolved = resolve.resolve_against(comm, data, include, normal, job.parameters.ambiguity)
    else:
        table = ambiguity.composition_table(frame.settings, frame.unique.rotations)
        resolved = resolve.resolve(
            comm,
            data,
            include,
            crystals.number,
            job.loaded.n_total,
            len(frame.unique),
            table,
            job.parameters.ambiguity,
        )
    setting = np.where(start.known, start.earlier.setting, resolved.setting)
    undecided = include & ~resolved.decided & ~start.known
    n_undecided = job.count(undecided)
    _say_settings(job, resolved, include, n_undecided)
    if 2 * n_undecided > job.count(include):
        say(
            comm,
            "most crystals fit all settings alike: they have too few reflections, or the symmetry is higher than %s "
            "(ambiguity.min_margin=0 keeps them all)",
            stage.space_group_symbol(frame.space_group),
        )
    margin = np.where(start.known, start.earlier.margin, resolved.margin)
    how = {
        "settings": [stage.reindexing_symbol(matrix) for matrix in frame.settings],
        "crystals": resolved.counts.tolist(),
        "undecided": n_undecided,
        "start_agreement": resolved.start_agreement.tolist(),
        "above_chance": resolved.above_chance,
    }
    return setting, margin, _with(fate, undecided, Fate.AMBIGUOUS), how


def _one_setting(n_crystals: int) -> tuple[np.ndarray, np.ndarray]:
    # nothing to choose from: infinitely sure
    return np.zeros(n_crystals, dtype=np.int64), np.full(n_crystals, np.inf)


def _say_settings(job: Job, resolved: resolve.Resolved, include: np.ndarray, undecided: int) -> None:
    margin = exact_median(job.comm, np.minimum(resolved.margin[include], 1e6)[:, None])[0]
    say(
        job.comm,
        "indexing ambiguity: %d settings (%s), crystals in each: %s; %d undecided; median log-likelihood margin %.1f",
        len(job.frame.settings),
        "; ".join(stage.reindexing_symbol(matrix) for matrix in job.frame.settings),
        ", ".join(str(count) for count in resolved.counts),
        undecided,
        margin,
    )
    if len(resolved.start_agreement):
        shares = ", ".join(f"{100 * share:.1f}%" for share in resolved.start_agreement)
        say(job.comm, "random starts that agree with the best one, share of crystals: %s", shares)


def _scale(
    job: Job, indexed: Indexed, fate: np.ndarray, start: _Start
) -> tuple[Indexed, np.ndarray, Scaled, Orientations]:
    comm, unique = job.comm, job.frame.unique
    require_some(comm, fate)
    scales, expected, everything = start.scales, start.expected, indexed.only(fate == Fate.KEPT)
    data = everything.used()
    if start.current is not None:
        scales = scaling_rounds.join_scales(
            data, scales, start.earlier.scales, start.known, start.noise, start.current, expected, unique
        )
    settings, orientations = job.parameters.scaling, start.orientations
    scaled = scaling_rounds.scale(comm, data, unique, scales, expected, settings, start.noise)
    if _orients(job.parameters) and post_refinement.possible(comm, everything):
        everything, scaled, orientations = post_refinement.with_scales(
            comm, everything, unique, scaled, settings, orientations
        )
        data = everything.used()
        _say_orientations(job, orientations)
    indexed, n_outliers = post_refinement.without_outliers(
        comm, everything.used().only(scaled.include), unique, scaled, settings.robust_bound
    )
    if n_outliers:
        say(comm, "%d observations left out that are too strong for any reflection of their resolution", n_outliers)
        scaled = scaling_rounds.scale(
            comm, indexed, unique, scaled.scales, scaled.merged.intensity, settings, scaled.noise
        )
    fate = _with(fate, data.include & ~scaled.include, Fate.NOT_SCALED)
    require_some(comm, fate)
    fate, scaled = filters.filter_crystals(comm, indexed, fate, scaled, unique, job.frame.shells, job.parameters)
    require_some(comm, fate)
    say(
        comm,
        "scaled in %d rounds%s by %s; error model a = %.3f, b = %.4f, c = %.4f; rms normalised deviation %.3f",
        scaled.rounds,
        "" if scaled.converged else f", not converged: scales still change by {100 * scaled.change:.1f}% in a round",
        scaled.model,
        scaled.noise.a,
        scaled.noise.b,
        scaled.noise.c,
        scaled.deviations.overall,
    )
    return indexed, fate, scaled, orientations


def _say_orientations(job: Job, orientations: Orientations) -> None:
    if not orientations.rounds:
        say(job.comm, "orientations: as integrated, since observations left out of it do not speak for others")
        return
    turned = np.degrees(np.sqrt(np.sum(orientations.angles**2, axis=1)))
    moved = np.any(orientations.angles != 0, axis=1)
    say(
        job.comm,
        "orientations: %d crystals rotated, median %.4f degrees; log-likelihood of observations left out of it +%.0f",
        job.count(moved),
        exact_median(job.comm, turned[moved][:, None])[0],
        orientations.gain,
    )


def _merge(
    job: Job,
    indexed: Indexed,
    fate: np.ndarray,
    scaled: Scaled,
    reference: Merged | None,
    grouping: groups.Grouping | None,
) -> tuple[dict[str, MergedData], dict[str, np.ndarray]]:
    # the sets by their names, and which crystals are in each
    kept = fate == Fate.KEPT
    sets: dict[str, MergedData] = {}
    members: dict[str, np.ndarray] = {}

    def merge_set(name: str, title: str, include: np.ndarray) -> None:
        data = merge(
            job.comm,
            indexed.only(include),
            job.crystals.number,
            scaled.scales,
            scaled.noise,
            scaled.merged,
            job.frame.unique,
            job.parameters.merging,
            job.parameters.d_min,
            reference,
        )
        sets[name], members[name] = data, include
        how = " (where CC1/2 falls to the cutoff)" if data.d_min_estimated else ""
        say(job.comm, "\n%s: %d crystals merged to %.2f angstrom%s", title, data.n_crystals, data.d_min, how)
        say(job.comm, "%s", report.shell_table(data.cut))
        say(job.comm, "%s", report.consistency_text(data.consistency))

    merge_set("merged", "all crystals", kept)
    chosen = groups.Groups((), (), np.full(len(kept), -1))
    if job.parameters.dose_series_repeat is not None:
        chosen = groups.dose_series(job.crystals, job.parameters.dose_series_repeat)
    elif grouping is not None:
        chosen = groups.by_metadata(job.comm, job.crystals, grouping)
    for number, (name, description) in enumerate(zip(chosen.names, chosen.descriptions)):
        of_group = kept & (chosen.of_crystal == number)
        if job.count(of_group):
            merge_set(name, f"{name} ({description})", of_group)
        else:
            say(job.comm, "%s (%s): no crystals", name, description)
    return sets, members


def _summary(
    job: Job,
    fate: np.ndarray,
    scaled: Scaled | None,
    merged: dict[str, MergedData],
    how: dict[str, Any] | None,
    orientations: Orientations,
) -> Summary:
    fates = job.comm.sum(np.bincount(fate, minlength=len(Fate)))
    return Summary(
        {FATE_TEXT[f]: int(fates[f]) for f in Fate if fates[f]},
        job.frame.cell,
        stage.space_group_symbol(job.frame.space_group),
        float(exact_median(job.comm, job.crystals.wavelength[:, None])[0]),
        merged,
        how,
        None if scaled is None else _scaling_in_numbers(scaled, orientations),
        job.loaded.without_background,
    )


def _scaling_in_numbers(scaled: Scaled, orientations: Orientations) -> dict[str, Any]:
    trend, deviation = scaled.scales.trend, scaled.deviations.overall
    return {
        "rounds": scaled.rounds,
        "converged": scaled.converged,
        "model": scaled.model,
        "simplified": scaled.simplified,
        "error_model": {"a": scaled.noise.a, "b": scaled.noise.b, "c": scaled.noise.c},
        "normalised_deviation": deviation if np.isfinite(deviation) else None,
        "orientations": {
            "rounds": orientations.rounds,
            "spread_deg": float(np.degrees(orientations.spread)) if orientations.rounds else None,
            "gain": orientations.gain,
        },
        "width_trend": {"d_star": trend.knots.tolist(), "log_variance_ratio": trend.values.tolist()},
    }


def _with(fate: np.ndarray, rows: np.ndarray, value: Fate) -> np.ndarray:
    return np.where(rows, value, fate).astype(np.int64)


def _text(cell: np.ndarray) -> str:
    return " ".join(f"{x:.2f}" for x in cell[:3]) + "  " + " ".join(f"{x:.2f}" for x in cell[3:])
