"""The geometry of a simulated detector, and images that follow from the seed alone."""

import numpy as np
import pytest

from ssx_mpi.simulation.detector import (
    bad_pixel_mask,
    gap_mask,
    header_detector,
    saturation,
    true_detector,
)
from ssx_mpi.simulation.simulation_parameters import (
    DETECTORS,
    BackgroundParameters,
    BeamParameters,
    CrystalParameters,
    DetectorParameters,
    HeaderParameters,
)
from ssx_mpi.simulation.still_images import Simulator

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("preset", ["eiger1m", "pilatus6m"])
def test_rays_land_where_dxtbx_says(preset):
    detector = true_detector(DetectorParameters(preset, 90.0), BeamParameters(), HeaderParameters(), RNG)
    panel = detector.to_dxtbx()[0]
    rng = np.random.default_rng(1)
    s1 = rng.normal(size=(50, 3)) * [0.3, 0.3, 0.02] + [0, 0, -1]
    s1 /= np.linalg.norm(s1, axis=1)[:, None] * 0.976
    expected = [panel.millimeter_to_pixel(panel.get_ray_intersection(tuple(s))) for s in s1]
    assert np.allclose(detector.pixels(s1), expected, atol=1e-3)
    assert panel.get_beam_centre((0, 0, -1 / 0.976)) == pytest.approx(detector.beam_centre_mm)


def test_jacobian_is_the_derivative():
    detector = true_detector(DetectorParameters("eiger1m", 90.0), BeamParameters(), HeaderParameters(), RNG)
    detector = type(detector)(
        detector.preset.__class__(**{**vars(detector.preset), "thickness_mm": 1e-9}),
        90.0,
        detector.beam_centre_mm,
        0.976,
    )
    s1 = np.array([[0.2, -0.3, -0.9], [0.0, 0.0, -1.0]])
    step = 1e-6
    for axis in range(3):
        moved = s1 + step * np.eye(3)[axis]
        assert np.allclose(
            (detector.pixels(moved) - detector.pixels(s1)) / step, detector.jacobian(s1)[:, :, axis], atol=0.01
        )


def test_gaps_and_bad_pixels():
    preset = DETECTORS["eiger1m"]
    gaps = gap_mask(preset)
    assert gaps.shape == (1062, 1028)
    assert gaps.sum() == 38 * 1028
    assert gaps[512:550].all()
    assert gap_mask(DETECTORS["pilatus6m"]).sum() == 2463 * 2527 - 60 * 487 * 195
    bad = bad_pixel_mask(preset, 70, np.random.default_rng(1))
    assert bad.sum() == 70
    assert not np.any(bad & gaps)


def test_header_is_wrong_by_what_was_asked():
    true = true_detector(DetectorParameters(), BeamParameters(), HeaderParameters(), RNG)
    header = header_detector(true, HeaderParameters((0.3, -0.2), 0.4))
    assert np.subtract(header.beam_centre_mm, true.beam_centre_mm) == pytest.approx((0.3, -0.2))
    assert header.distance_mm - true.distance_mm == pytest.approx(0.4)


def test_an_image_follows_from_seed_and_number(small):
    one, two = Simulator(small()), Simulator(small())
    hit = next(i for i in range(5) if one.image(i)[1].lattices)
    counts, truth = one.image(hit)
    two.image(0)
    again, _ = two.image(hit)
    assert np.array_equal(counts, again)
    assert not np.array_equal(counts, one.image(hit + 1)[0])
    assert not np.array_equal(counts, Simulator(small(seed=4)).image(hit)[0])
    assert truth.index == hit


def test_dead_pixels_carry_their_codes_and_others_counts(small):
    simulator = Simulator(small(crystal=CrystalParameters(d_min=2.5, brightness=1e8), hit_rate=1.0))
    counts, _ = simulator.image(0)
    assert np.all(counts[simulator.gaps] == -1)
    assert np.all(counts[simulator.bad] == -2)
    live = counts[~simulator.dead]
    assert live.min() >= 0
    assert live.max() == saturation(simulator.detector.preset)


def test_blank_images_are_background_alone(small):
    simulator = Simulator(small(hit_rate=0.0, background=BackgroundParameters(3.0, 0.0)))
    counts, truth = simulator.image(1)
    assert truth.lattices == ()
    live = ~simulator.dead
    expected = simulator.background[live]
    # reduced chi-square of Poisson counts
    where = expected > 0.5
    chi_square = np.mean((counts[live][where] - expected[where]) ** 2 / expected[where])
    assert chi_square == pytest.approx(1.0, abs=0.03)


def test_photons_of_a_spot_are_those_expected(small):
    """Counts on the image, less the background, are brightness times intensity, partiality and polarization."""
    simulator = Simulator(
        small(
            hit_rate=1.0,
            lattices=(1.0,),
            background=BackgroundParameters(0.0),
            detector=DetectorParameters("eiger1m", 70.0),
        )
    )
    counts, truth = simulator.image(2)
    (lattice,) = truth.lattices
    spots = simulator.spots(lattice.A, lattice.mosaicity_deg)
    expected = lattice.brightness * simulator.relative_counts(spots)
    centre, _ = simulator.project(spots)
    order = np.argsort(expected)[::-1]
    checked = 0
    for i in order[:20]:
        x, y = centre[i].astype(int)
        if not (10 <= x < 1018 and 10 <= y < 1052):
            continue
        others = np.delete(centre, i, axis=0)
        box = counts[y - 6 : y + 7, x - 6 : x + 7]
        near = np.abs(others - centre[i]).max(axis=1) < 14
        if box.min() < 0 or np.delete(expected, i)[near].sum() > 0.01 * expected[i]:
            continue
        assert box.sum() == pytest.approx(expected[i], abs=5 * np.sqrt(expected[i]) + 0.01 * expected[i])
        checked += 1
    assert checked >= 5


def test_spots_grow_with_resolution(small):
    simulator = Simulator(small(crystal=CrystalParameters(d_min=1.8, mosaicity_deg=0.2)))
    spots = simulator.spots(np.eye(3) / 60.0, 0.2)
    q = np.linalg.norm(spots.q, axis=1)
    _, covariance = simulator.project(spots)
    size = covariance[:, 0] + covariance[:, 2]
    assert np.median(size[q > 0.45]) > 2 * np.median(size[q < 0.2])


def test_hit_rate_and_lattices_are_as_asked(small):
    parameters = small(hit_rate=0.4, lattices=(0.5, 0.3, 0.2))
    simulator = Simulator(parameters)
    numbers = [simulator._draw_lattices(np.random.default_rng(i)) for i in range(3000)]
    shares = np.bincount(numbers, minlength=4) / 3000
    assert shares == pytest.approx([0.6, 0.2, 0.12, 0.08], abs=0.035)
