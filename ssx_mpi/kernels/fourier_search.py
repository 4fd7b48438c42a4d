"""Lattice vectors of one still by Fourier analysis of one-dimensional projections, as DIALS finds them.

The scattering vectors are projected on directions that cover half a sphere. Projections on a direct-lattice vector lie
on planes one reciprocal length apart, so that the Fourier transform of their histogram has a maximum at the length of
the vector (Steller, Bolotovsky & Rossmann, 1997). The directions of the highest maxima are refined on ever finer grids.

The steps, the grids and the thresholds are those of the method ``fft1d`` of DIALS, on purpose. On the spots of a split
or bent crystal the refinement has many optima, and which of them it ends in is decided by the vectors that it begins
with: with vectors from a finer or a continuous search one gets other lattices, of the same quality, but not those of
DIALS.

- The grid has a spacing of twice the finest resolution over the longest cell, or 0.029 rad where that is less; psi goes
  in equal steps from the pole to the equator, phi in equal steps about each circle. Where the spacing would be finer
  than 0.016 rad, a grid of 0.016 rad is searched first, and the fine one only about the best of its directions.
- The histogram of a direction has one bin for each fifth of a plane distance of the longest cell, its number raised to
  the next product of 2, 3 and 5.
- Maxima above a quarter of the number of spots count, except those of lengths above the longest cell; of directions
  within 5 degrees the best, 30 at most.
- About each, 5 by 5 directions a quarter of the spacing apart are tried, then again about the best of them with a
  quarter of that, down to a hundredth of the resolution of the grid. Of results within 10 degrees the best is kept.

References
----------
Steller, I., Bolotovsky, R. & Rossmann, M. G. (1997). J. Appl. Cryst. 30, 1036-1040.
Sauter, N. K., Grosse-Kunstleve, R. W. & Adams, P. D. (2004). J. Appl. Cryst. 37, 399-409.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import combinations

import numpy as np
from scipy.fft import rfft

from ssx_mpi.kernels._library import array, c_int, c_int64, declare
from ssx_mpi.kernels.lattice_search import cosine_sums
from ssx_mpi.kernels.lattices import CellCriterion, KnownLattice, packed_metric, reduce_bases
from ssx_mpi.kernels.rotations import rotation_matrices

# radians: the coarsest grid, and the finest that covers the whole hemisphere
_COARSEST_GRID = 0.029
_WHOLE_GRID = 0.016
_BINS_PER_PLANE = 5
# lower terms of the transform are the shape of the histogram
_FIRST_TERM = 3
# share of the spots that a maximum must reach; the same in the search of the first of two grids
_SHARE = 1 / 4
_QUICK_SHARE = 1 / 10
_CLUSTERS = 30
_CLUSTER_CHORD = 0.087  # 5 degrees
_SAME_DIRECTION = np.cos(np.radians(10.0))
_FINEST = 100
_SAME_GROUP = np.cos(np.radians(5.0))
# equal histograms give equal maxima up to the rounding of single precision; then the first counts
_EQUAL = 1e-6
_NO_EXTENT = 1e-12
# directions whose histograms are transformed together: about a megabyte
_CHUNK = 256
# triples that are reduced together, at first
_TOGETHER = 64
# settings of a basis that are held against the criterion, the nearest first
_SETTINGS = 64
# degrees: two vectors are no basis of a plane below, nor a third one of space
_MIN_ANGLE = 20.0


@dataclass(frozen=True)
class Periods:
    """The strongest period of the projections on some directions.

    Attributes
    ----------
    directions : (n, 3) float64
        Unit vectors.
    length : (n,) float64
        In angstrom.
    amplitude : (n,) float64
        Modulus of the Fourier sum over the spots, at most their number.
    """

    directions: np.ndarray
    length: np.ndarray
    amplitude: np.ndarray

    def __len__(self) -> int:
        return len(self.length)

    def select(self, which: np.ndarray) -> Periods:
        """Those of some directions."""
        return Periods(self.directions[which], self.length[which], self.amplitude[which])


def lattice_vectors(q: np.ndarray, max_cell: float, spacing: float | None = None) -> np.ndarray:
    """Direct-lattice vectors of the spots of a still, those of the highest Fourier maxima first.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors, 1/angstrom; at least 8.
    max_cell : float
        The longest vector that is looked for, in angstrom.
    spacing : float, optional
        Of the grid of directions, in radians; by default that of the module's description.

    Returns
    -------
    (m, 3) float64
        In angstrom; m is at most 30.
    """
    resolution = 1 / np.sqrt(np.max(np.einsum("ij,ij->i", q, q)))
    natural = min(_COARSEST_GRID, 2 * resolution / max_cell) if spacing is None else spacing
    spacing = min(_COARSEST_GRID, natural)
    directions = grid(spacing) if spacing > _WHOLE_GRID else _two_grids(q, max_cell, spacing)
    found = strongest_periods(q, directions, max_cell)
    found = found.select((found.length < max_cell) & (found.amplitude > _SHARE * len(q)))
    refined = _refined(q, found.select(_one_of_each_cluster(found)), max_cell, spacing, natural / _FINEST)
    refined = refined.select(np.argsort(-refined.amplitude, kind="stable"))
    same = np.abs(refined.directions @ refined.directions.T) > _SAME_DIRECTION
    best = refined.select(~np.tril(same, -1).any(axis=1))
    return best.directions * best.length[:, None]


@lru_cache(maxsize=2)
def grid(spacing: float) -> np.ndarray:
    """Unit vectors about `spacing` radians apart on half a sphere, circle by circle from the pole, (n, 3) float64."""
    n_circles = int(0.5 + np.pi / 2 / spacing)
    psi = np.arange(n_circles + 1) * (np.pi / 2 / n_circles)
    count = np.maximum(1, (0.5 + 2 * np.pi * np.sin(psi) / spacing).astype(np.int64))
    first = np.repeat(np.cumsum(count) - count, count)
    return _unit(np.repeat(psi, count), (np.arange(len(first)) - first) * np.repeat(2 * np.pi / count, count))


def _unit(psi: np.ndarray, phi: np.ndarray) -> np.ndarray:
    return np.stack([np.sin(psi) * np.cos(phi), np.sin(psi) * np.sin(phi), np.cos(psi)], axis=-1)


def strongest_periods(q: np.ndarray, directions: np.ndarray, max_cell: float) -> Periods:
    """The strongest period of the projections of `q` (n_spots, 3) on each of the `directions` (n, 3)."""
    limits, histograms, largest = _loops()
    q = np.ascontiguousarray(q.T)
    directions = np.ascontiguousarray(directions)
    n_spots, n = q.shape[1], len(directions)
    low, high = np.empty(n), np.empty(n)
    work = np.empty(n_spots)
    limits(q, n_spots, directions, n, work, low, high)
    wanted = 1 + ((high - low) * _BINS_PER_PLANE * max_cell).astype(np.int64)
    n_bins = _smooth_numbers(int(wanted.max()))[wanted]
    length, amplitude = np.empty(n), np.empty(n)
    for size in np.unique(n_bins):
        numbers = np.nonzero(n_bins == size)[0]
        for start in range(0, len(numbers), _CHUNK):
            some = numbers[start : start + _CHUNK]
            bins = np.empty((len(some), size), dtype=np.float32)
            histograms(q, n_spots, directions[some], len(some), low[some], high[some], size, work, bins)
            spectrum = rfft(bins, axis=1).view(np.float32)
            n_terms = spectrum.shape[1] // 2
            modulus, at = np.empty(len(some), dtype=np.float32), np.empty(len(some), dtype=np.int32)
            largest(spectrum, len(some), n_terms, _FIRST_TERM, np.empty(n_terms, dtype=np.float32), modulus, at)
            length[some] = at * ((size - 1) / size / np.maximum(high[some] - low[some], _NO_EXTENT))
            amplitude[some] = modulus
    return Periods(directions, length, amplitude)


@cache
def _loops() -> tuple:
    doubles, floats = array(np.float64), array(np.float32)
    doubles_out, floats_out = array(np.float64, writeable=True), array(np.float32, writeable=True)
    return (
        declare("ssx_projection_limits", [doubles, c_int64, doubles, c_int64, doubles_out, doubles_out, doubles_out]),
        declare(
            "ssx_projection_histograms",
            [doubles, c_int64, doubles, c_int64, doubles, doubles, c_int, doubles_out, floats_out],
        ),
        declare(
            "ssx_largest_modulus",
            [floats, c_int64, c_int64, c_int64, floats_out, floats_out, array(np.int32, writeable=True)],
        ),
    )


def _smooth_numbers(largest: int) -> np.ndarray:
    # for each number up to `largest` the next one that is a product of 2, 3 and 5
    return _smooth_table(1 << (largest - 1).bit_length())


@lru_cache(maxsize=8)
def _smooth_table(size: int) -> np.ndarray:
    numbers = sorted(
        2**i * 3**j * 5**k for i in range(32) for j in range(20) for k in range(14) if 2**i * 3**j * 5**k <= 2 * size
    )
    return np.array(numbers)[np.searchsorted(numbers, np.arange(size + 1))]


def _two_grids(q: np.ndarray, max_cell: float, spacing: float) -> np.ndarray:
    """Directions of the fine grid within 0.016 rad of the best ones of a grid with that spacing."""
    # seldom needed and slow to load
    from scipy.spatial import cKDTree

    found = strongest_periods(q, grid(_WHOLE_GRID), max_cell)
    found = found.select(found.amplitude > _QUICK_SHARE * len(q))
    per_winner = np.pi * (_WHOLE_GRID / spacing) ** 2
    n_winners = int(np.pi / _WHOLE_GRID**2 / per_winner)
    winners = found.directions[np.argsort(-found.amplitude, kind="stable")[:n_winners]]
    # on the equator a direction and its opposite are the same
    winners = np.concatenate([winners, -winners[np.abs(winners[:, 2]) < 1e-4]])
    fine = grid(spacing)
    near = cKDTree(fine).query_ball_point(winners, _WHOLE_GRID)
    return fine[np.unique(np.concatenate([*near, []]).astype(np.int64))]


def _one_of_each_cluster(found: Periods) -> np.ndarray:
    order = np.argsort(-found.amplitude, kind="stable")
    if len(order) < 3:
        return order
    directions = found.directions[order]
    free = np.ones(len(order), dtype=bool)
    chosen: list[int] = []
    for k in range(len(order)):
        if free[k]:
            chosen.append(int(order[k]))
            if len(chosen) == _CLUSTERS:
                break
            free &= np.linalg.norm(directions - directions[k], axis=1) >= _CLUSTER_CHORD
    return np.array(chosen, dtype=np.int64)


def _refined(q: np.ndarray, found: Periods, max_cell: float, spacing: float, finest: float) -> Periods:
    """Maxima on ever finer grids of 5 by 5 directions about each of those found."""
    n = len(found)
    best = found
    step = spacing / 4
    while step >= finest and n:
        trials = strongest_periods(q, _neighbours(best.directions, step).reshape(-1, 3), max_cell)
        amplitude = trials.amplitude.reshape(n, 25)
        highest = amplitude.max(axis=1, keepdims=True)
        first = (amplitude >= highest * (1 - _EQUAL)).argmax(axis=1)
        better = highest[:, 0] > best.amplitude * (1 + _EQUAL)
        chosen = np.arange(n) * 25 + first
        best = Periods(
            np.where(better[:, None], trials.directions[chosen], best.directions),
            np.where(better, trials.length[chosen], best.length),
            np.where(better, trials.amplitude[chosen], best.amplitude),
        )
        step /= 4
    return best


def _neighbours(directions: np.ndarray, step: float) -> np.ndarray:
    """Directions (n, 25, 3) turned by -2 to 2 steps about two axes across each direction (n, 3)."""
    psi, phi = np.arccos(directions[:, 2]), np.arctan2(directions[:, 1], directions[:, 0])
    beside = _unit(psi + step, phi)
    one = np.cross(directions, beside)
    one /= np.linalg.norm(one, axis=1, keepdims=True)
    other = np.cross(one, beside)
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    angles = -step * np.arange(-2, 3)[:, None]
    by_one, by_other = (rotation_matrices(angles * axis[:, None]) for axis in (one, other))
    turned = by_one @ directions[:, None, :, None]
    return (by_other[:, None] @ turned[:, :, None])[..., 0].reshape(len(directions), 25, 3)


def vectors_of_known_lengths(q: np.ndarray, lengths: np.ndarray, spacing: float, n: int) -> np.ndarray:
    """Vectors v of known lengths with the largest sum_j cos(2 pi q_j.v): ``real_space_grid_search`` of DIALS.

    Vectors on a grid of directions are grouped in order of their sums: one joins the first group whose mean has its
    length within 10% and its direction, or the opposite one, within 5 degrees. Of each group the first is taken.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors, 1/angstrom.
    lengths : (m,) float64
        In angstrom.
    spacing : float
        Of the directions, in radians.
    n : int
        The most groups.

    Returns
    -------
    (k, 3) float64
        In angstrom, in order of the sums.
    """
    vectors = (grid(spacing)[:, None] * np.unique(lengths)[:, None]).reshape(-1, 3)
    vectors = vectors[np.argsort(-cosine_sums(q, vectors), kind="stable")]
    sizes = np.linalg.norm(vectors, axis=1)
    first: list[int] = []
    sums, counts = np.empty((n, 3)), np.zeros(n)
    for k, (vector, size) in enumerate(zip(vectors, sizes)):
        means = sums[: len(first)] / counts[: len(first), None]
        mean_sizes = np.linalg.norm(means, axis=1)
        cosines = means @ vector / (mean_sizes * size)
        near = np.abs(mean_sizes - size) < 0.1 * np.maximum(mean_sizes, size)
        near &= np.abs(cosines) > _SAME_GROUP
        if near.any():
            group = near.argmax()
            sums[group] += np.sign(cosines[group]) * vector
        else:
            group = len(first)
            sums[group] = vector
            first.append(k)
            if len(first) == n:
                break
        counts[group] += 1
    return vectors[first]


def known_bases(vectors: np.ndarray, lattice: KnownLattice, criterion: CellCriterion) -> Iterator[np.ndarray]:
    """Bases of a known lattice that triples of vectors make, those of the first vectors first.

    Triples come in order of the sum of the squares of their numbers, as DIALS combines them.

    Parameters
    ----------
    vectors : (m, 3) float64
        In angstrom.
    lattice : KnownLattice
    criterion : CellCriterion
        What a basis must fulfil.

    Yields
    ------
    (3, 3) float64
        Direct primitive bases (rows, angstrom), in the setting of ``lattice.basis``.
    """
    triples = _triples(len(vectors))
    a, b, c = (vectors[triples[:, k]] for k in range(3))
    across = np.cross(a, b)
    volume = np.abs(np.einsum("ij,ij->i", across, c))
    area = np.linalg.norm(across, axis=1)
    smallest = np.sin(np.radians(_MIN_ANGLE))
    wide = area >= smallest * np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    wide &= volume >= smallest * area * np.linalg.norm(c, axis=1)
    known = abs(np.linalg.det(lattice.basis))
    low, high = (1 - criterion.length_tolerance) ** 3, (1 + criterion.length_tolerance) ** 3
    wide &= (volume > 0.9 * low * known) & (volume < 1.1 * high * known)
    triples = triples[wide]
    start, n = 0, _TOGETHER
    while start < len(triples):
        reduced = reduce_bases(vectors[triples[start : start + n]])
        # more than what can be symmetrised to the cell; cheap, and leaves few
        size = np.linalg.norm(reduced, axis=2) / np.linalg.norm(lattice.basis, axis=1)
        bases, good = _in_setting(
            reduced[(np.abs(size - 1) < 3 * criterion.length_tolerance).all(axis=1)], lattice, criterion
        )
        yield from bases[good]
        # the first ones do, where there is a lattice
        start, n = start + n, 4 * n


@lru_cache(maxsize=32)
def _triples(n: int) -> np.ndarray:
    triples = np.array(list(combinations(range(n), 3)), dtype=np.int64).reshape(-1, 3)
    return triples[np.argsort((triples**2).sum(axis=1), kind="stable")]


def _in_setting(reduced: np.ndarray, lattice: KnownLattice, criterion: CellCriterion) -> tuple[np.ndarray, np.ndarray]:
    """Reduced bases in the setting of the known one, (k, 3, 3), and which of them fulfil the criterion, (k,).

    Of the settings that fulfil it the one counts whose metric is nearest to that of the known basis. Where none does it
    is the nearest of all. The nearest alone would not do: a distorted basis may be as near to the known metric in a
    setting whose axes are not those of the symmetry.
    """
    metrics = (packed_metric(reduced) @ lattice.metrics.T).reshape(len(reduced), len(lattice.settings), 6)
    difference = np.abs(metrics - packed_metric(lattice.basis[None])).sum(axis=2)
    bases = lattice.settings[difference.argmin(axis=1)] @ reduced
    good = criterion.accepts(bases)
    others = np.nonzero(~good)[0]
    if not len(others):
        return bases, good
    order = np.argsort(difference[others], axis=1, kind="stable")[:, 1:_SETTINGS]
    trials = lattice.settings[order] @ reduced[others, None]
    accepted = criterion.accepts(trials.reshape(-1, 3, 3)).reshape(order.shape)
    mended = accepted.any(axis=1)
    bases[others[mended]] = trials[mended, accepted[mended].argmax(axis=1)]
    good[others[mended]] = True
    return bases, good
