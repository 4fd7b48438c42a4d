"""Background and ice from sampled pixels."""

from __future__ import annotations

import numpy as np
import pytest

from ssx_mpi.kernels.background import ICE_RINGS, background_numbers, share_on_ice_rings

WAVELENGTH = 1.1


def sampled(rng, level: float, ring: float = 0.0, d: float = 3.669, spots: int = 0, n: int = 40_000):
    """Poisson background falling with resolution, a ring of relative height `ring`, and `spots` very strong pixels."""
    d_star_sq = rng.uniform(0.002, 0.3, n)
    mean = level * (1.5 - 3 * d_star_sq)
    mean *= 1 + ring * (np.abs(d_star_sq - 1 / d**2) < 0.0015)
    values = rng.poisson(mean).astype(float)
    values[rng.integers(0, n, spots)] += 5000
    return values, np.ones(n, bool), (d_star_sq * WAVELENGTH**2).astype(np.float32), mean.mean()


@pytest.mark.parametrize("level", [0.1, 1.0, 30.0])
def test_mean_is_that_between_the_spots(level):
    values, valid, ray_sq, mean = sampled(np.random.default_rng(1), level, spots=200)
    assert background_numbers(values, valid, ray_sq, WAVELENGTH).mean == pytest.approx(mean, rel=0.04)


def test_pixels_that_cannot_be_trusted_do_not_count():
    values, valid, ray_sq, mean = sampled(np.random.default_rng(2), 5.0)
    values[::3], valid[::3] = 1e9, False
    assert background_numbers(values, valid, ray_sq, WAVELENGTH).mean == pytest.approx(mean, rel=0.02)
    assert background_numbers(values, np.zeros_like(valid), ray_sq, WAVELENGTH) == background_numbers(
        np.zeros(0), np.zeros(0, bool), np.zeros(0, np.float32), WAVELENGTH
    )


def test_ice_is_found_with_its_height_and_none_where_there_is_none():
    rng = np.random.default_rng(3)
    for level in (1.0, 10.0):
        found = background_numbers(*sampled(rng, level, ring=1.0, spots=100)[:3], WAVELENGTH).ice
        assert found == pytest.approx(1.0, abs=0.35 if level == 1 else 0.15)
    # with 4 standard deviations and ten rings one image in some thousand has a ring by chance
    assert all(background_numbers(*sampled(rng, 3.0, spots=100)[:3], WAVELENGTH).ice == 0 for _ in range(40))
    # a ring of something else is not ice
    assert background_numbers(*sampled(rng, 10.0, ring=1.0, d=3.2)[:3], WAVELENGTH).ice == 0


def test_share_of_spots_on_rings():
    rng = np.random.default_rng(4)
    by_chance = rng.uniform(0.005, 0.25, 5000)
    assert 0.04 < share_on_ice_rings(by_chance) < 0.09
    assert share_on_ice_rings(np.repeat(ICE_RINGS, 3)) == 1
