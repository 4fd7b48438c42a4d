"""Scales and merged intensities against direct formulas and against finite differences."""

from dataclasses import replace

import numpy as np
import pytest

from ssx_mpi.kernels import scaling
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import N_KNOTS, Expectation, Indexed, Merged, Noise, Restraints, Scales, Trend


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
        rng.uniform(0, 2.7, n).astype(np.float32),
    )
    unique = rng.integers(-1, n_unique, n).astype(np.int32)
    minus, d_star_sq = rng.integers(0, 2, n).astype(np.uint8), rng.uniform(0.01, 0.2, n_unique)
    trend = Trend(Trend.zero(d_star_sq).knots, rng.normal(0, 0.2, N_KNOTS))
    scales = Scales(rng.normal(0, 0.3, n_crystals), rng.normal(0, 5, n_crystals), rng.normal(0, 0.2, n_crystals), trend)
    count = np.bincount(unique[unique >= 0], minlength=n_unique).astype(float)
    merged = Merged(rng.normal(100, 30, n_unique), rng.uniform(0.01, 0.1, n_unique), count)
    return Indexed(observations, d_star_sq, unique, minus, np.ones(n_crystals, dtype=bool)), scales, merged


def test_merged_intensity_is_the_weighted_mean(data):
    indexed, scales, merged = data
    observations, d_star_sq, include = indexed.observations, indexed.d_star_sq, np.array([True, True, True, False])
    noise = Noise(1.2, 0.1)
    blank = Merged(merged.intensity, np.zeros(30))
    sums = scaling.accumulate(indexed.only(include), scales, noise, blank, 3.0)
    crystal = observations.crystal()
    width = scales.width[crystal] + scales.trend.at(d_star_sq)[indexed.unique]
    partiality = 0.5 * (observations.offset_sq * (1 - np.exp(-width)) - width)
    g = np.exp(scales.log_k[crystal] - 0.5 * scales.b_factor[crystal] * d_star_sq[indexed.unique] + partiality)
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
    indexed, scales, merged = data
    indexed.observations.intensity[7] = 1e5
    indexed.unique[7] = 3
    merged.count[3] += 1
    kept, lowered = (scaling.accumulate(indexed, scales, Noise(), merged, bound) for bound in (0.0, 4.0))
    others = Merged.from_sums(lowered).intensity[3]
    assert abs(others) < 0.1 * Merged.from_sums(kept).intensity[3]


def test_merged_intensities_come_to_rest_with_outliers():
    # one of six observations is ten times too strong; variances follow the intensity, so that the shares do, too
    rng = np.random.default_rng(3)
    n_unique, n = 200, 6
    truth = rng.exponential(300.0, n_unique) + 50.0
    unique = np.repeat(np.arange(n_unique), n).astype(np.int32)
    variance = rng.uniform(5, 40, n_unique * n) ** 2
    intensity = rng.normal(truth[unique], np.sqrt(variance + (0.1 * truth[unique]) ** 2))
    intensity[::n] *= 10.0
    observations = Observations(
        np.array([0, n_unique * n]), np.zeros((n_unique * n, 3), np.int32), intensity, variance,
        np.zeros(n_unique * n, np.float32),
    )  # fmt: skip
    d_star_sq, minus = np.full(n_unique, 0.01), np.zeros(n_unique * n, np.uint8)
    indexed = Indexed(observations, d_star_sq, unique, minus, np.ones(1, bool))
    merged, last = Merged(truth.mean() + np.zeros(n_unique), np.zeros(n_unique)), np.zeros(n_unique)
    for _ in range(40):
        last = merged.intensity
        merged = Merged.from_sums(scaling.accumulate(indexed, Scales.unit(1), Noise(1.0, 0.1), merged, 4.0))
    moved = np.abs(merged.intensity - last) * np.sqrt(merged.weight)
    assert np.mean(moved > 0.1) < 0.01
    assert np.median(np.abs(merged.intensity / truth - 1)) < 0.1


