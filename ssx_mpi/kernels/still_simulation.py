"""A still image from first principles: which reflections a crystal excites, where they fall, and how many photons come.

The crystal is a set of reciprocal-lattice points (rlps), each a trivariate normal distribution about q = A h,

    Sigma(q) = s_d² 1 + s_m² (|q|² 1 - q qᵀ),

isotropic from the finite size of the coherent domains (s_d) and spread perpendicular to q by their misorientation
(s_m, radians). On a still the Ewald sphere cuts through it where it happens to lie. Seen along n = (s0 + q) / |s0 + q|
the sphere is flat across one rlp and lies at z = eps = |s0| - |s0 + q| from its centre. With Sigma in a frame whose
third axis is n, split into blocks S11 (2 x 2), S12 (2) and S22, the part of the rlp in the cut has

    weight      N(eps; 0, S22) = exp(-eps² / 2 S22) / sqrt(2 pi S22)
    mean        S12 / S22 eps
    covariance  S11 - S12 S12ᵀ / S22

within the sphere. A spread of wavelength or direction of the beam thickens the sphere rather than the rlp: to S22 they
add (k (1 - cos 2θ) dλ/λ)² and (k sin 2θ δ)², and to the covariance the corresponding image on the detector.

References
----------
Parkhurst, J. M. (2020), thesis, University of Cambridge, chapter on stills; the same model of a still stands behind the
ellipsoid integration of DIALS. Brehm & Diederichs (2014) and White (2014) for partiality as a function of Ewald offset.
"""

from __future__ import annotations

from ctypes import c_uint64
from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int64, declare

# exp(-mean) and the search by inversion are cheap and exact up to here
_INVERSION_LIMIT = 16.0


@dataclass(frozen=True)
class RlpShape:
    """Spread of a crystal's rlps and of the beam that meets them, all standard deviations.

    Parameters
    ----------
    mosaicity
        Misorientation of the domains about each axis, radians.
    domain
        Isotropic width of each rlp from the size of the domains, Å⁻¹.
    bandwidth
        Relative spread of the wavelength.
    divergence
        Spread of the direction of the beam about each axis, radians.
    """

    mosaicity: float
    domain: float
    bandwidth: float = 0.0
    divergence: float = 0.0


