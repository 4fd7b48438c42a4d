"""Unique reflections as integers: Miller indices mapped to rows of one table that all ranks share.

An index h (row vector) has the symmetry equivalents h R, R the rotation parts of the space group, and the Friedel mates
of these. All of them share one key, the largest packed index among them, so that mapping a million indices costs a
loop of integer arithmetic and one binary search each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_int64, declare

IDENTITY = np.eye(3)


@dataclass(frozen=True)
class Observations:
    """Reflections as integrated, grouped by crystal, in the setting in which each crystal was indexed.

    Parameters
    ----------
    start
        (n_crystals + 1,) int64; the observations of crystal c are rows ``start[c]`` to ``start[c + 1] - 1``.
    hkl
        (n, 3) int32.
    intensity, variance
        (n,) float64; of the full reflection: corrected for Lorentz, polarisation, efficiency and partiality.
    offset_sq
        (n,) float32; squared distance of the reflection from the Ewald sphere over the variance of its width, -2
        ln(partiality); 0 where it was recorded whole.
    tilt
        (n, 3) float32: the offset whose square `offset_sq` is, with its sign, and its derivatives by rotations of the
        crystal about the two axes of :func:`ssx_mpi.kernels.orientation.beam_axes`, per radian. None where the file
        does not say where reciprocal lattice points are.
    limit
        Observations with a squared offset beyond it are not used, but tell of orientations.
    """

    start: np.ndarray
    hkl: np.ndarray
    intensity: np.ndarray
    variance: np.ndarray
    offset_sq: np.ndarray
    tilt: np.ndarray | None = None
    limit: float = np.inf

    @property
    def n_crystals(self) -> int:
        return len(self.start) - 1

    def crystal(self) -> np.ndarray:
        """Number of the crystal of each observation, (n,) int64."""
        return np.repeat(np.arange(self.n_crystals), np.diff(self.start))

    def within(self) -> np.ndarray:
        """Which observations are within the limit, (n,) bool."""
        return self.offset_sq <= self.limit

    def number_within(self) -> np.ndarray:
        """How many observations of each crystal are within the limit, (n_crystals,) int64."""
        return np.bincount(self.crystal()[self.within()], minlength=self.n_crystals)

    def select(self, crystals: np.ndarray) -> Observations:
        """The observations of the crystals where the mask (n_crystals,) bool is true."""
        rows = np.repeat(crystals, np.diff(self.start))
        counts = np.diff(self.start)[crystals]
        return Observations(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            self.hkl[rows],
            self.intensity[rows],
            self.variance[rows],
            self.offset_sq[rows],
            None if self.tilt is None else self.tilt[rows],
            self.limit,
        )


@dataclass(frozen=True)
class UniqueReflections:
    """The reflections that can be told apart when Friedel mates are one, sorted by key.

    Parameters
    ----------
    hkl
        (n, 3) int32, each in the asymmetric unit of who made the table.
    d_star_sq
        (n,) float64, 1/d^2 in 1/angstrom^2, with the central cell.
    epsilon
        (n,) int64, how many rotations leave the index where it is: its mean intensity is that many times the average.
    centric
        (n,) bool, some rotation takes the index to its Friedel mate.
    rotations
        (m, 3, 3) float64, of the point group, acting on indices from the right.
    key, flip
        (n,) int64 and uint8: the sorted keys, and which of the two Friedel mates reaches it.
    """

    hkl: np.ndarray
    d_star_sq: np.ndarray
    epsilon: np.ndarray
    centric: np.ndarray
    rotations: np.ndarray
    key: np.ndarray
    flip: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def locate(self, hkl: np.ndarray, reindex: np.ndarray = IDENTITY) -> tuple[np.ndarray, np.ndarray]:
        """Rows of this table for observed indices.

        Parameters
        ----------
        hkl
            (n, 3) int32.
        reindex
            (3, 3); the index in the common setting is ``hkl @ reindex``.

        Returns
        -------
        unique : (n,) int32
            Row in this table, -1 for indices that are absent or beyond its resolution.
        minus : (n,) uint8
            1 where the observation is of the Friedel mate of the tabulated index; 0 for centric ones.
        """
        key, minus = asu_keys(hkl, reindex @ self.rotations)
        row = np.searchsorted(self.key, key)
        row[row == len(self.key)] = 0
        found = self.key[row] == key if len(self.key) else np.zeros(len(key), dtype=bool)
        minus ^= self.flip[row]
        minus[self.centric[row]] = 0
        return np.where(found, row, -1).astype(np.int32), minus


def unique_reflections(hkl: np.ndarray, d_star_sq: np.ndarray, rotations: np.ndarray) -> UniqueReflections:
    """Table of unique reflections from one representative of each.

    Parameters
    ----------
    hkl
        (n, 3) integers, no two equivalent by symmetry or Friedel's law.
    d_star_sq
        (n,) in 1/angstrom^2.
    rotations
        (m, 3, 3), the point group.

    Raises
    ------
    ValueError
        When two of the indices are equivalent.
    """
    hkl = np.ascontiguousarray(hkl, dtype=np.int32).reshape(-1, 3)
    rotations = np.ascontiguousarray(rotations, dtype=np.float64)
    key, flip = asu_keys(hkl, rotations)
    order = np.argsort(key)
    if np.any(np.diff(key[order]) == 0):
        raise ValueError("the table of unique reflections holds equivalent indices")
    hkl = hkl[order]
    epsilon = np.zeros(len(hkl), dtype=np.int64)
    centric = np.zeros(len(hkl), dtype=bool)
    for rotation in rotations:
        image = np.rint(hkl @ rotation).astype(np.int32)
        epsilon += np.all(image == hkl, axis=1)
        centric |= np.all(image == -hkl, axis=1)
    return UniqueReflections(
        hkl, np.asarray(d_star_sq, float)[order], epsilon, centric, rotations, key[order], flip[order]
    )


def asu_keys(hkl: np.ndarray, rotations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Key of the class of symmetry and Friedel equivalents of each index, (n,) int64, and on which side it was reached.

    Parameters
    ----------
    hkl
        (n, 3) int32, each index within ±524,287 after any of the rotations.
    rotations
        (m, 3, 3) float64 acting from the right.

    Returns
    -------
    key : (n,) int64
    minus : (n,) uint8
        1 where only Friedel mates of the equivalents reach the key.
    """
    hkl = np.ascontiguousarray(hkl, dtype=np.int32)
    rotations = np.ascontiguousarray(rotations, dtype=np.float64)
    key = np.empty(len(hkl), dtype=np.int64)
    minus = np.empty(len(hkl), dtype=np.uint8)
    _asu_keys(len(hkl), hkl, len(rotations), rotations, key, minus)
    return key, minus


_asu_keys = declare(
    "ssx_asu_keys",
    [
        c_int64,
        array(np.int32, 2),
        c_int64,
        array(np.float64, 3),
        array(np.int64, 1, writeable=True),
        array(np.uint8, 1, writeable=True),
    ],
)
