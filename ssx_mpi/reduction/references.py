"""Reference intensities on every rank, in the rows of the table of unique reflections."""

from __future__ import annotations

import numpy as np

from ssx_mpi.kernels.free_set import new_flags
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Merged
from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.reduction.job import Job
from ssx_mpi.stages.intensities import reference as reader
from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.reference import FreeFlags

# A reference from another crystal form does not help; these tell forms apart and leave room for temperature
_LENGTH_TOLERANCE = 0.05
_ANGLE_TOLERANCE = 3.0


def load(
    comm: Communicator, parameters: ReductionParameters, cell: tuple[float, ...], space_group: str,
    unique: UniqueReflections,
) -> Merged | None:  # fmt: skip
    """The reference asked for, or None; read by rank 0. Collective.

    Raises
    ------
    InputError
        On all ranks, when it cannot be read, or its cell or symmetry is not that of the data.
    """
    if parameters.reference is None:
        return None
    return on_root(
        comm, lambda: _read(parameters, cell, space_group, unique), (reader.ReferenceError, InputError), InputError
    )


def free_flags(job: Job) -> FreeFlags | None:
    """Free flags for the rank that writes: new ones where asked for, or those of the reference; None for none.

    Those of a reference fit the indices of the merged data where these follow it, or there is one setting only.
    """
    if job.parameters.free_flags == "new":
        unique = job.frame.unique
        return FreeFlags("FreeR_flag", unique.hkl, new_flags(unique, job.frame.settings))
    path = job.parameters.reference
    if (
        job.parameters.free_flags == "none"
        or path is None
        or ("scale" not in job.parameters.steps and len(job.frame.settings) > 1)
    ):
        return None
    return reader.read_free_flags(str(path))


def place(hkl: np.ndarray, intensity: np.ndarray, weight: np.ndarray, unique: UniqueReflections) -> Merged:
    """Intensities in the rows of the table of unique reflections, weight 0 where there is none."""
    row, _ = unique.locate(hkl)
    inside = row >= 0
    merged = Merged(np.zeros(len(unique)), np.zeros(len(unique)))
    merged.intensity[row[inside]] = intensity[inside]
    merged.weight[row[inside]] = weight[inside]
    return merged


def normalised(reference: Merged, unique: UniqueReflections, shells: Shells) -> Merged:
    """Intensities divided by the mean of their shell and by epsilon."""
    known = reference.weight > 0
    number = shells.sum(known.astype(float))
    mean = shells.sum(np.where(known, reference.intensity / unique.epsilon, 0.0)) / np.maximum(number, 1)
    expected = mean[shells.number] * unique.epsilon
    usable = known & (expected > 0)
    intensity = np.divide(reference.intensity, expected, out=np.zeros(len(unique)), where=usable)
    return Merged(intensity, np.where(usable, 1.0, 0.0))


def _read(
    parameters: ReductionParameters, cell: tuple[float, ...], space_group: str, unique: UniqueReflections
) -> Merged:
    path = parameters.reference
    assert path is not None
    if not path.is_file():
        raise InputError(f"reference {path} is not there")
    d_min = float(unique.d_star_sq.max()) ** -0.5
    reference = reader.read_reference(str(path), d_min, parameters.k_sol, parameters.b_sol)
    if not stage.same_symmetry(reference.space_group, space_group):
        raise InputError(
            f"reference {path} has space group {reference.space_group}, "
            f"the crystals have {stage.space_group_symbol(space_group)}"
        )
    ours, theirs = np.array(cell), np.array(reference.cell)
    if np.any(np.abs(theirs[:3] / ours[:3] - 1) > _LENGTH_TOLERANCE) or np.any(
        np.abs(theirs[3:] - ours[3:]) > _ANGLE_TOLERANCE
    ):
        raise InputError(f"reference {path} has another cell ({_text(theirs)}) than the crystals ({_text(ours)})")
    return place(reference.hkl, reference.intensity, np.ones(len(reference.intensity)), unique)


def _text(cell: np.ndarray) -> str:
    return " ".join(f"{x:.1f}" for x in cell)
