"""Filters of scaled crystals: by mean I/sigma, and by what they do to CC1/2."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from ssx_mpi.kernels import crystal_outliers, merging, scaling
from ssx_mpi.kernels.exact_sums import exact_median
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction import post_refinement, scaling_rounds
from ssx_mpi.reduction.crystal_list import Fate
from ssx_mpi.reduction.scaling_rounds import Scaled

logger = logging.getLogger(__name__)

# logarithm of the odds against a crystal that is left out for not belonging to the others: one in a thousand at most
_EVIDENCE = 7.0
# largest share of the crystals that goes in a cycle
_AT_ONCE = 0.1
# times the mean that an intensity counts for in CC1/2
_STRONGEST = 10.0
_PRIOR_SHELLS = 20


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
        fate, scaled = _without_harmful(comm, data, fate, scaled, unique, shells, parameters)
    return fate, scaled


def mean_i_over_sigma(data: Indexed, scales: Scales, noise: Noise, merged: Merged) -> np.ndarray:
    """Mean I/sigma of each crystal's observations, with the errors of the error model: (n_crystals,)."""
    observations = data.observations
    sigma = np.sqrt(scaling.variances(data, scales, noise, merged))
    located = data.unique >= 0
    crystal = observations.crystal()[located]
    total = np.bincount(crystal, (observations.intensity / sigma)[located], observations.n_crystals)
    return total / np.maximum(np.bincount(crystal, minlength=observations.n_crystals), 1)


def _without_harmful(
    comm: Communicator,
    data: Indexed,
    fate: np.ndarray,
    scaled: Scaled,
    unique: UniqueReflections,
    shells: Shells,
    parameters: ReductionParameters,
) -> tuple[np.ndarray, Scaled]:
    # a few at a time, the worst first: the scales, errors and means that condemn a good crystal are those which the
    # worst ones have spoiled
    how, settings = parameters.filtering, parameters.scaling
    n_start, removed = count(comm, fate == Fate.KEPT), 0
    for cycle in range(how.max_cycles):
        kept = fate == Fate.KEPT
        present = data.only(kept)
        belonging = _belonging(comm, present, scaled, unique, settings.robust_bound)
        delta, spread = _delta_cc_half(comm, present, scaled, unique, shells)
        alien = kept & (belonging < -_EVIDENCE)
        harmful = kept & (belonging < 0) & (delta < -how.std_cutoff * spread)
        gone = alien | harmful
        allowed = int(n_start * how.max_percent_removed / 100) - removed
        found = count(comm, gone)
        most = min(allowed, max(1, int(_AT_ONCE * count(comm, kept))))
        gone &= belonging <= _threshold(comm, belonging[gone], most)
        number = count(comm, gone)
        _say(comm, "delta-CC1/2, cycle %d: %d crystals found, %d removed", cycle + 1, found, number)
        if number == 0:
            break
        fate = np.where(gone, Fate.DELTA_CC_HALF, fate).astype(np.int64)
        removed += number
        if not count(comm, fate == Fate.KEPT):
            break
        rest = data.only(fate == Fate.KEPT)
        # from the beginning: the scales may have followed what went
        scales, expected = scaling_rounds.radial_means(comm, rest, unique, shells, settings.widths)
        scaled = scaling_rounds.scale(comm, rest, unique, scales, expected, settings)
    return fate, scaled


def _belonging(
    comm: Communicator, data: Indexed, scaled: Scaled, unique: UniqueReflections, bound: float
) -> np.ndarray:
    shells = merging.resolution_shells(unique.d_star_sq, _PRIOR_SHELLS)
    predicted, mean = post_refinement.by_others(data, unique, scaled, shells, bound)
    return crystal_outliers.belonging(data, scaled.scales, scaled.noise, predicted, mean, bound)


def _delta_cc_half(
    comm: Communicator, data: Indexed, scaled: Scaled, unique: UniqueReflections, shells: Shells
) -> tuple[np.ndarray, float]:
    # of each crystal, less the median, and its spread; by medians, since those who do harm must not hide each other
    mean = scaling_rounds.mean_intensities(scaled.merged, unique, shells)
    limit = _STRONGEST * mean[data.unique] * scaling.scale_factors(data, scaled.scales)
    observations = data.observations
    limited = np.clip(observations.intensity, -limit, limit)
    data = replace(data, observations=replace(observations, intensity=limited))
    moment = comm.sum(merging.moments(data, scaled.scales))
    delta = merging.delta_cc_half(data, scaled.scales, moment, mean)
    kept = delta[data.include][:, None]
    median = exact_median(comm, kept)
    spread = 1.4826 * exact_median(comm, np.abs(kept - median))
    return delta - median[0], float(spread[0])


def _threshold(comm: Communicator, values: np.ndarray, most: int) -> float:
    # that `most` values of all ranks do not exceed
    if most <= 0:
        return -np.inf
    worst = np.sort(np.concatenate(comm.allgather(np.sort(values)[:most])))
    return float(worst[min(most, len(worst)) - 1]) if len(worst) else -np.inf


def _say(comm: Communicator, message: str, *values: object) -> None:
    if comm.rank == 0:
        logger.info(message, *values)
