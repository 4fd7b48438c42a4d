"""Merging statistics against their definitions."""

import numpy as np
import pytest
from half_sets import observe

from ssx_mpi.kernels import merging
from ssx_mpi.kernels.cell_clusters import cluster_cells, g6, nearest_cluster, within_tolerance
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Indexed, Scales


def test_shells_hold_equal_numbers_between_the_limits():
    d_star_sq = np.random.default_rng(0).uniform(0.001, 0.25, 1003)
    shells = merging.resolution_shells(d_star_sq, 10, d_min=2.5)
    counts = shells.sum(np.ones(1003))
    assert counts.sum() == np.count_nonzero(d_star_sq <= 0.16)
    assert counts.max() - counts.min() <= 1
    assert np.all(shells.number[d_star_sq > 0.16] == -1)


def test_half_sets_are_halves_and_do_not_repeat():
    numbers = np.arange(20000)
    halves = np.array([merging.half_set(numbers, repeat) for repeat in range(6)])
    assert np.all(np.abs(halves.mean(axis=1) - 0.5) < 0.02)
    agreement = np.corrcoef(halves.astype(float)) - np.eye(6)
    assert np.abs(agreement).max() < 0.03
    # neighbours are independent, too: images of a dose series must not all land in one half
    assert abs(np.mean(halves[:, 1:] == halves[:, :-1]) - 0.5) < 0.02


def test_sigma_tau_agrees_with_half_sets():
    rng = np.random.default_rng(2)
    n_unique, n = 4000, 8
    truth = rng.exponential(1.0, n_unique)
    x = truth[:, None] + rng.normal(0, 1.5, (n_unique, n))
    moment = np.stack([np.full(n_unique, n), x.sum(axis=1), (x**2).sum(axis=1)], axis=1)
    cc, _ = merging.cc_half_sigma_tau(moment, np.ones(n_unique))
    direct = np.corrcoef(x[:, : n // 2].mean(axis=1), x[:, n // 2 :].mean(axis=1))[0, 1]
    assert cc == pytest.approx(direct, abs=0.02)


def test_delta_cc_half_is_what_leaving_out_changes():
    rng = np.random.default_rng(4)
    n_crystals, n_unique, per_crystal = 12, 60, 40
    truth = rng.exponential(100.0, n_unique)
    unique = np.concatenate([rng.choice(n_unique, per_crystal, replace=False) for _ in range(n_crystals)])
    n = len(unique)
    observations = Observations(
        np.arange(0, n + 1, per_crystal),
        np.zeros((n, 3), np.int32),
        truth[unique] + rng.normal(0, 20, n),
        np.ones(n),
        np.zeros(n, np.float32),
    )
    observations.intensity[:per_crystal] = rng.exponential(100.0, per_crystal)
    everything = np.ones(n_crystals, bool)
    data = Indexed(observations, np.full(n_unique, 0.01), unique.astype(np.int32), np.zeros(n, np.uint8), everything)
    scales, unit = Scales.unit(n_crystals), np.full(n_unique, 100.0)
    moment = merging.moments(data, scales)
    delta = merging.delta_cc_half(data, scales, moment, unit)
    whole, _ = merging.cc_half_sigma_tau(moment, unit)
    for c in range(n_crystals):
        without = everything.copy()
        without[c] = False
        rest = merging.moments(data.only(without), scales)
        assert delta[c] == pytest.approx(100 * (whole - merging.cc_half_sigma_tau(rest, unit)[0]), abs=1e-8)
    assert np.argmin(delta) == 0 and delta[0] < 0


@pytest.mark.parametrize("n_unique, multiplicity", [(12000, 0.12), (3000, 0.3), (8000, 1.0), (8000, 3.0), (8000, 10.0)])
def test_resolution_is_where_cc_half_falls_however_sparse_the_data(n_unique, multiplicity):
    # of what was seen at all the multiplicity is 1.06 (and 80 reflections were seen twice), 1.16, 1.6, 3.2 and 10
    found = [merging.resolution_estimate(*observe(n_unique, multiplicity, seed)) for seed in range(3)]
    assert found == pytest.approx([2.0] * 3, abs=0.1)
    assert np.mean(found) == pytest.approx(2.0, abs=0.05)


@pytest.mark.parametrize("multiplicity", [0.3, 10.0])
def test_resolution_is_not_cut_where_the_data_end_first(multiplicity):
    assert merging.resolution_estimate(*observe(6000, multiplicity, 1, limit=0.6)) is None


def test_resolution_of_noise_or_of_next_to_nothing_is_not_estimated():
    assert merging.resolution_estimate(*observe(6000, 3.0, 1, limit=-0.2)) is None
    assert merging.resolution_estimate(*observe(60, 0.3, 1)) is None


def test_cells_cluster_by_distance():
    rng = np.random.default_rng(8)
    one = np.array([79.1, 79.1, 38.2, 90, 90, 90]) + rng.normal(0, [0.05, 0.05, 0.03, 0, 0, 0], (60, 6))
    two = one[:25] * [1.02, 1.02, 0.99, 1, 1, 1]
    cells = np.concatenate([two, one])
    clusters = cluster_cells(cells, threshold=60.0)
    assert [len(c.members) for c in clusters] == [60, 25]
    np.testing.assert_allclose(clusters[0].median, np.median(one, axis=0))
    labels = np.repeat([1, 0], [25, 60])
    assert nearest_cluster(cells[[3, 70]], cells, labels, 60.0).tolist() == [1, 0]
    assert nearest_cluster(cells[:1] * 1.5, cells, labels, 60.0).tolist() == [-1]
    assert within_tolerance(cells, one.mean(axis=0), 1.0, 0.5).sum() == 60


def test_g6_of_an_oblique_cell():
    a, b, c = np.array([3.0, 0, 0]), np.array([1.0, 4, 0]), np.array([0.5, 0.3, 5])
    lengths = [np.linalg.norm(v) for v in (a, b, c)]

    def angle(u, v):
        return np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))

    cell = np.array([[*lengths, angle(b, c), angle(a, c), angle(a, b)]])
    np.testing.assert_allclose(g6(cell)[0], [a @ a, b @ b, c @ c, 2 * b @ c, 2 * a @ c, 2 * a @ b])


