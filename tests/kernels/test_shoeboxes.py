"""Footprints, background, summation and shapes of spots, against DIALS on simulated frames."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from ssx_mpi import dials_compat
from ssx_mpi.kernels import shoeboxes
from ssx_mpi.kernels.ellipsoid import MODELS, on_ewald_sphere, tangential_frames
from ssx_mpi.kernels.prediction import find_panels, pixels_to_lab
from ssx_mpi.kernels.shoeboxes import Background, Frame

PARAMETERS = np.array([1.2e-3, 2e-4, 9e-4, -1e-4, 2e-4, 6e-4])
LIMIT = float(chi2.ppf(0.9973, 2))


@pytest.fixture(scope="module")
def still():
    """A crystal, two panels, and a frame with spots on a sloping background and some untrusted pixels."""
    from dxtbx.model import Beam, Crystal, Detector, Experiment, ParallaxCorrectedPxMmStrategy

    detector = Detector()
    for x in (-87.0, 1.0):
        panel = detector.add_panel()
        panel.set_frame((1, 0, 0), (0, -1, 0), (x, 60.0, -150.0))
        panel.set_pixel_size((0.172, 0.172))
        panel.set_image_size((500, 700))
        panel.set_trusted_range((-1, 1e6))
        panel.set_mu(3.9)
        panel.set_thickness(0.45)
        panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(3.9, 0.45))
    # at 1 Å, so that DIALS before its correction for other wavelengths has the same footprints
    experiment = Experiment(
        beam=Beam((0, 0, 1), 1.0), detector=detector, crystal=Crystal((40, 1, 0), (0, 45, 3), (2, 0, 50), "P1")
    )
    rng = np.random.default_rng(5)
    x = np.arange(500) * np.ones((700, 1))
    data = [rng.poisson(2 + x / 200).astype(np.int32) for _ in range(2)]
    for panel in data:
        for _ in range(900):
            panel[rng.integers(0, 698) :, rng.integers(0, 498) :][:3, :3] += rng.poisson(60, (3, 3)).astype(np.int32)
    mask = [rng.random((700, 500)) > 5e-4 for _ in range(2)]
    return experiment, data, mask


@pytest.fixture(scope="module")
def predicted(still):
    """Reflections as DIALS predicts them, with their bounding boxes."""
    from dials.algorithms.profile_model.ellipsoid import BBoxCalculatorSimple, PredictorSimple
    from dials.algorithms.spot_prediction import IndexGenerator
    from dxtbx import flumpy

    from ssx_mpi.stages.fast.fast_integration import panels_of

    crystal = still[0].crystal
    indices = IndexGenerator(crystal.get_unit_cell(), crystal.get_space_group().type(), 1.8).to_array()
    sigma = tuple(MODELS["simple6"].sigma(PARAMETERS).ravel())
    table = PredictorSimple(still[0], sigma, 0.9973).predict(indices)
    # DIALS before 3.14 predicts on the first panel alone
    panel = find_panels(panels_of(still[0].detector), flumpy.to_numpy(table["s1"]))
    table["panel"] = flumpy.from_numpy(np.maximum(panel, 0).astype(np.uint64))
    table = table.select(flumpy.from_numpy(panel >= 0))
    BBoxCalculatorSimple(still[0], sigma, 0.9973, 4).compute(table)
    return table


def arrays(still, table):
    from dxtbx import flumpy

    from ssx_mpi.stages.fast.fast_integration import panels_of

    s0 = np.array(still[0].beam.get_s0())
    sigmas = MODELS["simple6"].sigma(PARAMETERS)[None]
    seen = on_ewald_sphere(s0, flumpy.to_numpy(table["s2"]), sigmas)
    panel = flumpy.to_numpy(table["panel"]).astype(int)
    boxes = np.array([box[:4] for box in table["bbox"]], dtype=np.int32)
    return panels_of(still[0].detector), s0, seen, panel, boxes


def dials_shoeboxes(table, data, mask):
    """The boxes of a table cut out of a frame, as DIALS holds them."""
    from dials.array_family import flex
    from dxtbx import flumpy

    # masks of newer versions have one byte a pixel; arrays are named before they are passed on
    code = np.uint8 if dials_compat.dials_version() >= (3, 29) else np.int32
    boxes = flex.shoebox(table["panel"], table["bbox"], allocate=True)
    for k, shoebox in enumerate(boxes):
        x0, x1, y0, y1 = shoebox.bbox[:4]
        values, codes = np.zeros((1, y1 - y0, x1 - x0), np.float32), np.zeros((1, y1 - y0, x1 - x0), code)
        inside = slice(max(y0, 0), min(y1, 700)), slice(max(x0, 0), min(x1, 500))
        to = 0, slice(inside[0].start - y0, inside[0].stop - y0), slice(inside[1].start - x0, inside[1].stop - x0)
        values[to], codes[to] = data[shoebox.panel][inside], mask[shoebox.panel][inside]
        pixels, marks = flumpy.from_numpy(values), flumpy.from_numpy(codes)
        shoebox.data, shoebox.mask = pixels, marks
        boxes[k] = shoebox
    return boxes


def test_boxes_are_those_of_dials(still, predicted):
    panels, s0, seen, panel, boxes = arrays(still, predicted)
    assert len(boxes) > 300
    np.testing.assert_array_equal(shoeboxes.ellipse_boxes(panels, panel, s0, seen, LIMIT), boxes)


@pytest.mark.parametrize("dtype", [np.int32, np.float64, np.uint16])
def test_footprint_background_and_sum_are_those_of_dials(still, predicted, dtype):
    from dials.algorithms.profile_model.ellipsoid import MaskCalculatorSimple
    from dxtbx import flumpy

    experiment, data, mask = still
    panels, _, seen, panel, boxes = arrays(still, predicted)
    frame = Frame([part.astype(dtype) for part in data], mask)
    ours = shoeboxes.integrate_ellipses(panels, frame, panel, boxes, seen, LIMIT, 1.0, Background())

    table = predicted.copy()
    table["shoebox"] = dials_shoeboxes(table, data, mask)
    table["id"].fill(0)
    MaskCalculatorSimple(experiment, tuple(MODELS["simple6"].sigma(PARAMETERS).ravel()), 0.9973).compute(table)
    table.compute_background([experiment])
    table.compute_summed_intensity()
    codes = [flumpy.to_numpy(shoebox.mask) for shoebox in table["shoebox"]]
    foreground = np.array([((code & 5) == 5).sum() for code in codes])
    np.testing.assert_allclose(ours.n_foreground, foreground, atol=1)
    same = ours.n_foreground == foreground
    assert same.mean() > 0.995  # corners at the very edge of an ellipse
    np.testing.assert_array_equal(
        ours.n_background_used[same], np.array([(code & 16 > 0).sum() for code in codes])[same]
    )
    for mine, name in (
        (ours.level, "background.mean"),
        (ours.intensity, "intensity.sum.value"),
        (ours.variance, "intensity.sum.variance"),
        (ours.background, "background.sum.value"),
        (ours.background_variance, "background.sum.variance"),
    ):
        np.testing.assert_allclose(mine[same], flumpy.to_numpy(table[name])[same], rtol=1e-4, atol=1e-3)
    summed = flumpy.to_numpy(table.get_flags(table.flags.integrated_sum))
    np.testing.assert_array_equal((ours.failed[same] & shoeboxes.FAILED_SUMMATION) == 0, summed[same])
    assert 0.5 < summed.mean() < 1

    centroids = [shoebox.centroid_foreground_minus_background() for shoebox in table["shoebox"]]
    position = np.array([centroid.px.position[:2] for centroid in centroids])
    variance = np.array([centroid.px.std_err_sq[:2] for centroid in centroids])
    np.testing.assert_allclose(ours.centroid[same], position[same], atol=1e-3)
    np.testing.assert_allclose(ours.centroid_variance[same], variance[same], rtol=1e-3)


def test_saturated_pixels_are_flagged_and_few_pixels_give_no_background(still, predicted):
    panels, _, seen, panel, boxes = arrays(still, predicted)
    frame = Frame(still[1], still[2])
    limits = np.array([50.0, np.inf])
    found = shoeboxes.integrate_ellipses(panels, frame, panel, boxes, seen, LIMIT, 1.0, Background(), limits)
    overloaded = (found.failed & shoeboxes.OVERLOADED) != 0
    assert overloaded[panel == 0].any() and not overloaded[panel == 1].any()

    starved = Background(min_pixels=10**6)
    found = shoeboxes.integrate_ellipses(panels, frame, panel, boxes, seen, LIMIT, 1.0, starved)
    assert ((found.failed & shoeboxes.FAILED_BACKGROUND) != 0).all()
    assert (found.level == 0).all() and (found.n_background_used == 0).all()


def test_mean_background_is_the_mean(still, predicted):
    panels, _, seen, panel, boxes = arrays(still, predicted)
    flat = Frame([np.full((700, 500), 3, np.int32)] * 2, [np.ones((700, 500), bool)] * 2)
    for method in ("mean", "glm"):
        found = shoeboxes.integrate_ellipses(panels, flat, panel, boxes, seen, LIMIT, 1.0, Background(method))
        np.testing.assert_allclose(found.level, 3, rtol=0.05)  # equal counts are no Poisson sample
        if method == "mean":
            np.testing.assert_allclose(found.intensity, 0, atol=1e-9)


@pytest.mark.parametrize("mean", [0.05, 0.7, 3.0, 40.0, 5000.0])
def test_robust_mean_is_that_of_dials_and_ignores_outliers(mean):
    from dials.algorithms.background.glm import RobustPoissonMean
    from dials.array_family import flex

    rng = np.random.default_rng(int(mean * 100))
    counts = rng.poisson(mean, 600).astype(float)
    counts[:30] += 50 + 20 * mean
    expected = RobustPoissonMean(flex.double(counts), float(np.median(counts)) or 1.0, 1.345, 1e-3, 100)
    assert shoeboxes.robust_poisson_mean(counts) == pytest.approx(expected.mean(), rel=1e-6)
    assert shoeboxes.robust_poisson_mean(counts) == pytest.approx(mean, rel=0.15, abs=0.08)
    # counts divided by a gain are not whole numbers
    scaled = counts / 1.7
    expected = RobustPoissonMean(flex.double(scaled), float(np.sort(scaled)[300]) or 1.0, 1.345, 1e-3, 100)
    assert shoeboxes.robust_poisson_mean(scaled) == pytest.approx(expected.mean(), rel=1e-6)


def strong_spots(still, panels):
    """Boxes of 5 x 5 pixels around the brightest places of each panel, and directions a little off their centres."""
    rng = np.random.default_rng(7)
    panel, boxes = [], []
    for p, data in enumerate(still[1]):
        for at in np.argsort(data[5:-5, 5:-5].ravel())[:-400:-20]:
            y, x = np.unravel_index(at, (690, 490))
            boxes.append([x + 3, x + 8, y + 3, y + 8])
            panel.append(p)
    panel, boxes = np.array(panel), np.array(boxes, dtype=np.int32)
    mask = (rng.random((len(boxes), 25)) > 0.3).astype(np.uint8)
    mask[:, 12] = 1
    strong = shoeboxes.StrongPixels(panel, boxes, 25 * np.arange(len(boxes)), mask.ravel())
    centres = np.column_stack([boxes[:, :2].mean(axis=1), boxes[:, 2:].mean(axis=1)])
    directions = pixels_to_lab(panels, panel, centres + rng.normal(scale=0.5, size=centres.shape))
    return strong, directions / np.linalg.norm(directions, axis=1, keepdims=True)


def dials_table(strong, directions):
    from dials.array_family import flex
    from dxtbx import flumpy

    table = flex.reflection_table()
    table["panel"] = flumpy.from_numpy(strong.panel.astype(np.uint64))
    table["bbox"] = flex.int6([(*(int(v) for v in box), 0, 1) for box in strong.bbox])
    table["s1"] = flumpy.vec_from_numpy(directions)
    table["xyzobs.px.value"] = flex.vec3_double(len(table))
    return table


def test_angular_spread_is_that_of_dials(still):
    from dials.algorithms.profile_model.gaussian_rs.calculator import ComputeEsdBeamDivergence

    from ssx_mpi.stages.fast.fast_integration import panels_of

    experiment, data, _ = still
    panels = panels_of(experiment.detector)
    strong, directions = strong_spots(still, panels)
    table = dials_table(strong, directions)
    table["shoebox"] = dials_shoeboxes(table, data, [np.ones((700, 500), bool)] * 2)
    for k, shoebox in enumerate(table["shoebox"]):
        shoebox.mask.as_1d().set_selected(shoebox.mask.as_1d() > 0, 0)
        for i in np.nonzero(strong.mask[25 * k : 25 * k + 25])[0]:
            shoebox.mask[int(i)] = 5
    frame = Frame(data, still[2])
    expected = ComputeEsdBeamDivergence(experiment.detector, table).sigma()
    assert shoeboxes.angular_spread(panels, frame, strong, directions) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="no counts"):
        shoeboxes.angular_spread(panels, Frame([part * 0 for part in data], still[2]), strong, directions)


def test_circle_boxes_are_those_of_dials(still):
    from dials.algorithms.profile_model.gaussian_rs import BBoxCalculator

    from ssx_mpi.stages.fast.fast_integration import panels_of

    experiment = still[0]
    panels = panels_of(experiment.detector)
    strong, directions = strong_spots(still, panels)
    table = dials_table(strong, directions)
    args = experiment.crystal, experiment.beam, experiment.detector, None, None, 4e-3, 0
    from dials.array_family import flex

    expected = BBoxCalculator(*args)(table["s1"], flex.double(len(table), 0), table["panel"])
    found = shoeboxes.circle_boxes(panels, strong.panel, np.array(experiment.beam.get_s0()), directions, 4e-3)
    np.testing.assert_array_equal(found, [box[:4] for box in expected])


def test_shapes_of_strong_spots_are_the_moments_of_their_counts(still):
    from ssx_mpi.stages.fast.fast_integration import panels_of

    experiment, data, mask = still
    panels, s0 = panels_of(experiment.detector), np.array(experiment.beam.get_s0())
    strong, directions = strong_spots(still, panels)
    radius = 3e-3
    boxes = shoeboxes.circle_boxes(panels, strong.panel, s0, directions, 2 * radius)
    frame = Frame(data, mask)
    measured, found, moments = shoeboxes.measure_strong_spots(
        panels, frame, strong, boxes, s0, directions, radius, Background()
    )
    for k in range(0, len(boxes), 5):
        x0, x1, y0, y1 = boxes[k]
        y, x = np.mgrid[y0:y1, x0:x1]
        corners = np.stack([x + dx for dx in (0, 1, 0, 1)]), np.stack([y + dy for dy in (0, 0, 1, 1)])
        panel = np.full(corners[0].size, strong.panel[k])
        lab = pixels_to_lab(panels, panel, np.column_stack([corners[0].ravel(), corners[1].ravel()]).astype(float))
        lab /= np.linalg.norm(lab, axis=1, keepdims=True)
        axes = tangential_frames(directions[k : k + 1], s0)[0, :2]
        foreground = (np.linalg.norm(lab @ axes.T, axis=1).reshape(4, *x.shape) < radius).any(axis=0)
        sx0, sx1, sy0, sy1 = strong.bbox[k] - [x0, x0, y0, y0]
        foreground[sy0:sy1, sx0:sx1] |= strong.mask[25 * k : 25 * k + 25].reshape(5, 5) > 0
        use = foreground & mask[strong.panel[k]][y0:y1, x0:x1]
        counts = data[strong.panel[k]][y0:y1, x0:x1] - measured.level[k]
        use &= counts > 0
        weights = counts[use]
        centre = np.array([np.average(x[use] + 0.5, weights=weights), np.average(y[use] + 0.5, weights=weights)])
        np.testing.assert_allclose(measured.centroid[k], centre, atol=1e-6)
        direction = pixels_to_lab(panels, strong.panel[k : k + 1], centre[None])[0]
        np.testing.assert_allclose(found[k], direction / np.linalg.norm(direction), atol=1e-9)
        pixels = np.column_stack([x[use] + 0.5, y[use] + 0.5])
        lab = pixels_to_lab(panels, np.full(len(pixels), strong.panel[k]), pixels)
        plane = lab / np.linalg.norm(lab, axis=1, keepdims=True) * np.linalg.norm(s0)
        plane = plane @ tangential_frames(found[k : k + 1], s0)[0, :2].T
        covariance = np.cov(plane.T, aweights=weights, ddof=0)
        expected = [weights.sum(), *np.average(plane, axis=0, weights=weights), *covariance[np.triu_indices(2)]]
        np.testing.assert_allclose(moments[k], expected, rtol=1e-6, atol=1e-12)


class TestCalibratedPixels:
    """Photons with the noise of a readout, some of them below zero."""

    @pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
    @pytest.mark.parametrize("mean", [0.02, 0.3, 2.0, 30.0])
    def test_the_robust_mean_is_unbiased(self, mean, sigma):
        rng = np.random.default_rng(1)
        found = [
            shoeboxes.robust_noisy_mean(rng.poisson(mean, 150) + rng.normal(0, sigma, 150), sigma**2)
            for _ in range(400)
        ]
        error = np.sqrt((mean + sigma**2) / 150 / 400)
        # a robust mean is a little less certain than the mean, and the root is found to a thousandth of its sigma
        assert abs(np.mean(found) - mean) < 5 * error
        assert np.std(found) < 1.3 * np.sqrt((mean + sigma**2) / 150)

    def test_outliers_move_it_by_less_than_its_error(self):
        rng = np.random.default_rng(2)
        values = rng.poisson(0.5, 150) + rng.normal(0, 0.3, 150)
        clean = shoeboxes.robust_noisy_mean(values, 0.09)
        values[:3] += 1000.0
        assert abs(shoeboxes.robust_noisy_mean(values, 0.09) - clean) < 2 * np.sqrt(0.59 / 150)

    @given(st.lists(st.floats(-1e4, 1e6), min_size=1, max_size=40), st.floats(1e-4, 1e3))
    @settings(max_examples=200, deadline=None)
    def test_it_is_always_found_within_the_data(self, values, readout):
        found = shoeboxes.robust_noisy_mean(np.array(values), readout)
        assert min(values) - 1e-9 <= found <= max(values) + 1e-9

    def test_without_noise_it_is_that_of_counts(self):
        counts = np.random.default_rng(3).poisson(5.0, 200).astype(float)
        of_counts = shoeboxes.robust_poisson_mean(counts)
        assert shoeboxes.robust_noisy_mean(counts, 1e-4) == pytest.approx(of_counts, rel=2e-3)

    @pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
    def test_intensities_are_those_of_the_photons_and_their_errors_true(self, still, predicted, sigma):
        _, data, mask = still
        rng = np.random.default_rng(4)
        noisy = [part + rng.normal(0, sigma, part.shape) for part in data]
        whole = integrated(still, Frame(data, mask), predicted)
        found = integrated(still, Frame(noisy, mask, [sigma**2] * 2), predicted)
        assert not np.any(found.failed & shoeboxes.FAILED_BACKGROUND)
        good = (found.failed | whole.failed) & shoeboxes.FAILED_SUMMATION == 0
        difference = (found.intensity - whole.intensity)[good]
        # what the noise adds to the variance is what the difference scatters by
        added = (found.n_foreground * sigma**2 * (1 + found.n_foreground / found.n_background_used))[good]
        z = difference / np.sqrt(added)
        assert np.median(np.abs(z)) / 0.6745 == pytest.approx(1.0, abs=0.35)
        assert abs(np.median(z)) < 0.3
        assert np.all(found.variance[good] >= added)


def integrated(still, frame, predicted):
    """Reflections of the fixture `predicted` integrated on a frame."""
    panels, _, seen, panel, boxes = arrays(still, predicted)
    return shoeboxes.integrate_ellipses(panels, frame, panel, boxes, seen, LIMIT, 1.0, Background())
