"""The gain of a detector from the scatter of its background."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ssx_mpi.images.frames import readout_variance
from ssx_mpi.kernels.detector_gain import Image, estimate_gain

GAINS = (0.5, 1.0, 4.0, 12.4, 25.0)
SHAPE = (400, 400)


def images(gain=1.0, level=1.0, n=4, noise=0.0, spots=40, spread=0.0, sensitivity=0.0, seed=1):
    """Rings of background on pixels of unequal sensitivity, with Bragg spots; noise in photons."""
    rng = np.random.default_rng(seed)
    slow, fast = np.indices(SHAPE)
    radius = np.hypot(slow - 200, fast - 190)
    background = np.exp(-((radius / 160) ** 2)) + 0.3 * np.exp(-(((radius - 100) / 25) ** 2))
    background *= 1 + sensitivity * rng.standard_normal(SHAPE)
    spot = np.exp(-((np.indices((5, 5)) - 2) ** 2).sum(axis=0) / 1.5)
    mask = np.ones(SHAPE, bool)
    mask[200:220] = False
    found = []
    for _ in range(n):
        expected = level * background * rng.uniform(0.5, 1.5)
        for y, x in rng.integers(5, 390, (spots, 2)):
            expected[y - 2 : y + 3, x - 2 : x + 3] += rng.exponential(20) * spot
        data = rng.poisson(expected).astype(float)
        if spread:
            data = gaussian_filter(data, spread)
        if noise:
            data += rng.normal(0, noise, SHAPE)
        data *= gain
        found.append(Image([data], [mask], [readout_variance(data, mask)]))
    return found


@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize(
    "kind",
    [
        {"level": 0.05},
        {"level": 0.5},
        {"level": 3.0},
        {"level": 300.0, "sensitivity": 0.03},
        {"level": 1.0, "n": 1},
        {"level": 1.0, "noise": 0.1},
        {"level": 1.0, "noise": 0.3},
    ],
)
def test_it_is_found_and_named_only_where_it_is_not_one(gain, kind):
    found = estimate_gain(images(gain, **kind))
    assert found.value == pytest.approx(gain, rel=0.06)
    assert found.is_one == (gain == 1)


@pytest.mark.parametrize("noise", [0.3, 1.0])
@pytest.mark.parametrize("level", [0.01, 0.1, 1.0])
def test_noise_is_not_taken_for_a_gain(level, noise):
    for seed in range(3):
        found = estimate_gain(images(level=level, noise=noise, seed=seed))
        assert found is None or found.is_one


def test_what_neighbours_share_is_counted():
    found = estimate_gain(images(level=10.0, spread=1.0))
    # less than a tenth of it by the pixels alone; what spreads beyond two pixels is lost
    assert found.value == pytest.approx(0.8, abs=0.1)
    assert found.is_one


def test_many_strong_spots_are_left_out():
    assert estimate_gain(images(level=1.0, spots=600)).value == pytest.approx(1, abs=0.05)
    found = estimate_gain(images(level=0.05, spots=600))
    assert found is None or found.is_one


def test_integers_and_floats_say_the_same():
    floats = images(4.0)
    integers = [Image([im.data[0].astype(np.int32)], im.masks, im.readout) for im in floats]
    assert estimate_gain(integers) == estimate_gain(floats)


def test_images_without_photons_say_nothing():
    empty = [Image([np.zeros(SHAPE, np.int32)], [np.ones(SHAPE, bool)], [0.0])] * 2
    masked = [Image([np.ones(SHAPE, np.int32)], [np.zeros(SHAPE, bool)], [0.0])] * 2
    small = [Image([np.ones((8, 8), np.int32)], [np.ones((8, 8), bool)], [0.0])] * 2
    for nothing in (empty, masked, small, []):
        assert estimate_gain(nothing) is None


def test_several_panels_are_one_detector():
    whole = images(12.4)
    halves = [
        Image([im.data[0][:208], im.data[0][208:]], [im.masks[0][:208], im.masks[0][208:]], [0.0, 0.0]) for im in whole
    ]
    assert estimate_gain(halves).value == pytest.approx(estimate_gain(whole).value, rel=0.02)
