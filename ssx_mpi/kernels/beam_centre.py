"""Where the beam meets the detector, from the spots of many stills and the known cell, before anything is indexed.

A beam centre that is wrong by d shifts all scattering vectors of a still by nearly the same dq = d / (wavelength
distance). Fourier amplitudes abs(sum_j exp(2 pi i v.q_j)) do not change with a common shift, so the lattice vectors v,
and from them the orientations, are found with the wrong centre as well as with the right one. What does change is
whether the spots fall on lattice points: with an orientation in hand, the spots explained are counted for every shift
of a grid. One still alone has as many peaks as there are lattice points in reach; the sum over stills of different
orientation has one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels import lattice_search
from ssx_mpi.kernels.lattices import KnownLattice

# low-resolution spots tell the centre and do not mind a wrong distance or orientation
_MOST_SPOTS = 150
_VECTORS = 40
_BASES = 150
# steps of the grid of shifts, in spacings of the longest reduced axis; explained spots lie within 0.3 of a point
_STEP = 0.12
_MOST_STEPS = 12


@dataclass(frozen=True)
class ShiftGrid:
    """Shifts of the detector to try: (m, 2) float64 in mm along its fast and slow axes, no shift in the middle."""

    shifts: np.ndarray
    n_side: int
    step: float


def shift_grid(lattice: KnownLattice, wavelength: float, distance: float) -> ShiftGrid:
    """A grid wide enough for the cell at this `distance` (mm) and `wavelength` (angstrom).

    It reaches as far as half a spacing of the shortest axis, beyond which stills are ambiguous, but no further than is
    affordable.
    """
    lengths = np.linalg.norm(lattice.basis, axis=1)
    step = _STEP * wavelength * distance / lengths[-1]
    reach = 0.5 * wavelength * distance / lengths[0]
    n = int(min(max(np.ceil(reach / step), 4), _MOST_STEPS))
    axis = step * np.arange(-n, n + 1)
    fast, slow = np.meshgrid(axis, axis)
    return ShiftGrid(np.stack([fast.ravel(), slow.ravel()], axis=1), 2 * n + 1, step)


def score_shifts(x_lab, shifts: np.ndarray, axes: np.ndarray, s0: np.ndarray, lattice: KnownLattice) -> np.ndarray:
    """Share of the spots of one still that the best orientation explains, for every shift of the detector.

    Parameters
    ----------
    x_lab : (n_spots, 3) float64
        Where the spots are in the laboratory, mm, with the detector where the header has it.
    shifts : (m, 2) float64
        Shifts of the detector along `axes`, mm.
    axes : (2, 3) float64
        Fast and slow axis.
    s0 : (3,) float64
        Incident beam, 1/angstrom.
    lattice : KnownLattice
        The primitive reduced lattice that the crystal has.

    Returns
    -------
    (m,) float64
        Zero throughout where no orientation was found.
    """
    q = _scattering_vectors(x_lab, s0)
    nearest = np.argsort(np.linalg.norm(q, axis=1), kind="stable")[:_MOST_SPOTS]
    x_lab, q = x_lab[nearest], q[nearest]
    bases = _candidate_bases(q, lattice)
    if not len(bases):
        return np.zeros(len(shifts))
    scores = [lattice_search.explained(_scattering_vectors(x_lab + shift @ axes, s0), bases).max() for shift in shifts]
    return np.array(scores, dtype=float) / len(q)


def _scattering_vectors(x_lab: np.ndarray, s0: np.ndarray) -> np.ndarray:
    return x_lab / np.linalg.norm(x_lab, axis=1, keepdims=True) * np.linalg.norm(s0) - s0


def _candidate_bases(q: np.ndarray, lattice: KnownLattice, tolerance: float = 0.03) -> np.ndarray:
    """Orientations of `lattice` whose periods stand out, whatever the origin of `q`: direct bases, (k, 3, 3)."""
    found, worth = [], []
    # mirror images of the pattern have the same amplitudes: both orientations are among the pairs
    for length in np.unique(np.round(np.linalg.norm(lattice.vectors, axis=1), 3)):
        vectors, score = _free_vectors(q, float(length), tolerance)
        found.append(vectors)
        worth.append(score)
    vectors, score = np.concatenate(found), np.concatenate(worth)
    if len(vectors) < 2:
        return np.empty((0, 3, 3))
    rotations = lattice_search.orientations_from_pairs(vectors, score, lattice, tolerance, 2.0, _BASES)
    return np.einsum("kij,lj->kli", rotations, lattice.basis)


def _free_vectors(q: np.ndarray, length: float, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of about one length with large amplitude, refined with a free origin; and their amplitude a spot."""
    q_max = np.linalg.norm(q, axis=1).max()
    # a step that keeps the phase of the outermost spot within a quarter turn
    spacing = 0.5 / (q_max * length)
    directions = lattice_search.hemisphere(int(min(max(2 * np.pi / spacing**2, 500), 30_000)))
    lengths = length * np.linspace(1 - tolerance, 1 + tolerance, max(3, int(np.ceil(4 * tolerance * length * q_max))))
    amplitude, best = lattice_search.period_amplitudes(q, directions, lengths)
    top = np.argpartition(-amplitude, min(10 * _VECTORS, len(amplitude) - 1))[: 10 * _VECTORS]
    top.sort()
    vectors = directions[top] * lengths[best[top], None]
    vectors = vectors[lattice_search.strongest(vectors, amplitude[top], 0.6 / q_max, _VECTORS)]
    return _refined(q, vectors)


