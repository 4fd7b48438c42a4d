r"""Strong pixels of a still, found by the dispersion of counts around them.

Photons are counted: over a flat background the variance of the counts equals their mean. Around a pixel, in a window of
:math:`(2 k_x + 1) \times (2 k_y + 1)` pixels, let :math:`m` be the number of valid pixels, :math:`x` the sum of their
values and :math:`y` the sum of the squares. The index of dispersion, variance over mean, is

.. math:: D = \frac{m y - x^2}{(m - 1)\, x},

and for a flat background :math:`(m - 1) D` follows :math:`\chi^2` with :math:`m - 1` degrees of freedom, so that
:math:`D` has the mean 1 and the standard deviation :math:`\sqrt{2 / (m - 1)}`. A pixel is *dispersed* when
:math:`D > g\,(1 + n_b \sqrt{2 / (m - 1)})`, with the gain :math:`g`, multiplied out so that nothing is divided by zero:

.. math:: m y - x^2 > g\, x \left( m - 1 + n_b \sqrt{2 (m - 1)} \right).

``dispersion`` calls a dispersed pixel of value :math:`v` strong when it stands out of its own window,
:math:`m v - x > n_s \sqrt{g\, x\, m}`, and is above the global threshold.

``dispersion_extended`` first decides which pixels belong to signal: the dispersed ones that have no background within
:math:`\min(k_x, k_y) - 1` pixels (an erosion: a window sees a spot from afar). The mean :math:`\mu = x / m` is then
taken from what is not signal, in a window that is two pixels wider on each side, and a signal pixel is strong when
:math:`v \ge \mu + n_s \sqrt{g \mu}` and above the global threshold.

The cost is in visiting every pixel. Here a first pass in 32-bit integers and single precision only lists the pixels
whose window *may* be dispersed, erring on the safe side; everything after it works on that list, in double precision,
and is skipped where there is nothing. A blank image is done after the first pass.

References
----------
Winter, G. et al. (2018). Acta Cryst. D74, 85-97, sections 2.3 and following (spot finding in DIALS).
Parkhurst, J. M. (2020). PhD thesis, University of Cambridge, chapter 3 (dispersion_extended).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int, c_int64, declare

_GEOMETRY_AND_CRITERIA = [c_int64] * 4 + [c_double] * 4 + [c_int64, c_int, c_int]
_WORK = [array(dtype, 1, writeable=True) for dtype in (np.uint8, np.float64, np.uint8, np.int32)]
_DISPERSION = {
    np.dtype(dtype): declare(
        f"ssx_dispersion_{np.dtype(dtype).name}",
        [array(dtype, 2), array(np.uint8, 2), *_GEOMETRY_AND_CRITERIA, array(dtype, 1, writeable=True), *_WORK],
        c_int64,
    )
    for dtype in (np.int32, np.float64)
}
_groups_of_size = declare(
    "ssx_groups_of_size",
    [array(np.int32, 1, writeable=True), c_int64, c_int64, c_int64, c_int64] + [array(np.int32, 1, writeable=True)] * 2,
    c_int64,
)
_trusted_int32 = declare(
    "ssx_trusted_int32",
    [array(np.int32), array(np.uint8), c_int64, c_int, c_int, array(np.uint8, writeable=True)],
    c_int64,
)
_trusted_float64 = declare(
    "ssx_trusted_float64",
    [array(np.float64), array(np.uint8), c_int64, c_double, c_double, array(np.uint8, writeable=True)],
    c_int64,
)

INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class DispersionCriteria:
    """What makes a pixel strong; names and defaults are those of DIALS.

    Attributes
    ----------
    extended
        ``dispersion_extended`` rather than ``dispersion``.
    kernel_size
        Half widths of the window along slow and fast, in pixels, without the central pixel.
    gain
        Counts per photon.
    sigma_background, sigma_strong
        :math:`n_b` and :math:`n_s` above.
    min_local
        Fewest valid pixels in the window; 0 or less asks for all of them.
    global_threshold
        A strong pixel is above this value.
    erode_beside_masked
        Masked pixels count as background in the erosion, which loses the signal beside them (DIALS before 3.24).
    """

    extended: bool = True
    kernel_size: tuple[int, int] = (3, 3)
    gain: float = 1.0
    sigma_background: float = 6.0
    sigma_strong: float = 3.0
    min_local: int = 2
    global_threshold: float = 0.0
    erode_beside_masked: bool = False

    def __post_init__(self):
        if min(self.kernel_size) < 1:
            raise ValueError(f"kernel_size must be positive, not {self.kernel_size}")
        if self.gain <= 0:
            raise ValueError(f"gain must be positive, not {self.gain}")
        if self.global_threshold < 0 or self.sigma_background < 0 or self.sigma_strong < 0:
            raise ValueError("global_threshold, sigma_background and sigma_strong must not be negative")
        if self.min_local == 1 or self.min_local > self.window_size:
            raise ValueError(f"min_local must lie between 2 and {self.window_size}, or be 0, not {self.min_local}")

    @property
    def window_size(self) -> int:
        """Number of pixels in the window."""
        ky, kx = self.kernel_size
        return (2 * ky + 1) * (2 * kx + 1)


class StrongPixelFinder:
    """Finds strong pixels in panels of one shape; keeps the work space from one image to the next.

    Parameters
    ----------
    shape
        Pixels along slow and fast.
    criteria
        What makes a pixel strong.
    """

    def __init__(self, shape: tuple[int, ...], criteria: DispersionCriteria):
        self.shape = shape
        self.criteria = criteria
        ny, nx = shape
        self._rows = {dtype: np.empty(3 * (nx + 2 * criteria.kernel_size[1]), dtype) for dtype in _DISPERSION}
        self._suspect = np.empty(nx + 8, np.uint8)
        self._windows = np.empty(6 * nx, np.float64)
        self._state = np.empty(ny * nx, np.uint8)
        self._list = np.empty(ny * nx, np.int32)

    def __call__(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Places of the strong pixels.

        Parameters
        ----------
        image
            Counts, ``shape`` int32 or float64.
        mask
            Valid pixels, ``shape`` bool.

        Returns
        -------
        ``(n_strong,) int32``, ascending places in the flattened image.

        Raises
        ------
        ValueError
            When image and mask do not have the shape of this finder.
        """
        if image.shape != self.shape or mask.shape != self.shape:
            raise ValueError(f"image {image.shape} and mask {mask.shape} must have the shape {self.shape}")
        c = self.criteria
        n_strong = _DISPERSION[image.dtype](
            image,
            mask.view(np.uint8),
            *self.shape,
            *c.kernel_size,
            c.gain,
            c.sigma_background,
            c.sigma_strong,
            c.global_threshold,
            c.min_local if c.min_local > 0 else c.window_size,
            c.extended,
            c.erode_beside_masked,
            self._rows[image.dtype],
            self._suspect,
            self._windows,
            self._state,
            self._list,
        )
        return self._list[:n_strong].copy()


