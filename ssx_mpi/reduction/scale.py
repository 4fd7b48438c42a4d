"""Scales, error model and merged intensities over the ranks, iterated until nothing moves.

Each rank holds its own crystals; what all ranks share are sums over unique reflections.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import error_model, scaling
from ssx_mpi.kernels.error_model import Deviations
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.communicator import Communicator

logger = logging.getLogger(__name__)

# Wilson's distribution as an error model: intensities scatter about their shell's mean by as much as that mean
_WILSON = Noise(a=1.0, b=1.0)
_RADIAL_ROUNDS = 4


@dataclass(frozen=True)
class ScalingSettings:
    """How far to iterate.

    Parameters
    ----------
    robust_bound
        Normalised deviation beyond which an observation loses weight.
    tolerance
        Root mean square relative change of the scales in a round, at which they are converged.
    max_rounds
        Rounds of scales between two estimates of the error model.
    error_cycles
        Estimates of the error model.
    min_observations
        Crystals with fewer usable observations are left out.
    """

    robust_bound: float = 4.0
    tolerance: float = 1e-3
    max_rounds: int = 20
    error_cycles: int = 4
    min_observations: int = 10


@dataclass(frozen=True)
class Scaled:
    """Result of scaling: scales of this rank's crystals, and what all ranks share.

    Parameters
    ----------
    include
        (n_crystals,) bool, those that could be scaled.
    sums
        (3, n_unique, 2): numerator, weight, number; see :func:`ssx_mpi.kernels.scaling.accumulate`.
    rounds
        How many rounds of scaling it took.
    """

    include: np.ndarray
    scales: Scales
    noise: Noise
    merged: Merged
    sums: np.ndarray
    deviations: Deviations
    rounds: int


def radial_means(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    unique: UniqueReflections,
    shells: Shells,
) -> tuple[Scales, np.ndarray]:
    """Scale and B of each crystal against the mean intensity in resolution shells alone.

    No crystal need share a reflection with another for this, nor be indexed consistently with it: it is where
    scaling starts, and it normalises intensities for the comparison of settings.

    Returns
    -------
    scales : Scales
    expected : (n_unique,) float64
        Mean intensity of the reflection's shell, times epsilon; positive everywhere.
    """
    scales = Scales.unit(observations.n_crystals)
    noise, merged = Noise(), Merged(np.zeros(len(unique)), np.zeros(len(unique)))
    expected = np.ones(len(unique))
    for round_number in range(_RADIAL_ROUNDS + 1):
        sums = scaling.accumulate(observations, indexed, include, scales, noise, merged, unique.d_star_sq, 0.0)
        expected = _smooth_means(comm.sum(sums), unique, shells)
        if round_number == _RADIAL_ROUNDS:
            break
        # the mean of a shell is known well: its weight does not limit that of an observation
        merged, noise = Merged(expected, np.full(len(unique), 1e30)), _WILSON
        for _ in range(3):
            scales, _, _ = scaling.fit_scales(
                observations, indexed, include, scales, noise, merged, unique.d_star_sq, 0.0, fit_b=round_number > 0
            )
        scales = _centred(comm, scales, include)
        merged = Merged(expected, np.zeros(len(unique)))
    return scales, expected


def scale(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    unique: UniqueReflections,
    start: Scales,
    expected: np.ndarray,
    settings: ScalingSettings,
    noise: Noise = Noise(a=1.0, b=0.1),  # noqa: B008  (frozen)
) -> Scaled:
    """Alternate scales and merged intensities to convergence, and the error model around them.

    Parameters
    ----------
    include
        (n_crystals,) bool, the crystals of this rank to scale.
    start, expected
        From :func:`radial_means`, or the scales and merged intensities of an earlier run to continue from.
    noise
        Error model to start from.
    """
    d_star_sq, bound = unique.d_star_sq, settings.robust_bound
    scales = start

    def merge(scales: Scales, noise: Noise, merged: Merged, bound: float) -> np.ndarray:
        return comm.sum(scaling.accumulate(observations, indexed, include, scales, noise, merged, d_star_sq, bound))

    # no deviation means anything before there are merged intensities: the first merge weighs by expectation alone
    sums = merge(scales, Noise(noise.a, max(noise.b, 0.3)), Merged(expected, np.zeros(len(unique))), 0.0)
    merged = Merged.from_sums(sums)
    rounds = 0
    for cycle in range(settings.error_cycles):
        for _ in range(settings.max_rounds):
            scales, step, used = scaling.fit_scales(
                observations, indexed, include, scales, noise, merged, d_star_sq, bound
            )
            include = include & (used >= settings.min_observations)
            scales = _centred(comm, scales, include)
            sums = merge(scales, noise, merged, bound)
            merged = Merged.from_sums(sums)
            rounds += 1
            total, number = comm.sum(np.array([np.sum(step[include] ** 2), np.count_nonzero(include)], dtype=float))
            change = np.sqrt(total / max(number, 1))
            if change < settings.tolerance:
                break
        if cycle < settings.error_cycles - 1:
            previous = noise
            for _ in range(3):
                noise = error_model.refine_noise(
                    comm.sum(
                        error_model.deviation_sums(observations, indexed, include, scales, noise, merged, d_star_sq)
                    ),
                    noise,
                )
                sums = merge(scales, noise, merged, bound)
                merged = Merged.from_sums(sums)
            logger.debug("error model %d: a = %.3f, b = %.4f", cycle + 1, noise.a, noise.b)
            if cycle and abs(noise.a / previous.a - 1) < 0.01 and abs(noise.b - previous.b) < 0.002:
                break
    left = comm.sum(error_model.deviation_sums(observations, indexed, include, scales, noise, merged, d_star_sq))
    return Scaled(include, scales, noise, merged, sums, error_model.deviations(left), rounds)


def as_scaled(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    unique: UniqueReflections,
    expected: np.ndarray,
) -> Scaled:
    """Observations that were scaled before, as a result of scaling: unit scales, and errors as they are. Collective."""
    scales, noise = Scales.unit(observations.n_crystals), Noise()
    merged = Merged(expected, np.zeros(len(unique)))
    sums = comm.sum(scaling.accumulate(observations, indexed, include, scales, noise, merged, unique.d_star_sq, 0.0))
    merged = Merged.from_sums(sums)
    left = comm.sum(error_model.deviation_sums(observations, indexed, include, scales, noise, merged, unique.d_star_sq))
    return Scaled(include, scales, noise, merged, sums, error_model.deviations(left), 0)


def join_scales(
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    radial: Scales,
    earlier: Scales,
    known: np.ndarray,
    noise: Noise,
    merged: Merged,
    unique: UniqueReflections,
) -> Scales:
    """Scales to continue from when crystals are added: the earlier ones, and new ones fitted to what was merged.

    Parameters
    ----------
    radial
        Of all crystals, from :func:`radial_means`; for new crystals the start of the fit.
    earlier, known
        Scales of an earlier reduction, and the crystals (n_crystals,) bool that have them.
    merged
        Of the earlier reduction.
    """
    new = include & ~known
    scales = Scales(np.where(known, earlier.log_k, radial.log_k), np.where(known, earlier.b_factor, radial.b_factor))
    for _ in range(5):
        scales, _, _ = scaling.fit_scales(observations, indexed, new, scales, noise, merged, unique.d_star_sq, 0.0)
    return scales


def _centred(comm: Communicator, scales: Scales, include: np.ndarray) -> Scales:
    # The merged intensities can absorb a common scale and B: the mean crystal keeps 1 and 0. A crystal far out (one
    # that does not fit at all) must not drag the others along, hence the clipping.
    k, b = np.clip(scales.log_k[include], -5, 5), np.clip(scales.b_factor[include], -50, 50)
    log_k, b_factor, number = comm.sum(np.array([k.sum(), b.sum(), len(k)], dtype=float))
    return scales.shifted(log_k / max(number, 1), b_factor / max(number, 1))


def _smooth_means(sums: np.ndarray, unique: UniqueReflections, shells: Shells) -> np.ndarray:
    # shells in which noise left a mean of zero or below take a small positive one: they expect nothing, which must
    # not become a division by it
    weight = sums[1].sum(axis=1)
    numerator = sums[0].sum(axis=1)
    shell_weight = shells.sum(weight * unique.epsilon)
    mean = np.divide(shells.sum(numerator), shell_weight, out=np.zeros(len(shells)), where=shell_weight > 0)
    highest = mean.max(initial=0.0)
    if highest <= 0:
        return np.ones(len(unique))
    mean = np.maximum(mean, 1e-3 * highest)
    centres = 0.5 * (shells.edges[1:] + shells.edges[:-1])
    return np.exp(np.interp(unique.d_star_sq, centres, np.log(mean))) * unique.epsilon
