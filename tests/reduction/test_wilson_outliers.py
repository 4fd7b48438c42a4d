"""Observations that no reflection explains: found where they are alone, and nothing else is."""

import numpy as np
import synthetic
from test_scaling_rounds import COMM, prepared

from ssx_mpi.kernels import wilson_outliers
from ssx_mpi.parameters.reduction_parameters import ScalingSettings
from ssx_mpi.reduction import post_refinement, scaling_rounds


def scaled_with(planted_on=0, factor=60.0):
    observations, truth = synthetic.simulate(synthetic.LYSOZYME, 40, per_crystal=150, seed=7)
    row, _ = truth.unique.locate(observations.hkl)
    alone = np.flatnonzero(np.bincount(row, minlength=len(truth.unique))[row] == 1)
    chosen = np.random.default_rng(5).choice(alone, planted_on, replace=False)
    crystal, d_star_sq = observations.crystal()[chosen], truth.unique.d_star_sq[row[chosen]]
    g = np.exp(truth.scales.log_k[crystal] - 0.5 * truth.scales.b_factor[crystal] * d_star_sq)
    observations.intensity[chosen] = factor * 1000.0 * np.exp(-10.0 * d_star_sq) * truth.unique.epsilon[row[chosen]] * g
    _, _, indexed, start, expected = prepared(observations, truth, np.zeros(40, dtype=np.int64))
    scaled = scaling_rounds.scale(COMM, indexed, truth.unique, start, expected, ScalingSettings())
    return truth, indexed, scaled, chosen


def test_planted_ones_are_found_and_hardly_another():
    truth, indexed, scaled, chosen = scaled_with(25)
    left, number = post_refinement.without_outliers(COMM, indexed, truth.unique, scaled, 4.0)
    gone = (indexed.unique >= 0) & (left.unique < 0)
    assert gone.sum() == number
    assert gone[chosen].sum() >= 23
    assert number - gone[chosen].sum() <= 1


def test_nothing_is_left_out_of_good_data_nor_where_nobody_asks():
    truth, indexed, scaled, _ = scaled_with()
    _, number = post_refinement.without_outliers(COMM, indexed, truth.unique, scaled, 4.0)
    assert number <= 1
    planted = scaled_with(5)
    assert post_refinement.without_outliers(COMM, planted[1], truth.unique, planted[2], 0.0) == (planted[1], 0)


def test_limits_are_those_of_wilson():
    acentric, centric = wilson_outliers.largest_ratio(1000, np.array([False, True]))
    rng = np.random.default_rng(1)
    n = 2_000_000
    # of 1,000 true ones 0.1 are beyond: 200 of these, with a standard deviation of 14
    assert abs(np.count_nonzero(rng.exponential(1.0, n) > acentric) - 200) < 60
    assert abs(np.count_nonzero(rng.chisquare(1, n) > centric) - 200) < 60