def test_r_factors_by_their_formulas():
    rng = np.random.default_rng(5)
    n = np.array([1, 2, 3, 6])
    observed = [rng.uniform(50, 150, k) for k in n]
    scatter = merging.Scatter(
        n.astype(float), np.array([x.sum() for x in observed]), np.array([np.abs(x - x.mean()).sum() for x in observed])
    )
    shells = merging.Shells(np.array([0.0, 0.1, 0.2]), np.array([0, 0, 1, 1]))
    got = merging.r_factors(scatter, shells)
    several = observed[1:]
    total = sum(x.sum() for x in several)
    assert got.r_merge[-1] == pytest.approx(sum(np.abs(x - x.mean()).sum() for x in several) / total)
    meas = sum(np.sqrt(len(x) / (len(x) - 1)) * np.abs(x - x.mean()).sum() for x in several) / total
    assert got.r_meas[-1] == pytest.approx(meas)
    first = observed[1]
    # the reflection observed once has no say
    assert got.r_pim[0] == pytest.approx(np.abs(first - first.mean()).sum() / first.sum())


def test_half_sets_are_compared_shell_by_shell():
    rng = np.random.default_rng(6)
    n = 900
    truth = rng.exponential(100, n)
    halves = []
    for _ in range(2):
        noise = np.where(np.arange(n) < 450, 5.0, 100.0)[:, None]
        sums = np.zeros((3, n, 2))
        sums[1] = 1 / noise**2
        sums[0] = (truth[:, None] + noise * rng.normal(size=(n, 2))) * sums[1]
        sums[2] = 1
        halves.append(sums)
    halves[1][:, :9] = 0
    shells = merging.Shells(np.array([0.0, 0.1, 0.2]), np.repeat([0, 1], 450))
    cc, r_split, cc_anom, pairs = merging.compare_half_sets(*halves, shells)
    assert list(pairs) == [441, 450, 891]
    # a half-set's mean of two has half the variance
    spread = truth[9:450].var(), truth[450:].var()
    expected = [v / (v + s**2 / 2) for v, s in zip(spread, (5, 100))]
    np.testing.assert_allclose(cc[:2], expected, atol=0.08)
    assert r_split[0] < 0.1 < 0.3 < r_split[1]
    assert np.all(np.abs(cc_anom) < 0.15)


def test_a_correlation_of_few_pairs_is_no_number():
    pairs = np.array([[40.0, 49.0, 51.0], [60.0, 50.0, 51.0]])
    halves = merging.HalfSets(*3 * [np.full((2, 3), 0.9)], pairs)
    np.testing.assert_array_equal(halves.meaningful(np.full(3, 0.9)), [0.9, np.nan, 0.9])


def test_rsplit_is_the_mean_difference_over_root_two():
    # two half-sets that differ by 2 about 10 in every reflection: 2 / (sqrt(2) 10)
    halves = []
    for value in (9.0, 11.0):
        sums = np.zeros((3, 100, 2))
        sums[1, :, 0], sums[2, :, 0], sums[0, :, 0] = 1.0, 1.0, value + np.arange(100) % 2
        halves.append(sums)
    shells = merging.Shells(np.array([0.0, 0.1]), np.zeros(100, dtype=np.int64))
    _, r_split, _, _ = merging.compare_half_sets(*halves, shells)
    assert r_split[0] == pytest.approx(2.0 / (np.sqrt(2.0) * 10.5))


@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_differences_of_friedel_mates_over_their_errors(signal):
    rng = np.random.default_rng(5)
    weight = rng.uniform(0.1, 4.0, (20000, 2))
    difference = signal * rng.standard_normal(len(weight))
    mates = 100 + 0.5 * difference[:, None] * [1, -1] + rng.standard_normal(weight.shape) / np.sqrt(weight)
    sums = np.array([weight * mates, weight, np.ones_like(weight)])
    sums[:, :100, 1] = 0.0
    found = merging.anomalous_significance(sums)
    assert np.all(found[:100] == 0)
    # the mean of |x| of a normal distribution, with the variance of the signal over that of the errors on top
    expected = np.sqrt(2 / np.pi) * np.sqrt(1 + signal**2 / (1 / weight).sum(axis=1))
    assert found[100:].mean() == pytest.approx(expected[100:].mean(), rel=0.02)
