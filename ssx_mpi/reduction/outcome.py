"""All files that a finished reduction leaves."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.kernels.scaling import Indexed, Merged
from ssx_mpi.records.files import placing, write_json
from ssx_mpi.reduction import output, references
from ssx_mpi.reduction.crystfel import CellType
from ssx_mpi.reduction.job import Job, logger
from ssx_mpi.reduction.merge import MergedData
from ssx_mpi.reduction.resampling import Resampled, Spread, resampled_sums
from ssx_mpi.reduction.scaling_rounds import Scaled
from ssx_mpi.report import merging_report as report
from ssx_mpi.report.table_one import TableOne
from ssx_mpi.stages.dials import dials_reduction
from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.mmcif_file import write_merged_mmcif
from ssx_mpi.stages.intensities.reference import FreeFlags


@dataclass(frozen=True)
class Summary:
    """What came out, for the end of the log and for programs.

    Parameters
    ----------
    fates
        Number of crystals by what became of them.
    cell, space_group, wavelength
        Of the merged data; angstrom and degrees.
    merged
        By name: the statistics of each merged set; none when DIALS merged.
    ambiguity, scaling
        How these went, in numbers; None where they had no part.
    without_background
        Share of the reflections that were left out because integration found no background for them.
    resampled
        By name: what data sets of resampled crystals say of each merged set, where they were asked for.
    """

    fates: dict[str, int]
    cell: tuple[float, ...]
    space_group: str
    wavelength: float
    merged: dict[str, MergedData]
    ambiguity: dict[str, Any] | None = None
    scaling: dict[str, Any] | None = None
    without_background: float = 0.0
    resampled: dict[str, Resampled] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """All of it as plain data, for programs."""
        return {
            "crystals": self.fates,
            "cell": [round(x, 4) for x in self.cell],
            "space_group": self.space_group,
            "wavelength": self.wavelength,
            "ambiguity": self.ambiguity,
            "scaling": self.scaling,
            "without_background": round(self.without_background, 4),
            "merged": {
                name: {
                    "n_crystals": data.n_crystals,
                    "d_min": round(data.d_min, 4),
                    "d_min_estimated": data.d_min_estimated,
                    **report.overall(data.cut),
                    "consistency": report.consistency_in_numbers(data.consistency),
                    **_bootstrap_numbers(self.resampled.get(name)),
                }
                for name, data in self.merged.items()
            },
        }


def write(job: Job, summary: Summary, scaled: Scaled, crystals: output.CrystalResults) -> None:
    """Write merged and scaled data, exports, and the scales to continue from. Collective."""
    if "scale" in job.parameters.steps:
        _write_by_file(job, crystals, scaled)
    if job.comm.rank == 0:
        free = references.free_flags(job)
        if free is not None:
            new = job.parameters.free_flags == "new"
            logger.info("free flags %s", "are new" if new else f"{free.label} of the reference are carried over")
        named = stage.named_setting(job.frame.space_group)
        if named is not None:
            logger.info("merged files are in the setting %s, since this one has no symbol: h,k,l became %s", *named)
        for name, data in summary.merged.items():
            _write_merged(job, name, data, summary, free)
    job.comm.barrier()


def _write_by_file(job: Job, results: output.CrystalResults, scaled: Scaled) -> None:
    export, frame = job.parameters.export, job.frame
    state, data_files = job.folder / "data_reduction", job.folder / "DataFiles"
    written = []
    for number, of_file in output.collect_by_file(job, results).items():
        output.write_scales(state, number, of_file)
        kept = output.kept_crystals(of_file, frame.settings)
        if not kept:
            continue
        source = job.sources[number]
        if export.scaled or export.unmerged_mtz or export.unmerged_mmcif:
            stem = data_files / f"scaled_{number + 1}"
            output.write_scaled(
                source, kept, stem, job.selection, frame, scaled.merged, scaled.noise, scaled.scales.trend
            )
            written.append(number)
        if export.stream:
            cell_type = CellType(*stage.lattice_type(frame.space_group))
            path = data_files / f"crystals_{number + 1}.stream"
            output.write_stream(source, kept, path, cell_type, job.selection.width)
    written = sorted(number for part in job.comm.allgather(written) for number in part)
    if job.comm.rank == 0:
        output.write_index(
            state,
            job.sources,
            scaled.noise,
            scaled.scales.trend,
            frame.settings,
            job.selection.width,
            frame.unique,
            scaled.merged,
        )
        if export.unmerged_mtz or export.unmerged_mmcif:
            _export_unmerged(job, [data_files / f"scaled_{number + 1}" for number in written])


def _export_unmerged(job: Job, stems: list[Path]) -> None:
    data_files, export = job.folder / "DataFiles", job.parameters.export
    data, threshold = dials_reduction.read(stems), job.parameters.partiality_threshold
    try:
        if export.unmerged_mtz:
            with placing(data_files / "scaled_unmerged.mtz") as path:
                dials_reduction.export_unmerged(data, threshold, path, None)
        if export.unmerged_mmcif:
            with placing(data_files / "scaled_unmerged.cif") as path:
                dials_reduction.export_unmerged(data, threshold, None, path)
    except dials_reduction.DialsReductionError as error:
        logger.warning("%s", error)


def write_resampled(
    job: Job, summary: Summary, indexed: Indexed, members: dict[str, np.ndarray], scaled: Scaled
) -> Summary:
    """Merge and write what ``merging.bootstrap`` asks for; the summary with what it says. Collective.

    Parameters
    ----------
    members
        By name of the merged set (n_crystals,) bool, its crystals on this rank.
    """
    comm, settings, number = job.comm, job.parameters.merging, job.parameters.merging.bootstrap
    if not number or not summary.merged:
        return summary
    free = comm.bcast(references.free_flags(job) if comm.rank == 0 else None)
    found = {}
    for name, data in summary.merged.items():
        spread, own = Spread(data.sums), None
        resampled = resampled_sums(
            *(comm, indexed.only(members[name]), scaled.scales, scaled.noise, Merged.from_sums(data.sums)),
            *(settings.robust_bound, number),
        )
        for replicate, sums in enumerate(resampled):
            spread.add(sums)
            if replicate % comm.size == comm.rank:
                own = replicate, sums
            # amplitudes take longer than sums: each rank writes one file of a lot
            if own is not None and (replicate + 1 == number or (replicate + 1) % comm.size == 0):
                _write_one_resampled(job, name, *own, summary, free)
                own = None
        found[name] = Resampled(number, spread.over_sigma())
        if comm.rank == 0:
            _say_resampled(name, found[name])
    comm.barrier()
    return replace(summary, resampled=found)


def _write_one_resampled(
    job: Job, name: str, replicate: int, sums: np.ndarray, summary: Summary, free: FreeFlags | None
) -> None:
    data = summary.merged[name]
    note = f"{data.n_crystals} crystals drawn with replacement from those of {name}: data set {replicate + 1}"
    path = job.folder / "DataFiles" / f"{name}_bootstrap_{replicate + 1:03d}.mtz"
    _write_mtz(job, path, sums, None, data.d_min if data.d_min_estimated else None, summary.wavelength, free, note)


def _say_resampled(name: str, resampled: Resampled) -> None:
    if resampled.spread is None:
        how = "too few reflections have ten observations for a comparison with their sigmas"
    else:
        how = f"over them intensities vary by {resampled.spread:.2f} times their sigmas (median)"
    logger.info("%s: %d data sets of resampled crystals; %s", name, resampled.number, how)


def _bootstrap_numbers(resampled: Resampled | None) -> dict[str, Any]:
    if resampled is None:
        return {}
    spread = resampled.spread
    return {
        "bootstrap": {"number": resampled.number, "spread_over_sigma": None if spread is None else round(spread, 4)}
    }


def _write_mtz(
    job: Job,
    path: Path,
    sums: np.ndarray,
    half_sums: tuple[np.ndarray, np.ndarray] | None,
    d_min: float | None,
    wavelength: float,
    free: FreeFlags | None,
    note: str,
) -> None:
    frame = job.frame
    with placing(path) as beside:
        stage.write_merged_mtz(
            *(str(beside), frame.cell, frame.space_group, wavelength, frame.unique, sums, half_sums),
            *(d_min, job.parameters.anomalous, free, (note,)),
        )


def _write_merged(job: Job, name: str, data: MergedData, summary: Summary, free: FreeFlags | None) -> None:
    frame, data_files = job.frame, job.folder / "DataFiles"

    def write_mtz(path: Path, d_min: float | None) -> None:
        note = f"{data.n_crystals} crystals, {name}"
        _write_mtz(job, path, data.sums, data.half_sums, d_min, summary.wavelength, free, note)

    everything = data.d_min_estimated is False
    write_mtz(data_files / f"{name}.mtz", None if everything else data.d_min)
    if job.parameters.d_min is None:
        # without a cut the two are the same, and French-Wilson is what takes time
        full = data_files / f"{name}_full.mtz"
        if everything:
            with placing(full) as path:
                shutil.copyfile(data_files / f"{name}.mtz", path)
        else:
            write_mtz(full, None)
    wilson_b = stage.wilson_b(frame.cell, frame.space_group, frame.unique, data.merged, data.d_min)
    logger.info("%s: Wilson B %s", name, "unknown" if wilson_b is None else f"{wilson_b:.1f} square angstrom")
    content = report.merge_json(data.cut, summary.wavelength, wilson_b)
    suffix = "" if name == "merged" else f".{name}"
    write_json(job.folder / "LogFiles" / f"dials.merge{suffix}.json", content)
    if job.parameters.export.mmcif:
        (of_wavelength,) = content.values()
        numbers = summary.numbers()
        # Table 1 is that of the set called merged
        table = TableOne.of({**numbers, "merged": {"merged": numbers["merged"][name]}}, of_wavelength["merging_stats"])
        with placing(data_files / f"{name}.cif") as path:
            write_merged_mmcif(
                path,
                data_files / f"{name}.mtz",
                data.n_crystals,
                statistics="" if table is None else table.mmcif,
                free_label=None if free is None else free.label,
                free_value=0 if job.parameters.free_flags == "new" else None,
            )