def expected_target(indexed, scales, expectation, restraints):
    """What the normal equations are of, where the variance does not depend on the scales."""
    observations, use = indexed.observations, indexed.unique >= 0
    g = scaling.scale_factors(indexed, scales)[use]
    u = indexed.unique[use]
    misfit = -2 * observations.intensity[use] * g * expectation.value[u] + g**2 * expectation.square[u]
    return 0.5 * (
        np.sum(misfit / observations.variance[use])
        + np.sum((scales.b_factor / restraints.b_factor) ** 2)
        + np.sum((scales.width / restraints.width) ** 2)
    )


def moved(scales, flat):
    n = len(scales.log_k)
    return Scales(
        scales.log_k + flat[:n], scales.b_factor + flat[n : 2 * n], scales.width + flat[2 * n : 3 * n],
        Trend(scales.trend.knots, scales.trend.values + flat[3 * n :]),
    )  # fmt: skip


def test_gradient_is_that_of_the_expected_misfit(data):
    indexed, scales, merged = data
    restraints = Restraints(10.0, 0.5, 1.0)
    blank = Merged(merged.intensity, np.zeros(30))
    expectation = Expectation.posterior(merged, np.full(30, 90.0))
    equations = scaling.scale_equations(indexed, scales, Noise(), blank, expectation, 0.0, restraints)
    assert equations.used.tolist() == [
        np.sum(indexed.unique[a:b] >= 0) for a, b in ((0, 60), (0, 0), (60, 150), (150, 200))
    ]
    analytic = np.concatenate([equations.own_gradient.T.ravel(), equations.common.sum(axis=0)[:, -1]])
    numeric = np.empty_like(analytic)
    for k in range(len(analytic)):
        ends = []
        for h in (1e-5, -1e-5):
            flat = np.zeros(len(analytic))
            flat[k] = h
            ends.append(expected_target(indexed, moved(scales, flat), expectation, restraints))
        numeric[k] = -(ends[0] - ends[1]) / 2e-5
    # the crystal without observations is left alone, restraints or not
    numeric[[5, 9]] = analytic[[5, 9]]
    np.testing.assert_allclose(analytic, numeric, rtol=1e-4, atol=1e-3 * np.abs(analytic).max() * 1e-2)


