r"""Observations that are too strong for any reflection of their resolution.

Where a reflection was seen several times, one that does not agree loses its weight. One that was seen once has nobody
to disagree with, and on stills that is what half of the reflections are: a spot of another lattice, or of ice, where
hardly anything is recorded of the reflection, is divided by the small partiality and becomes the strongest intensity
of all. Wilson's distribution says how strong a reflection can be: beyond x times the mean are :math:`e^{-x}` of the
acentric, and :math:`\operatorname{erfc} \sqrt{x/2}` of the centric ones. An observation is an outlier where it is,
less three standard deviations, further out than one true reflection in all data is expected to be with a probability
of 0.1, and no other observation of the reflection bears it out.

References
----------
Read (1999). Acta Cryst. D55, 1759: outliers by Wilson's distribution.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.special import erfcinv

from ssx_mpi.kernels.orientation import Predicted
from ssx_mpi.kernels.scaling import Indexed, Noise, Scales, scale_factors

# expected number of true reflections that are taken for outliers
_FALSE = 0.1
# standard deviations that are given to the observation, and within which others bear it out
_SIGMAS, _AGREES = 3.0, 3.0
# observations that tell the median of a crystal, and the least that it is taken to be
_LEAST_TOLD, _LOWEST = 20, 0.1


def largest_ratio(n_observations: int, centric: np.ndarray) -> np.ndarray:
    """Times the mean that a reflection may have, (n,), for reflections that are centric (n,) bool or not."""
    p = min(_FALSE / max(n_observations, 1), 0.1)
    return np.where(centric, 2.0 * erfcinv(p) ** 2, -np.log(p))


def too_strong(
    data: Indexed,
    scales: Scales,
    noise: Noise,
    predicted: Predicted,
    mean: np.ndarray,
    centric: np.ndarray,
    n_observations: int,
) -> np.ndarray:
    """Which observations no reflection explains, (n,) bool.

    Parameters
    ----------
    predicted
        By the other observations of the reflection; from the mean alone where there are none.
    mean
        (n_unique,) mean intensity at the reflection's resolution times epsilon.
    centric
        (n_unique,) bool.
    n_observations
        Of all crystals.
    """
    row, g = data.unique, scale_factors(data, scales)
    intensity = data.observations.intensity / g
    # by counting: the error model would excuse what is strong with being strong
    sigma = noise.a * np.sqrt(data.observations.variance) / g
    used = (row >= 0) & data.include[data.observations.crystal()]
    own = _typical(data, used & (sigma < mean[row]), intensity / mean[row])[data.observations.crystal()]
    beyond = intensity - _SIGMAS * sigma > largest_ratio(n_observations, centric[row]) * mean[row] * own
    spread = np.sqrt(sigma**2 + (noise.b * intensity) ** 2 + predicted.variance)
    alone = predicted.variance > 0.5 * mean[row] ** 2
    borne_out = ~alone & (intensity - predicted.value < _AGREES * spread)
    return used & beyond & ~borne_out


def _typical(data: Indexed, told: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    # by how much the scale of each crystal is too high, at most 1: a few outliers raise it, and hide behind that, but
    # leave the median of all observations over their expected mean where it is; by less than two it may be chance
    start = data.observations.start
    factor = np.ones(data.observations.n_crystals)
    for crystal, (begin, end) in enumerate(pairwise(start)):
        values = ratio[begin:end][told[begin:end]]
        if len(values) >= _LEAST_TOLD:
            factor[crystal] = np.clip(2.0 * np.median(values) / np.log(2.0), _LOWEST, 1.0)
    return factor
