"""Crystals drawn with replacement, merged again: how far maps and models depend on which crystals were at hand.

The bootstrap (Efron, 1979) takes the crystals that were merged for the population: as many are drawn from them, each
with replacement, and those drawn twice count twice. What varies between such data sets is what would vary if the
experiment were done again. Scales, orientations and the error model stay those of all crystals.

References
----------
Efron, B. (1979). Ann. Statist. 7, 1-26.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import scaling
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction.sums import largest_of

# the spread over data sets is compared with sigmas where so many observations, or more, make it mean something
_FEWEST_OBSERVATIONS = 10
_FEWEST_REFLECTIONS = 50
_STREAM = 7_000


@dataclass(frozen=True)
class Resampled:
    """What the data sets of resampled crystals say of the one that they come from.

    Parameters
    ----------
    number
        Of data sets.
    spread
        Standard deviation of intensities over the data sets, divided by their sigmas: 1 where sigmas are right. By the
        median over the reflections with ten observations or more, corrected for how few observations and data sets
        there are; None for fewer than 50 such reflections.
    """

    number: int
    spread: float | None


def draws(comm: Communicator, include: np.ndarray, replicate: int) -> np.ndarray:
    """How often each crystal of this rank is drawn, (n_crystals,) int64; the same on any number of ranks. Collective.

    Parameters
    ----------
    include
        (n_crystals,) bool, the crystals to draw from; ranks have them in their order in the data set.
    replicate
        Number of the data set, from which the draw follows.
    """
    own = np.flatnonzero(include)
    counts = comm.allgather(len(own))
    n, first = sum(counts), sum(counts[: comm.rank])
    drawn = np.random.default_rng([_STREAM, replicate]).integers(n, size=n) if n else np.zeros(0, dtype=np.int64)
    times = np.zeros(len(include), dtype=np.int64)
    times[own] = np.bincount(drawn, minlength=n)[first : first + len(own)]
    return times


def resampled_sums(
    comm: Communicator,
    data: Indexed,
    scales: Scales,
    noise: Noise,
    merged: Merged,
    bound: float,
    number: int,
) -> Iterator[np.ndarray]:
    """For each data set in turn the sums (3, n_unique, 2) of :func:`ssx_mpi.kernels.scaling.accumulate`. Collective.

    Parameters
    ----------
    merged
        Of all crystals: variances and outliers are found against it.
    """
    largest = largest_of(comm, data.observations)
    for replicate in range(number):
        times = draws(comm, data.include, replicate)
        own = np.zeros((3, len(data.d_star_sq), 2))
        for least in range(1, int(times.max(initial=0)) + 1):
            own += scaling.accumulate(data.only(times >= least), scales, noise, merged, bound, largest)
        yield comm.sum(own)


class Spread:
    """Standard deviation of intensities over data sets, from sums that are handed in one after the other.

    Parameters
    ----------
    sums
        (3, n_unique, 2) of the data set that the others come from.
    """

    def __init__(self, sums: np.ndarray) -> None:
        self._merged, self._observed = Merged.from_sums(sums), sums[2].sum(axis=1)
        self._n, self._mean, self._squares = (np.zeros(len(self._observed)) for _ in range(3))

    def add(self, sums: np.ndarray) -> None:
        """Take a data set into account, by the recurrence of Welford (1962)."""
        merged = Merged.from_sums(sums)
        seen = merged.weight > 0
        self._n += seen
        change = np.where(seen, merged.intensity - self._mean, 0.0)
        self._mean += change / np.maximum(self._n, 1)
        self._squares += change * np.where(seen, merged.intensity - self._mean, 0.0)

    def over_sigma(self) -> float | None:
        """See :class:`Resampled`."""
        use = (self._observed >= _FEWEST_OBSERVATIONS) & (self._merged.weight > 0) & (self._n > 1)
        if np.count_nonzero(use) < _FEWEST_REFLECTIONS:
            return None
        free = self._n[use] - 1
        # the mean of n observations drawn from n has (n - 1) / n of the variance that the mean truly has
        corrected = self._observed[use] / (self._observed[use] - 1)
        # a variance of so many degrees of freedom has its median below its mean (Wilson & Hilferty, 1931)
        median = (1 - 2 / (9 * free)) ** 3
        variance = self._squares[use] / free * self._merged.weight[use]
        return float(np.sqrt(np.median(variance * corrected / median)))
