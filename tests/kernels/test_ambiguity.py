"""Settings of a lattice, and crystals compared with merged intensities in each."""

import numpy as np
import pytest

from ssx_mpi.kernels import ambiguity
from ssx_mpi.stages.intensities import reflection_data as stage


@pytest.mark.parametrize(
    ("symbol", "cell", "number"),
    [
        ("P 43 21 2", (79.1, 79.1, 38.2, 90, 90, 90), 1),
        ("P 21 3", (96.4, 96.4, 96.4, 90, 90, 90), 2),
        ("P 41", (50.0, 50.0, 80.0, 90, 90, 90), 2),
        ("P 31", (50.0, 50.0, 80.0, 90, 90, 120), 4),
        ("R 3 :H", (80.0, 80.0, 120.0, 90, 90, 120), 2),
        ("P 21 21 21", (50.0, 60.0, 70.0, 90, 90, 90), 1),
        # accidental: two axes of an orthorhombic cell alike, a monoclinic angle of 90 degrees
        ("P 21 21 21", (50.0, 50.02, 70.0, 90, 90, 90), 2),
        ("P 1 21 1", (50.0, 60.0, 70.0, 90, 90.1, 90), 2),
        ("C 1 2 1", (60.0, 40.0, 50.0, 90, 105, 90), 1),
    ],
)
def test_settings_of_a_lattice(symbol, cell, number):
    settings = stage.reindexing_settings(cell, symbol, max_delta=0.5)
    assert len(settings) == number
    np.testing.assert_array_equal(settings[0], np.eye(3))
    rotations = stage.point_group_rotations(symbol)
    # no two settings differ by a symmetry of the crystal
    for s in range(number):
        for t in range(s):
            relation = np.linalg.inv(settings[t]) @ settings[s]
            assert not np.any(np.all(np.abs(rotations - relation) < 1e-6, axis=(1, 2)))


def test_composition_of_settings_is_a_group():
    settings = stage.reindexing_settings((50.0, 50.0, 80.0, 90, 90, 120), "P 31", 0.5)
    table = ambiguity.composition_table(settings, stage.point_group_rotations("P 31"))
    assert np.all(np.sort(table, axis=0) == np.arange(4)[:, None])
    assert table[0].tolist() == [0, 1, 2, 3]


def test_settings_that_do_not_keep_the_point_group_cannot_be_applied_to_all():
    # a tetragonal crystal with a cubic lattice: its fourfold axis can lie along any edge
    cell = (50.0, 50.0, 50.0, 90, 90, 90)
    settings = stage.reindexing_settings(cell, "P 41 21 2", 0.5)
    table = ambiguity.composition_table(settings, stage.point_group_rotations("P 41 21 2"))
    assert len(settings) == 3
    assert np.all(table[:, 0] == [0, 1, 2])
    assert np.all(table[:, 1:] == -1)


def test_own_contribution_is_left_out():
    rng = np.random.default_rng(7)
    n_unique = 400
    start = np.array([0, 300], dtype=np.int64)
    unique = rng.choice(n_unique, 300, replace=False).astype(np.int32)[None]
    x = rng.exponential(1.0, 300)
    data = ambiguity.Normalised(start, unique, x, np.full(300, 0.8))
    mine = np.ones((1, 1))
    sums = ambiguity.spread(data, mine, n_unique)
    # others: pure noise, which a crystal must not agree with
    noise = rng.exponential(1.0, n_unique)
    merged = sums[0] + 3 * noise, sums[1] + 3
    alone = ambiguity.agreement(data, mine, *merged)
    assert abs(alone.correlation[0, 0]) < 0.2
    contaminated = ambiguity.agreement(data, np.zeros((1, 1)), *merged)
    assert contaminated.correlation[0, 0] > 0.2


def test_correlation_is_weighted_pearson():
    rng = np.random.default_rng(9)
    n = 200
    unique = np.arange(n, dtype=np.int32)[None]
    x, w = rng.exponential(1.0, n), rng.uniform(0.2, 1.0, n)
    y, weight = 0.7 * x + rng.normal(0, 0.4, n), rng.uniform(1.0, 5.0, n)
    data = ambiguity.Normalised(np.array([0, n]), unique, x, w)
    got = ambiguity.agreement(data, np.zeros((1, 1)), y * weight, weight)
    q = w * weight / (1 + weight)
    covariance = np.cov(x, y, aweights=q)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    assert got.correlation[0, 0] == pytest.approx(expected)
    n_effective = q.sum() ** 2 / np.sum(q**2)
    assert got.log_likelihood[0, 0] == pytest.approx(-(n_effective - 3) / 2 * np.log(1 - expected**2))
    assert np.isinf(got.margin()[0])


def test_probabilities_sharpen_with_falling_temperature():
    likelihood = np.array([[0.0, 2.0], [5.0, 0.0]])
    warm, cold = (ambiguity.probabilities(likelihood, t) for t in (10.0, 0.1))
    np.testing.assert_allclose(warm.sum(axis=1), 1)
    assert warm[0, 1] < 0.6 < 0.99 < cold[0, 1]
