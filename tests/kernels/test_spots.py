"""Strong pixels: against DIALS's own threshold objects, against the definition, and by symmetry."""

import numpy as np
import pytest
from dials.algorithms.image import threshold
from dials.array_family import flex
from dxtbx import flumpy
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ssx_mpi import dials_compat
from ssx_mpi.kernels.spots import DispersionCriteria, StrongPixelFinder, groups_of_size, trusted_pixels

THIS_DIALS_ERODES_BESIDE_MASKED = dials_compat.dials_version() < (3, 24)


def strong_by_dials(image, mask, criteria, with_gain):
    kind = threshold.DispersionExtendedThreshold if criteria.extended else threshold.DispersionThreshold
    algorithm = kind(
        image.shape,
        criteria.kernel_size,
        criteria.sigma_background,
        criteria.sigma_strong,
        criteria.global_threshold,
        criteria.min_local,
    )
    values, valid = flumpy.from_numpy(image.astype(float)), flumpy.from_numpy(mask)
    strong = flex.bool(flex.grid(image.shape))
    if with_gain:
        algorithm(values, valid, flex.double(values.accessor(), criteria.gain), strong)
    else:
        algorithm(values, valid, strong)
    return np.flatnonzero(flumpy.to_numpy(strong))


def strong_by_definition(image, mask, criteria):
    """The equations of the module, written with the filters of scipy."""
    c = criteria

    def window_sum(values, extension):
        size = [2 * (k + extension) + 1 for k in c.kernel_size]
        return ndimage.convolve(values.astype(float), np.ones(size), mode="constant")

    m, x, y = window_sum(mask, 0), window_sum(mask * image, 0), window_sum(mask * image.astype(float) ** 2, 0)
    few = np.maximum(m - 1, 0)
    min_local = c.min_local if c.min_local > 0 else c.window_size
    enough = mask & (m >= min_local) & (x >= 0)
    dispersed = enough & (m * y - x * x > c.gain * x * (m - 1 + c.sigma_background * np.sqrt(2 * few)))
    bright = mask & (image > c.global_threshold)
    if not c.extended:
        return np.flatnonzero(dispersed & bright & (m * image - x > c.sigma_strong * np.sqrt(c.gain * x * m)))
    square = np.ones([2 * min(c.kernel_size) - 1] * 2)
    no_background = dispersed if c.erode_beside_masked else dispersed | ~mask
    signal = dispersed & ndimage.binary_erosion(no_background, square, border_value=1)
    background = mask & ~signal
    m, x = np.rint(window_sum(background, 2)), np.rint(window_sum(background * image, 2))
    mean = np.where(m >= 2, x / np.maximum(m, 1), 0)
    return np.flatnonzero(signal & bright & (image >= mean + c.sigma_strong * np.sqrt(c.gain * np.maximum(mean, 0))))


