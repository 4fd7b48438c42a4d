"""Orientations of the crystals refined against their intensities, over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels import merging, orientation, wilson_outliers
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.orientation import Predicted
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Noise, Scales
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ScalingSettings
from ssx_mpi.reduction import scaling_rounds
from ssx_mpi.reduction.scaling_rounds import Scaled
from ssx_mpi.reduction.sums import exact_sum

# log-likelihood of the untouched observations that rotations must bring in all, and may cost a crystal
_EVIDENCE, _ALLOWED = 5.0, 3.0
# crystals of which a tenth of the observations is enough
_ENOUGH = 200
# times that the spread of the rotations is estimated, and crystals for which the one assumed counts
_SPREADS, _ASSUMED = 3, 4
#: standard deviations of a reflection, beyond the partiality threshold, from which on observations are not read at all
MARGIN = 1.0
_ROUNDS, _PRIOR_SHELLS = 3, 20


@dataclass(frozen=True)
class Orientations:
    """What was found, of the crystals of this rank.

    Parameters
    ----------
    angles
        (n_crystals, 2) radians, by which each crystal is rotated from where integration had it.
    spread
        Their standard deviation, as the crystals show it.
    gain
        Log-likelihood that the observations which took no part gained in all refinements that were taken.
    rounds
        Refinements that were taken.
    """

    angles: np.ndarray
    spread: float = orientation.FIRST_SPREAD
    gain: float = 0.0
    rounds: int = 0

    @classmethod
    def as_integrated(cls, n_crystals: int) -> Orientations:
        """Where integration had them."""
        return cls(np.zeros((n_crystals, orientation.N_AXES)))


def possible(comm: Communicator, data: Indexed) -> bool:
    """Whether the files of all ranks say where reciprocal lattice points are. Collective."""
    unknown = data.observations.tilt is None and data.observations.n_crystals > 0
    return count(comm, np.array([unknown])) == 0


def refine(
    comm: Communicator,
    data: Indexed,
    scales: Scales,
    noise: Noise,
    predicted: Predicted,
    before: Orientations,
    bound: float,
) -> tuple[Orientations, Indexed]:
    """Rotate crystals to where their intensities say they are, if observations that took no part agree. Collective.

    Parameters
    ----------
    data
        All observations that were read.
    predicted
        What is expected of each.
    before
        What was found so far.

    Returns
    -------
    orientations, data
        The same objects where nothing was gained.
    """
    if data.observations.tilt is None:
        data = replace(data, observations=replace(data.observations, tilt=np.zeros((0, 3), np.float32)))
    spread = before.spread
    for _ in range(_SPREADS):
        found = orientation.refine(data, scales, noise, predicted, before.angles, spread, bound)
        squares = (before.angles + found.angles) ** 2 + found.variance
        squares = np.where(found.refined[:, None], np.minimum(squares, (5 * spread) ** 2), 0.0)
        assumed = _ASSUMED * orientation.N_AXES * orientation.FIRST_SPREAD**2
        number = count(comm, found.refined) + _ASSUMED
        spread = np.sqrt((exact_sum(comm, squares).sum() + assumed) / (orientation.N_AXES * number))
        spread = float(np.clip(spread, *orientation.SPREAD_LIMITS))
    found = orientation.refine(data, scales, noise, predicted, before.angles, spread, bound)
    gains = found.gain
    # of few crystals a tenth says little: every tenth is left out in turn
    n_tenths = int(np.clip(_ENOUGH // max(count(comm, found.refined), 1), 1, 10))
    for tenth in range(1, n_tenths):
        gains = gains + orientation.refine(data, scales, noise, predicted, before.angles, spread, bound, tenth).gain
    gain = float(exact_sum(comm, gains[:, None])[0])
    if gain < _EVIDENCE:
        return before, data
    better = found.refined & (gains > -_ALLOWED)
    steps = np.where(better[:, None], found.angles, 0.0)
    orientations = Orientations(before.angles + steps, spread, before.gain + gain, before.rounds + 1)
    return orientations, replace(data, observations=orientation.rotated(data.observations, steps))


def by_others(
    data: Indexed, unique: UniqueReflections, scaled: Scaled, shells: Shells, bound: float
) -> tuple[Predicted, np.ndarray]:
    """What is expected of each observation by those of the other crystals, and (n_unique,) mean intensities."""
    mean = scaling_rounds.mean_intensities(scaled.merged, unique, shells)
    within = data.observations.within()
    return Predicted.by_others(data, within, scaled.scales, scaled.noise, scaled.merged, mean, bound), mean


def without_outliers(
    comm: Communicator, data: Indexed, unique: UniqueReflections, scaled: Scaled, bound: float
) -> tuple[Indexed, int]:
    """Observations without those that are too strong for any reflection, and how many these are. Collective.

    Parameters
    ----------
    bound
        Normalised deviation beyond which an observation loses weight; with 0 there are no outliers.
    """
    if not bound:
        return data, 0
    shells = merging.resolution_shells(unique.d_star_sq, _PRIOR_SHELLS)
    predicted, mean = by_others(data, unique, scaled, shells, bound)
    n_observations = count(comm, (data.unique >= 0) & data.include[data.observations.crystal()])
    outliers = wilson_outliers.too_strong(
        data, scaled.scales, scaled.noise, predicted, mean, unique.centric, n_observations
    )
    number = count(comm, outliers)
    if not number:
        return data, 0
    return replace(data, unique=np.where(outliers, -1, data.unique).astype(np.int32)), number


def with_scales(
    comm: Communicator,
    data: Indexed,
    unique: UniqueReflections,
    scaled: Scaled,
    settings: ScalingSettings,
    before: Orientations,
) -> tuple[Indexed, Scaled, Orientations]:
    """Orientations against the merged intensities, and scales, in turn, for as long as it helps. Collective.

    Parameters
    ----------
    data
        All observations that were read, of the crystals that were to be scaled.
    scaled
        What scaling made of those within their limit.
    """
    shells = merging.resolution_shells(unique.d_star_sq, _PRIOR_SHELLS)
    for _ in range(_ROUNDS):
        own = data.only(scaled.include)
        predicted, _ = by_others(own, unique, scaled, shells, settings.robust_bound)
        after, rotated = refine(comm, own, scaled.scales, scaled.noise, predicted, before, settings.robust_bound)
        if after is before:
            break
        data, before = rotated.only(data.include), after
        scaled = scaling_rounds.scale(
            comm,
            data.used().only(scaled.include),
            unique,
            scaled.scales,
            scaled.merged.intensity,
            settings,
            scaled.noise,
        )
    return data, scaled, before
