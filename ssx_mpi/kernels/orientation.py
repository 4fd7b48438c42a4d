r"""Orientations of crystals on stills, told by the recorded intensities themselves (post-refinement).

Where spots lie on a still hardly depends on small rotations about axes across the beam: a reciprocal lattice point
moves through the Ewald sphere, and what changes is how much of it is recorded. A rotation by :math:`\delta` moves its
centre q by :math:`\delta \times q`, and with :math:`s_2 = s_0 + q` the excitation error
:math:`\epsilon = |s_2| - |s_0|` by

.. math:: d\epsilon = \frac{s_2 \cdot (\delta \times q)}{|s_2|} = \frac{\delta \cdot (s_2 \times s_0)}{|s_2|},

which is nothing for a rotation about the beam. With the offset :math:`o = \epsilon / \sqrt S` the recorded intensity is
:math:`m = K J \exp(-\tfrac12 o^2 e^{-u})` (K, J and u as in :mod:`ssx_mpi.kernels.scaling`), so that intensities that
fall off on one side of the sphere and not on the other say where it is. They need not be known for that: Wilson's
distribution says what to expect, J with the mean :math:`\Sigma` and the variance :math:`\Sigma^2`, and merged
intensities of *other* crystals say it better. (Those that the crystal has a part in would agree with it whatever its
orientation is.)
The rotation and log K of each crystal are those that minimise

.. math:: \sum \rho \frac{(I - m)^2}{v + (m / J)^2 \operatorname{var} J} + \frac{|\delta|^2}{\tau^2},

the variances held from step to step. Since J is the mean of what is known without the observation, the equations have
no bias towards what is there. The spread :math:`\tau` of the rotations is that which the crystals show.

Fits of orientations are good at fitting noise. A tenth of the observations of each crystal takes no part, and by how
much it becomes likelier decides whether the rotations are taken.

References
----------
Rossmann et al. (1979). J. Appl. Cryst. 12, 570: post-refinement.
White (2014). Phil. Trans. R. Soc. B 369, 20130330; Uervirojnangkoorn et al. (2015). eLife 4, e05421: of stills.
Brünger (1992). Nature 355, 472: what takes no part in a refinement tells whether it helped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels.merging import scramble
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Expectation, Indexed, Merged, Noise, Scales, scale_factors, variances

N_AXES = 2
#: spread of the rotations to begin with, and its limits, radians: 0.015, 0.001 and 0.1 degrees
FIRST_SPREAD, SPREAD_LIMITS = 2.6e-4, (1.7e-5, 1.7e-3)
# steps in all, and those at the beginning that leave the orientation alone
_ITERATIONS, _SCALE_ONLY = 9, 2
# largest change of the root mean square offset of a crystal in one step: the exponential is not linear
_LARGEST_STEP = 0.5
_LARGEST_SCALE_STEP = 0.5
# a crystal needs so many observations, and rotates at most by so many spreads
_LEAST, _FARTHEST = 20, 5.0
_STREAM = 20_000


@dataclass(frozen=True)
class Predicted:
    """Intensity that is expected for each observation without it, and the variance of that, (n,) float64 each."""

    value: np.ndarray
    variance: np.ndarray

    @classmethod
    def by_wilson(cls, data: Indexed, mean: np.ndarray) -> Predicted:
        """From the mean intensities (n_unique,) alone."""
        expected = mean[data.unique]
        return cls(expected, expected**2)

    @classmethod
    def by_others(
        cls,
        data: Indexed,
        within: np.ndarray,
        scales: Scales,
        noise: Noise,
        merged: Merged,
        mean: np.ndarray,
        bound: float,
    ) -> Predicted:
        """From the merged intensities, what each observation brought to them taken off.

        Parameters
        ----------
        within
            (n,) bool, observations that were merged.
        mean
            (n_unique,) mean intensity at the reflection's resolution times epsilon.
        """
        row = data.unique
        g, v = scale_factors(data, scales), variances(data, scales, noise, merged)
        offset = data.observations.offset_sq * np.exp(
            -scales.width[data.observations.crystal()] - scales.trend.at(data.d_star_sq)[row]
        )
        taper = np.clip(2.0 * (1.0 - offset / scales.max_offset), 0.0, 1.0) if np.isfinite(scales.max_offset) else 1.0
        number = np.maximum(merged.numbers()[row], 1.0)
        leverage = np.where(number > 1.5, 1.0 - 1.0 / number, np.inf)
        z_sq = (data.observations.intensity - g * merged.intensity[row]) ** 2 / (v * leverage)
        robust = np.where(z_sq > bound**2, bound**2 / np.maximum(z_sq, 1e-300), 1.0) if bound > 0 else 1.0
        own = np.where(within & (row >= 0), robust * taper * g / v, 0.0)
        weight = merged.weight[row] - own * g
        # what is left of one observation by itself is rounding
        seen = weight > 1e-6 * merged.weight[row]
        weight = np.where(seen, weight, 0.0)
        total = merged.weight[row] * merged.intensity[row] - own * data.observations.intensity
        intensity = np.divide(total, weight, out=np.zeros_like(weight), where=seen)
        expectation = Expectation.posterior(Merged(intensity, weight), mean[row])
        return cls(expectation.value, np.maximum(expectation.square - expectation.value**2, 0.0))


@dataclass(frozen=True)
class Rotations:
    """Result of a refinement, of the crystals of one rank.

    Parameters
    ----------
    angles
        (n_crystals, 2) radians about the two axes, from where the crystals were.
    variance
        (n_crystals, 2) of them.
    gain
        (n_crystals,) by how much the log-likelihood of the observations that took no part rose.
    refined
        (n_crystals,) bool.
    """

    angles: np.ndarray
    variance: np.ndarray
    gain: np.ndarray
    refined: np.ndarray


def beam_axes(beam: np.ndarray) -> np.ndarray:
    """Two axes across the direction (3,) of the beam, about which a crystal is rotated: (2, 3)."""
    up = np.array([0.0, 1.0, 0.0]) if abs(beam[1]) < 0.9 * np.linalg.norm(beam) else np.array([1.0, 0.0, 0.0])
    along = beam / np.linalg.norm(beam)
    first = up - np.sum(up * along) * along
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(along, first)])


def rotation_matrix(beam: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) by two angles, in radians, about the axes across a beam."""
    x, y, z = np.sum(beam_axes(beam) * angles[:, None], axis=0)
    turn = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    size = float(np.sqrt(x * x + y * y + z * z))
    # Rodrigues
    return np.eye(3) + np.sinc(size / np.pi) * turn + 0.5 * np.sinc(0.5 * size / np.pi) ** 2 * (turn @ turn)


