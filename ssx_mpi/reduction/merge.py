"""Merged intensities and their statistics over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import merging, scaling
from ssx_mpi.kernels.merging import HalfSets, Scatter, Shells, ShellStatistics
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.reduction.sums import largest_of
from ssx_mpi.reduction_parameters import MergingSettings


@dataclass(frozen=True)
class MergedData:
    """Everything about one set of merged crystals; the same on all ranks.

    Parameters
    ----------
    sums
        (3, n_unique, 2) for each reflection and its Friedel mate, see :func:`ssx_mpi.kernels.scaling.accumulate`.
    half_sums
        Such sums of the two half-sets of the first repeat.
    cut
        Statistics of the data to the resolution limit.
    d_min
        The limit, in angstrom.
    d_min_estimated
        Whether CC1/2 set it; otherwise it is the user's, or that of the data.
    n_crystals
        Crystals merged.
    """

    sums: np.ndarray
    half_sums: tuple[np.ndarray, np.ndarray]
    cut: ShellStatistics
    d_min: float
    d_min_estimated: bool
    n_crystals: int

    @property
    def merged(self) -> Merged:
        return Merged.from_sums(self.sums)


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
    d_star_sq, bound, largest = unique.d_star_sq, settings.robust_bound, largest_of(comm, observations)

    def accumulated(include: np.ndarray, merged: Merged, bound: float) -> np.ndarray:
        return comm.sum(
            scaling.accumulate(observations, indexed, include, scales, noise, merged, d_star_sq, bound, largest)
        )

    blank = Merged(current.intensity, np.zeros(len(unique)))
    own = Merged.from_sums(accumulated(include, blank, 0.0))
    for _ in range(2):
        sums = accumulated(include, own, bound)
        own = Merged.from_sums(sums)

    def halves(repeat: int) -> tuple[np.ndarray, np.ndarray]:
        first = accumulated(include & merging.half_set(crystal_number, repeat), own, bound)
        second = sums - first
        # what is left by subtraction of equal sums is rounding, not data
        second *= second[2] > 0.5
        return first, second

    def agreement(shells: Shells) -> HalfSets:
        # one split at a time: all of them together would be many times the merged data
        comparisons = [merging.compare_half_sets(*halves(repeat), shells) for repeat in range(settings.repeats)]
        return HalfSets(*(np.array(rows) for rows in zip(*comparisons)))

    scatter = _scatter(comm, observations, indexed, include, scales, own, d_star_sq)
    mates = Indexed(
        np.where(indexed.unique < 0, -1, 2 * indexed.unique + indexed.minus).astype(np.int32), indexed.minus
    )
    weight = sums[1].ravel()
    intensity = np.divide(sums[0].ravel(), weight, out=np.zeros_like(weight), where=weight > 0)
    scatter_of_mates = _scatter(
        comm,
        observations,
        mates,
        include,
        scales,
        Merged(intensity, weight),
        np.repeat(d_star_sq, 2),
    )
    estimated = None
    if d_min is None and settings.cc_half_cutoff is not None:
        populated = merging.resolution_shells(d_star_sq, settings.n_shells, seen=own.weight > 0)
        estimated = merging.resolution_estimate(
            sums, agreement(populated), populated, d_star_sq, settings.cc_half_cutoff
        )
    shells = merging.resolution_shells(d_star_sq, settings.n_shells, d_min=estimated)
    cut = merging.statistics(sums, scatter, scatter_of_mates, agreement(shells), unique, shells, reference)
    limit = d_min or estimated or float(cut.d_min[-1])
    number = int(comm.sum(np.array([np.count_nonzero(include)]))[0])
    return MergedData(sums, halves(0), cut, limit, estimated is not None, number)


def _scatter(
    comm: Communicator,
    observations: Observations,
    indexed: Indexed,
    include: np.ndarray,
    scales: Scales,
    merged: Merged,
    d_star_sq: np.ndarray,
) -> Scatter:
    moments = comm.sum(merging.moments(observations, indexed, include, scales, d_star_sq))
    absolute = comm.sum(merging.absolute_deviations(observations, indexed, include, scales, merged, d_star_sq))
    return Scatter(moments[:, 0], moments[:, 1], absolute)