@st.composite
def images(draw, spots=True):
    """Flat or sloping background with spots, masked pixels and gaps between modules."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ny, nx = draw(st.integers(1, 70)), draw(st.integers(1, 90))
    background = draw(st.sampled_from([0.0, 0.02, 0.5, 4.0, 60.0, 3000.0]))
    slope = np.linspace(1, draw(st.sampled_from([1.0, 3.0])), nx)
    expected = background * np.broadcast_to(slope, (ny, nx)).copy()
    rows, columns = np.mgrid[:ny, :nx]
    for _ in range(draw(st.integers(0, 6)) if spots else 0):
        y, x, width = rng.uniform(0, ny), rng.uniform(0, nx), rng.uniform(0.4, 3)
        height = rng.choice([5, 50, 2000, 30000]) * (1 + background / 20)
        expected += height * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2))
    image = rng.poisson(expected).astype(np.int32)
    mask = rng.random((ny, nx)) > draw(st.sampled_from([0.0, 0.0, 0.01, 0.4]))
    if draw(st.booleans()):
        gap, at = draw(st.integers(1, 8)), draw(st.integers(0, nx))
        mask[:, at : at + gap] = False
    return image, mask


@st.composite
def criteria_of_dials(draw, **fixed):
    kernel_size = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)) | st.just((3, 3)))
    largest = (2 * kernel_size[0] + 1) * (2 * kernel_size[1] + 1)
    return DispersionCriteria(
        **{
            "extended": draw(st.booleans()),
            "kernel_size": kernel_size,
            "gain": draw(st.sampled_from([1.0, 1.0, 0.5, 2.7])),
            # not round numbers: where both sides of a test are equal, rounding decides
            "sigma_background": draw(st.sampled_from([6.0, 1.0, 2.9, 0.013])),
            "sigma_strong": draw(st.sampled_from([3.0, 0.017, 1.03, 5.0])),
            "min_local": draw(st.sampled_from([2, 2, 0, 5, largest])),
            "global_threshold": draw(st.sampled_from([0.0, 0.0, 3.0, 100.0])),
            "erode_beside_masked": draw(st.booleans()),
            **fixed,
        }
    )


@settings(max_examples=300, deadline=None)
@given(images(), criteria_of_dials(erode_beside_masked=THIS_DIALS_ERODES_BESIDE_MASKED), st.booleans())
def test_same_as_dials(sample, criteria, as_float):
    image, mask = sample
    found = StrongPixelFinder(image.shape, criteria)(image.astype(float) if as_float else image, mask)
    assert np.array_equal(found, strong_by_dials(image, mask, criteria, with_gain=criteria.gain != 1))


@settings(max_examples=150, deadline=None)
@given(images(), criteria_of_dials())
def test_same_as_definition(sample, criteria):
    image, mask = sample
    found = StrongPixelFinder(image.shape, criteria)(image, mask)
    assert np.array_equal(found, strong_by_definition(image, mask, criteria))


@settings(max_examples=50, deadline=None)
@given(images(), criteria_of_dials())
def test_turning_the_image_turns_the_strong_pixels(sample, criteria):
    image, mask = sample

    def strong_map(image, mask, kernel_size):
        turned = DispersionCriteria(**{**vars(criteria), "kernel_size": kernel_size})
        found = np.zeros(image.size, bool)
        found[StrongPixelFinder(image.shape, turned)(np.ascontiguousarray(image), np.ascontiguousarray(mask))] = True
        return found.reshape(image.shape)

    upright = strong_map(image, mask, criteria.kernel_size)
    assert np.array_equal(strong_map(image.T, mask.T, criteria.kernel_size[::-1]).T, upright)
    assert np.array_equal(strong_map(image[::-1, ::-1], mask[::-1, ::-1], criteria.kernel_size)[::-1, ::-1], upright)


@pytest.mark.parametrize("extended", [True, False])
def test_values_beyond_single_precision_and_int16(extended):
    """Hot pixels of every size, 2^24 (which DIALS leaves out of the sums) among them, on a high background."""
    rng = np.random.default_rng(1)
    image = rng.poisson(20000, (120, 130)).astype(np.int32)
    for value in (30000, 2**17, 2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1):
        image[tuple(rng.integers(0, 120, 2))] = value
    image[60:64, 60:64] += 5000
    criteria = DispersionCriteria(extended=extended, erode_beside_masked=THIS_DIALS_ERODES_BESIDE_MASKED)
    mask = np.ones(image.shape, bool)
    found = StrongPixelFinder(image.shape, criteria)(image, mask)
    assert len(found) >= 16
    assert np.array_equal(found, strong_by_dials(image, mask, criteria, with_gain=False))


def test_masked_values_do_not_matter():
    rng = np.random.default_rng(2)
    image = rng.poisson(3, (60, 60)).astype(np.int32)
    image[20:24, 20:24] += 100
    mask = rng.random(image.shape) > 0.1
    finder = StrongPixelFinder(image.shape, DispersionCriteria())
    expected = finder(image, mask)
    for rubbish in (-(2**31), -1, 2**31 - 1):
        assert np.array_equal(finder(np.where(mask, image, np.int32(rubbish)), mask), expected)
    assert np.array_equal(finder(np.where(mask, image, np.nan), mask), expected)


def test_signal_beside_a_gap_is_kept_unless_eroded():
    image = np.random.default_rng(3).poisson(2, (40, 40)).astype(np.int32)
    image[18:22, 16:20] += 200
    mask = np.ones(image.shape, bool)
    mask[:, 20:27] = False

    def n_strong(beside):
        return len(StrongPixelFinder(image.shape, DispersionCriteria(erode_beside_masked=beside))(image, mask))

    assert n_strong(False) == 16
    assert n_strong(True) == 8


def test_work_space_carries_nothing_over():
    rng = np.random.default_rng(4)
    blank, mask = rng.poisson(1, (50, 60)).astype(np.int32), np.ones((50, 60), bool)
    hit = blank.copy()
    hit[10:15, 10:15] += 300
    finder = StrongPixelFinder(blank.shape, DispersionCriteria())
    first = finder(hit, mask)
    assert len(finder(blank, mask)) == 0 < len(first)
    assert np.array_equal(finder(hit, mask), first)


def test_wrong_shape_and_criteria_are_refused():
    finder = StrongPixelFinder((5, 6), DispersionCriteria())
    with pytest.raises(ValueError, match="shape"):
        finder(np.zeros((6, 5), np.int32), np.ones((6, 5), bool))
    for wrong in (
        {"kernel_size": (0, 3)},
        {"gain": 0.0},
        {"min_local": 1},
        {"min_local": 50},
        {"global_threshold": -1.0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DispersionCriteria(**wrong)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 30),
    st.integers(1, 30),
    st.floats(0.05, 0.95),
    st.integers(1, 6),
    st.data(),
)
def test_groups_are_those_of_scipy(seed, ny, nx, fraction, smallest, data):
    largest = data.draw(st.integers(smallest, 40))
    strong = np.random.default_rng(seed).random((ny, nx)) < fraction
    label, _ = ndimage.label(strong)
    size = np.bincount(label.ravel())[label]
    expected = np.flatnonzero(strong & (size >= smallest) & (size <= largest))
    assert np.array_equal(groups_of_size(np.flatnonzero(strong).astype(np.int32), nx, smallest, largest), expected)


def test_trusted_range_includes_its_ends():
    raw = np.array([[-2, -1, 0, 9, 10, 11]], np.int32)
    valid = np.array([[True, True, False, True, True, True]])
    expected = [False, True, False, True, True, False]
    assert trusted_pixels(raw, valid, -1, 10)[0][0].tolist() == expected
    assert trusted_pixels(raw.astype(float), valid, -1, 10)[0][0].tolist() == expected
    assert trusted_pixels(raw, valid, -1, 10)[1] == trusted_pixels(raw.astype(float), valid, -1, 10)[1] == 1
    assert trusted_pixels(raw, valid, -1, 8)[1] == 3
    # limits beyond int32, as formats without an upper limit give them
    assert trusted_pixels(raw, valid, -1e20, 1e20)[0][0].tolist() == valid[0].tolist()
    assert trusted_pixels(raw, valid, -1.5, 9.5)[0][0].tolist() == [False, True, False, True, False, False]
