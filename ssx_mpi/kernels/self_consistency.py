r"""Whether the errors of merged intensities mean what they say, from the intensities alone.

*Half-sets.* With the variances :math:`v_1, v_2` that the two half-sets claim and the variance :math:`\tau^2` of the
true intensities, that of all merged ones less what they claim, the correlation of the half-sets is expected to be

.. math:: CC_{1/2} = \frac{\tau^2}{\sqrt{(\tau^2 + \langle v_1 \rangle) (\tau^2 + \langle v_2 \rangle)}}.

One that is seen to be lower says that the errors are larger than claimed, or that the crystals are not alike.

*Second moments.* :math:`\langle J^2 \rangle / \langle J \rangle^2` of true intensities in a shell is 2 for acentric
and 3 for centric reflections (Wilson). Measured ones have :math:`\langle \sigma^2 \rangle` on top, which is taken off.
Errors that are too small leave it above, too large ones below; a twin below, whatever the errors are. A reflection
counts by its number of observations, not by its own error: that grows with the intensity, and would leave out the
strong ones.

References
----------
Wilson (1949). Acta Cryst. 2, 318. Stein (2007). CCP4 Newsletter 47: moments and twins.
Karplus & Diederichs (2012). Science 336, 1030. Mittan-Moreau et al. (2025). Acta Cryst. D81: errors of stills.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels.merging import LEAST_PAIRS, Shells, shell_correlation
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Merged


@dataclass(frozen=True)
class SelfConsistency:
    """What is seen and what is expected; nan where there are fewer than 50 reflections.

    Parameters
    ----------
    cc_half, cc_half_expected
        Means over the shells, each by its number of pairs, of the correlation of two half-sets and of what their errors
        let expect.
    acentric, centric
        Second moments; 2 and 3 for single crystals with true errors.
    """

    cc_half: float
    cc_half_expected: float
    acentric: float
    centric: float


def self_consistency(
    sums: np.ndarray, halves: tuple[np.ndarray, np.ndarray], unique: UniqueReflections, shells: Shells
) -> SelfConsistency:
    """Of merged intensities and of their half-sets.

    Parameters
    ----------
    sums, halves
        (3, n_unique, 2) each, see :func:`ssx_mpi.kernels.scaling.accumulate`.
    """
    merged = Merged.from_sums(sums)
    one, two = (Merged.from_sums(half) for half in halves)
    seen, expected, pairs = _half_sets(merged, one, two, shells)
    return SelfConsistency(
        _mean(seen, pairs),
        _mean(expected, pairs),
        *(_second_moment(merged, kind, unique, shells) for kind in (~unique.centric, unique.centric)),
    )


def _half_sets(merged: Merged, one: Merged, two: Merged, shells: Shells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    both = (one.weight > 0) & (two.weight > 0) & (merged.weight > 0)
    number = shells.sum(both.astype(float))

    def mean(values: np.ndarray) -> np.ndarray:
        return shells.sum(np.where(both, values, 0.0)) / np.maximum(number, 1.0)

    claimed = [mean(_variance(half)) for half in (merged, one, two)]
    average = mean(merged.intensity)
    true = np.maximum(mean(merged.intensity**2) - average**2 - claimed[0], 0.0)
    of_halves = (true + claimed[1]) * (true + claimed[2])
    expected = np.divide(true, np.sqrt(of_halves), out=np.zeros_like(true), where=of_halves > 0)
    seen = shell_correlation(one.intensity, two.intensity, both, shells)[:-1]
    return seen, expected, np.where(np.isfinite(seen), number, 0.0)


def _second_moment(merged: Merged, kind: np.ndarray, unique: UniqueReflections, shells: Shells) -> float:
    use = kind & (merged.weight > 0)
    if np.count_nonzero(use & (shells.number >= 0)) < LEAST_PAIRS:
        return float("nan")
    number = np.maximum(merged.numbers(), 1.0)
    n = np.maximum(shells.sum(use.astype(float)), 1.0)
    intensity, variance = merged.intensity / unique.epsilon, _variance(merged) / unique.epsilon**2
    mean = shells.sum(np.where(use, intensity, 0.0)) / n
    # variance of one observation, in squares of the mean of the shell
    of_one = shells.sum(np.where(use, variance * number, 0.0)) / n
    ratio = np.divide(of_one, mean**2, out=np.full(len(shells), np.inf), where=mean > 0)
    weight = np.where(use, 1.0 / (1.0 + ratio[shells.number] / number) ** 2, 0.0)
    safe = np.where(mean > 0, mean, 1.0)[shells.number]
    total, first, second = (
        shells.sum(weight * term) for term in (np.ones(len(use)), intensity / safe, (intensity**2 - variance) / safe**2)
    )
    # a shell without signal has no mean to divide by; its weight is what its reflections weigh
    good = (mean > 0) & (total > 0) & (first > 0)
    moments = np.divide(second * total, first**2, out=np.zeros(len(shells)), where=good)
    return _mean(np.where(good, moments, np.nan), np.where(good, total, 0.0))


def _variance(merged: Merged) -> np.ndarray:
    return np.divide(1.0, merged.weight, out=np.zeros_like(merged.weight), where=merged.weight > 0)


def _mean(values: np.ndarray, weight: np.ndarray) -> float:
    used = weight > 0
    return float(np.sum(values[used] * weight[used]) / weight[used].sum()) if np.any(used) else float("nan")
