"""Filters of scaled crystals: by mean I/sigma, and by what they do to CC1/2."""

from __future__ import annotations

import logging

import numpy as np

from ssx_mpi.kernels import merging, scaling
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction import scaling_rounds
from ssx_mpi.reduction.crystal_list import Fate
from ssx_mpi.reduction.scaling_rounds import Scaled

logger = logging.getLogger(__name__)


def filter_crystals(
    comm: Communicator,
    data: Indexed,
    fate: np.ndarray,
    scaled: Scaled,
    unique: UniqueReflections,
    shells: Shells,
    parameters: ReductionParameters,
) -> tuple[np.ndarray, Scaled]:
    """Leave crystals out as asked for, and scale again without them. Collective.

    Returns
    -------
    fate : (n_crystals,) int64
    scaled : Scaled
        Of the crystals that are left; the same object when none went.
    """
    how = parameters.filtering
    fate = fate.copy()

    def again() -> Scaled:
        return scaling_rounds.scale(
            comm, data.only(fate == Fate.KEPT), unique, scaled.scales, scaled.merged.intensity, parameters.scaling,
            scaled.noise,
        )  # fmt: skip

    if how.i_over_sigma:
        weak = mean_i_over_sigma(data, scaled.scales, scaled.noise, scaled.merged)
        gone = (fate == Fate.KEPT) & (weak < how.min_i_over_sigma)
        fate[gone] = Fate.I_SIGMA
        number = count(comm, gone)
        _say(comm, "%d crystals with a mean I/sigma below %g", number, how.min_i_over_sigma)
        if number and count(comm, fate == Fate.KEPT):
            scaled = again()
    if how.delta_cc_half:
        n_start = count(comm, fate == Fate.KEPT)
        removed = 0
        for cycle in range(how.max_cycles):
            delta = _delta_cc_half(comm, data.only(fate == Fate.KEPT), scaled, unique, shells)
            most = int(n_start * how.max_percent_removed / 100) - removed
            gone = _outliers(comm, delta, fate == Fate.KEPT, how.std_cutoff, most)
            number = count(comm, gone)
            _say(comm, "delta-CC1/2, cycle %d: %d crystals removed", cycle + 1, number)
            if number == 0:
                break
            fate[gone] = Fate.DELTA_CC_HALF
            removed += number
            scaled = again()
    return fate, scaled


def mean_i_over_sigma(data: Indexed, scales: Scales, noise: Noise, merged: Merged) -> np.ndarray:
    """Mean I/sigma of each crystal's observations, with the errors of the error model: (n_crystals,)."""
    observations = data.observations
    sigma = np.sqrt(scaling.variances(data, scales, noise, merged))
    located = data.unique >= 0
    crystal = observations.crystal()[located]
    total = np.bincount(crystal, (observations.intensity / sigma)[located], observations.n_crystals)
    return total / np.maximum(np.bincount(crystal, minlength=observations.n_crystals), 1)


def _delta_cc_half(
    comm: Communicator, data: Indexed, scaled: Scaled, unique: UniqueReflections, shells: Shells
) -> np.ndarray:
    moment = comm.sum(merging.moments(data, scaled.scales))
    number = shells.sum((moment[:, 0] > 0).astype(float))
    mean = np.divide(moment[:, 1], moment[:, 0], out=np.zeros(len(unique)), where=moment[:, 0] > 0)
    unit = (shells.sum(mean) / np.maximum(number, 1))[shells.number] * unique.epsilon
    return merging.delta_cc_half(data, scaled.scales, moment, unit)


def _outliers(comm: Communicator, delta: np.ndarray, include: np.ndarray, cutoff: float, most: int) -> np.ndarray:
    # the worst first: where fewer may go than lie beyond the cutoff, the threshold moves out to the `most` worst
    kept = delta[include]
    n, total, square = comm.sum(np.array([len(kept), kept.sum(), np.sum(kept**2)], dtype=float))
    mean = total / max(n, 1)
    threshold = mean - cutoff * np.sqrt(max(square / max(n, 1) - mean**2, 0.0))
    worst = np.sort(np.concatenate(comm.allgather(np.sort(kept[kept < threshold])[: max(most, 0)])))
    if most <= 0 or not len(worst):
        return np.zeros(len(delta), dtype=bool)
    return include & (delta <= worst[min(most, len(worst)) - 1])


def _say(comm: Communicator, message: str, *values: object) -> None:
    if comm.rank == 0:
        logger.info(message, *values)
