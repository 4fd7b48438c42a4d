"""Spots of the fast finder: the table that DIALS makes, column by column."""

import copy
import pickle

import libtbx.phil
import numpy as np
import pytest
from dials.array_family import flex
from dials.command_line.find_spots import phil_scope
from dxtbx import flumpy
from dxtbx.model import ExperimentList
from dxtbx.model.experiment_list import ExperimentListFactory
from in_memory_images import imageset_in_memory

from ssx_mpi.images.frames import BadImage, FrameReader
from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder

SIZES = "spotfinder.filter.min_spot_size=3\nspotfinder.filter.max_spot_size=20\n"


def params_from(text):
    return phil_scope.fetch(libtbx.phil.parse(text)).extract()


@pytest.fixture(scope="module")
def still(thaumatin_images):
    """Function of the image number: its experiment."""

    def load(number):
        experiments = ExperimentListFactory.from_filenames([str(thaumatin_images / f"thau_3_2_{number:04d}.cbf")])
        experiments[0].identifier = f"still-{number}"
        return experiments[0]

    return load


def spots_by_dials(experiment, params):
    return flex.reflection_table.from_observations(ExperimentList([experiment]), copy.deepcopy(params), is_stills=True)


def assert_same_table(found, expected):
    assert set(found.keys()) == {*expected.keys(), "n_signal"}
    assert dict(found.experiment_identifiers()) == dict(expected.experiment_identifiers())
    for name in expected:
        if name != "shoebox":
            assert list(found[name]) == list(expected[name]), name
    for a, b in zip(found["shoebox"], expected["shoebox"], strict=True):
        assert (a.panel, a.bbox) == (b.panel, b.bbox)
        for pixels in ("data", "mask", "background"):
            assert (getattr(a, pixels) == getattr(b, pixels)).all_eq(True), pixels


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (2, ""),
        (12, ""),
        (16, ""),
        (12, "spotfinder.threshold.algorithm=dispersion\nspotfinder.threshold.dispersion.gain=0.7\n"),
        (
            12,
            "spotfinder.filter{d_min=2.5\nd_max=20\nresolution_range=4,4.5\nborder=30\n"
            "untrusted{circle=1200,1200,100\n}\nuntrusted{polygon=100,100,900,100,900,900,200,800\n}\n"
            "max_separation=0.5\n}\n",
        ),
        (
            12,
            "spotfinder.region_of_interest=700,1800,600,1500\n"
            "spotfinder.threshold.dispersion{kernel_size=4,2\nsigma_strong=4\nsigma_background=5\nmin_local=30\n"
            "global_threshold=20\n}\n",
        ),
        (12, "spotfinder.filter.min_spot_size=Auto\nspotfinder.filter.max_spot_size=1000\n"),
    ],
)
def test_same_table_as_dials(still, number, text):
    params = params_from(SIZES + text)
    assert FastSpotFinder.supports(params) == (True, "")
    experiment = still(number)
    expected = spots_by_dials(experiment, params)
    found = FastSpotFinder(params).find(experiment, FrameReader()(experiment.imageset))
    assert len(expected) > 50 or number == 16
    assert_same_table(found, expected)
    assert list(found["n_signal"]) == list(found["shoebox"].count_mask_values(5))


def test_user_mask_is_honoured(still, tmp_path):
    experiment = still(12)
    masked = np.ones((2527, 2463), bool)
    masked[:1200] = False
    path = tmp_path / "half.mask"
    path.write_bytes(pickle.dumps((flumpy.from_numpy(masked),)))
    params = params_from(SIZES + f"spotfinder.lookup.mask={path}\n")
    found = FastSpotFinder(params).find(experiment, FrameReader()(experiment.imageset))
    assert_same_table(found, spots_by_dials(experiment, params))
    assert min(found["xyzobs.px.value"].parts()[1]) > 1200
    path.write_bytes(pickle.dumps(flumpy.from_numpy(masked[1:])))
    with pytest.raises(ValueError, match=r"lookup\.mask"):
        FastSpotFinder(params).find(experiment, FrameReader()(experiment.imageset))


def test_masks_follow_the_geometry(still):
    """The resolution limit moves when the detector is moved, also in place."""
    params = params_from(SIZES + "spotfinder.filter{d_min=3\ndisable_parallax_correction=True\n}\n")
    finder, reader = FastSpotFinder(params), FrameReader()
    experiment = still(12)
    frame = reader(experiment.imageset)
    near = finder.find(experiment, frame)
    assert_same_table(near, spots_by_dials(experiment, params))
    panel = experiment.imageset.get_detector()[0]
    x, y, z = panel.get_origin()
    panel.set_frame(panel.get_fast_axis(), panel.get_slow_axis(), (x, y, z * 1.3))
    far = finder.find(experiment, frame)
    assert_same_table(far, spots_by_dials(experiment, params))
    assert len(far) > len(near) > 50


