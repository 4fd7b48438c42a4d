"""Merged intensities and their statistics over the ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels import merging, scaling
from ssx_mpi.kernels.merging import HalfSets, Scatter, Shells, ShellStatistics
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales
from ssx_mpi.kernels.self_consistency import SelfConsistency, self_consistency
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import MergingSettings
from ssx_mpi.reduction.sums import largest_of


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
        The limit, in angstrom, that of the data where they end before it.
    d_min_estimated
        Whether CC1/2 set it; otherwise it is the user's, or that of the data.
    n_crystals
        Crystals merged.
    consistency
        Whether errors and intensities fit each other, to the resolution limit.
    """

    sums: np.ndarray
    half_sums: tuple[np.ndarray, np.ndarray]
    cut: ShellStatistics
    d_min: float
    d_min_estimated: bool
    n_crystals: int
    consistency: SelfConsistency

    @property
    def merged(self) -> Merged:
        return Merged.from_sums(self.sums)


def merge(
    comm: Communicator,
    data: Indexed,
    crystal_number: np.ndarray,
    scales: Scales,
    noise: Noise,
    current: Merged,
    unique: UniqueReflections,
    settings: MergingSettings,
    d_min: float | None = None,
    reference: Merged | None = None,
) -> MergedData:
    """Merge the crystals of all ranks that take part, of those that were scaled together. Collective.

    Parameters
    ----------
    crystal_number
        (n_crystals,) int64 in the whole data set, which decides on half-sets.
    current
        Merged intensities from scaling, for the expected variances of a first round; outliers are then found against
        the intensities of the included crystals themselves.
    d_min
        Resolution limit given by the user; otherwise it is estimated.
    """
    d_star_sq, bound, largest = unique.d_star_sq, settings.robust_bound, largest_of(comm, data.observations)

    def accumulated(data: Indexed, merged: Merged, bound: float) -> np.ndarray:
        return comm.sum(scaling.accumulate(data, scales, noise, merged, bound, largest))

    blank = Merged(current.intensity, np.zeros(len(unique)))
    own = Merged.from_sums(accumulated(data, blank, 0.0))
    for _ in range(2):
        sums = accumulated(data, own, bound)
        own = Merged.from_sums(sums)

    def halves(repeat: int) -> tuple[np.ndarray, np.ndarray]:
        first = accumulated(data.only(data.include & merging.half_set(crystal_number, repeat)), own, bound)
        second = sums - first
        # what is left by subtraction of equal sums is rounding, not data
        second *= second[2] > 0.5
        return first, second

    def agreement(shells: Shells) -> HalfSets:
        # one split at a time: all of them together would be many times the merged data
        comparisons = [merging.compare_half_sets(*halves(repeat), shells) for repeat in range(settings.repeats)]
        return HalfSets(*(np.array(rows) for rows in zip(*comparisons)))

    scatter = _scatter(comm, data, scales, own)
    of_mate = np.where(data.unique < 0, -1, 2 * data.unique + data.minus).astype(np.int32)
    mates = replace(data, unique=of_mate, d_star_sq=np.repeat(d_star_sq, 2))
    weight = sums[1].ravel()
    intensity = np.divide(sums[0].ravel(), weight, out=np.zeros_like(weight), where=weight > 0)
    scatter_of_mates = _scatter(comm, mates, scales, Merged(intensity, weight))
    estimated = None
    if d_min is None and settings.cc_half_cutoff is not None:
        populated = merging.resolution_shells(d_star_sq, settings.n_shells, seen=own.weight > 0)
        estimated = merging.resolution_estimate(
            sums, agreement(populated), populated, d_star_sq, settings.cc_half_cutoff
        )
    shells = merging.resolution_shells(d_star_sq, settings.n_shells, d_min=estimated)
    cut = merging.statistics(sums, scatter, scatter_of_mates, agreement(shells), unique, shells, reference)
    limit = estimated or max(d_min or 0.0, float(cut.d_min[-1]))
    number = count(comm, data.include)
    first = halves(0)
    consistency = self_consistency(sums, first, unique, shells)
    return MergedData(sums, first, cut, limit, estimated is not None, number, consistency)


def _scatter(comm: Communicator, data: Indexed, scales: Scales, merged: Merged) -> Scatter:
    moments = comm.sum(merging.moments(data, scales))
    absolute = comm.sum(merging.absolute_deviations(data, scales, merged))
    return Scatter(moments[:, 0], moments[:, 1], absolute)
