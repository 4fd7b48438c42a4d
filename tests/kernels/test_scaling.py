"""Scales and merged intensities against direct formulas and against finite differences."""

import numpy as np
import pytest

from ssx_mpi.kernels import scaling
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales


@pytest.fixture
def data():
    rng = np.random.default_rng(5)
    n_crystals, n_unique, n = 4, 30, 200
    counts = np.array([60, 0, 90, 50])
    observations = Observations(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        np.zeros((n, 3), dtype=np.int32),
        rng.normal(100, 40, n),
        rng.uniform(10, 50, n),
    )
    unique = rng.integers(-1, n_unique, n).astype(np.int32)
    indexed = Indexed(unique, rng.integers(0, 2, n).astype(np.uint8))
    scales = Scales(rng.normal(0, 0.3, n_crystals), rng.normal(0, 5, n_crystals))
    merged = Merged(rng.normal(100, 30, n_unique), rng.uniform(0.01, 0.1, n_unique))
    return observations, indexed, scales, merged, rng.uniform(0.01, 0.2, n_unique)


def test_merged_intensity_is_the_weighted_mean(data):
    observations, indexed, scales, merged, d_star_sq = data
    include = np.array([True, True, True, False])
    noise = Noise(1.2, 0.1)
    blank = Merged(merged.intensity, np.zeros(30))
    sums = scaling.accumulate(observations, indexed, include, scales, noise, blank, d_star_sq, 3.0)
    crystal = observations.crystal()
    g = np.exp(scales.log_k[crystal] - 0.5 * scales.b_factor[crystal] * d_star_sq[indexed.unique])
    model = g * merged.intensity[indexed.unique]
    v = 1.44 * (observations.variance + 0.01 * np.maximum(model, 0) ** 2)
    for u in range(30):
        use = (indexed.unique == u) & include[crystal]
        if not use.any():
            assert sums[1, u].sum() == 0
            continue
        got = Merged.from_sums(sums)
        # the mean of I / g, each with the variance v / g^2
        expected = np.average(observations.intensity[use] / g[use], weights=g[use] ** 2 / v[use])
        assert got.intensity[u] == pytest.approx(expected)
        assert got.weight[u] == pytest.approx(np.sum(g[use] ** 2 / v[use]))
        assert sums[2, u].tolist() == [np.sum(use & (indexed.minus == 0)), np.sum(use & (indexed.minus == 1))]


def test_an_outlier_loses_weight(data):
    observations, indexed, scales, merged, d_star_sq = data
    observations.intensity[7] = 1e5
    indexed.unique[7] = 3
    everything = np.ones(4, dtype=bool)
    kept, lowered = (
        scaling.accumulate(observations, indexed, everything, scales, Noise(), merged, d_star_sq, bound)
        for bound in (0.0, 4.0)
    )
    others = Merged.from_sums(lowered).intensity[3]
    assert abs(others) < 0.1 * Merged.from_sums(kept).intensity[3]


def test_steps_lead_to_the_minimum(data):
    observations, indexed, scales, merged, d_star_sq = data
    everything = np.ones(4, dtype=bool)
    noise = Noise(1.0, 0.0)
    prior = (1.0, 10.0)
    # with merged intensities known exactly, the target is plain least squares
    exact = Merged(merged.intensity, np.full(30, 1e30))
    for _ in range(60):
        scales, step, used = scaling.fit_scales(
            observations, indexed, everything, scales, noise, exact, d_star_sq, 0.0, b_prior=prior
        )
    assert step.max() < 1e-8
    assert used[1] == 0

    def target(log_k, b):
        crystal = observations.crystal()
        use = (indexed.unique >= 0) & (crystal == 2)
        g = np.exp(log_k - 0.5 * b * d_star_sq[indexed.unique[use]])
        residual = observations.intensity[use] - g * merged.intensity[indexed.unique[use]]
        return np.sum(residual**2 / observations.variance[use]) + ((b - prior[0]) / prior[1]) ** 2

    best = target(scales.log_k[2], scales.b_factor[2])
    for dk, db in ((1e-3, 0), (-1e-3, 0), (0, 0.05), (0, -0.05), (1e-3, 0.05)):
        assert target(scales.log_k[2] + dk, scales.b_factor[2] + db) > best


def test_scales_follow_the_units_of_the_crystal(data):
    # doubling all intensities of a crystal doubles its scale and leaves B alone
    observations, indexed, scales, merged, d_star_sq = data
    everything = np.ones(4, dtype=bool)
    doubled = Observations(observations.start, observations.hkl, 2 * observations.intensity, 4 * observations.variance)
    exact = Merged(merged.intensity, np.full(30, 1e30))
    results = []
    for table in (observations, doubled):
        found = scales
        for _ in range(60):
            found, _, _ = scaling.fit_scales(
                table, indexed, everything, found, Noise(), exact, d_star_sq, 0.0, b_prior=(0, 1e6)
            )
        results.append(found)
    fitted = [0, 2, 3]
    np.testing.assert_allclose(results[1].log_k[fitted] - results[0].log_k[fitted], np.log(2), atol=1e-6)
    np.testing.assert_allclose(results[1].b_factor[fitted], results[0].b_factor[fitted], atol=1e-4)
