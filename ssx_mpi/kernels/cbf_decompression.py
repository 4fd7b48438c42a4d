"""Decompression of CBF images stored by byte offsets."""

from __future__ import annotations

import numpy as np

from ssx_mpi.kernels._library import array, c_int64, declare

_byte_offset = declare(
    "ssx_cbf_byte_offset",
    [array(np.uint8, 1), c_int64, c_int64, array(np.int32, 1, writeable=True)],
    c_int64,
)


def decode_byte_offset(packed: np.ndarray, n_pixels: int) -> np.ndarray:
    """Pixels of an image compressed as x-CBF_BYTE_OFFSET.

    Each pixel is stored as its difference to the pixel before (the first one to 0) in one signed byte, or, where the
    difference does not fit, as the smallest number of that width followed by the next wider little-endian integer:
    2, 4, at last 8 bytes.

    Parameters
    ----------
    packed
        ``(n_bytes,) uint8``, from the first byte of data on; what follows the last pixel is ignored.
    n_pixels
        Number of pixels to decode.

    Returns
    -------
    ``(n_pixels,) int32``

    Raises
    ------
    ValueError
        When the bytes end before the last pixel.

    References
    ----------
    Bernstein, H. J. & Hammersley, A. P. (2005). International Tables for Crystallography G, chapter 2.3; CBFlib manual,
    byte_offset compression.
    """
    pixels = np.empty(n_pixels, np.int32)
    done = _byte_offset(packed, len(packed), n_pixels, pixels)
    if done != n_pixels:
        raise ValueError(f"compressed data end after {done} of {n_pixels} pixels")
    return pixels