def test_spots_of_a_multipanel_detector():
    """Three panels in memory; the same spot on each is reported on each."""
    image = np.random.default_rng(0).poisson(2, (60, 80)).astype(np.int32)
    image[30:33, 40:43] += 60
    for kind in (np.int32, np.float64):
        imageset = imageset_in_memory(*[image.astype(kind)] * 3)
        experiment = ExperimentListFactory.from_imageset_and_crystal(imageset, None)[0]
        params = params_from(SIZES)
        found = FastSpotFinder(params).find(experiment, FrameReader()(imageset))
        assert_same_table(found, spots_by_dials(experiment, params))
        assert list(found["panel"]) == [0, 1, 2]
        assert set(found["xyzobs.px.value"].parts()[0]) == {found["xyzobs.px.value"][0][0]}


def test_blank_has_an_empty_table_with_all_columns():
    imageset = imageset_in_memory(np.zeros((60, 80), np.int32))
    experiment = ExperimentListFactory.from_imageset_and_crystal(imageset, None)[0]
    params = params_from(SIZES)
    found = FastSpotFinder(params).find(experiment, FrameReader()(imageset))
    assert len(found) == 0
    assert_same_table(found, spots_by_dials(experiment, params))


def test_spots_of_dials_3_30(real_data, thaumatin_images):
    """Without erosion beside masked pixels, every spot that DIALS 3.30 indexed is found, with the same pixels."""
    with np.load(real_data / "thaumatin_dials_3_30" / "indexed.npz") as columns:
        first = columns["id"] == 0
        centroids, n_signal = columns["xyzobs.px.value"][first], columns["n_signal"][first]
    experiment = ExperimentListFactory.from_filenames([str(thaumatin_images / "thau_3_2_0001.cbf")])[0]
    params = params_from("spotfinder.filter.min_spot_size=3\n")
    found = FastSpotFinder(params, erode_beside_masked=False).find(experiment, FrameReader()(experiment.imageset))
    ours = np.array(found["xyzobs.px.value"])
    distance = np.linalg.norm(centroids[:, None, :2] - ours[None, :, :2], axis=2)
    assert len(centroids) > 250
    assert distance.min(axis=1).max() < 1e-6
    assert np.array_equal(np.array(found["n_signal"])[distance.argmin(axis=1)], n_signal)


def test_too_many_strong_pixels_is_a_bad_image(still):
    params = params_from(SIZES + "spotfinder.filter.max_strong_pixel_fraction=0.0001\n")
    experiment = still(2)
    with pytest.raises(RuntimeError, match="number of strong pixels"):
        spots_by_dials(experiment, params)
    with pytest.raises(BadImage) as caught:
        FastSpotFinder(params).find(experiment, FrameReader()(experiment.imageset))
    assert caught.value.reason == "too many strong pixels"


@pytest.mark.parametrize(
    "text",
    [
        "spotfinder.threshold.algorithm=radial_profile",
        "spotfinder.threshold.dispersion.global_threshold=Auto",
        "spotfinder.filter.background_gradient.filter=True",
        "spotfinder.filter.spot_density.filter=True",
        "spotfinder.compute_mean_background=True",
        "spotfinder.write_hot_mask=True",
        "spotfinder.scan_range=1,2",
        "maximum_trusted_value=100",
        "output.shoeboxes=False",
    ],
)
def test_what_is_not_covered_is_refused_by_name(text):
    params = params_from(text)
    supported, reason = FastSpotFinder.supports(params)
    assert not supported
    assert text.split("=")[0].removeprefix("spotfinder.") in reason
    with pytest.raises(ValueError, match="does not do"):
        FastSpotFinder(params)


def test_contradicting_resolution_limits_are_refused():
    with pytest.raises(ValueError, match="is above d_max"):
        FastSpotFinder(params_from("spotfinder.filter{d_min=3\nd_max=2\n}"))


def test_parameters_are_left_as_they_were(still):
    params = params_from("spotfinder.filter.untrusted.rectangle=0,100,0,100\n")
    before = phil_scope.format(params).as_str()
    experiment = still(16)
    FastSpotFinder(params).find(experiment, FrameReader()(experiment.imageset))
    assert phil_scope.format(params).as_str() == before
