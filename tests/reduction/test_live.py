"""Live statistics against those of the reduction, in any distribution over ranks."""

import numpy as np
import pytest
import synthetic

from ssx_mpi.reduction.live import LiveMerge


def test_live_statistics_grow_towards_the_truth():
    lattice = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 3.0)
    observations, truth = synthetic.simulate(lattice, 120, per_crystal=300)
    ranks = [LiveMerge(lattice.cell, lattice.space_group, 3.0) for _ in range(3)]
    seen = []
    for number in range(120):
        rows = slice(observations.start[number], observations.start[number + 1])
        ranks[number % 3].add(number, observations.hkl[rows], observations.intensity[rows], observations.variance[rows])
        if number in (9, 39, 119):
            seen.append(ranks[0].statistics(sum(rank.sums() for rank in ranks)))
    assert [s.n_crystals for s in seen] == [10, 40, 120]
    assert seen[0].completeness[-1] < seen[1].completeness[-1] < seen[2].completeness[-1]
    assert np.all(np.diff([s.cc_half[-1] for s in seen]) > 0)
    assert seen[2].cc_half[-1] > 0.9
    n = len(truth.unique)
    unique, _ = truth.unique.locate(observations.hkl)
    assert seen[2].completeness[-1] == pytest.approx(len(np.unique(unique)) / n)
    assert seen[2].multiplicity[-1] == pytest.approx(120 * 300 / len(np.unique(unique)))


def test_a_crystal_without_signal_is_not_counted():
    live = LiveMerge(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 4.0)
    live.add(0, np.array([[3, 2, 1]], dtype=np.int32), np.array([-50.0]), np.array([10.0]))
    live.add(1, np.array([[99, 2, 1]], dtype=np.int32), np.array([50.0]), np.array([10.0]))
    assert live.statistics(live.sums()).n_crystals == 0
