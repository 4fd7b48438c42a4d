"""Merged intensities and their statistics over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import merging, scaling
from ssx_mpi.kernels.merging import HalfSets, Shells, ShellStatistics
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.communicator import Communicator


@dataclass(frozen=True)
class MergedData:
    """Everything about one set of merged crystals; the same on all ranks.

    Parameters
    ----------
    sums
        (3, n_unique, 2): numerator, weight and number, for each reflection and its Friedel mate.
    half_sums
        Such sums of the two half-sets of the first repeat.
    full, cut
        Statistics of all data, and of those to the resolution limit.
    d_min
        The limit, in angstrom.
    d_min_estimated
        Whether CC1/2 set it; otherwise it is the user's, or that of the data.
    n_crystals
        Crystals merged.
    """

    sums: np.ndarray
    half_sums: tuple[np.ndarray, np.ndarray]
    full: ShellStatistics
    cut: ShellStatistics
    d_min: float
    d_min_estimated: bool
    n_crystals: int

    @property
    def merged(self) -> Merged:
        return Merged.from_sums(self.sums)


@dataclass(frozen=True)
class MergingSettings:
    """Parameters of merging.

    Parameters
    ----------
    n_shells
        Resolution shells of the tables.
    repeats
        Random splits into half-sets.
    cc_half_cutoff
        CC1/2 at which the resolution is cut; None keeps all.
    robust_bound
        Normalised deviation beyond which an observation loses weight.
    """

    n_shells: int = 20
    repeats: int = 10
    cc_half_cutoff: float | None = 0.3
    robust_bound: float = 4.0


def merge(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    crystal_number: np.ndarray,
    scales: Scales,
    noise: Noise,
    current: Merged,
    unique: UniqueReflections,
    settings: MergingSettings,
    d_min: float | None = None,
    reference: Merged | None = None,
) -> MergedData:
    """Merge the included crystals of all ranks. Collective.

    Parameters
    ----------
    include
        (n_crystals,) bool; may be a part of the crystals that were scaled together.
    crystal_number
        (n_crystals,) int64 in the whole data set, which decides on half-sets.
    current
        Merged intensities from scaling, for the expected variances of a first round; outliers are then found against
        the intensities of the included crystals themselves.
    d_min
        Resolution limit given by the user; otherwise it is estimated.
    """
    d_star_sq, bound = unique.d_star_sq, settings.robust_bound

    def accumulated(include: np.ndarray, merged: Merged, bound: float) -> np.ndarray:
        return comm.sum(scaling.accumulate(observations, indexed, include, scales, noise, merged, d_star_sq, bound))

    blank = Merged(current.intensity, np.zeros(len(unique)))
    own = Merged.from_sums(accumulated(include, blank, 0.0))
    for _ in range(2):
        sums = accumulated(include, own, bound)
        own = Merged.from_sums(sums)

    halves: list[tuple[np.ndarray, np.ndarray]] = []
    full_shells = merging.resolution_shells(d_star_sq, settings.n_shells)
    full_comparisons = []
    for repeat in range(settings.repeats):
        first = accumulated(include & merging.half_set(crystal_number, repeat), own, bound)
        second = np.maximum(sums - first, 0.0)
        # what is left by subtraction of equal sums is rounding, not data
        second[0] = np.where(second[2] > 0.5, sums[0] - first[0], 0.0)
        second[1] *= second[2] > 0.5
        halves.append((first, second))
        full_comparisons.append(merging.compare_half_sets(first, second, full_shells))
    moments = comm.sum(merging.moments(observations, indexed, include, scales, d_star_sq))
    absolute = comm.sum(merging.absolute_deviations(observations, indexed, include, scales, own, d_star_sq))

    def statistics(shells: Shells, comparisons: list[tuple[np.ndarray, ...]]) -> ShellStatistics:
        agreement = HalfSets(*(np.array(rows) for rows in zip(*comparisons)))
        return merging.statistics(sums, moments, absolute, agreement, unique, shells, reference)

    full = statistics(full_shells, full_comparisons)
    estimated = None
    if d_min is None and settings.cc_half_cutoff is not None:
        centres = 0.5 * (full_shells.edges[1:] + full_shells.edges[:-1])
        pairs = np.mean([comparison[3] for comparison in full_comparisons], axis=0)
        estimated = merging.resolution_estimate(centres, full.cc_half[:-1], pairs[:-1], settings.cc_half_cutoff)
    limit = d_min if d_min is not None else estimated
    cut = full
    if limit is not None:
        shells = merging.resolution_shells(d_star_sq, settings.n_shells, d_min=limit)
        cut = statistics(shells, [merging.compare_half_sets(*half, shells) for half in halves])
    number = int(comm.sum(np.array([np.count_nonzero(include)]))[0])
    return MergedData(
        sums, halves[0], full, cut, float(cut.d_min[-1] if limit is None else limit), estimated is not None, number
    )