def test_steps_with_the_crystals_eliminated_solve_all_equations(data):
    indexed, scales, merged = data
    expectation = Expectation.posterior(merged, np.full(30, 90.0))
    equations = scaling.scale_equations(indexed, scales, Noise(1.0, 0.1), merged, expectation, 4.0, Restraints())
    common = equations.common.sum(axis=0)
    k = len(common)
    whole, right = np.zeros((12 + k, 12 + k)), np.zeros(12 + k)
    for c in range(4):
        rows = slice(3 * c, 3 * c + 3)
        whole[rows, rows], right[rows] = equations.own[c], equations.own_gradient[c]
        whole[rows, 12:], whole[12:, rows] = equations.cross[c], equations.cross[c].T
    whole[12:, 12:], right[12:] = common[:, :-1] + np.eye(k), common[:, -1]
    direct = np.linalg.solve(whole, right)
    reduced = equations.reduced().sum(axis=0)
    of_trend = np.linalg.solve(reduced[:, :-1] + np.eye(k), reduced[:, -1])
    np.testing.assert_allclose(of_trend, direct[12:], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(equations.steps(of_trend).ravel(), direct[:12], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("intensity", "sigma"), [(500, 1), (500, 80), (20, 60), (-90, 40), (-300, 20), (-3000, 50), (0, 0)]
)
def test_posterior_is_the_one_of_wilson(intensity, sigma):
    merged = Merged(np.array([float(intensity)]), np.array([sigma**-2.0 if sigma else 0.0]))
    found = Expectation.posterior(merged, np.array([100.0]))
    j = np.concatenate([np.linspace(0, 5, 20001)[:-1], np.linspace(5, 5000, 400001)])
    log = -j / 100.0 - (0.5 * ((j - intensity) / sigma) ** 2 if sigma else 0.0)
    weight = np.exp(log - log.max()) * np.gradient(j)
    assert found.value[0] == pytest.approx(np.average(j, weights=weight), rel=1e-3)
    assert found.square[0] == pytest.approx(np.average(j**2, weights=weight), rel=3e-3)


def fitted(indexed, scales, exact, restraints):
    expectation = Expectation(exact, exact**2)
    blank = Merged(exact, np.zeros(30))
    still = np.zeros(len(scales.trend.knots))
    for _ in range(80):
        equations = scaling.scale_equations(indexed, scales, Noise(), blank, expectation, 0.0, restraints)
        scales = scaling.stepped(scales, equations.steps(still), still)
    return scales


def test_scales_follow_the_units_of_the_crystal(data):
    # doubling all intensities of a crystal doubles its scale and leaves B and width alone
    indexed, scales, merged = data
    observations = indexed.observations
    doubled = replace(observations, intensity=2 * observations.intensity, variance=4 * observations.variance)
    results = [
        fitted(replace(indexed, observations=table), scales, merged.intensity, Restraints(1e5, 1e3, None))
        for table in (observations, doubled)
    ]
    with_data = [0, 2, 3]
    np.testing.assert_allclose((results[1].log_k - results[0].log_k)[with_data], np.log(2), atol=1e-3)
    np.testing.assert_allclose(results[1].b_factor[with_data], results[0].b_factor[with_data], atol=0.05)
    np.testing.assert_allclose(results[1].width[with_data], results[0].width[with_data], atol=0.01)


def test_held_parameters_stay(data):
    indexed, scales, merged = data
    found = fitted(indexed, scales, merged.intensity, Restraints(None, None, None))
    assert np.array_equal(found.b_factor, scales.b_factor) and np.array_equal(found.width, scales.width)
    assert not np.array_equal(found.log_k, scales.log_k)


def test_a_common_width_belongs_to_the_trend(data):
    indexed, scales, _ = data
    before = scaling.scale_factors(indexed, scales)
    after = scaling.scale_factors(indexed, scales.shifted(0.0, 0.0, 0.3))
    np.testing.assert_allclose(after, before)


def test_trend_is_placed_as_it_is_evaluated():
    trend = Trend.zero(np.array([0.01, 0.09, 0.25]))
    trend = Trend(trend.knots, np.arange(len(trend.knots)) ** 2.0)
    d_star_sq = np.array([0.01, 0.0121, 0.09, 0.2, 0.25])
    knot, share = trend.place(d_star_sq)
    assert share.min() >= 0 and share.max() <= 1
    at = (1 - share) * trend.values[knot] + share * trend.values[knot + 1]
    np.testing.assert_allclose(at, trend.at(d_star_sq))


def test_no_step_is_longer_than_the_exponential_is_straight():
    scales = Scales.unit(3)
    steps = np.array([[0.5, 0.0, 0.0], [40.0, 0.0, 0.0], [0.0, -800.0, 3.0]])
    moved = scaling.stepped(scales, steps, np.array([9.0, -9.0, 0.5, 0.0, 0.0, 0.0]))
    highest = scales.trend.knots[-1] ** 2
    change = np.abs(moved.log_k) + 0.5 * highest * np.abs(moved.b_factor) + 0.5 * np.abs(moved.width)
    np.testing.assert_allclose(change, [0.5, 1.0, 1.0])
    # shortened, not turned
    assert moved.b_factor[2] / moved.width[2] == pytest.approx(-800.0 / 3.0)
    np.testing.assert_allclose(moved.trend.values[:3], [1.0, -1.0, 0.5])


@pytest.mark.parametrize(("offset", "weight"), [(0.0, 1.0), (1.9, 1.0), (2.0, 1.0), (3.0, 0.5), (3.8, 0.1), (4.1, 0.0)])
def test_observations_far_from_the_sphere_lose_weight_without_a_step(offset, weight):
    observations = Observations(
        np.array([0, 1]),
        np.array([[1, 2, 3]], np.int32),
        np.array([10.0]),
        np.array([4.0]),
        np.array([offset], np.float32),
    )
    unique, minus = np.array([0], np.int32), np.array([0], np.uint8)
    data = scaling.Indexed(observations, np.array([0.1]), unique, minus, np.array([True]))
    scales = replace(Scales.unit(1), max_offset=4.0)
    blank = Merged(np.zeros(1), np.zeros(1))
    sums = scaling.accumulate(data, scales, Noise(1.0, 0.0), blank, 0.0)
    assert sums[1].sum() == pytest.approx(weight / 4.0, rel=1e-6)
    assert sums[2].sum() == (weight > 0)