def rotated(observations: Observations, angles: np.ndarray) -> Observations:
    """Observations as they are with crystals rotated by angles (n_crystals, 2), in radians.

    Intensities are divided by the partialities that follow, variances by their squares.
    """
    if observations.tilt is None or not np.any(angles):
        return observations
    of_observation = angles[observations.crystal()]
    tilt = observations.tilt.astype(np.float64)
    offset = tilt[:, 0] + tilt[:, 1] * of_observation[:, 0] + tilt[:, 2] * of_observation[:, 1]
    factor = np.exp(0.5 * np.minimum(offset**2 - tilt[:, 0] ** 2, _HIGHEST))
    moved = observations.tilt.copy()
    moved[:, 0] = offset
    return replace(
        observations,
        intensity=observations.intensity * factor,
        variance=observations.variance * factor**2,
        offset_sq=(offset**2).astype(np.float32),
        tilt=moved,
    )


# of squared offsets, beyond which an observation is left out whatever its intensity is
_HIGHEST = 100.0


def refine(
    data: Indexed,
    scales: Scales,
    noise: Noise,
    predicted: Predicted,
    so_far: np.ndarray,
    spread: float,
    bound: float,
    tenth: int = 0,
) -> Rotations:
    """Rotations and scales of crystals that fit their recorded intensities best.

    Parameters
    ----------
    data
        All observations that were predicted, those far from the sphere too: that nothing is there says where it is not.
    so_far
        (n_crystals, 2) angles by which the crystals were rotated before to be as they are in `data`, radians.
    spread
        Standard deviation of the rotations in all, radians.
    bound
        Normalised deviation beyond which an observation loses weight; 0 for never.
    tenth
        Which tenth of the observations takes no part.
    """
    observations = data.observations
    n = observations.n_crystals
    assert observations.tilt is not None
    usable = (data.unique >= 0) & data.include[observations.crystal()]
    usable &= np.isfinite(predicted.value) & (predicted.value > 0)
    rows = np.flatnonzero(usable)
    crystal, row = observations.crystal()[rows], data.unique[rows]
    tilt = observations.tilt[rows].astype(np.float64)
    recorded = np.exp(-0.5 * tilt[:, 0] ** 2)
    intensity, variance = observations.intensity[rows] * recorded, observations.variance[rows] * recorded**2
    u = scales.width[crystal] + scales.trend.at(data.d_star_sq)[row]
    shrink = np.exp(-u)
    unit = np.exp(scales.log_k[crystal] - 0.5 * scales.b_factor[crystal] * data.d_star_sq[row] - 0.5 * u)
    value, uncertain = unit * predicted.value[rows], unit**2 * predicted.variance[rows]
    a_sq, b_sq, c_sq = noise.squares()
    place = rows - observations.start[crystal]
    untouched = scramble(place, _STREAM) % np.uint64(10) == np.uint64(tenth)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(crystal, values, n)

    def model(angles: np.ndarray, log_k: np.ndarray) -> tuple[np.ndarray, ...]:
        offset = tilt[:, 0] + tilt[:, 1] * angles[crystal, 0] + tilt[:, 2] * angles[crystal, 1]
        share = np.exp(log_k[crystal] - 0.5 * shrink * offset**2)
        m = value * share
        expected_sq = m**2 + uncertain * share**2
        v = a_sq * (variance + (b_sq + c_sq * shrink * offset**2) * expected_sq) + uncertain * share**2
        left = intensity - m
        return offset, m, v, left

    enough = sums((~untouched).astype(float)) >= _LEAST
    angles, log_k = np.zeros((n, N_AXES)), np.zeros(n)
    squares = np.stack([sums(tilt[:, axis] ** 2) for axis in (1, 2)], axis=1)
    typical = np.sqrt(squares / np.maximum(sums(np.ones(len(rows))), 1)[:, None])
    before = np.zeros(len(rows))
    for iteration in range(_ITERATIONS + 1):
        offset, m, v, left = model(angles, log_k)
        z_sq = left**2 / v
        robust = np.where(z_sq > bound**2, bound**2 / np.maximum(z_sq, 1e-300), 1.0) if bound > 0 else 1.0
        weight = np.where(untouched, 0.0, robust / v)
        slope = -m * shrink * offset
        terms = (m, slope * tilt[:, 1], slope * tilt[:, 2])
        if iteration == _SCALE_ONLY:
            # scales alone were fitted so far: this is what orientations must be better than
            before = robust_log_likelihood(z_sq, v, bound)
        free = 1 if iteration < _SCALE_ONLY else 3
        matrix, gradient = np.zeros((n, 3, 3)), np.zeros((n, 3))
        for p in range(free):
            gradient[:, p] = sums(weight * terms[p] * left)
            for q in range(p, free):
                matrix[:, p, q] = matrix[:, q, p] = sums(weight * terms[p] * terms[q])
        # scales are near where they should be; a crystal without observations stays
        matrix[:, 0, 0] += 1.0
        gradient[:, 0] -= log_k
        for p in (1, 2):
            matrix[:, p, p] += spread**-2
            gradient[:, p] -= (so_far + angles)[:, p - 1] / spread**2
        covariance = np.linalg.inv(matrix)
        if iteration == _ITERATIONS:
            break
        step = np.sum(covariance * gradient[:, None, :], axis=2)
        size = np.abs(step) / np.column_stack(
            [np.full(n, _LARGEST_SCALE_STEP), _LARGEST_STEP / np.maximum(typical, 1e-9)]
        )
        step /= np.maximum(size.max(axis=1), 1.0)[:, None]
        log_k = np.where(enough, log_k + step[:, 0], 0.0)
        if iteration >= _SCALE_ONLY:
            angles = np.where(enough[:, None], angles + step[:, 1:], 0.0)
    after = robust_log_likelihood(z_sq, v, bound)
    gain = sums(np.where(untouched, after - before, 0.0))
    refined = enough & np.isfinite(angles).all(axis=1) & (np.abs(so_far + angles).max(axis=1) < _FARTHEST * spread)
    return Rotations(
        np.where(refined[:, None], angles, 0.0), np.diagonal(covariance, axis1=1, axis2=2)[:, 1:], gain, refined
    )


def robust_log_likelihood(z_sq: np.ndarray, v: np.ndarray, bound: float) -> np.ndarray:
    """Of observations with squared deviations over variances `v`, up to a constant; beyond `bound` by the logarithm."""
    if bound > 0:
        z_sq = np.where(z_sq > bound**2, bound**2 * (1.0 + np.log(np.maximum(z_sq, 1e-300) / bound**2)), z_sq)
    return -0.5 * (z_sq + np.log(v))