@dataclass(frozen=True)
class StillSpots:
    """Reflections that a still excites, one row each, before the detector.

    Attributes
    ----------
    index : (n,) int64
        Row of the reflection in the list that was asked about.
    q : (n, 3) float64
        Centre of the rlp, Å⁻¹, laboratory frame.
    offset : (n,) float64
        Ewald offset eps = |s0| - |s0 + q|, Å⁻¹.
    width : (n,) float64
        Standard deviation of the rlp along the normal of the sphere, beam included: sqrt(S22), Å⁻¹.
    s1 : (n, 3) float64
        Centre of the diffracted beam, length 1/λ.
    covariance : (n, 3, 3) float64
        Spread of the diffracted beam in the plane perpendicular to it, Å⁻².
    """

    index: np.ndarray
    q: np.ndarray
    offset: np.ndarray
    width: np.ndarray
    s1: np.ndarray
    covariance: np.ndarray


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation matrix (3, 3) distributed uniformly over all orientations.

    References
    ----------
    Shoemake (1992), Graphics Gems III: a unit quaternion uniform on the 3-sphere, here a normalised Gaussian vector.
    """
    w, x, y, z = (lambda v: v / np.linalg.norm(v))(rng.standard_normal(4))
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def rlp_covariance(q: np.ndarray, shape: RlpShape) -> np.ndarray:
    """Covariance (n, 3, 3) of the rlps about their centres `q` (n, 3), Å⁻²."""
    q2 = np.einsum("ni,ni->n", q, q)
    identity = np.eye(3)
    spread = q2[:, None, None] * identity - q[:, :, None] * q[:, None, :]
    return shape.domain**2 * identity + shape.mosaicity**2 * spread


def still_spots(
    hkl: np.ndarray, A: np.ndarray, s0: np.ndarray, shape: RlpShape, d_min: float, cutoff: float = 4.0
) -> StillSpots:
    """The reflections whose rlp is cut by the Ewald sphere within `cutoff` standard deviations.

    Parameters
    ----------
    hkl : (n, 3) float64
        Miller indices, both members of each Friedel pair.
    A : (3, 3) float64
        Setting matrix UB: q = A h, Å⁻¹.
    s0 : (3,) float64
        Incident beam, length 1/λ.
    shape
        Spread of the rlps.
    d_min
        Resolution limit, Å.
    cutoff
        Ewald offset, in standard deviations, beyond which a reflection is left out.

    Returns
    -------
    StillSpots
        In the order of `hkl`.
    """
    k = float(np.linalg.norm(s0))
    q2_max = 1.0 / d_min**2
    # an upper bound of the width keeps the expensive part to a few thousand: |s0 + q| - k = (q² + 2 s0.q) / ~2k
    widest = np.sqrt(
        shape.domain**2
        + shape.mosaicity**2 * q2_max
        + (shape.bandwidth * q2_max / (2 * k)) ** 2
        + shape.divergence**2 * q2_max
    )
    metric = A.T @ A
    q2 = np.einsum("ni,ni->n", hkl @ metric, hkl)
    excess = q2 + hkl @ (2.0 * (A.T @ s0))
    near = np.flatnonzero((q2 <= q2_max) & (np.abs(excess) < 1.1 * cutoff * widest * 2 * k))

    q = hkl[near] @ A.T
    s2 = q + s0
    length = np.linalg.norm(s2, axis=1)
    n = s2 / length[:, None]
    offset = k - length
    sigma = rlp_covariance(q, shape)
    s_n = np.einsum("nij,nj->ni", sigma, n)
    s22_rlp = np.einsum("ni,ni->n", s_n, n)
    cos_2theta = n @ s0 / k
    s22_band = (k * (1 - cos_2theta) * shape.bandwidth) ** 2
    s22_divergence = k * k * np.maximum(0.0, 1 - cos_2theta**2) * shape.divergence**2
    s22 = s22_rlp + s22_band + s22_divergence

    keep = np.abs(offset) < cutoff * np.sqrt(s22)
    near, q, n, offset, sigma, s_n, s22 = (v[keep] for v in (near, q, n, offset, sigma, s_n, s22))
    s12 = s_n - n * np.einsum("ni,ni->n", s_n, n)[:, None]
    # the mean follows the cut through the rlp; thickness of the sphere lessens how much the offset says about the rlp
    s1 = k * n + s12 * (offset / s22)[:, None]
    s1 *= k / np.linalg.norm(s1, axis=1)[:, None]
    plane = np.eye(3) - n[:, :, None] * n[:, None, :]
    covariance = plane @ sigma @ plane - s12[:, :, None] * s12[:, None, :] / s22[:, None, None]
    covariance = covariance + (k * shape.divergence) ** 2 * plane
    return StillSpots(near, q, offset, np.sqrt(s22), s1, covariance)


def partiality(offset: np.ndarray, width: np.ndarray, reference_width: float) -> np.ndarray:
    """Share of a reflection that a still records, relative to a centred rlp of width `reference_width`.

    The density of the rlp on the sphere is exp(-eps²/2w²) / (sqrt(2π) w); times sqrt(2π) `reference_width` it is
    without dimension. A broader rlp is weaker on every single still, though its integral over all offsets is the same.

    Parameters
    ----------
    offset, width : (n,) float64
        Ewald offset and standard deviation along the normal, Å⁻¹.
    reference_width
        Å⁻¹.

    Returns
    -------
    (n,) float64
    """
    return reference_width / width * np.exp(-0.5 * (offset / width) ** 2)


def polarization_factor(s1: np.ndarray, s0: np.ndarray, normal: np.ndarray, fraction: float) -> np.ndarray:
    """Intensity factor (n,) of the directions `s1` (n, 3) for a beam polarized perpendicular to `normal`.

    References
    ----------
    Kahn et al. (1982), J. Appl. Cryst. 15, 330-337.
    """
    u = s1 / np.linalg.norm(s1, axis=-1, keepdims=True)
    k = s0 / np.linalg.norm(s0)
    across = np.cross(normal, k)
    return fraction * (1 - (u @ across) ** 2) + (1 - fraction) * (1 - (u @ normal) ** 2)


def add_spots(
    image: np.ndarray, centre: np.ndarray, covariance: np.ndarray, total: np.ndarray, reach: float = 4.5
) -> None:
    """Add spots, bivariate normal distributions integrated over the pixels, to an image in place.

    Parameters
    ----------
    image : (ny, nx) float32
        Expected counts; changed.
    centre : (n, 2) float64
        x and y in pixels; pixel (0, 0) reaches from 0 to 1.
    covariance : (n, 3) float64
        xx, xy, yy in pixels squared, positive definite.
    total : (n,) float64
        Counts in each spot.
    reach
        Half size of the box that is drawn, in standard deviations.
    """
    draw = declare(
        "ssx_add_spots",
        [
            array(np.float32, 2, writeable=True),
            c_int64,
            c_int64,
            array(np.float64, 2),
            array(np.float64, 2),
            array(np.float64, 1),
            c_int64,
            c_double,
        ],
    )
    ny, nx = image.shape
    draw(
        image,
        ny,
        nx,
        np.ascontiguousarray(centre),
        np.ascontiguousarray(covariance),
        np.ascontiguousarray(total),
        len(total),
        reach,
    )


def poisson_counts(expected: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Counts drawn from the Poisson distributions with the expectations given.

    Small expectations, nearly all pixels, go through a compiled inversion with a counter-based generator, two to three
    times as fast as NumPy's; the others through NumPy's.

    Parameters
    ----------
    expected : (ny, nx) float32
    rng
        Source of randomness; the counts depend on its state alone.

    Returns
    -------
    (ny, nx) int32
    """
    invert = declare(
        "ssx_poisson",
        [array(np.float32), c_int64, c_uint64, c_double, array(np.int32, writeable=True)],
        c_int64,
    )
    counts = np.empty(expected.shape, np.int32)
    key = int(rng.integers(0, 2**64, dtype=np.uint64))
    if invert(np.ascontiguousarray(expected), expected.size, key, _INVERSION_LIMIT, counts):
        bright = counts < 0
        counts[bright] = rng.poisson(expected[bright].astype(np.float64))
    return counts
