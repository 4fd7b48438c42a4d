"""Where rays meet the detector, and which reciprocal lattice points are near the Ewald sphere.

Vectors are in the laboratory frame, reciprocal ones in 1/Å and real ones in mm. A reciprocal lattice point r = A h is
seen in the direction of s2 = s0 + r, which ends off the Ewald sphere by |s2| - |s0|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_int64, declare


@dataclass(frozen=True)
class Panels:
    """Flat panels of a detector.

    Attributes
    ----------
    origin, fast, slow : (n_panels, 3) float64
        Corner of the first pixel in mm, and unit vectors along its rows and columns.
    pixel_size : (n_panels, 2) float64
        mm, along fast and slow.
    image_size : (n_panels, 2) int64
        Pixels, along fast and slow.
    mu, thickness : (n_panels,) float64
        Attenuation coefficient in 1/mm and thickness in mm of the sensor; 0 where there is no parallax.
    """

    origin: np.ndarray
    fast: np.ndarray
    slow: np.ndarray
    pixel_size: np.ndarray
    image_size: np.ndarray
    mu: np.ndarray
    thickness: np.ndarray

    def __len__(self) -> int:
        return len(self.origin)

    def packed(self, panel: int) -> np.ndarray:
        """The 13 numbers of one panel that the compiled loops take."""
        return np.concatenate(
            [
                self.origin[panel],
                self.fast[panel],
                self.slow[panel],
                self.pixel_size[panel],
                [self.mu[panel], self.thickness[panel]],
            ]
        )


def pixels_to_lab(panels: Panels, panel: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Lab coordinates of pixel coordinates, at the surface where the photon entered.

    Parameters
    ----------
    panels : Panels
    panel : (n,) int
        Panel of each point.
    xy : (n, 2) float64
        Pixels along fast and slow.

    Returns
    -------
    (n, 3) float64
        mm.
    """
    convert = declare(
        "ssx_pixel_to_lab",
        [c_int64, array(np.float64, 1), array(np.float64, 2), array(np.float64, 2, writeable=True)],
    )
    lab = np.empty((len(xy), 3))
    for p in np.unique(panel):
        (on,) = np.nonzero(panel == p)
        part = np.empty((len(on), 3))
        convert(len(on), panels.packed(int(p)), np.ascontiguousarray(xy[on], dtype=np.float64), part)
        lab[on] = part
    return lab


