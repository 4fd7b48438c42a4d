"""Frames: what dxtbx reads, and what becomes of damaged files."""

import numpy as np
import pytest
from dxtbx import flumpy
from dxtbx.format.image import ImageBool
from dxtbx.format.Registry import get_format_class_for_file
from dxtbx.model.experiment_list import ExperimentListFactory
from in_memory_images import imageset_in_memory

from ssx_mpi.images import frames
from ssx_mpi.images.frames import BadImage, FrameReader


@pytest.fixture(scope="module")
def hit_file(thaumatin_images):
    return thaumatin_images / "thau_3_2_0012.cbf"


def imageset_of(path):
    return get_format_class_for_file(str(path)).get_imageset([str(path)], as_imageset=True)


@pytest.mark.parametrize("share_with_dxtbx", [False, True])
def test_pixels_and_masks_are_those_of_dxtbx(hit_file, share_with_dxtbx):
    frame = FrameReader(share_with_dxtbx)(imageset_of(hit_file))
    reference = imageset_of(hit_file)
    assert frame.image == str(hit_file)
    assert frame.data == frame.raw
    assert np.array_equal(frame.raw[0], flumpy.to_numpy(reference.get_raw_data(0)[0]))
    assert np.array_equal(frame.masks[0], flumpy.to_numpy(reference.get_mask(0)[0]))
    # gaps, and values beyond the trusted range, are there to be masked
    assert 0.05 < 1 - frame.masks[0].mean() < 0.2


def test_masks_of_later_images_do_not_come_from_dxtbx(thaumatin_images, hit_file, monkeypatch):
    reader = FrameReader()
    reader(imageset_of(hit_file))
    monkeypatch.setattr(frames, "_dxtbx_masks", lambda *_: pytest.fail("dxtbx was asked for a mask"))
    later = thaumatin_images / "thau_3_2_0001.cbf"
    mask = reader(imageset_of(later)).masks[0]
    assert np.array_equal(mask, flumpy.to_numpy(imageset_of(later).get_mask(0)[0]))


def test_images_of_a_sequence_keep_their_number(thaumatin_images):
    paths = [str(thaumatin_images / f"thau_3_2_{n:04d}.cbf") for n in (3, 4)]
    imageset = ExperimentListFactory.from_filenames(paths)[0].imageset
    frame = FrameReader()(imageset, 1)
    assert frame.image == paths[1]
    assert frame.array_index == 3


def test_shared_frames_are_not_read_again_by_dxtbx(hit_file, tmp_path):
    """The file is gone, and dxtbx still has the image."""
    path = tmp_path / "only_0001.cbf"
    path.write_bytes(hit_file.read_bytes())
    imageset = imageset_of(path)
    frame = FrameReader(share_with_dxtbx=True)(imageset)
    path.unlink()
    assert np.array_equal(flumpy.to_numpy(imageset.get_raw_data(0)[0]), frame.raw[0])


def test_gain_and_pedestal_as_dxtbx_applies_them():
    raw = np.random.default_rng(0).poisson(50, (30, 40)).astype(np.int32)
    imageset = imageset_in_memory(raw, gain=2.5, pedestal=4.0)
    frame = FrameReader()(imageset)
    assert frame.data[0].dtype == np.float64
    assert np.array_equal(frame.data[0], flumpy.to_numpy(imageset.get_corrected_data(0)[0]))
    assert frame.data[0].mean() == pytest.approx((raw.mean() - 4) / 2.5)
    assert np.array_equal(frame.masks[0], flumpy.to_numpy(imageset.get_mask(0)[0]))


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_panels_with_rectangles_and_a_mask_from_the_file(dtype):
    rng = np.random.default_rng(1)
    panels = [rng.integers(-3, 15, (20, 30)).astype(dtype) for _ in range(3)]
    imageset = imageset_in_memory(*panels, trusted_range=(-1, 10))
    imageset.get_detector(0)[1].add_mask(5, 2, 9, 12)
    given = rng.random((20, 30)) > 0.2
    reader = FrameReader()
    # a second mask, also without a file name, is another mask
    for third_panel in (given, ~given):
        tiles = tuple(flumpy.from_numpy(m) for m in (given, given, third_panel))
        imageset.external_lookup.mask.data = ImageBool(tiles)
        found = reader(imageset).masks
        expected = imageset.get_mask(0)
        assert all(np.array_equal(f, flumpy.to_numpy(e)) for f, e in zip(found, expected, strict=True))
        assert not found[1][2:12, 5:9].any()
        assert np.array_equal(found[2] & third_panel, found[2])