def groups_of_size(places: np.ndarray, width: int, smallest: int, largest: int) -> np.ndarray:
    """Those of the listed pixels that form groups of an allowed size; pixels that share an edge are in one group.

    Parameters
    ----------
    places
        ``(n,) int32``, ascending places in the flattened panel.
    width
        Pixels in a row.
    smallest, largest
        Allowed numbers of pixels in a group.

    Returns
    -------
    ``(n_kept,) int32``, ascending
    """
    kept = places.copy()
    n_kept = _groups_of_size(
        kept, len(kept), width, smallest, largest, np.empty(len(kept), np.int32), np.empty(len(kept), np.int32)
    )
    return kept[:n_kept]


def trusted_pixels(raw: np.ndarray, valid: np.ndarray, lowest: float, highest: float) -> tuple[np.ndarray, int]:
    """Valid pixels whose value lies in the trusted range, both ends included, and how many lie above it.

    Parameters
    ----------
    raw
        Values as read, int32 or float64.
    valid
        Pixels that may be valid in any image, bool, same shape.
    lowest, highest
        The trusted range.

    Returns
    -------
    mask, n_above
        bool, same shape, and the number of valid pixels above the range.
    """
    mask = np.empty(raw.shape, bool)
    if raw.dtype == np.int32:
        bounds = (max(int(np.ceil(lowest)), INT32.min), min(int(np.floor(highest)), INT32.max))
        above = _trusted_int32(raw, valid.view(np.uint8), raw.size, *bounds, mask.view(np.uint8))
    else:
        above = _trusted_float64(raw, valid.view(np.uint8), raw.size, lowest, highest, mask.view(np.uint8))
    return mask, above