def _ray_coordinates(panels: Panels, panel: int, s1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """mm coordinates of rays on the plane of a panel, and the reciprocal distance to it (not positive: never met)."""
    basis = np.column_stack([panels.fast[panel], panels.slow[panel], panels.origin[panel]])
    uvw = np.linalg.solve(basis, s1.T)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (uvw[:2] / uvw[2]).T, uvw[2]


def _parallax_shift(panels: Panels, panel: int, mm: np.ndarray) -> np.ndarray:
    """Shift in mm, along fast and slow, from where a ray enters the sensor to where it is absorbed on average.

    The mean depth of absorption along the ray, within a sensor of thickness t that it crosses at an angle to the normal
    with cosine c, is 1/mu - (t/c + 1/mu) exp(-mu t/c).
    """
    mu, thickness = panels.mu[panel], panels.thickness[panel]
    if mu <= 0 or thickness <= 0:
        return np.zeros_like(mm)
    fast, slow = panels.fast[panel], panels.slow[panel]
    ray = panels.origin[panel] + mm[:, :1] * fast + mm[:, 1:] * slow
    ray /= np.linalg.norm(ray, axis=1, keepdims=True)
    path = thickness / np.abs(ray @ np.cross(fast, slow))
    depth = 1 / mu - (path + 1 / mu) * np.exp(-mu * path)
    return np.column_stack([ray @ fast, ray @ slow]) * depth[:, None]


def rays_to_pixels(panels: Panels, panel: np.ndarray, s1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays meet the planes of the panels given.

    Parameters
    ----------
    panels : Panels
    panel : (n,) int
    s1 : (n, 3) float64
        Directions, of any length.

    Returns
    -------
    px, mm : (n, 2) float64
        Coordinates along fast and slow; NaN where the plane is not met.
    """
    px, mm = np.full((len(s1), 2), np.nan), np.full((len(s1), 2), np.nan)
    for p in np.unique(panel):
        (on,) = np.nonzero(panel == p)
        at, w = _ray_coordinates(panels, int(p), s1[on])
        at[w <= 0] = np.nan
        mm[on] = at
        px[on] = (at + _parallax_shift(panels, int(p), at)) / panels.pixel_size[p]
    return px, mm


def find_panels(panels: Panels, s1: np.ndarray) -> np.ndarray:
    """Panel that each ray meets first, -1 where it meets none.

    Parameters
    ----------
    panels : Panels
    s1 : (n, 3) float64

    Returns
    -------
    (n,) int64
    """
    found, nearest = np.full(len(s1), -1), np.zeros(len(s1))
    for p in range(len(panels)):
        mm, w = _ray_coordinates(panels, p, s1)
        size = panels.image_size[p] * panels.pixel_size[p]
        with np.errstate(invalid="ignore"):
            hit = (w > nearest) & (mm >= 0).all(axis=1) & (mm < size).all(axis=1)
        found[hit], nearest[hit] = p, w[hit]
    return found


def indices_near_ewald_sphere(A: np.ndarray, s0: np.ndarray, d_min: float, width: float) -> np.ndarray:
    """All Miller indices to a resolution with | |s0 + A h| - |s0| | <= width.

    For two of the indices fixed, |s0 + A h|² is a quadratic in the third, so that the third lies between the two roots
    for the radius |s0| + width, but not between those for |s0| - width. The third is taken along the longest cell edge,
    which leaves the fewest pairs.

    Parameters
    ----------
    A : (3, 3) float64
        Columns a*, b*, c* in 1/Å.
    s0 : (3,) float64
        Beam vector, length 1/wavelength.
    d_min : float
        Å.
    width : float
        1/Å.

    Returns
    -------
    (n, 3) int64
        In ascending order of h, then k, then l.
    """
    real = np.linalg.inv(A)  # rows a, b, c
    limit = np.floor(np.linalg.norm(real, axis=1) / d_min).astype(int)
    axis = int(np.argmax(np.linalg.norm(real, axis=1)))
    others = [k for k in range(3) if k != axis]
    i, j = np.meshgrid(*(np.arange(-limit[k], limit[k] + 1) for k in others), indexing="ij")
    fixed = np.zeros((i.size, 3))
    fixed[:, others[0]], fixed[:, others[1]] = i.ravel(), j.ravel()

    start, step, radius = fixed @ A.T + s0, A[:, axis], float(np.linalg.norm(s0))
    half_b, a, c = start @ step, step @ step, np.einsum("ij,ij->i", start, start)
    outer = half_b**2 - a * (c - (radius + width) ** 2)
    inner = half_b**2 - a * (c - max(radius - width, 0.0) ** 2)
    kept = outer >= 0
    fixed, half_b, outer, inner = fixed[kept], half_b[kept], np.sqrt(outer[kept]), inner[kept]
    split = inner > 0
    inner = np.sqrt(np.where(split, inner, 0))
    # where the inner sphere is missed, the lower interval is all, and the upper one (from 1 to 0) is empty
    starts = np.concatenate([-half_b - outer, np.where(split, -half_b + inner, a)])
    ends = np.concatenate([np.where(split, -half_b - inner, -half_b + outer), np.where(split, -half_b + outer, 0)])
    first, last = np.ceil(starts / a), np.floor(ends / a)
    count = np.maximum(last - first + 1, 0).astype(int)
    indices = np.repeat(np.vstack([fixed, fixed]), count, axis=0)
    position = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    indices[:, axis] = np.repeat(first, count) + position

    r2 = np.einsum("ij,ij->i", indices @ A.T, indices @ A.T)
    indices = np.unique(indices[(r2 > 0) & (r2 <= d_min**-2)].astype(np.int64), axis=0)
    return indices