def test_masks_come_from_dxtbx_where_it_has_rules_of_its_own(monkeypatch):
    raw = np.ones((4, 5), np.int32)
    imageset = imageset_in_memory(raw)
    odd = np.arange(20).reshape(4, 5) % 2 == 1
    monkeypatch.setattr(frames, "_dxtbx_masks", lambda *_: (odd,))
    reader = FrameReader()
    assert reader(imageset).masks[0] is odd
    assert reader(imageset).masks[0] is odd


def damaged(content, how):
    header = content.index(b"\x0c\x1a\x04\xd5")
    return {
        "cut in the header": content[: header // 2],
        "cut before the data": content[:header],
        "cut in the data": content[: len(content) // 2],
        "cut at the last bytes": content[: header + 6_223_900],
        "another size": content.replace(b"Fastest-Dimension: 2463", b"Fastest-Dimension: 2462"),
        "an impossible size": content.replace(b"Second-Dimension: 2527", b"Second-Dimension: 2527000000000"),
        "no size": content.replace(b"X-Binary-Size-Second", b"Y-Binary-Size-Second"),
        "empty": b"",
        "rubbish": np.random.default_rng(0).bytes(100_000),
    }[how]


@pytest.mark.parametrize("share_with_dxtbx", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("cut in the header", "truncated"),
        ("cut before the data", "truncated"),
        ("cut in the data", "truncated"),
        ("cut at the last bytes", "truncated"),
        ("another size", "does not fit the detector"),
        ("an impossible size", "truncated"),
        ("no size", "damaged"),
        ("empty", "cannot be read"),
        ("rubbish", "cannot be read"),
    ],
)
def test_bad_images_are_one_kind_of_exception(hit_file, tmp_path, how, reason, share_with_dxtbx):
    path = tmp_path / "bad_0001.cbf"
    path.write_bytes(hit_file.read_bytes())
    imageset = imageset_of(path)
    path.write_bytes(damaged(path.read_bytes(), how))
    reader = FrameReader(share_with_dxtbx)
    with pytest.raises(BadImage) as caught:
        reader(imageset)
    assert caught.value.image == str(path)
    assert str(path) in str(caught.value)
    if not share_with_dxtbx:
        assert caught.value.reason == reason
    # the reader goes on with the next image
    assert reader(imageset_of(hit_file)).raw[0].shape == (2527, 2463)


def test_missing_file_is_a_bad_image(hit_file, tmp_path):
    path = tmp_path / "gone_0001.cbf"
    path.write_bytes(hit_file.read_bytes())
    imageset = imageset_of(path)
    path.unlink()
    with pytest.raises(BadImage, match=r"cannot be read .*FileNotFoundError"):
        FrameReader()(imageset)


def test_rejected_image_is_a_bad_image():
    imageset = imageset_in_memory(np.zeros((10, 12), np.int32))
    imageset.mark_for_rejection(0, True)
    with pytest.raises(BadImage, match="marked for rejection"):
        FrameReader()(imageset)


def test_panels_of_another_shape_are_a_bad_image():
    with pytest.raises(BadImage, match="does not fit the detector"):
        FrameReader()(imageset_in_memory(np.zeros((10, 12), np.int32), shape=(12, 10)))


class TestReadoutNoise:
    """Pixels that are photons with noise, and pixels that are counts."""

    @pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0])
    @pytest.mark.parametrize("mean", [0.05, 0.5])
    def test_its_variance_is_that_of_the_pixels_without_a_photon(self, sigma, mean):
        rng = np.random.default_rng(1)
        data = rng.poisson(mean, (300, 300)) + rng.normal(0, sigma, (300, 300))
        found = frames.readout_variance(data, np.ones(data.shape, bool))
        assert found == pytest.approx(sigma**2, rel=0.15)

    def test_counts_have_none(self):
        counts = np.random.default_rng(2).poisson(1.0, (300, 300))
        everywhere = np.ones(counts.shape, bool)
        assert frames.readout_variance(counts.astype(np.int32), everywhere) == 0
        assert frames.readout_variance(counts.astype(np.float64), everywhere) == 0

    def test_masked_pixels_and_a_few_bad_ones_do_not_count(self):
        data = np.random.default_rng(3).poisson(1.0, (300, 300)).astype(np.float64)
        data[:50] = -1.0
        data[60, :80] = -5.0
        good = np.ones(data.shape, bool)
        good[:50] = False
        assert frames.readout_variance(data, good) == 0
