"""Spots that are too far from their predicted positions: the minimum covariance determinant of their residuals.

The location and scatter of the half of the residuals that has the smallest covariance determinant are not moved by the
other half (Rousseeuw & Van Driessen 1999). From any three points, repeated concentration (keep the half nearest to the
present estimate, estimate again) can only lower the determinant; many starts, and the best of them carried to
convergence, find the minimum. The starts are drawn with a fixed seed from the points in sorted order, so that the
result depends on the points alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ssx_mpi.kernels._library import array, c_int64, declare
from ssx_mpi.kernels.ellipsoid import squared_radius

# As in Rousseeuw & Van Driessen and in DIALS
_N_STARTS = 500
_N_BEST = 10
_N_STEPS = 3
_MAX_STEPS = 100


def robust_location_and_scatter(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum covariance determinant estimate for points in the plane, consistent for normal ones.

    Parameters
    ----------
    points : (n, 2) float64

    Returns
    -------
    location : (2,) float64
    scatter : (2, 2) float64

    Raises
    ------
    ValueError
        With fewer than five points, or when half of them lie on one line.

    References
    ----------
    Rousseeuw & Van Driessen (1999), Technometrics 41, 212-223.
    Pison, Van Aelst & Willems (2002), Metrika 55, 111-123 (correction for small samples).
    """
    n = len(points)
    if n < 5:
        raise ValueError(f"{n} spots are too few to tell outliers")
    half = (n + 3) // 2
    points = points[np.lexsort(points.T)]
    location, scatter = _starts(points)
    points = np.ascontiguousarray(points.T)
    for _ in range(_N_STEPS):
        determinant = _concentrate(points, half, location, scatter)
    best = np.argsort(determinant, kind="stable")[:_N_BEST]
    location, scatter, determinant = location[best], scatter[best], determinant[best]
    for _ in range(_MAX_STEPS):
        smaller = _concentrate(points, half, location, scatter)
        if (smaller >= determinant).all():
            break
        determinant = smaller
    chosen = int(np.argmin(smaller))
    if not 0 < smaller[chosen] < np.inf:
        raise ValueError("the residuals of the spots lie on one line")
    xx, xy, yy = scatter[chosen] * _consistency(half / n) * _small_sample(n)
    return location[chosen], np.array([[xx, xy], [xy, yy]])


def _starts(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means (n_starts, 2) and covariances xx, xy, yy (n_starts, 3) of random triples of points."""
    rng = np.random.default_rng(0)
    first, second, third = rng.random((3, _N_STARTS))
    n = len(points)
    # distinct by construction: steps around the circle of points, the two together short of a full turn
    a = (first * n).astype(int)
    b = 1 + (second * (n - 2)).astype(int)
    c = b + 1 + (third * (n - 1 - b)).astype(int)
    chosen = points[np.stack([a, (a + b) % n, (a + c) % n], axis=1)]
    location = chosen.mean(axis=1)
    x, y = (chosen - location[:, None]).transpose(2, 0, 1)
    return location, np.stack([(x * x).sum(axis=1), (x * y).sum(axis=1), (y * y).sum(axis=1)], axis=1) / 2


@cache
def _concentration() -> Any:
    out, out_vectors = array(np.float64, 1, writeable=True), array(np.float64, 2, writeable=True)
    points = array(np.float64, 2)
    return declare("ssx_concentration", [c_int64, points, c_int64, c_int64, out_vectors, out_vectors, out, out])


def _concentrate(points: np.ndarray, half: int, location: np.ndarray, scatter: np.ndarray) -> np.ndarray:
    """Replace estimates by those of the `half` of points (2, n) nearest to each; determinants of the new scatters."""
    determinant = np.empty(len(location))
    _concentration()(
        points.shape[1], points, half, len(location), location, scatter, determinant, np.empty(3 * points.shape[1])
    )
    return determinant


def _consistency(fraction: float) -> float:
    """Factor by which the covariance of the central `fraction` of a normal sample in the plane is too small.

    That covariance is P(chi²_4 < q) / fraction times the true one, where q is the quantile of chi²_2; both have closed
    forms.
    """
    q = squared_radius(fraction, 2)
    return fraction / (1 - np.exp(-q / 2) * (1 + q / 2))


def _small_sample(n: int) -> float:
    """Correction of Pison et al. for two dimensions and a subset of one half (their Table 1)."""
    return 1 / (1 - np.exp(0.673292623522027) / n**0.691365864961895)


def inliers(residuals: np.ndarray, probability: float, max_separation: float) -> np.ndarray:
    """Which residuals belong to the robust estimate's central `probability`, and are short enough.

    Parameters
    ----------
    residuals : (n, 2) float64
        Observed minus predicted position, in pixels.
    probability : float
    max_separation : float
        Pixels.

    Returns
    -------
    (n,) bool
    """
    location, scatter = robust_location_and_scatter(residuals)
    centred = residuals - location
    distance = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(scatter), centred)
    return (distance < squared_radius(probability, 2)) & (np.linalg.norm(residuals, axis=1) < max_separation)
