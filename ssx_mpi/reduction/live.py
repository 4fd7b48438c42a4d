"""Completeness, multiplicity and CC1/2 while crystals are still coming in.

Every rank adds its crystals as they are integrated; what it keeps is of fixed size and adds up over ranks and batches.
Intensities are normalised by the crystal's scale and the mean of their resolution shell, so that ranks agree on a scale
without talking to each other. Nothing is refined, and an indexing ambiguity is not resolved: CC1/2 then is that of the
twinned average.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import ambiguity, merging
from ssx_mpi.stages import reduction as stage

_SHELLS = 10


@dataclass(frozen=True)
class LiveStatistics:
    """How far the merged data have come; shells from low to high resolution, the last entry for all.

    Parameters
    ----------
    d_min
        (n_shells + 1,) in angstrom.
    completeness, multiplicity
        (n_shells + 1,).
    cc_half
        (n_shells + 1,) of normalised intensities; nan where there is none yet.
    n_crystals
        Crystals merged.
    """

    d_min: np.ndarray
    completeness: np.ndarray
    multiplicity: np.ndarray
    cc_half: np.ndarray
    n_crystals: int


class LiveMerge:
    """Normalised intensities of crystals, merged in two half-sets.

    Parameters
    ----------
    cell, space_group
        What the crystals were indexed with.
    d_min
        Resolution in angstrom to which statistics are kept.
    """

    def __init__(self, cell: tuple[float, ...], space_group: str, d_min: float) -> None:
        self._unique = stage.unique_table(stage.symmetric_cell(np.array(cell), space_group), space_group, d_min)
        self._shells = merging.resolution_shells(self._unique.d_star_sq, _SHELLS)
        n = len(self._unique)
        # per half-set: sum of w x, of w, and number; the last entry of the number counts crystals
        self._sums = np.zeros((2, 3, n + 1))
        self._shell_sum, self._shell_weight = np.zeros(_SHELLS), np.zeros(_SHELLS)

    def add(self, number: int, hkl: np.ndarray, intensity: np.ndarray, variance: np.ndarray) -> None:
        """Add a crystal.

        Parameters
        ----------
        number
            Of the crystal in the whole data set; it decides on the half-set.
        hkl
            (n, 3) int32.
        intensity, variance
            (n,) of full reflections, as :func:`ssx_mpi.stages.reduction.read_observations` makes them.
        """
        row, _ = self._unique.locate(hkl)
        inside = row >= 0
        row, intensity, variance = row[inside], intensity[inside], variance[inside]
        if not len(row):
            return
        shell, epsilon = self._shells.number[row], self._unique.epsilon[row]
        shape = self._means()[shell] * epsilon
        weight = 1.0 / (variance + shape**2)
        scale = np.sum(weight * intensity * shape) / np.sum(weight * shape**2)
        if scale <= 0:
            return
        weight = 1.0 / (variance / scale**2 + shape**2)
        self._shell_sum += np.bincount(shell, weight * intensity / scale / epsilon, _SHELLS)
        self._shell_weight += np.bincount(shell, weight, _SHELLS)
        x, w = ambiguity.normalise(intensity, variance, scale * self._means()[shell] * epsilon)
        half = self._sums[int(merging.half_set(np.array([number]), 0)[0])]
        half[0, :-1] += np.bincount(row, w * x, len(self._unique))
        half[1, :-1] += np.bincount(row, w, len(self._unique))
        half[2, :-1] += np.bincount(row, minlength=len(self._unique))
        half[2, -1] += 1

    def sums(self) -> np.ndarray:
        """What was added so far, (2, 3, n_unique + 1); arrays of several ranks or batches add up."""
        return self._sums.copy()

    def statistics(self, sums: np.ndarray) -> LiveStatistics:
        """Statistics of sums, of this rank alone or of all."""
        numerator, weight, number = sums[:, 0, :-1], sums[:, 1, :-1], sums[:, 2, :-1]
        mean = np.divide(numerator, weight, out=np.zeros_like(weight), where=weight > 0)
        total, shells = number.sum(axis=0), self._shells
        seen = merging.with_total(shells.sum((total > 0).astype(float)))
        possible = merging.with_total(shells.sum(np.ones(len(total))))
        observed = merging.with_total(shells.sum(total))
        both = np.all(number > 0, axis=0)
        edges = shells.edges
        return LiveStatistics(
            d_min=np.append(edges[1:], edges[-1]) ** -0.5,
            completeness=seen / possible,
            multiplicity=observed / np.maximum(seen, 1),
            cc_half=merging.shell_correlation(mean[0], mean[1], both, shells),
            n_crystals=int(sums[:, 2, -1].sum()),
        )

    def _means(self) -> np.ndarray:
        # nothing known yet: a flat one; a shell that noise left without intensity expects a little
        known = self._shell_weight > 0
        if not known.any():
            return np.ones(_SHELLS)
        mean = np.divide(self._shell_sum, self._shell_weight, out=np.zeros(_SHELLS), where=known)
        return np.maximum(mean, 1e-3 * max(mean.max(), 1e-12))
