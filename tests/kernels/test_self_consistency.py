"""Errors that are true, too small and too large, on Wilson's intensities."""

import numpy as np
import pytest

from ssx_mpi.kernels.merging import resolution_shells
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.self_consistency import self_consistency


def made(claimed: float, twin: bool = False, seed: int = 1):
    """Two half-sets of 20,000 reflections whose variances are claimed to be so many times what they are."""
    rng = np.random.default_rng(seed)
    n = 20_000
    d_star_sq, centric = np.sort(rng.uniform(0.01, 0.25, n)), rng.random(n) < 0.3
    nothing = np.zeros((n, 3), np.int32)
    unique = UniqueReflections(
        nothing, d_star_sq, np.ones(n, np.int64), centric, np.eye(3)[None], np.arange(n), np.zeros(n, np.uint8)
    )
    mean = 100.0 * np.exp(-10.0 * d_star_sq)
    intensity = np.where(centric, rng.chisquare(1, n), rng.exponential(1.0, n))
    if twin:
        intensity = 0.5 * (intensity + np.where(centric, rng.chisquare(1, n), rng.exponential(1.0, n)))
    intensity *= mean
    halves = []
    for _ in range(2):
        number = rng.integers(0, 4, n)
        variance = 400.0 / np.maximum(number, 1) + 0.01 * intensity**2 / np.maximum(number, 1)
        values = intensity + np.sqrt(variance) * rng.standard_normal(n)
        weight = np.where(number > 0, 1.0 / (claimed * variance), 0.0)
        sums = np.zeros((3, n, 2))
        sums[:, :, 0] = weight * values, weight, number
        halves.append(sums)
    shells = resolution_shells(d_star_sq, 20)
    return self_consistency(halves[0] + halves[1], tuple(halves), unique, shells)


def test_true_errors_are_consistent():
    found = made(1.0)
    assert found.cc_half == pytest.approx(found.cc_half_expected, abs=0.01)
    assert found.acentric == pytest.approx(2.0, abs=0.06)
    assert found.centric == pytest.approx(3.0, abs=0.15)


def test_errors_that_are_too_small_or_too_large_show():
    assert made(0.2).cc_half < made(0.2).cc_half_expected - 0.05
    assert made(4.0).cc_half > made(4.0).cc_half_expected + 0.05
    assert made(0.2).acentric > 2.1 > 1.9 > made(4.0).acentric


def test_a_twin_shows_in_the_moments_alone():
    found = made(1.0, twin=True)
    assert found.acentric == pytest.approx(1.5, abs=0.05) and found.centric == pytest.approx(2.0, abs=0.1)
    assert found.cc_half == pytest.approx(found.cc_half_expected, abs=0.01)
