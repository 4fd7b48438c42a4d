"""DIALS's own programs on rank 0, fed with the crystals that passed the cell filter: the reference, for what fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ssx_mpi.kernels import ambiguity
from ssx_mpi.parallel.collective import on_every_rank
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.records.files import placing, write_json
from ssx_mpi.reduction import output
from ssx_mpi.reduction.crystal_list import Fate
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.reduction.job import Job, logger
from ssx_mpi.stages.dials import dials_reduction

COSYM_CRYSTALS = 500


def scale_and_merge(job: Job, setting: np.ndarray, fate: np.ndarray) -> None:
    """dials.scale and dials.merge on the kept crystals in the settings found. Collective.

    Raises
    ------
    InputError
        On all ranks, with what DIALS said, when it refused.
    """
    numbers = _write_selected(job, "selected", setting, fate)
    with on_every_rank(job.comm, dials_reduction.DialsReductionError, InputError):
        if job.comm.rank == 0:
            try:
                _run(_stems(job, "selected", numbers), job.parameters, job.folder)
            finally:
                _remove(job, "selected", numbers)


def compare_with_cosym(job: Job, setting: np.ndarray, fate: np.ndarray) -> None:
    """Let dials.cosym set up to 500 crystals, as they were indexed, and say how many it sets alike. Collective."""
    every = max(1, -(-job.loaded.n_total // COSYM_CRYSTALS))
    sampled = np.where((fate == Fate.KEPT) & (job.crystals.number % every == 0), Fate.KEPT, Fate.CELL)
    numbers = _write_selected(job, "cosym", np.zeros(len(setting), dtype=np.int64), sampled)
    ours = {job.crystals.identifier[row]: int(setting[row]) for row in np.flatnonzero(sampled == Fate.KEPT)}
    gathered = job.comm.gather(ours)
    if gathered is None:
        return
    try:
        _say_how_many_agree(job, {name: row for part in gathered for name, row in part.items()}, numbers)
    except dials_reduction.DialsReductionError as error:
        logger.warning("comparison with dials.cosym failed: %s", error)
    finally:
        _remove(job, "cosym", numbers)


def _say_how_many_agree(job: Job, ours: dict[str, int], numbers: list[int]) -> None:
    frame, parameters = job.frame, job.parameters
    matrices = dials_reduction.cosym_settings(
        dials_reduction.read(_stems(job, "cosym", numbers)),
        frame.space_group,
        parameters.lattice_symmetry_max_delta,
        parameters.partiality_threshold,
        parameters.ambiguity.seed,
        parameters.symmetry_phil,
    )
    names = [name for name in ours if name in matrices]
    rotations = frame.unique.rotations
    theirs = np.array([ambiguity.find_setting(matrices[name], frame.settings, rotations) for name in names])
    known = theirs >= 0
    table = ambiguity.composition_table(frame.settings, rotations)
    alike = ambiguity.relative_agreement(np.array([ours[name] for name in names])[known], theirs[known], table)
    logger.info("dials.cosym sets %d of %d crystals alike", alike.max(initial=0), len(ours))


def _write_selected(job: Job, name: str, setting: np.ndarray, fate: np.ndarray) -> list[int]:
    results = output.CrystalResults.unscaled(setting, fate)
    written = []
    for number, of_file in output.collect_by_file(job, results).items():
        kept = output.kept_crystals(of_file, job.frame.settings)
        if kept:
            # DIALS has the partialities that integration wrote
            selection = replace(job.selection, width=None)
            output.write_selected(job.sources[number], kept, _stem(job, name, number), selection, job.frame.space_group)
            written.append(number)
    return sorted(number for part in job.comm.allgather(written) for number in part)


def _run(stems: list[Path], parameters: ReductionParameters, folder: Path) -> None:
    data_files = folder / "DataFiles"
    threshold, anomalous = parameters.partiality_threshold, parameters.anomalous
    scaled = dials_reduction.scale(dials_reduction.read(stems), threshold, anomalous, parameters.scaling_phil)
    with placing(data_files / "scaled.refl") as path:
        scaled.reflections.as_file(str(path))
    with placing(data_files / "scaled.expt") as path:
        scaled.experiments.as_file(str(path))
    with placing(data_files / "merged.mtz") as path:
        content = dials_reduction.merge(
            scaled, str(path), threshold, anomalous, parameters.d_min, parameters.merging_phil
        )
    write_json(folder / "LogFiles" / "dials.merge.json", content)


def _stem(job: Job, name: str, number: int) -> Path:
    return job.folder / "data_reduction" / f"{name}_{number + 1}"


def _stems(job: Job, name: str, numbers: list[int]) -> list[Path]:
    return [_stem(job, name, number) for number in numbers]


def _remove(job: Job, name: str, numbers: list[int]) -> None:
    for stem in _stems(job, name, numbers):
        for suffix in (".expt", ".refl"):
            stem.with_suffix(suffix).unlink(missing_ok=True)
