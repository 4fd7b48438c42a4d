"""Lattices in the spots of one still: real-space vectors first, orientations from pairs of them, best ones first.

A direct-lattice vector v makes every q.v of the scattering vectors q = s1 - s0 an integer, up to the error of the
measurement. The search has four steps, each one array operation over all candidates:

1. For each short vector of the known lattice, the density of the spots projected on directions that cover half a
   sphere is transformed at the lengths around the vector's own: A(n, L) = |sum_j exp(2 pi i L n.q_j)|, the
   one-dimensional Fourier search of Steller et al. (1997) at the lengths that matter alone. The modulus does not
   depend on where the origin of reciprocal space is, so that a beam centre a few pixels off does no harm.
2. The strongest maxima are refined as planes through the spots, n_j = q_j.v + c, by weighted least squares.
3. Two vectors with the lengths and the angle of two known ones fix an orientation. All such pairs are formed, and
   scored by the number of spots that lie near a lattice point.
4. The best are refined against the lattice points they explain (q = (1 + M) B h, linear in the 3x3 matrix M), from
   low resolution to high, and those that are the same lattice are dropped.

References
----------
Steller, I., Bolotovsky, R. & Rossmann, M. G. (1997). J. Appl. Cryst. 30, 1036-1040.
Gasparotto, P. et al. (2024). J. Appl. Cryst. 57, 931-944 (search for vectors of known length).
"""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache

import numpy as np

from ssx_mpi.kernels._library import array, c_int, c_int64, declare
from ssx_mpi.kernels.lattices import KnownLattice, like_cell, reduce_bases

# spots in the search for vectors, those of lowest resolution
_SEARCH_SPOTS = 200
# phase error in cycles that half a step of the grid of directions makes for the outermost spot in use
_GRID_PHASE = 0.35
_LENGTH_STEP = 0.5
_MAX_DIRECTIONS = 60_000
# relative width of the windows of length that are searched; the refinement goes beyond
_WINDOW = 0.05
# vectors kept for each length, and orientations made of their pairs
_VECTORS = 120
_ORIENTATIONS = 25_000
# half an octave: lengths from (1 - x) to (1 + x); and lattice planes resolved in the search for unknown lengths
_HALF_OCTAVE = 0.17
_LAYERS = 30.0
# degrees by which the angle of two vectors may differ from the known one
_PAIR_ANGLE = 3.0
# the compiled loops work on this many spots at a time
_LANES = 8
# distance from a lattice point in index space within which a spot speaks for a lattice when candidates are compared
_NARROW = 0.2


@lru_cache(maxsize=32)
def hemisphere(n: int) -> np.ndarray:
    """`n` unit vectors spread evenly over half a sphere (a spiral of the golden angle), (n, 3) float64."""
    z = (np.arange(n) + 0.5) / n
    phi = np.arange(n) * (np.pi * (3 - np.sqrt(5)))
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(phi), r * np.sin(phi), z], axis=1)


