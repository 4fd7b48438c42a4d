"""Live statistics against those of the reduction, in any distribution over batches and ranks."""

import numpy as np
import pytest
import synthetic
from dxtbx.model import BeamFactory, DetectorFactory

from ssx_mpi.reduction.live_merge import _MOST_UNIQUE, LiveMerge, detector_resolution

LATTICE = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 3.0)


def batches(observations, sizes):
    """The observations of so many crystals each, with the numbers of these."""
    first = 0
    for size in sizes:
        chosen = np.zeros(observations.n_crystals, dtype=bool)
        chosen[first : first + size] = True
        yield observations.select(chosen), np.arange(first, first + size)
        first += size


def test_live_statistics_grow_towards_the_truth():
    observations, truth = synthetic.simulate(LATTICE, 120, per_crystal=300)
    live = LiveMerge(LATTICE.cell, LATTICE.space_group, 3.0)
    seen = [live.add(live.sums(*batch)) for batch in batches(observations, (10, 30, 80))]
    assert [s.n_crystals for s in seen] == [10, 40, 120]
    assert seen[0].completeness[-1] < seen[1].completeness[-1] < seen[2].completeness[-1]
    assert np.all(np.diff([s.cc_half[-1] for s in seen]) > 0)
    assert seen[2].cc_half[-1] > 0.9
    n = len(truth.unique)
    unique, _ = truth.unique.locate(observations.hkl)
    assert seen[2].completeness[-1] == pytest.approx(len(np.unique(unique)) / n)
    assert seen[2].multiplicity[-1] == pytest.approx(120 * 300 / len(np.unique(unique)))


def test_the_order_of_batches_does_not_change_the_last_bit():
    observations, _ = synthetic.simulate(LATTICE, 60, per_crystal=300)
    parts = [LiveMerge(LATTICE.cell, LATTICE.space_group, 3.0).sums(*b) for b in batches(observations, (7, 20, 33))]
    ends = []
    for order in ((0, 1, 2), (2, 0, 1)):
        live = LiveMerge(LATTICE.cell, LATTICE.space_group, 3.0)
        ends.append([live.add(parts[k]) for k in order][-1])
    for name in ("completeness", "multiplicity", "cc_half"):
        assert np.array_equal(getattr(ends[0], name), getattr(ends[1], name), equal_nan=True)


def test_crystals_without_usable_reflections_are_not_counted():
    observations, _ = synthetic.simulate(LATTICE, 3, per_crystal=5)
    live = LiveMerge(LATTICE.cell, LATTICE.space_group, 3.0)
    found = live.add(live.sums(observations, np.arange(3)))
    assert (found.n_crystals, found.completeness[-1]) == (0, 0.0)
    assert np.isnan(found.cc_half).all()


def test_a_huge_cell_is_followed_to_a_resolution_that_is_bounded():
    live = LiveMerge((300.0, 400.0, 500.0, 90.0, 90.0, 90.0), "P222", 2.0)
    assert live.d_min > 3.5
    assert 0.9 * _MOST_UNIQUE < live.nothing().shape[-1] < 1.1 * _MOST_UNIQUE


def test_the_resolution_of_a_square_detector_is_that_of_its_edges():
    detector = DetectorFactory.simple("PAD", 200.0, (100.0, 100.0), "+x", "-y", (0.1, 0.1), (2000, 2000), (0, 1e6))
    beam = BeamFactory.simple(1.0)
    at_edge = detector[0].get_resolution_at_pixel(beam.get_s0(), (2000, 1000))
    assert detector_resolution(detector, beam.get_s0()) == pytest.approx(at_edge, rel=0.03)