def _refined(q: np.ndarray, vectors: np.ndarray, n_cycles: int = 3, width: float = 0.3):
    """Fit q.v + c to integers for all vectors at once, the phase c of each starting from its Fourier sum."""
    x = np.concatenate([q, np.ones((len(q), 1))], axis=1)
    phase = -np.angle(np.exp(2j * np.pi * (vectors @ q.T)).sum(axis=1)) / (2 * np.pi)
    v = np.concatenate([vectors, phase[:, None]], axis=1)
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), 16)
    for _ in range(n_cycles):
        t = v @ x.T
        delta = np.rint(t) - t
        weight = np.maximum(0.0, 1 - (delta / width) ** 2) ** 2
        normal = (weight @ outer).reshape(-1, 4, 4) + 1e-9 * np.eye(4)
        v = v + np.linalg.solve(normal, ((weight * delta) @ x)[..., None])[..., 0]
    t = v @ x.T
    weight = np.maximum(0.0, 1 - ((np.rint(t) - t) / width) ** 2) ** 2
    return v[:, :3], weight.mean(axis=1)


@dataclass(frozen=True)
class ShiftFound:
    """The best shift of the detector in mm, the mean share of spots explained there and without a shift, and how far
    the best stands out from the other shifts, in their standard deviations."""

    shift: tuple[float, float]
    explained: float
    explained_before: float
    significance: float


def best_shift(grid: ShiftGrid, scores: np.ndarray) -> ShiftFound:
    """The best shift of a `grid` with mean `scores`, (m,), interpolated between its points by a parabola each way."""
    image = scores.reshape(grid.n_side, grid.n_side)
    row, column = np.unravel_index(np.argmax(image), image.shape)
    fast = grid.step * (column - grid.n_side // 2 + _vertex(image[row], int(column)))
    slow = grid.step * (row - grid.n_side // 2 + _vertex(image[:, column], int(row)))
    others = np.ones_like(image, dtype=bool)
    others[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3] = False
    noise = max(float(image[others].std()), 1e-6)
    middle = grid.n_side // 2
    significance = float((image[row, column] - image[others].mean()) / noise)
    return ShiftFound((float(fast), float(slow)), float(image[row, column]), float(image[middle, middle]), significance)


def _vertex(values: np.ndarray, at: int) -> float:
    if at == 0 or at == len(values) - 1:
        return 0.0
    left, top, right = values[at - 1 : at + 2]
    curvature = left - 2 * top + right
    return 0.0 if curvature >= 0 else float(np.clip(0.5 * (left - right) / curvature, -0.5, 0.5))