def period_amplitudes(q: np.ndarray, directions: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A(n, L) = abs(sum_j exp(2 pi i L n.q_j)), the largest over the lengths L for each direction n.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors, 1/angstrom.
    directions : (n_directions, 3) float64
        Unit vectors.
    lengths : (n_lengths,) float64
        In angstrom, evenly spaced.

    Returns
    -------
    amplitude : (n_directions,) float32
    best : (n_directions,) int32
        Number of the length that gives it.
    """
    spots = _padded(q)
    amplitude = np.empty(len(directions), dtype=np.float32)
    best = np.empty(len(directions), dtype=np.int32)
    step = float(lengths[1] - lengths[0]) if len(lengths) > 1 else 0.0
    _loops()[0](
        spots,
        len(q),
        spots.shape[1],
        np.ascontiguousarray(directions, dtype=np.float32),
        len(directions),
        float(lengths[0]),
        step,
        len(lengths),
        np.empty(2 * _LANES * len(lengths), dtype=np.float32),
        amplitude,
        best,
    )
    return amplitude, best


def cosine_sums(q: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """sum_j cos(2 pi q_j.v) over the spots (n_spots, 3) for each vector v of (m, 3), (m,) float32, to 5e-5 a spot."""
    spots = _padded(q)
    sums = np.empty(len(vectors), dtype=np.float32)
    _loops()[2](spots, len(q), spots.shape[1], np.ascontiguousarray(vectors, dtype=np.float32), len(vectors), sums)
    return sums


def _padded(q: np.ndarray) -> np.ndarray:
    padded = np.zeros((3, -(-len(q) // _LANES) * _LANES), dtype=np.float32)
    padded[:, : len(q)] = q.T
    return padded


@cache
def _loops() -> tuple:
    floats = array(np.float32)
    out = array(np.float32, writeable=True)
    real = ctypes.c_float
    amplitudes = declare(
        "ssx_period_amplitudes",
        [floats, c_int, c_int, floats, c_int64, real, real, c_int, out, out, array(np.int32, writeable=True)],
    )
    explained = declare("ssx_explained", [floats, c_int, c_int, floats, c_int64, real, out])
    return amplitudes, explained, declare("ssx_cosine_sums", [floats, c_int, c_int, floats, c_int64, out])


def strongest(vectors: np.ndarray, score: np.ndarray, radius: float, n: int) -> np.ndarray:
    """Numbers of at most `n` vectors in order of score, none nearer to a better one (or its inverse) than `radius`.

    Parameters
    ----------
    vectors : (m, 3) float64
    score : (m,) float64
    radius : float
    n : int
    """
    order = np.argsort(-score, kind="stable")
    v = vectors[order]
    square = np.einsum("ij,ij->i", v, v)
    free = np.ones(len(order), dtype=bool)
    chosen: list[int] = []
    for k in range(len(order)):
        if free[k]:
            chosen.append(int(order[k]))
            if len(chosen) == n:
                break
            # |v -+ v_k|^2, the smaller of the two
            free &= square - 2 * np.abs(v @ v[k]) > radius * radius - square[k]
    return np.array(chosen, dtype=np.int64)


def refine_vectors(q: np.ndarray, vectors: np.ndarray, n_cycles: int = 3, width: float = 0.3) -> tuple:
    """Least-squares fit of q.v + c to integers, with Tukey's weights, for all vectors at once.

    Returns
    -------
    vectors : (m, 3) float64
    score : (m,) float64
        Sum of the weights (1 - (delta / width)^2)^2 of the spots.
    """
    v = np.concatenate([vectors, np.zeros((len(vectors), 1))], axis=1)
    x = np.concatenate([q, np.ones((len(q), 1))], axis=1)
    # c is a shift of the origin, small compared with the distance of the planes: held by a prior of width 0.1
    prior = np.diag([1e-9, 1e-9, 1e-9, 1.0])
    outer = (x[:, :, None] * x[:, None, :]).reshape(len(x), 16)
    for _ in range(n_cycles):
        t = v @ x.T
        delta = np.rint(t) - t
        weight = np.maximum(0.0, 1 - (delta / width) ** 2) ** 2
        normal = (weight @ outer).reshape(-1, 4, 4) + prior
        right = (weight * delta) @ x
        right[:, 3] -= prior[3, 3] * v[:, 3]
        v = v + np.linalg.solve(normal, right[..., None])[..., 0]
    t = v @ x.T
    weight = np.maximum(0.0, 1 - ((np.rint(t) - t) / width) ** 2) ** 2
    return v[:, :3], weight.sum(axis=1)


def _round_up(n: float) -> int:
    # steps of 10%, so that few grids are ever made
    return int(1.1 ** np.ceil(np.log(n) / np.log(1.1)))


def find_vectors(q: np.ndarray, length: float, tolerance: float, n: int = _VECTORS) -> tuple[np.ndarray, np.ndarray]:
    """Direct-lattice vectors of about one length, best first.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors in order of length, 1/angstrom.
    length, tolerance : float
        Length looked for in angstrom, and the relative deviation allowed.
    n : int
        Number of vectors wanted.

    Returns
    -------
    vectors : (m, 3) float64
    score : (m,) float64
        Weight of the spots that lie on planes of the vector, per spot.
    """
    size = np.linalg.norm(q, axis=1)
    low = q[:_SEARCH_SPOTS]
    q_max = float(np.linalg.norm(low[-1]))
    spacing = 2 * _GRID_PHASE / (q_max * length)
    directions = hemisphere(_round_up(float(np.clip(2 * np.pi / spacing**2, 500, _MAX_DIRECTIONS))))
    n_lengths = max(3, int(np.ceil(2 * tolerance * length * q_max / _LENGTH_STEP)))
    lengths = length * np.linspace(1 - tolerance, 1 + tolerance, n_lengths)
    value, best = period_amplitudes(low, directions, lengths)
    top = np.argpartition(-value, min(10 * n, len(value) - 1))[: 10 * n]
    top.sort()
    vectors = directions[top] * lengths[best[top], None]
    vectors = vectors[strongest(vectors, value[top], 0.6 / q_max, n)]
    q_limit = q_max
    while True:
        used = q[: int(np.searchsorted(size, q_limit)) + 1]
        vectors, score = refine_vectors(used, vectors)
        if len(used) >= min(len(q), 400):
            break
        q_limit *= 1.5
    good = np.abs(np.linalg.norm(vectors, axis=1) / length - 1) < tolerance
    vectors, score = vectors[good], score[good] / len(used)
    keep = strongest(vectors, score, 0.5 / q_max, n)
    return vectors[keep], score[keep]


def orientations_from_pairs(
    vectors: np.ndarray,
    score: np.ndarray,
    lattice: KnownLattice,
    length_tolerance: float,
    angle_tolerance: float,
    n: int = _ORIENTATIONS,
) -> np.ndarray:
    """Orientation matrices U (crystal frame to laboratory) from all pairs of vectors that match a pair of the lattice.

    Parameters
    ----------
    vectors, score : (m, 3) and (m,) float64
        Vectors found and their worth.
    length_tolerance, angle_tolerance : float
        Relative, and in degrees.
    n : int
        The most that are returned, those of the best vectors first.

    Returns
    -------
    (k, 3, 3) float64
    """
    size = np.linalg.norm(vectors, axis=1)
    unit = vectors / size[:, None]
    angles = np.degrees(np.arccos(np.clip(unit @ unit.T, -1, 1)))
    np.fill_diagonal(angles, np.nan)
    known_size = np.linalg.norm(lattice.vectors, axis=1)
    known_unit = lattice.vectors / known_size[:, None]
    label = np.abs(size[:, None] / known_size - 1) < length_tolerance
    matches = []
    for number, (i, j) in enumerate(lattice.pairs):
        known_angle = np.degrees(np.arccos(known_unit[i] @ known_unit[j]))
        first, second = np.nonzero(label[:, i])[0], np.nonzero(label[:, j])[0]
        angle = angles[np.ix_(first, second)]
        for sign in (1, -1):
            near = np.abs((angle if sign > 0 else 180 - angle) - known_angle) < angle_tolerance
            a, b = np.nonzero(near)
            # v1, v2 may be -v1, -v2 as well: an orientation of its own unless a rotation of the lattice undoes it
            for flip in (1, -1):
                matches.append(
                    np.stack([first[a], second[b], *(np.full(len(a), x) for x in (flip, flip * sign, number))])
                )
    table = np.concatenate(matches, axis=1)
    table = table[:, np.argsort(-(score[table[0]] + score[table[1]]), kind="stable")[:n]]
    first, second, flip1, flip2, number = table
    found = _frames(flip1[:, None] * unit[first], flip2[:, None] * unit[second])
    known = _frames(known_unit[lattice.pairs[:, 0]], known_unit[lattice.pairs[:, 1]])
    return found @ known.transpose(0, 2, 1)[number]


def _frames(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    # orthonormal frame of two unit vectors, which share the error of their angle
    e1, e2 = a + b, a - b
    e1 = e1 / np.linalg.norm(e1, axis=1, keepdims=True)
    e2 = e2 / np.linalg.norm(e2, axis=1, keepdims=True)
    return np.stack([e1, e2, np.cross(e1, e2)], axis=-1)


def explained(q: np.ndarray, bases: np.ndarray, tolerance: float = 0.3) -> np.ndarray:
    """Weight of the spots near a lattice point, sum of 1 - (|h - nint(h)| / tolerance)^2, for each basis, (k,)."""
    spots = _padded(q)
    score = np.empty(len(bases), dtype=np.float32)
    _loops()[1](
        spots, len(q), spots.shape[1], np.ascontiguousarray(bases, dtype=np.float32), len(bases), tolerance, score
    )
    return score.astype(float)


def same_lattice(bases: np.ndarray, lattice: KnownLattice, angle: float = 1.0) -> np.ndarray:
    """Numbers of the bases that are no rotated copy of an earlier one, up to the symmetry of the lattice.

    Parameters
    ----------
    bases : (k, 3, 3) float64
        Direct bases (rows) in order of preference, near the lattice's own.
    angle : float
        Misorientation in degrees below which two are the same.
    """
    u, _, vt = np.linalg.svd((np.linalg.inv(lattice.basis) @ bases).transpose(0, 2, 1))
    rotations = u @ vt
    # trace(U1^T U2 R) > 1 + 2 cos(angle) for any symmetry R
    flat = rotations.reshape(len(bases), 9)
    free = np.ones(len(bases), dtype=bool)
    chosen = []
    for k in range(len(bases)):
        if not free[k]:
            continue
        chosen.append(k)
        trace = (flat @ (rotations[k] @ lattice.rotations).reshape(-1, 9).T).max(axis=1)
        free &= trace < 1 + 2 * np.cos(np.radians(angle))
    return np.array(chosen, dtype=np.int64)


def refine_bases(q: np.ndarray, bases: np.ndarray, n_cycles: int = 3, tolerance: float = 0.35) -> np.ndarray:
    """Direct bases fitted to the lattice points that they explain: q = (1 + M) q_calc, linear in M, for all at once."""
    for _ in range(n_cycles):
        reciprocal = np.linalg.inv(bases)
        h = bases @ q.T
        n = np.rint(h)
        delta = h - n
        weight = np.maximum(0.0, 1 - (delta * delta).sum(axis=1) / tolerance**2)
        calc = reciprocal @ n
        weighted = weight[:, None] * calc
        normal = weighted @ calc.transpose(0, 2, 1) + 1e-7 * np.eye(3)
        right = weighted @ (q.T - calc).transpose(0, 2, 1)
        m = np.linalg.solve(normal, right).transpose(0, 2, 1)
        # far-off solutions of ill-determined cases are cut
        m *= np.minimum(1.0, 0.05 / np.maximum(np.abs(m).max(axis=(1, 2), keepdims=True), 1e-12))
        bases = bases @ np.linalg.inv(np.eye(3) + m)
    return bases


def search_known(
    q: np.ndarray,
    lattice: KnownLattice,
    length_tolerance: float = 0.1,
    angle_tolerance: float = 5.0,
    n: int = 10,
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates for a lattice of known cell in the spots of a still, best first.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors, 1/angstrom.
    lattice : KnownLattice
    length_tolerance, angle_tolerance : float
        Deviation of the cell's lengths (relative) and angles (degrees) from the known ones that is allowed. Vectors are
        searched for within 5% of the known lengths; a cell may move beyond that in refinement, but not begin there.
    n : int
        The most candidates that are returned.

    Returns
    -------
    bases : (k, 3, 3) float64
        Direct primitive bases (rows, angstrom), each in the setting of ``lattice.basis``.
    score : (k,) float64
        Weight of the spots that each explains.
    """
    size = np.linalg.norm(q, axis=1)
    order = np.lexsort((q[:, 2], q[:, 1], q[:, 0], size))
    q, size = q[order], size[order]
    lengths = np.linalg.norm(lattice.vectors, axis=1)
    found, worth = [], []
    for length in _windows(lengths, length_tolerance):
        vectors, score = find_vectors(q, length, min(length_tolerance, _WINDOW))
        found.append(vectors)
        worth.append(score)
    vectors, score = np.concatenate(found), np.concatenate(worth)
    keep = strongest(vectors, score, 0.2 * lengths[0] * 0.05, len(vectors))
    vectors, score = vectors[keep], score[keep]
    rotations = orientations_from_pairs(vectors, score, lattice, length_tolerance, min(angle_tolerance, _PAIR_ANGLE))
    if not len(rotations):
        return np.empty((0, 3, 3)), np.empty(0)
    bases = lattice.basis @ rotations.transpose(0, 2, 1)
    low = q[: max(min(len(q), 80), int(np.searchsorted(size, 15.0 / lengths.max())))][:200]
    score = explained(low, bases)
    bases = bases[np.argsort(-score, kind="stable")[:400]]
    bases = bases[same_lattice(bases, lattice)][:100]
    n_used = len(low)
    while True:
        bases = refine_bases(q[:n_used], bases)
        score = explained(q[:n_used], bases)
        bases = bases[np.argsort(-score, kind="stable")]
        bases = bases[same_lattice(bases, lattice)]
        if n_used == len(q):
            break
        bases = bases[: 2 * n]
        n_used = min(len(q), int(1.6 * n_used) + 1)
    bases = bases[like_cell(bases, lattice.basis, length_tolerance, angle_tolerance)]
    if not len(bases):
        return bases, np.empty(0)
    score = explained(q, bases, _NARROW)
    order = np.argsort(-score, kind="stable")[:n]
    return bases[order], score[order]


def _windows(lengths: np.ndarray, tolerance: float) -> list[float]:
    # one search serves all vectors whose lengths differ by less than a third of what it allows
    centres: list[float] = []
    for length in lengths:
        if not centres or length > centres[-1] * (1 + tolerance / 3):
            centres.append(float(length))
    return centres


def search_unknown(
    q: np.ndarray, min_cell: float, max_cell: float, min_volume: float, n: int = 8
) -> tuple[np.ndarray, np.ndarray]:
    """Primitive reduced bases of unknown cell that explain many spots of a still.

    Vectors are searched for in half octaves of length, all triples of the best are scored, and of those with the same
    volume the best is kept: a multiple of the cell explains as much as the cell itself, and the caller chooses.

    Parameters
    ----------
    q : (n_spots, 3) float64
        Scattering vectors, 1/angstrom.
    min_cell, max_cell : float
        Shortest and longest basis vector, angstrom.
    min_volume : float
        Smallest volume of the cell, cubic angstrom.
    n : int
        The most candidates that are returned.

    Returns
    -------
    bases : (k, 3, 3) float64
        Reduced direct bases (rows, angstrom) in the laboratory.
    score : (k,) float64
        Weight of the spots that each explains.
    """
    size = np.linalg.norm(q, axis=1)
    order = np.lexsort((q[:, 2], q[:, 1], q[:, 0], size))
    q, size = q[order], size[order]
    found, worth = [], []
    length = max(min_cell, 0.3 / size[min(len(q), _SEARCH_SPOTS) - 1]) * (1 + _HALF_OCTAVE)
    while length * (1 - _HALF_OCTAVE) < max_cell:
        low = q[: max(60, int(np.searchsorted(size, _LAYERS / length)))]
        vectors, score = find_vectors(low, length, _HALF_OCTAVE, _VECTORS // 3)
        found.append(vectors)
        worth.append(score)
        length *= (1 + _HALF_OCTAVE) / (1 - _HALF_OCTAVE)
    vectors, score = np.concatenate(found), np.concatenate(worth)
    short = np.linalg.norm(vectors, axis=1) <= max_cell
    vectors, score = vectors[short], score[short]
    keep = strongest(vectors, score, 1.0, 36)
    bases = _triples(vectors[keep])
    bases = bases[np.linalg.det(bases) > min_volume]
    if not len(bases):
        return np.empty((0, 3, 3)), np.empty(0)
    score = explained(q, bases, _NARROW)
    best = np.argsort(-score, kind="stable")[:150]
    bases = refine_bases(q, bases[best], tolerance=0.25)
    score = explained(q, bases, _NARROW)
    volume = np.abs(np.linalg.det(bases))
    chosen: list[int] = []
    for k in np.argsort(-score, kind="stable"):
        if volume[k] > min_volume and all(abs(volume[k] / volume[c] - 1) > 0.03 for c in chosen):
            chosen.append(int(k))
            if len(chosen) == n:
                break
    return reduce_bases(bases[chosen]), score[chosen]


def _triples(vectors: np.ndarray) -> np.ndarray:
    # right-handed bases of all triples that span a cell of more than a tenth of the product of their lengths
    i, j, k = (x.ravel() for x in np.meshgrid(*3 * [np.arange(len(vectors))], indexing="ij"))
    ascending = (i < j) & (j < k)
    bases = vectors[np.stack([i, j, k], axis=1)[ascending]]
    volume = np.linalg.det(bases)
    bases = bases * np.where(volume < 0, -1.0, 1.0)[:, None, None]
    return bases[np.abs(volume) > 0.1 * np.linalg.norm(bases, axis=2).prod(axis=1)]
