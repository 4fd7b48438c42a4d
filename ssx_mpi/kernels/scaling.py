r"""Scale and B factor of every crystal against merged intensities.

An observation of reflection h on crystal c is modelled as

.. math:: m = g J_h, \qquad g = k_c \exp(-2 B_c s^2), \qquad s^2 = d^{*2} / 4

with the variance :math:`v = a^2 (\sigma^2 + b^2 m^2)`, in which the model rather than the observation stands, so that
observations that came out low by chance do not get more weight. Given J, every crystal is a problem of two parameters;
given the scales, :math:`J_h = \sum \rho g I / v \big/ \sum \rho g^2 / v`. Alternating the two converges, and
only sums over unique reflections have to be combined between ranks. :math:`\rho` is the robust weight, 1 up to a
normalised deviation of `bound` and falling with its square beyond, which bounds and then lowers the pull of an outlier.

References
----------
Hamilton, Rollett & Sparks (1965). Acta Cryst. 18, 129: scales and means by alternating least squares.
Beaton & Tukey (1974). Technometrics 16, 147: iteratively reweighted least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int, c_int64, declare
from ssx_mpi.kernels.reflections import Observations


@dataclass(frozen=True)
class Scales:
    """Logarithm of the scale, and B in angstrom^2, of each crystal: (n_crystals,) float64 each."""

    log_k: np.ndarray
    b_factor: np.ndarray

    @classmethod
    def unit(cls, n_crystals: int) -> Scales:
        return cls(np.zeros(n_crystals), np.zeros(n_crystals))

    def shifted(self, log_k: float, b_factor: float) -> Scales:
        """With the given amounts taken off all crystals."""
        return Scales(self.log_k - log_k, self.b_factor - b_factor)


@dataclass(frozen=True)
class Noise:
    """Error model: the variance of an observation is a^2 (sigma^2 + b^2 m^2), m its expected intensity."""

    a: float = 1.0
    b: float = 0.0


@dataclass(frozen=True)
class Merged:
    """Merged intensities and their weights (1/variance; 0 where nothing was observed), (n_unique,) float64 each."""

    intensity: np.ndarray
    weight: np.ndarray

    @classmethod
    def from_sums(cls, sums: np.ndarray) -> Merged:
        """From the (3, n_unique, 2) sums of :func:`accumulate`, Friedel mates taken together."""
        numerator, weight = sums[0].sum(axis=1), sums[1].sum(axis=1)
        return cls(np.divide(numerator, weight, out=np.zeros_like(weight), where=weight > 0), weight)


@dataclass(frozen=True)
class Indexed:
    """Where the observations belong: unique reflection (int32, -1 for none) and Friedel mate (uint8), (n,) each."""

    unique: np.ndarray
    minus: np.ndarray


def accumulate(
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    scales: Scales,
    noise: Noise,
    merged: Merged,
    d_star_sq: np.ndarray,
    bound: float,
) -> np.ndarray:
    """Sums that make merged intensities.

    Parameters
    ----------
    include
        (n_crystals,) bool, the crystals to take.
    merged
        Of the round before: they give the variances and find the outliers. With weights of 0 no observation is one.
    d_star_sq
        (n_unique,) in 1/angstrom^2.
    bound
        Normalised deviation beyond which an observation loses weight; 0 for never.

    Returns
    -------
    sums : (3, n_unique, 2) float64
        Numerator, weight and number of observations per unique reflection, apart for the reflection and its Friedel
        mate. Sums of several ranks add up.
    """
    sums = np.zeros((3, 2 * len(d_star_sq)))
    _accumulate(
        observations.n_crystals,
        observations.start,
        _mask(include),
        scales.log_k,
        scales.b_factor,
        indexed.unique,
        indexed.minus,
        observations.intensity,
        observations.variance,
        d_star_sq,
        merged.intensity,
        merged.weight,
        noise.a**2,
        noise.b**2,
        bound,
        *sums,
    )
    return sums.reshape(3, -1, 2)


def fit_scales(
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    scales: Scales,
    noise: Noise,
    merged: Merged,
    d_star_sq: np.ndarray,
    bound: float,
    fit_b: bool = True,
    b_prior: tuple[float, float] = (0.0, 30.0),
) -> tuple[Scales, np.ndarray, np.ndarray]:
    """One Gauss-Newton step for scale and B of each crystal against the merged intensities.

    Minimises :math:`\\sum \\rho (I - m)^2 / (v + g^2 / W_h) + (B - B_0)^2 / \\sigma_B^2`, where W is the weight of the
    merged intensity: what is known badly itself must not pull on the scales.

    Parameters
    ----------
    b_prior
        Mean and standard deviation, in angstrom^2, of a weak restraint on B: it matters for crystals with few
        reflections or a narrow range of resolution.

    Returns
    -------
    scales : Scales
    step : (n_crystals,) float64
        Relative change of the crystal's scale that this step made, at its mean resolution and by B.
    used : (n_crystals,) int64
        Observations that took part.
    """
    log_k, b_factor = scales.log_k.copy(), scales.b_factor.copy()
    step = np.empty(observations.n_crystals)
    used = np.empty(observations.n_crystals, dtype=np.int64)
    _fit_scales(
        observations.n_crystals,
        observations.start,
        _mask(include),
        indexed.unique,
        observations.intensity,
        observations.variance,
        d_star_sq,
        merged.intensity,
        merged.weight,
        noise.a**2,
        noise.b**2,
        bound,
        fit_b,
        *b_prior,
        log_k,
        b_factor,
        step,
        used,
    )
    return Scales(log_k, b_factor), step, used


def scale_factors(observations: Observations, indexed: Indexed, scales: Scales, d_star_sq: np.ndarray) -> np.ndarray:
    """g of each observation, (n,) float64; dividing the intensity by it puts it on the common scale."""
    crystal = observations.crystal()
    return np.exp(scales.log_k[crystal] - 0.5 * scales.b_factor[crystal] * d_star_sq[indexed.unique])


def _mask(include: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(include, dtype=np.uint8)


_floats = array(np.float64, 1)
_out_floats = array(np.float64, 1, writeable=True)
_accumulate = declare(
    "ssx_accumulate",
    [c_int64, array(np.int64, 1), array(np.uint8, 1), _floats, _floats, array(np.int32, 1), array(np.uint8, 1)]
    + [_floats] * 5
    + [c_double] * 3
    + [_out_floats] * 3,
)
_fit_scales = declare(
    "ssx_fit_scales",
    [c_int64, array(np.int64, 1), array(np.uint8, 1), array(np.int32, 1)]
    + [_floats] * 5
    + [c_double] * 3
    + [c_int, c_double, c_double]
    + [_out_floats] * 3
    + [array(np.int64, 1, writeable=True)],
)
