"""Completeness, multiplicity and CC1/2 while crystals are still coming in.

The rank that keeps a batch sums its crystals up when it is finished, for themselves: scaled against the mean intensity
in resolution shells, which needs no other batch, and normalised by it, so that batches agree on a scale without talking
to each other. What comes of a batch is of fixed size, the unique reflections in two half-sets, and adds up. It does so
in whole numbers (fixed point): sums of these are the same in any order, to the last bit, so that the statistics do not
depend on the number of ranks. No crystal is put into another setting: with an indexing ambiguity CC1/2 is that of the
twinned average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.kernels import ambiguity, merging
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction import loading, resolve, scaling_rounds
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.reflection_data import Selection

_SHELLS = 10
# a unit of the fixed point: intensities are in units of their mean, weights below one
_UNIT = 2.0**-20
# more unique reflections than this are not followed: a batch of them is some 20 MB to send
_MOST_UNIQUE = 500_000
# a square detector sees this share of its pixels within the circle that touches its edges
_WITHIN_EDGES = 0.785


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
    """Crystals of finished batches, merged in two half-sets.

    Parameters
    ----------
    cell, space_group
        What the crystals were indexed with.
    d_min
        Resolution in angstrom to which statistics are kept; coarser where that makes too many reflections.
    parameters
        Of the reduction, for the choice of reflections.

    Attributes
    ----------
    d_min
        Resolution in angstrom to which statistics are kept.
    n_settings
        Settings that crystals can have been indexed in: above one, CC1/2 is that of their average.
    """

    def __init__(
        self,
        cell: tuple[float, ...],
        space_group: str,
        d_min: float,
        parameters: ReductionParameters = ReductionParameters(),  # noqa: B008  (frozen)
    ) -> None:
        cell = stage.symmetric_cell(np.array(cell), space_group)
        self.d_min = max(d_min, _finest(cell, space_group))
        self._parameters = parameters
        self._unique = stage.unique_table(cell, space_group, self.d_min)
        self._shells = merging.resolution_shells(self._unique.d_star_sq, _SHELLS)
        self.n_settings = len(stage.reindexing_settings(cell, space_group, parameters.lattice_symmetry_max_delta))
        self._total = self.nothing()

    def nothing(self) -> np.ndarray:
        """The sums of no crystals.

        Per half-set, (2, 3, n_unique + 1) int64: weighted intensity and weight in units of the fixed point, and number
        of observations; the last entry of the numbers counts crystals.
        """
        return np.zeros((2, 3, len(self._unique) + 1), dtype=np.int64)

    def of_batch(self, folder: Path) -> np.ndarray:
        """The sums of the integrated crystals in the folder of a finished batch."""
        reflections = folder / "integrated_1.refl"
        if not reflections.is_file():
            return self.nothing()
        source = loading.Source(folder / "integrated_1.expt", reflections)
        how = self._parameters
        selection = Selection(how.partiality_threshold, how.d_min, how.d_max)
        try:
            loaded = loading.load(SerialCommunicator(), [source], selection)
        except InputError as error:
            raise RuntimeError(f"a batch of this run cannot be read: {error}") from error
        return self.sums(loaded.observations, crystal_numbers(folder, len(loaded.crystals.identifier)))

    def sums(self, observations: Observations, numbers: np.ndarray) -> np.ndarray:
        """The sums of crystals that are scaled together.

        Parameters
        ----------
        observations
            Of all of them, as :func:`ssx_mpi.stages.intensities.reflection_data.read_observations` makes them.
        numbers
            (n_crystals,) int64 that stand for the crystals in the whole data set; they decide on the half-sets.
        """
        unique, sums = self._unique, self.nothing()
        include = np.diff(observations.start) >= self._parameters.scaling.min_observations
        if not include.any():
            return sums
        as_indexed = np.zeros(observations.n_crystals, dtype=np.int64)
        data = resolve.index_in_settings(observations, unique, np.eye(3)[None], as_indexed).used().only(include)
        scales, expected = scaling_rounds.radial_means(SerialCommunicator(), data, unique, self._shells)
        crystal, row = observations.crystal(), data.unique
        use = (row >= 0) & include[crystal]
        crystal, row = crystal[use], row[use]
        g = np.exp(scales.log_k[crystal] - 0.5 * scales.b_factor[crystal] * unique.d_star_sq[row])
        x, w = ambiguity.normalise(observations.intensity[use], observations.variance[use], g * expected[row])
        w[~np.isfinite(x)] = x[~np.isfinite(x)] = 0.0
        first = merging.half_set(numbers, 0)
        for half in (0, 1):
            own = first[crystal] == half
            for part, values in enumerate((w * x / _UNIT, w / _UNIT, np.ones(len(w)))):
                # each value for itself: a sum of rounded numbers does not depend on the order
                sums[half, part, :-1] = np.bincount(row[own], np.rint(values[own]), len(unique)).astype(np.int64)
            sums[half, 2, -1] = np.count_nonzero(include & (first == half))
        return sums

    def add(self, sums: np.ndarray) -> LiveStatistics:
        """Add the sums of a batch, or of several, to all so far."""
        self._total += sums
        return self.statistics()

    def statistics(self) -> LiveStatistics:
        """Statistics of all so far."""
        sums, shells = self._total, self._shells
        numerator, weight, number = (sums[:, part, :-1].astype(np.float64) for part in range(3))
        mean = np.divide(numerator, weight, out=np.zeros_like(weight), where=weight > 0)
        total = number.sum(axis=0)
        seen = merging.with_total(shells.sum((total > 0).astype(float)))
        possible = merging.with_total(shells.sum(np.ones(len(total))))
        observed = merging.with_total(shells.sum(total))
        both = np.all(weight > 0, axis=0)
        edges = shells.edges
        return LiveStatistics(
            d_min=np.append(edges[1:], edges[-1]) ** -0.5,
            completeness=seen / possible,
            multiplicity=observed / np.maximum(seen, 1),
            cc_half=merging.shell_correlation(mean[0], mean[1], both, shells),
            n_crystals=int(sums[:, 2, -1].sum()),
        )


def crystal_numbers(folder: Path, n_crystals: int) -> np.ndarray:
    """A number for each crystal of the batch in `folder`, (n,) int64.

    It follows from the place in the run alone: identifiers depend on where the images lie.
    """
    return (int(folder.name.rpartition("_")[2]) << 20) + np.arange(n_crystals, dtype=np.int64)


def detector_resolution(detector: Any, s0: Any) -> float:
    """Resolution in angstrom within which a detector sees most reflections whole.

    For a square one around the beam it is that at the middle of its edges, for any other the one within which the same
    share of its pixels lies.
    """
    d = [
        panel.get_resolution_at_pixel(s0, (fast * width, slow * height))
        for panel in detector
        for width, height in (panel.get_image_size(),)
        for fast in np.linspace(0.05, 0.95, 10)
        for slow in np.linspace(0.05, 0.95, 10)
    ]
    return float(np.quantile(d, 1 - _WITHIN_EDGES))


def _finest(cell: tuple[float, ...], space_group: str) -> float:
    """Resolution in angstrom at which there are as many unique reflections as are followed."""
    a, b, c, *angles = cell
    cosines = np.cos(np.radians(angles))
    volume = a * b * c * math.sqrt(max(1 - np.sum(cosines**2) + 2 * np.prod(cosines), 0.0))
    # half a sphere in reciprocal space, over the rotations; centred lattices have fewer, which does no harm
    return (2 * math.pi / 3 * volume / len(stage.point_group_rotations(space_group)) / _MOST_UNIQUE) ** (1 / 3)
