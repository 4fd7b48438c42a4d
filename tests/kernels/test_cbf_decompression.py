"""Byte-offset decompression against dxtbx's compressor."""

import numpy as np
import pytest
from dxtbx import flumpy
from dxtbx.ext import compress
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ssx_mpi.kernels.cbf_decompression import decode_byte_offset

INT32 = np.iinfo(np.int32)
# differences on both sides of every change of width
STEPS = [0, 1, -1, 126, 127, 128, -127, -128, -129, 32767, 32768, -32767, -32768, -32769]
steps = st.sampled_from(STEPS) | st.integers(-300, 300) | st.integers(-40000, 40000)


# dxtbx's compressor ends the process where neighbours differ by this much, which is an assertion of its own
NOT_FOR_DXTBX = -(2**27)


def packed(pixels):
    image = flumpy.from_numpy(np.ascontiguousarray(pixels.reshape(1, -1)))
    return np.frombuffer(compress(image), np.uint8)


@settings(max_examples=200, deadline=None)
@given(hnp.arrays(np.int32, st.integers(1, 60), elements=steps))
def test_differences_of_all_widths(differences):
    pixels = np.cumsum(differences, dtype=np.int32)
    assert np.array_equal(decode_byte_offset(packed(pixels), len(pixels)), pixels)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.int32, st.integers(1, 40), elements=st.integers(INT32.min // 2, INT32.max // 2)))
def test_any_values(pixels):
    assume(NOT_FOR_DXTBX not in np.diff(pixels.astype(np.int64), prepend=0))
    assert np.array_equal(decode_byte_offset(packed(pixels), len(pixels)), pixels)


def test_a_difference_that_dxtbx_cannot_write():
    data = b"\x80\x00\x80" + NOT_FOR_DXTBX.to_bytes(4, "little", signed=True) + b"\x05"
    assert decode_byte_offset(np.frombuffer(data, np.uint8), 2).tolist() == [NOT_FOR_DXTBX, NOT_FOR_DXTBX + 5]


def test_differences_of_eight_bytes():
    """From the lowest to the highest int32 and back; what follows the last pixel is ignored."""
    wide = b"\x80\x00\x80\x00\x00\x00\x80"
    span = INT32.max - INT32.min
    first = wide + INT32.min.to_bytes(8, "little", signed=True)
    data = first + wide + span.to_bytes(8, "little") + wide + (-span).to_bytes(8, "little", signed=True) + b"\x07\x07"
    pixels = decode_byte_offset(np.frombuffer(data, np.uint8), 3)
    assert pixels.tolist() == [INT32.min, INT32.max, INT32.min]


@pytest.mark.parametrize("n_missing", [1, 2, 7, 8])
def test_truncated_data_are_refused(n_missing):
    data = packed(np.array([1, 2, 3, 100000, 5, 6, 40000], np.int32))
    with pytest.raises(ValueError, match="of 7 pixels"):
        decode_byte_offset(data[:-n_missing], 7)
