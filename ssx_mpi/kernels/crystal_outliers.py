r"""Crystals whose intensities are not those of the others.

Two things can be expected of the intensities of a crystal: those that the *other* crystals have, with what is known of
them, or, if it has nothing to do with the others, any that follow Wilson's distribution with the mean of their
resolution. The logarithm of the ratio of the two likelihoods,

.. math:: \Lambda = \sum \ln \frac{p(I \mid g J, v + g^2 \operatorname{var} J)}{p(I \mid g \Sigma, v + g^2 \Sigma^2)},

is above zero for a crystal that belongs, by the more the more it tells, about zero for one that tells nothing, and far
below for another cell, setting or protein. Unlike a difference of CC1/2 it has a zero of its own, so that neither the
number nor the size of the outliers moves the limit. An observation beyond a bound counts by the logarithm of its
deviation: a few spots of something else do not condemn a crystal, a tenth of all does.

References
----------
Assmann, Brehm & Diederichs (2016). J. Appl. Cryst. 49, 1021: delta-CC1/2.
Wilson (1949). Acta Cryst. 2, 318.
"""

from __future__ import annotations

import numpy as np

from ssx_mpi.kernels.orientation import Predicted, robust_log_likelihood
from ssx_mpi.kernels.scaling import Indexed, Noise, Scales, refined_offsets, scale_factors


def belonging(
    data: Indexed, scales: Scales, noise: Noise, predicted: Predicted, mean: np.ndarray, bound: float
) -> np.ndarray:
    """Log-likelihood ratio of each crystal, (n_crystals,): below zero for those that do not belong to the others.

    Parameters
    ----------
    predicted
        By the other crystals.
    mean
        (n_unique,) mean intensity at the reflection's resolution times epsilon.
    bound
        Normalised deviation beyond which an observation counts by the logarithm; 0 for never.
    """
    observations, crystal = data.observations, data.observations.crystal()
    used = (data.unique >= 0) & data.include[crystal] & np.isfinite(predicted.value) & (mean[data.unique] > 0)
    offset = refined_offsets(data, scales)
    used &= offset < scales.max_offset
    g = scale_factors(data, scales)
    a_sq, b_sq, c_sq = noise.squares()
    relative = b_sq + c_sq * offset

    def log_likelihood(value: np.ndarray, variance: np.ndarray) -> np.ndarray:
        v = a_sq * (observations.variance + relative * g**2 * (value**2 + variance)) + g**2 * variance
        return robust_log_likelihood((observations.intensity - g * value) ** 2 / v, v, bound)

    expected = mean[data.unique]
    of_wilson = log_likelihood(expected, expected**2)
    ratio = np.where(used, log_likelihood(predicted.value, predicted.variance) - of_wilson, 0.0)
    return np.bincount(crystal, ratio, observations.n_crystals)
