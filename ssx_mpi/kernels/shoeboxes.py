"""Pixels of reflections: footprints, background and summation on frames in memory.

The footprint of a reflection is the ellipse (x - m)ᵀ C⁻¹ (x - m) < q in the plane tangential to the Ewald sphere,
with q the quantile of chi² with two degrees of freedom; a pixel is foreground when one of its corners lies inside.
The rest of the box around it is background. Its level b is by default the robust Poisson mean: the root of

    sum_i [ psi_c((y_i - mu)/sqrt(mu)) - E psi_c ] sqrt(mu) = 0,    psi_c(r) = max(-c, min(c, r)),

by Newton's method in ln mu with the expected information, from the median (Cantoni & Ronchetti 2001).

Calibrated pixels are not counts: to the photons comes the noise of the readout, Gaussian with variance r about zero.
The residual is then (y_i - mu) / s with s² = max(mu, 0) + r, and its expectation is that over the Poisson distribution
of the photons k of

    E psi_c((k - mu)/s + z sqrt(r)/s),    z normal,

which is closed. The score is positive for the smallest pixel value and negative for the largest, so a root between
them is always found. Here c is at least a photon and three standard deviations of the readout: where photons are rare,
one of them is no outlier. Where r is 0 and Newton's method does not come to an end within the data, the same is done.

With n foreground pixels, N background pixels and P the sum over the foreground (Leslie 1999),

    I = P - n b        var I = |I| + (|n b| + n r) (1 + n/N).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int, c_int64, declare
from ssx_mpi.kernels.ellipsoid import OnEwaldSphere, tangential_frames
from ssx_mpi.kernels.prediction import Panels, rays_to_pixels

FAILED_BACKGROUND, FAILED_SUMMATION, FAILED_CENTROID, OVERLOADED = 1, 2, 4, 8

_METHODS = {"glm": 0, "mean": 1}


@dataclass(frozen=True)
class Background:
    """How the background under a reflection is estimated.

    Attributes
    ----------
    method : str
        "glm", the robust Poisson mean, or "mean".
    tuning : float
        Residual in standard deviations beyond which a pixel's pull is limited (c above).
    min_pixels : int
    """

    method: str = "glm"
    tuning: float = 1.345
    min_pixels: int = 10


@dataclass(frozen=True)
class Frame:
    """Corrected data of one shot, by panel.

    Attributes
    ----------
    data : sequence of (slow, fast) int32 or float64
        Other types are copied to float64.
    mask : sequence of (slow, fast) bool
        True where a pixel can be trusted.
    readout : sequence of float
        Variance of the readout noise of each panel, in squared photons; none where pixels are counts.
    """

    data: Sequence[np.ndarray]
    mask: Sequence[np.ndarray]
    readout: Sequence[float] = ()

    def __post_init__(self) -> None:
        data = [
            np.ascontiguousarray(d if d.dtype in (np.int32, np.float64) else d.astype(np.float64)) for d in self.data
        ]
        object.__setattr__(self, "data", tuple(data))
        object.__setattr__(self, "mask", tuple(np.ascontiguousarray(m, dtype=bool) for m in self.mask))

    def readout_of(self, panel: int) -> float:
        """Variance of the readout noise of a panel."""
        return float(self.readout[panel]) if len(self.readout) else 0.0

    def arguments(self, panel: int) -> tuple:
        """Data, whether they are floating point, mask, height and width, as the compiled loops take them."""
        data = self.data[panel]
        return data.ctypes.data, int(data.dtype == np.float64), self.mask[panel].view(np.uint8), *data.shape


@dataclass(frozen=True)
class Measured:
    """Sums over the pixels of each of n reflections.

    Attributes
    ----------
    intensity, variance : (n,) float64
        Counts above background.
    background, background_variance : (n,) float64
        Counts of the background under the peak.
    level : (n,) float64
        Background counts per pixel.
    centroid, centroid_variance : (n, 2) float64
        Pixels along fast and slow, of the counts above background.
    n_valid, n_foreground, n_background, n_background_used : (n,) int32
        Pixels of the box, all of them trusted.
    failed : (n,) int32
        Bits: FAILED_BACKGROUND (too few pixels), FAILED_SUMMATION (pixels of the peak cannot be
        trusted), FAILED_CENTROID (no counts above background), OVERLOADED (pixels of the box are beyond the trusted
        range).
    """

    intensity: np.ndarray
    variance: np.ndarray
    background: np.ndarray
    background_variance: np.ndarray
    level: np.ndarray
    centroid: np.ndarray
    centroid_variance: np.ndarray
    n_valid: np.ndarray
    n_foreground: np.ndarray
    n_background: np.ndarray
    n_background_used: np.ndarray
    failed: np.ndarray

    @classmethod
    def _from_loops(cls, sums: np.ndarray, counts: np.ndarray, failed: np.ndarray) -> Measured:
        intensity, variance, under, under_variance, level = sums[:, :5].T
        valid, foreground, outside, used = counts.T
        centroid, centroid_variance = sums[:, 5:7], sums[:, 7:9]
        return cls(
            intensity=intensity,
            variance=variance,
            background=under,
            background_variance=under_variance,
            level=level,
            centroid=centroid,
            centroid_variance=centroid_variance,
            n_valid=valid,
            n_foreground=foreground,
            n_background=outside,
            n_background_used=used,
            failed=failed,
        )


@dataclass(frozen=True)
class StrongPixels:
    """Which pixels of each strong spot the spot finder took.

    Attributes
    ----------
    panel : (n,) int64
    bbox : (n, 4) int32
        x0, x1, y0, y1.
    offset : (n,) int64
        Where each spot's pixels start in `mask`.
    mask : (n_pixels,) uint8
        Rows of all boxes, one after the other.
    """

    panel: np.ndarray
    bbox: np.ndarray
    offset: np.ndarray
    mask: np.ndarray

    def selected(self, which: np.ndarray) -> StrongPixels:
        return StrongPixels(self.panel[which], self.bbox[which], self.offset[which], self.mask)


def boxes_around(panels: Panels, panel: np.ndarray, rays: np.ndarray, border: int = 0) -> np.ndarray:
    """Boxes of whole pixels around the points where bundles of rays meet their panels.

    Parameters
    ----------
    panels : Panels
    panel : (n,) int
    rays : (n, m, 3) float64
    border : int
        Pixels added on each side.

    Returns
    -------
    (n, 4) int32
        x0, x1, y0, y1; all 0 where a ray never meets the panel's plane.
    """
    n, m = rays.shape[:2]
    px, _ = rays_to_pixels(panels, np.repeat(panel, m), rays.reshape(-1, 3))
    px = px.reshape(n, m, 2)
    met = np.isfinite(px).all(axis=(1, 2))
    px[~met] = 0
    low, high = np.floor(px.min(axis=1)) - border, np.ceil(px.max(axis=1)) + border
    boxes = np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], axis=1)
    boxes[~met] = 0
    return boxes.astype(np.int32)


_SIGNS = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]], dtype=float)


def ellipse_boxes(
    panels: Panels, panel: np.ndarray, s0: np.ndarray, seen: OnEwaldSphere, limit: float, border: int = 4
) -> np.ndarray:
    """Boxes around the footprints of ellipses, with room for background: (n, 4) int32.

    Parameters
    ----------
    panels, panel
    s0 : (3,) float64
    seen : OnEwaldSphere
    limit : float
        Squared Mahalanobis distance at the edge of the footprint.
    border : int
        Pixels on each side; 4 in DIALS.
    """
    half = np.sqrt(limit * np.einsum("nii->ni", seen.covariance))
    points = seen.mean[:, None] + _SIGNS * half[:, None]
    height = np.full((*points.shape[:2], 1), np.linalg.norm(s0))
    rays = np.concatenate([points, height], axis=2) @ seen.frames
    return boxes_around(panels, panel, rays, border)


def circle_boxes(
    panels: Panels, panel: np.ndarray, s0: np.ndarray, directions: np.ndarray, radius: float
) -> np.ndarray:
    """Boxes around squares of half width `radius` (radian) about directions on the Ewald sphere: (n, 4) int32."""
    frames = tangential_frames(directions, s0)
    tangential = np.einsum("mk,nki->nmi", _SIGNS * radius, frames[:, :2])
    rays = tangential + np.sqrt(1 - 2 * radius**2) * frames[:, None, 2]
    return boxes_around(panels, panel, rays)


def _scratch(boxes: np.ndarray) -> tuple[int, np.ndarray]:
    largest = int(((boxes[:, 1] - boxes[:, 0]).astype(int) * (boxes[:, 3] - boxes[:, 2])).max(initial=1))
    return largest, np.empty(8 * (largest + 2))


_BOXES, _FLOATS, _VECTORS = array(np.int32, 2), array(np.float64, 1), array(np.float64, 2)
_OFFSETS, _PIXELS, _FRAME_MASK = array(np.int64, 1), array(np.uint8, 1), array(np.uint8, 2)
_OUT, _OUT_VECTORS = array(np.float64, 1, writeable=True), array(np.float64, 2, writeable=True)
_OUT_COUNTS, _OUT_FAILED = array(np.int32, 2, writeable=True), array(np.int32, 1, writeable=True)
# data, whether floating point, mask, height, width; panel
_FRAME = (c_void_p, c_int, _FRAME_MASK, c_int, c_int, _FLOATS)
# method, tuning, minimum number of pixels, variance of the readout; largest box and scratch space for it; sums, counts,
# failures
_FIT = (c_int, c_double, c_int, c_double, c_int64, _OUT, _OUT_VECTORS, _OUT_COUNTS, _OUT_FAILED)


@cache
def _integrate() -> Any:
    shape = (_BOXES, _VECTORS, _VECTORS, _VECTORS, c_double, c_double)
    return declare("ssx_integrate", [c_int64, *shape, *_FRAME, c_double, *_FIT])


@cache
def _strong_spots() -> Any:
    shape = (_BOXES, _VECTORS, c_double, _BOXES, _OFFSETS, _PIXELS, _FLOATS)
    return declare("ssx_strong_spots", [c_int64, *shape, *_FRAME, *_FIT, _OUT_VECTORS, _OUT_VECTORS])


@cache
def _angular_variance() -> Any:
    spots = (_BOXES, _OFFSETS, _PIXELS, _VECTORS)
    return declare("ssx_angular_variance", [c_int64, *spots, *_FRAME, _OUT, _OUT])


@cache
def _robust_poisson_mean() -> Any:
    return declare("ssx_robust_poisson_mean", [c_int64, _FLOATS, c_double, c_int, _OUT, _OUT], c_int)


def integrate_ellipses(
    panels: Panels,
    frame: Frame,
    panel: np.ndarray,
    boxes: np.ndarray,
    seen: OnEwaldSphere,
    limit: float,
    radius: float,
    background: Background,
    saturation: np.ndarray | None = None,
) -> Measured:
    """Background and summed intensity within elliptical footprints.

    Parameters
    ----------
    panels, frame
    panel : (n,) int
    boxes : (n, 4) int32
        Not empty.
    seen : OnEwaldSphere
    limit : float
        Squared Mahalanobis distance at the edge of the footprint.
    radius : float
        Of the Ewald sphere that pixels are projected on, 1/Å.
    background : Background
    saturation : (n_panels,) float64, optional
        Upper ends of the panels' trusted ranges.
    """
    axes = seen.frames[:, :2].reshape(-1, 6)
    inverse = np.linalg.inv(seen.covariance)
    precision = np.stack([inverse[:, 0, 0], inverse[:, 0, 1], inverse[:, 1, 1]], axis=1)
    largest, scratch = _scratch(boxes)
    n = len(boxes)
    sums, counts, failed = np.zeros((n, 9)), np.zeros((n, 4), np.int32), np.zeros(n, np.int32)
    for p in np.unique(panel):
        (on,) = np.nonzero(panel == p)
        part = np.zeros((len(on), 9)), np.zeros((len(on), 4), np.int32), np.zeros(len(on), np.int32)
        _integrate()(
            len(on),
            boxes[on],
            axes[on],
            seen.mean[on],
            precision[on],
            limit,
            radius,
            *frame.arguments(int(p)),
            panels.packed(int(p)),
            np.inf if saturation is None else float(saturation[p]),
            _METHODS[background.method],
            background.tuning,
            background.min_pixels,
            frame.readout_of(int(p)),
            largest,
            scratch,
            *part,
        )
        sums[on], counts[on], failed[on] = part
    return Measured._from_loops(sums, counts, failed)


def angular_spread(panels: Panels, frame: Frame, strong: StrongPixels, s1: np.ndarray) -> float:
    """Root mean square angle in radian of the strong pixels' counts from the predicted directions of their spots.

    Parameters
    ----------
    panels, frame, strong
    s1 : (n, 3) float64

    Raises
    ------
    ValueError
        When no spot has counts.

    References
    ----------
    Kabsch (2010), Acta Cryst. D66, 133-144, section 3.1 (beam divergence).
    """
    variances = []
    for p in np.unique(strong.panel):
        (on,) = np.nonzero(strong.panel == p)
        counts, variance = np.empty(len(on)), np.empty(len(on))
        _angular_variance()(
            len(on),
            strong.bbox[on],
            strong.offset[on],
            strong.mask,
            s1[on],
            *frame.arguments(int(p)),
            panels.packed(int(p)),
            counts,
            variance,
        )
        variances.append(variance[counts > 1])
    if not any(len(part) for part in variances):
        raise ValueError("the strong spots have no counts")
    return float(np.sqrt(np.concatenate(variances).mean()))


def measure_strong_spots(
    panels: Panels,
    frame: Frame,
    strong: StrongPixels,
    boxes: np.ndarray,
    s0: np.ndarray,
    directions: np.ndarray,
    radius: float,
    background: Background,
) -> tuple[Measured, np.ndarray, np.ndarray]:
    """Background, centroid and shape of strong spots, within a circle and the pixels that the spot finder took.

    Parameters
    ----------
    panels, frame, strong
    boxes : (n, 4) int32
    s0 : (3,) float64
    directions : (n, 3) float64
        To the centres of the circles.
    radius : float
        Of the circles, radian.
    background : Background

    Returns
    -------
    measured : Measured
    directions : (n, 3) float64
        Unit vectors to the centroids.
    moments : (n, 6) float64
        Counts, and in the frame of these directions their mean e1, e2 (1/Å) and covariance 11, 12, 22 (1/Å²).
    """
    axes = tangential_frames(directions, s0)[:, :2].reshape(-1, 6)
    largest, scratch = _scratch(boxes)
    n = len(boxes)
    sums, counts, failed = np.zeros((n, 9)), np.zeros((n, 4), np.int32), np.zeros(n, np.int32)
    centroids, moments = np.zeros((n, 3)), np.zeros((n, 6))
    for p in np.unique(strong.panel):
        (on,) = np.nonzero(strong.panel == p)
        m = len(on)
        part = (
            np.zeros((m, 9)),
            np.zeros((m, 4), np.int32),
            np.zeros(m, np.int32),
            np.zeros((m, 3)),
            np.zeros((m, 6)),
        )
        _strong_spots()(
            m,
            boxes[on],
            axes[on],
            1 / radius**2,
            strong.bbox[on],
            strong.offset[on],
            strong.mask,
            s0,
            *frame.arguments(int(p)),
            panels.packed(int(p)),
            _METHODS[background.method],
            background.tuning,
            background.min_pixels,
            frame.readout_of(int(p)),
            largest,
            scratch,
            *part,
        )
        sums[on], counts[on], failed[on], centroids[on], moments[on] = part
    return Measured._from_loops(sums, counts, failed), centroids, moments


def robust_poisson_mean(values: np.ndarray, tuning: float = 1.345, max_iterations: int = 100) -> float:
    """Robust mean of Poisson counts.

    Parameters
    ----------
    values : (n,) float64
        Not negative.
    tuning : float
    max_iterations : int

    Raises
    ------
    ValueError
        When the iteration does not converge.

    References
    ----------
    Cantoni & Ronchetti (2001), J. Am. Stat. Assoc. 96, 1022-1030.
    """
    mean = np.zeros(1)
    if not _robust_poisson_mean()(
        len(values), np.asarray(values, dtype=float), tuning, max_iterations, np.empty(len(values)), mean
    ):
        raise ValueError("the robust mean did not converge")
    return float(mean[0])


@cache
def _robust_noisy_mean() -> Any:
    return declare("ssx_robust_noisy_mean", [c_int64, _FLOATS, c_double, c_double], c_double)


def robust_noisy_mean(values: np.ndarray, readout: float, tuning: float = 1.345) -> float:
    """Robust mean of photons with Gaussian noise.

    Parameters
    ----------
    values : (n,) float64
        Not empty.
    readout : float
        Variance of the noise, positive.
    tuning : float
    """
    return float(_robust_noisy_mean()(len(values), np.asarray(values, dtype=float), readout, tuning))
