"""Spots that are too far from their predicted positions: the minimum covariance determinant of their residuals.

The location and scatter of the half of the residuals that has the smallest covariance determinant are not moved by the other
half (Rousseeuw & Van Driessen 1999). From any three points, repeated concentration (keep the half nearest to the present
estimate, estimate again) can only lower the determinant; many starts, and the best carried to convergence, find the minimum.
The starts are drawn with a fixed seed from the points in sorted order, so that the result depends on the points alone.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import chi2

_N_STARTS = 200
_N_BEST = 10
_N_STEPS = 2  # concentration steps before the best starts are chosen, as in Rousseeuw & Van Driessen
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
    half = (n + 3) // 2
    if half >= n or n < 5:
        raise ValueError(f"{n} spots are too few to tell outliers")
    points = points[np.lexsort(points.T)]
    rng = np.random.default_rng(0)
    starts = np.argsort(rng.random((_N_STARTS, n)), axis=1)[:, :3]
    location, scatter = _estimate(points, starts)
    kept = np.linalg.det(scatter) > 1e-12 * np.trace(scatter, axis1=1, axis2=2) ** 2
    location, scatter = location[kept], scatter[kept]
    for _ in range(_N_STEPS + 1):
        if not len(location):
            raise ValueError("the residuals of the spots lie on one line")
        location, scatter, determinant = _concentrate(points, location, scatter, half)
    best = np.argsort(determinant, kind="stable")[:_N_BEST]
    location, scatter, determinant = location[best], scatter[best], determinant[best]
    for _ in range(_MAX_STEPS):
        location, scatter, smaller = _concentrate(points, location, scatter, half)
        if (smaller >= determinant).all():
            break
        determinant = smaller
    best_one = int(np.argmin(smaller))
    return location[best_one], scatter[best_one] * _consistency(half / n) * _small_sample(n)


def _estimate(points: np.ndarray, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and covariances of subsets of the points given by (n_subsets, size) indices."""
    chosen = points[members]
    location = chosen.mean(axis=1)
    centred = chosen - location[:, None]
    return location, np.einsum("sni,snj->sij", centred, centred) / (members.shape[1] - 1)


def _concentrate(points: np.ndarray, location: np.ndarray, scatter: np.ndarray, half: int):
    centred = points - location[:, None]
    inverse = np.linalg.inv(scatter)
    x, y = centred[..., 0], centred[..., 1]
    distance = x * x * inverse[:, :1, 0] + 2 * x * y * inverse[:, :1, 1] + y * y * inverse[:, 1:, 1]
    location, scatter = _estimate(points, np.argpartition(distance, half, axis=1)[:, :half])
    determinant = np.linalg.det(scatter)
    alive = determinant > 0
    return location[alive], scatter[alive], determinant[alive]


def _consistency(fraction: float) -> float:
    """Factor by which the covariance of the central `fraction` of a normal sample in the plane is too small."""
    return fraction / chi2.cdf(chi2.ppf(fraction, 2), 4)


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
    return (distance < chi2.ppf(probability, 2)) & (np.linalg.norm(residuals, axis=1) < max_separation)
