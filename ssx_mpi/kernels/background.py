"""The background of a still and what stands out of it at the resolutions of ice, from a sample of its pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int64, declare

#: 1/d^2 of the powder rings of hexagonal ice, per square angstrom (d from 3.90 to 1.72 angstrom), weakest left out
ICE_RINGS = 1 / np.array([3.895, 3.661, 3.438, 2.667, 2.249, 2.068, 1.947, 1.916, 1.882, 1.719]) ** 2
# bins of 1/d^2; a ring is the bin with its middle and one on either side, and is compared with bins beyond these
_BIN, _N_BINS = 0.001, 380
_BESIDE = (-4, -3, 3, 4)
# a ring, and what is beside it, needs so many sampled pixels
_FEWEST = 40
# values above are left out, so many times anew
_N_SIGMA, _PASSES = 4.0, 4
# standard deviations that make a ring no accident
_SIGNIFICANT = 4.0
# spots so near to a ring, in 1/d^2, may be its own: half the width that DIALS takes
_HALF_WIDTH = 0.001

_background = declare(
    "ssx_background",
    [array(np.float64, 1), array(np.uint8, 1), array(np.float32, 1), c_int64, c_double, c_double, c_double]
    + [c_int64, c_int64, array(np.int32, 1, writeable=True)]
    + [array(np.float64, 1, writeable=True)] * 3,
    c_double,
)


@dataclass(frozen=True)
class BackgroundNumbers:
    """Mean of the pixels between the spots, and by how much the strongest ice ring exceeds what is beside it.

    The excess is relative, 0 where no ring is beyond chance.
    """

    mean: float
    ice: float


def background_numbers(
    values: np.ndarray, valid: np.ndarray, ray_sq: np.ndarray, wavelength: float, readout: float = 0.0
) -> BackgroundNumbers:
    """Background and ice of one still.

    Parameters
    ----------
    values, valid
        Sampled pixels in counts, ``(n,) float64``, and which of them can be trusted, ``(n,) bool``.
    ray_sq
        Squared distance between the unit vectors along the beam and to the pixel, 4 sin^2(theta), ``(n,) float32``.
    wavelength
        In angstrom.
    readout
        Variance of the readout noise.
    """
    means, counts, limit = np.empty(_N_BINS), np.empty(_N_BINS), np.empty(_N_BINS)
    mean = _background(
        values,
        valid.view(np.uint8),
        ray_sq,
        len(values),
        1 / (wavelength**2 * _BIN),
        readout,
        _N_SIGMA,
        _PASSES,
        _N_BINS,
        np.empty(len(values), np.int32),
        limit,
        means,
        counts,
    )
    middle = (ICE_RINGS / _BIN).astype(int)
    # what lies beyond the last bin is in it
    middle = middle[middle < _N_BINS - 6]
    n_ring, ring = _mean_of(means, counts, middle, (-1, 0, 1))
    n_beside, beside = _mean_of(means, counts, middle, _BESIDE)
    known = (n_ring >= _FEWEST) & (n_beside >= _FEWEST) & (beside > 0)
    if not known.any():
        return BackgroundNumbers(mean, 0.0)
    ring, beside, n_ring, n_beside = ring[known], beside[known], n_ring[known], n_beside[known]
    sigma = np.sqrt((beside + readout) * (1 / n_ring + 1 / n_beside))
    excess = np.where(ring - beside > _SIGNIFICANT * sigma, ring / beside - 1, 0.0)
    return BackgroundNumbers(mean, float(excess.max()))


def _mean_of(
    means: np.ndarray, counts: np.ndarray, middle: np.ndarray, offsets: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    bins = middle[:, None] + np.array(offsets)
    n = counts[bins].sum(axis=1)
    return n, (counts[bins] * means[bins]).sum(axis=1) / np.maximum(n, 1)


def share_on_ice_rings(d_star_sq: np.ndarray) -> float:
    """Share of spots within the rings of ice: 0.06 to 0.08 of those that know nothing of ice lie there by chance.

    Parameters
    ----------
    d_star_sq
        1/d^2 of the spots, ``(n,)``, per square angstrom; n > 0.
    """
    nearest = np.abs(d_star_sq[:, None] - ICE_RINGS).min(axis=1)
    return float(np.mean(nearest <= _HALF_WIDTH))
