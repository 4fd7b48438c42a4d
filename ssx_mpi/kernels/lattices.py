"""Lattices as bases: reduction, symmetry, and whether a basis may belong to a known cell. Bases are vectors as rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

# the six numbers of a symmetric matrix, and where they stand in it
_PACKED = np.array([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]).T
_UNPACKED = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]])


@dataclass(frozen=True)
class KnownLattice:
    """A primitive lattice that is looked for, as Cartesian vectors in the frame of the crystal.

    Attributes
    ----------
    basis : (3, 3) float64
        Reduced basis vectors as rows, in angstrom.
    rotations : (n, 3, 3) float64
        Proper rotations that map the lattice onto itself.
    vectors : (m, 3) float64
        Short lattice vectors, one of each pair v and -v, in order of length.
    pairs : (p, 2) int64
        Pairs of `vectors` that are not parallel, one of each set that `rotations` make equal.
    settings : (s, 3, 3) float64
        Integer matrices one of which leads from any other reduced basis of the lattice, or of one with lengths up to a
        quarter different, to `basis`.
    metrics : (6 s, 6) float64
        What they make of packed metrics.
    """

    basis: np.ndarray
    rotations: np.ndarray
    vectors: np.ndarray
    pairs: np.ndarray
    settings: np.ndarray
    metrics: np.ndarray


def metric_basis(cell: tuple[float, ...] | np.ndarray) -> np.ndarray:
    """Direct basis vectors (rows, angstrom) of a cell (a, b, c, angles in degrees), a along x and c* along z."""
    a, b, c = cell[:3]
    ca, cb, cg = np.cos(np.radians(cell[3:6]))
    sg = np.sin(np.radians(cell[5]))
    cx, cy = c * cb, c * (ca - cb * cg) / sg
    square = c * c - cx * cx - cy * cy
    if square <= 0 or sg <= 0:
        raise ValueError(f"these angles make no cell: {tuple(cell)}")
    return np.array([[a, 0.0, 0.0], [b * cg, b * sg, 0.0], [cx, cy, np.sqrt(square)]])


def reduce_basis(basis: np.ndarray) -> np.ndarray:
    """:func:`reduce_bases` of one basis (3, 3)."""
    return reduce_bases(basis[None])[0]


def reduce_bases(bases: np.ndarray) -> np.ndarray:
    """Three shortest independent vectors that span the same lattice, as rows in order of length, right-handed.

    Each step replaces the second vector by the shortest of its sums with multiples of the first, and the third by the
    shortest of its sums with multiples of both.

    Parameters
    ----------
    bases : (k, 3, 3) float64
        Independent vectors as rows.

    References
    ----------
    Semaev, I. (2001). Lecture Notes in Computer Science 2146, 181-193.
    """
    bases = np.array(bases, dtype=float)
    shifts = np.array(list(product((-1.0, 0.0, 1.0), repeat=2)))
    moving = np.arange(len(bases))
    for _ in range(100):
        some = bases[moving]
        some = np.take_along_axis(some, np.argsort((some**2).sum(axis=2), axis=1, kind="stable")[..., None], axis=1)
        before = (some**2).sum(axis=(1, 2))
        some[:, 1] -= np.rint(_dot(some[:, 0], some[:, 1]) / _dot(some[:, 0], some[:, 0]))[:, None] * some[:, 0]
        plane = some[:, :2] @ some[:, :2].transpose(0, 2, 1)
        near = np.linalg.solve(plane, (some[:, :2] @ some[:, 2, :, None]))[..., 0]
        trials = some[:, None, 2] - (np.rint(near)[:, None] + shifts) @ some[:, :2]
        shortest = np.argmin((trials**2).sum(axis=2), axis=1)
        some[:, 2] = trials[np.arange(len(some)), shortest]
        bases[moving] = some
        moving = moving[(some**2).sum(axis=(1, 2)) < before * (1 - 1e-12)]
        if not len(moving):
            break
    bases = np.take_along_axis(bases, np.argsort((bases**2).sum(axis=2), axis=1, kind="stable")[..., None], axis=1)
    return bases * np.sign(np.linalg.det(bases))[:, None, None]


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def lattice_rotations(basis: np.ndarray, tolerance: float = 0.01) -> np.ndarray:
    """Proper rotations of a reduced lattice: those of the integer matrices that keep its metric.

    Parameters
    ----------
    basis : (3, 3) float64
        Reduced direct basis, rows.
    tolerance : float
        Largest relative change of a length, and of a scalar product relative to the lengths.

    Returns
    -------
    (n, 3, 3) float64
        Cartesian rotation matrices, the identity first.
    """
    matrices = unimodular_matrices()
    metric = basis @ basis.T
    scale = np.sqrt(np.outer(np.diag(metric), np.diag(metric)))
    change = np.abs(matrices @ metric @ matrices.transpose(0, 2, 1) - metric) / scale
    kept = matrices[change.max(axis=(1, 2)) < 2 * tolerance]
    # rows transform as basis' = m basis = basis R^T
    rotations = (np.linalg.inv(basis) @ kept @ basis).transpose(0, 2, 1)
    u, _, vt = np.linalg.svd(rotations)
    rotations = u @ vt
    first = np.argsort(-np.trace(rotations, axis1=1, axis2=2), kind="stable")
    return rotations[first]


@lru_cache(maxsize=1)
def unimodular_matrices() -> np.ndarray:
    matrices = np.array(list(product((-1, 0, 1), repeat=9)), dtype=float).reshape(-1, 3, 3)
    return matrices[np.rint(np.linalg.det(matrices)) == 1]


def known_lattice(basis: np.ndarray) -> KnownLattice:
    """The lattice of a primitive direct basis (rows, angstrom), prepared for the search.

    The short vectors are those up to the length of the diagonal of a square on the second reduced vector, and the third
    reduced one unless it is much longer: a still shows the period of vectors along the beam badly, and then the others
    must do; long vectors cost more to find and add little, since two vectors fix the orientation.
    """
    basis = reduce_basis(basis)
    rotations = lattice_rotations(basis)
    lengths = np.linalg.norm(basis, axis=1)
    indices = np.array([n for n in product((-1, 0, 1), repeat=3) if n > (0, 0, 0)])
    vectors = indices @ basis
    size = np.linalg.norm(vectors, axis=1)
    limit = 1.005 * max(lengths[1] * np.sqrt(2), min(lengths[2], 1.5 * lengths[1]))
    order = np.argsort(size, kind="stable")
    vectors = vectors[order][size[order] <= limit]
    others = unimodular_matrices()
    size = np.sort(np.linalg.norm(others @ basis, axis=2), axis=1)
    settings = np.rint(np.linalg.inv(others[(size <= 1.25 * lengths).all(axis=1)]))
    metrics = metric_transforms(settings).reshape(-1, 6)
    return KnownLattice(basis, rotations, vectors, _unequal_pairs(vectors, rotations), settings, metrics)


def _unequal_pairs(vectors: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    # a pair (i, j) is named by the smallest pair of numbers among its images
    images = np.einsum("gij,mj->gmi", rotations, vectors)
    distance = np.minimum(
        np.linalg.norm(images[:, :, None] - vectors, axis=-1), np.linalg.norm(images[:, :, None] + vectors, axis=-1)
    )
    number = distance.argmin(axis=2)
    # an image may leave the list where the lattice has the symmetry only within the tolerance
    number[distance.min(axis=2) > 0.05 * np.linalg.norm(vectors, axis=1)] = len(vectors)
    seen = set()
    pairs = []
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            cosine = vectors[i] @ vectors[j] / np.linalg.norm(vectors[i]) / np.linalg.norm(vectors[j])
            if abs(cosine) > 0.94:  # less than 20 degrees apart: the orientation would be ill determined
                continue
            name = min((min(a, b), max(a, b)) for a, b in zip(number[:, i], number[:, j]))
            if name not in seen:
                seen.add(name)
                pairs.append((i, j))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def like_cell(bases: np.ndarray, known: np.ndarray, length_tolerance: float, angle_tolerance: float) -> np.ndarray:
    """Whether lengths (relative) and angles (degrees) of bases (k, 3, 3) are those of a known one (3, 3)."""
    size, angles = _lengths_and_angles(bases @ bases.transpose(0, 2, 1))
    known_size, known_angles = _lengths_and_angles(known @ known.T)
    good = np.abs(size / known_size - 1).max(axis=1) < length_tolerance
    return good & (np.abs(angles - known_angles).max(axis=1) < angle_tolerance)


def _lengths_and_angles(metric: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    size = np.sqrt(np.diagonal(metric, axis1=-2, axis2=-1))
    cosine = np.stack(
        [metric[..., (k + 1) % 3, (k + 2) % 3] / size[..., k - 2] / size[..., k - 1] for k in range(3)], -1
    )
    return size, np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@dataclass(frozen=True)
class CellCriterion:
    """Whether a basis may belong to a known cell: the criterion of DIALS, in the setting of a :class:`KnownLattice`.

    The twofold axes of the lattice must be perpendicular to their planes within some degrees (Le Page, 1982), and the
    cell made symmetric must have the known lengths and angles. A measured basis may so be off by more than the
    tolerance in one length if it is not in the mean.

    Attributes
    ----------
    symmetrised : (6, 6) float64
        The mean over the symmetry of the lattice, for metrics as six numbers (:func:`packed_metric`).
    axes, normals : (t, 3) float64
        Direct and reciprocal indices of the twofold axes and of the planes across them.
    to_conventional : (3, 3) float64
        Leads from the primitive reduced basis to that of the cell.
    lengths, angles : (3,) float64
        Of the cell, in angstrom and degrees.
    length_tolerance, angle_tolerance, max_delta : float
        Relative, in degrees, and the limit of Le Page in degrees.

    References
    ----------
    Le Page, Y. (1982). J. Appl. Cryst. 15, 255-259.
    """

    symmetrised: np.ndarray
    axes: np.ndarray
    normals: np.ndarray
    to_conventional: np.ndarray
    lengths: np.ndarray
    angles: np.ndarray
    length_tolerance: float
    angle_tolerance: float
    max_delta: float

    @classmethod
    def of(
        cls,
        lattice: KnownLattice,
        operations: np.ndarray,
        to_conventional: np.ndarray,
        length_tolerance: float,
        angle_tolerance: float,
        max_delta: float,
    ) -> CellCriterion:
        """The criterion for the cell of a lattice.

        `operations` (n, 3, 3) are the integer matrices M of its symmetry: the rows of ``M @ basis`` are those of a
        rotated `basis`.
        """
        cell = to_conventional @ lattice.basis
        twofold = operations[np.rint(np.trace(operations, axis1=1, axis2=2)) == -1]
        return cls(
            metric_transforms(operations).mean(axis=0),
            np.array([_fixed(m.T) for m in twofold]).reshape(-1, 3),
            np.array([_fixed(m) for m in twofold]).reshape(-1, 3),
            to_conventional,
            *_lengths_and_angles(cell @ cell.T),
            length_tolerance,
            angle_tolerance,
            max_delta,
        )

    def accepts(self, bases: np.ndarray) -> np.ndarray:
        """Whether bases (k, 3, 3) fulfil it, (k,) bool."""
        mean = (packed_metric(bases) @ self.symmetrised.T)[:, _UNPACKED]
        lengths, angles = _lengths_and_angles(self.to_conventional @ mean @ self.to_conventional.T)
        good = np.abs(lengths / self.lengths - 1).max(axis=1) < self.length_tolerance
        good &= np.abs(angles - self.angles).max(axis=1) < self.angle_tolerance
        axes = self.axes @ bases
        normals = self.normals @ np.linalg.inv(bases).transpose(0, 2, 1)
        cosine = np.abs(_dot(axes, normals)) / np.linalg.norm(axes, axis=2) / np.linalg.norm(normals, axis=2)
        return good & (np.degrees(np.arccos(np.minimum(cosine, 1))) < self.max_delta).all(axis=1)


def packed_metric(bases: np.ndarray) -> np.ndarray:
    """Scalar products aa, bb, cc, bc, ac, ab of the vectors of bases (k, 3, 3), (k, 6) float64."""
    return (bases @ bases.transpose(0, 2, 1))[:, _PACKED[0], _PACKED[1]]


def metric_transforms(changes: np.ndarray) -> np.ndarray:
    """Matrices (n, 6, 6) that take the packed metric of a basis to that of ``change @ basis``; changes (n, 3, 3)."""
    units = np.eye(6)[:, _UNPACKED]
    return (changes[:, None] @ units @ changes[:, None].transpose(0, 1, 3, 2))[..., _PACKED[0], _PACKED[1]].transpose(
        0, 2, 1
    )


def _fixed(m: np.ndarray) -> np.ndarray:
    # m + 1 projects on the axis of a twofold rotation
    columns = (m + np.eye(3)).T
    return columns[np.argmax(np.abs(columns).sum(axis=1))]
