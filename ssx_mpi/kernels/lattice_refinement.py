"""Orientation and cell of one lattice fitted to the spots of a still, and the spots that do not belong to it.

The model is the one by which DIALS refines stills: the reciprocal lattice point q = A h is turned by the smallest
angle, delta psi, onto the Ewald sphere, and the ray s1 = s0 + r of the turned point r is followed to the panel. With
u = s0 / |s0|, k = 1 / |s0| the wavelength, q_u = q.u, q_p = |q - q_u u| and c = (q - q_u u) / q_p,

    a = k |q|^2 / 2,  b = sqrt(|q|^2 - a^2),  r = -a u + b c,  delta psi = -atan2(q_u, q_p) - atan2(a, b).

The residuals are x and y on the panel, weighted by the variance of the spot's centroid, and delta psi with a constant
weight, which holds the orientation about the axes that the positions do not see.

A = R U (1 + E) B, with a small rotation R in the laboratory and a symmetric strain E that the point group leaves as it
is, so that the cell keeps its symmetry exactly; the derivatives of q are e_i x q and U E_k U^T q, and those of the
position and of delta psi follow from the equations above (:func:`prediction_gradients`).

References
----------
Waterman, D. G. et al. (2016). Acta Cryst. D72, 558-575 (refinement in DIALS).
Sauter, N. K. et al. (2014). Acta Cryst. D70, 3299-3309 (stills: delta psi).
Sauter, N. K. & Poon, B. K. (2010). J. Appl. Cryst. 43, 611-616 (outliers).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from ssx_mpi.kernels._library import array, c_int, c_int64, declare
from ssx_mpi.kernels.rotations import GENERATORS, rotation_matrices

# 1 / rad^2: the weight that DIALS gives to delta psi (refinement.reflections.weighting_strategy.delpsi_constant)
DELTA_PSI_WEIGHT = 1_000_000.0
# of the variances of centroids that positions have at least: nothing is measured better than to a tenth of its error
_SMALLEST_FACTOR = 0.01
_SMALLEST_VARIANCE = 1e-10  # radian^2


@dataclass(frozen=True)
class Spots:
    """Strong spots of a still with the geometry of the panel that each is on.

    Attributes
    ----------
    q : (n, 3) float64
        Scattering vectors s1 - s0, 1/angstrom.
    xy : (n, 2) float64
        Positions on the panel, mm (fast, slow).
    weight : (n, 2) float64
        1 / variance of the positions, 1/mm^2.
    d_inverse : (n, 3, 3) float64
        Inverse of the panel's matrix d = (fast, slow, origin), 1/mm.
    s0 : (3,) float64
        Vector of the incident beam, 1/angstrom.
    """

    q: np.ndarray
    xy: np.ndarray
    weight: np.ndarray
    d_inverse: np.ndarray
    s0: np.ndarray

    def __len__(self) -> int:
        return len(self.q)

    def select(self, chosen: np.ndarray) -> Spots:
        """The spots of a boolean mask or of a list of numbers."""
        return Spots(self.q[chosen], self.xy[chosen], self.weight[chosen], self.d_inverse[chosen], self.s0)


@dataclass(frozen=True)
class CellModel:
    """A cell with the strains that its symmetry allows.

    Attributes
    ----------
    basis : (3, 3) float64
        Direct basis vectors (rows, angstrom) in the setting that is wanted, Cartesian frame of the crystal.
    strains : (m, 3, 3) float64
        Orthonormal symmetric matrices E that the point group leaves as they are, 1 <= m <= 6.
    primitive : (3, 3) float64
        Matrix of the primitive basis: h_primitive = primitive @ h.
    """

    basis: np.ndarray
    strains: np.ndarray
    primitive: np.ndarray


@dataclass(frozen=True)
class Lattice:
    """Orientation and cell: q = U B h with ``B = inv(basis)``.

    Attributes
    ----------
    orientation : (3, 3) float64
        Rotation U from the frame of the crystal to the laboratory.
    basis : (3, 3) float64
        Direct basis vectors (rows, angstrom) in the frame of the crystal.
    """

    orientation: np.ndarray
    basis: np.ndarray

    @property
    def direct(self) -> np.ndarray:
        """Direct basis vectors (rows, angstrom) in the laboratory: h = direct @ q."""
        return self.basis @ self.orientation.T

    @property
    def setting(self) -> np.ndarray:
        """A = U B: q = A h."""
        return self.orientation @ np.linalg.inv(self.basis)


@dataclass(frozen=True)
class Prediction:
    """What a lattice predicts: rays `s1` (n, 3) 1/angstrom, `xy` (n, 2) mm, `delta_psi` (n,) radian."""

    s1: np.ndarray
    xy: np.ndarray
    delta_psi: np.ndarray


@dataclass(frozen=True)
class Fit:
    """A refined lattice, and the weighted sum of squared residuals that is left."""

    lattice: Lattice
    target: float


def invariant_strains(rotations: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the symmetric 3x3 matrices E with R E R^T = E for all rotations R, (m, 3, 3) float64.

    Parameters
    ----------
    rotations : (n, 3, 3) float64
        Point group in the Cartesian frame of the crystal.
    """
    root = np.sqrt(0.5)
    symmetric = np.zeros((6, 3, 3))
    for k in range(3):
        symmetric[k, k, k] = 1.0
        i, j = (k + 1) % 3, (k + 2) % 3
        symmetric[3 + k, i, j] = symmetric[3 + k, j, i] = root
    images = np.einsum("gij,kjl,gml->kim", rotations, symmetric, rotations) / len(rotations)
    projector = images.reshape(6, 9) @ symmetric.reshape(6, 9).T
    values, vectors = np.linalg.eigh(0.5 * (projector + projector.T))
    return np.einsum("kn,kij->nij", vectors[:, values > 0.5], symmetric)


def nearest_lattice(direct: np.ndarray, model: CellModel) -> Lattice:
    """The lattice with the symmetry of `model` that is nearest to direct basis vectors (rows, angstrom, laboratory)."""
    # basis_lab = basis (1 + E) U^T up to strains that the symmetry forbids
    deformation = np.linalg.inv(model.basis) @ direct
    u, s, vt = np.linalg.svd(deformation)
    if np.linalg.det(u @ vt) < 0:
        raise ValueError("the two bases have opposite hands")
    strain = u @ np.diag(s) @ u.T - np.eye(3)
    allowed = np.einsum("k,kij->ij", np.einsum("kij,ij->k", model.strains, strain), model.strains)
    return Lattice((u @ vt).T, model.basis @ (np.eye(3) + allowed))


def predict(h: np.ndarray, lattice: Lattice, d_inverse: np.ndarray, s0: np.ndarray) -> Prediction:
    """Rays, positions and delta psi of Miller indices `h` (n, 3), each on the panel of its spot."""
    q = h.astype(float) @ lattice.setting.T
    return prediction_gradients(q, np.empty((0, len(h), 3)), d_inverse, s0)[0]


def prediction_gradients(
    q: np.ndarray, dq: np.ndarray, d_inverse: np.ndarray, s0: np.ndarray
) -> tuple[Prediction, np.ndarray, np.ndarray]:
    """Predictions, and their derivatives along changes of q.

    Parameters
    ----------
    q : (n, 3) float64
        Reciprocal lattice points.
    dq : (p, n, 3) float64
        Their derivatives by p parameters.
    d_inverse : (n, 3, 3) float64
        Of the panel of each, as in :class:`Spots`.
    s0 : (3,) float64

    Returns
    -------
    prediction : Prediction
    dxy : (p, n, 2) float64
    ddelta_psi : (p, n) float64
    """
    n, p = len(q), len(dq)
    s1, xy, psi = np.empty((n, 3)), np.empty((n, 2)), np.empty(n)
    dxy, dpsi = np.empty((p, n, 2)), np.empty((p, n))
    q, dq, d_inverse, s0 = map(np.ascontiguousarray, (q, dq, d_inverse, s0))
    _still_prediction()(q, dq, n, p, d_inverse, s0, s1, xy, psi, dxy, dpsi)
    return Prediction(s1, xy, psi), dxy, dpsi


@cache
def _still_prediction():
    read, write = array(np.float64), array(np.float64, writeable=True)
    return declare("ssx_still_prediction", [read, read, c_int64, c_int, read, read, *5 * [write]])


def refine_lattice(
    spots: Spots,
    h: np.ndarray,
    lattice: Lattice,
    strains: np.ndarray,
    delta_psi_weight: float = DELTA_PSI_WEIGHT,
    max_steps: int = 30,
) -> Fit:
    """Least-squares orientation and cell of indexed spots by damped Gauss-Newton steps.

    Parameters
    ----------
    spots : Spots
        The n indexed spots.
    h : (n, 3) int
        Miller indices.
    lattice : Lattice
        Start.
    strains : (m, 3, 3) float64
        Strains allowed; none are fitted where there are fewer spots than parameters.
    delta_psi_weight : float
        Weight of the squares of delta psi, 1/radian^2.

    Returns
    -------
    Fit

    Raises
    ------
    ValueError
        When there are fewer than three spots: the orientation is then not determined.
    """
    if len(spots) < 3:
        raise ValueError(f"{len(spots)} spots do not determine an orientation")
    if len(spots) < 3 + len(strains):
        strains = strains[:0]
    h = h.astype(float)
    weight = np.concatenate([spots.weight, np.full((len(spots), 1), delta_psi_weight)], axis=1)
    root = np.sqrt(weight)

    def evaluate(trial: Lattice) -> tuple[np.ndarray, np.ndarray, float]:
        q = h @ trial.setting.T
        rotated = trial.orientation @ strains @ trial.orientation.T
        dq = q @ np.concatenate([GENERATORS, rotated]).transpose(0, 2, 1)
        prediction, dxy, ddelta_psi = prediction_gradients(q, dq, spots.d_inverse, spots.s0)
        residual = np.concatenate([prediction.xy - spots.xy, prediction.delta_psi[:, None]], axis=1) * root
        jacobian = np.concatenate([dxy, ddelta_psi[..., None]], axis=2) * root
        return residual.ravel(), jacobian.reshape(len(dq), -1), float(np.sum(residual**2))

    residual, jacobian, target = evaluate(lattice)
    damping = 0.0
    normal = jacobian @ jacobian.T
    for _ in range(max_steps):
        scale = np.diag(np.diag(normal))
        step = -np.linalg.solve(normal + damping * scale + 1e-12 * scale, jacobian @ residual)
        # a step of more than 3 degrees or 5% leaves the region where the indices mean anything
        step *= min(1.0, 0.05 / max(np.abs(step).max(), 1e-300))
        trial = _moved(lattice, step, strains)
        new = evaluate(trial)
        if not new[2] <= target * (1 + 1e-12):
            damping = max(10 * damping, 1e-3)
            if damping > 1e6:
                break
            continue
        gain = target - new[2]
        lattice, (residual, jacobian, target) = trial, new
        normal = jacobian @ jacobian.T
        damping = damping / 10 if damping > 1e-6 else 0.0
        if gain <= 1e-7 * target:
            break
    return Fit(lattice, target)


def _moved(lattice: Lattice, step: np.ndarray, strains: np.ndarray) -> Lattice:
    # A = R U (1 + E) B, so that the direct basis, the rows of inv(A), goes with inv(1 + E)
    strain = np.eye(3) + np.einsum("k,kij->ij", step[3:], strains)
    u, _, vt = np.linalg.svd(rotation_matrices(step[:3]) @ lattice.orientation)
    return replace(lattice, orientation=u @ vt, basis=lattice.basis @ np.linalg.inv(strain))


def balanced_weight(spots: Spots, h: np.ndarray, lattice: Lattice, n_parameters: int) -> float:
    """Weight of delta psi, 1/radian^2, that goes with the positional weights of the spots as the variances do.

    A still shows the tilts of a crystal by delta psi, which scatters over the width of the reflections, and by
    positions, whose variances are known up to a factor. With f = sum w r^2 / (2 n - p), the mean weighted square of the
    n positional residuals r, and s^2 = sum delta_psi^2 / n, weights w of the positions and f / s^2 of delta psi are in
    proportion to the inverse variances, so that least squares has the smallest variance (Aitken, 1936). The constant of
    DIALS is too large where centroids are better than their variances say: then the scatter of delta psi turns the
    crystal.

    Parameters
    ----------
    n_parameters : int
        Number p of parameters that were refined.

    References
    ----------
    Aitken, A. C. (1936). Proc. R. Soc. Edinburgh 55, 42-48.
    """
    prediction = predict(h, lattice, spots.d_inverse, spots.s0)
    freedom = max(2 * len(spots) - n_parameters, len(spots))
    factor = float(np.sum(spots.weight * (prediction.xy - spots.xy) ** 2)) / freedom
    variance = float(np.mean(prediction.delta_psi**2))
    return max(factor, _SMALLEST_FACTOR) / max(variance, _SMALLEST_VARIANCE)


def chance(
    spots: Spots, h: np.ndarray, lattice: Lattice, n_searched: int, n_strains: int, n_rotations: int, volume: float
) -> float:
    """Decimal logarithm of the number of lattices that fit this well by chance in as many random spots.

    A spot agrees by chance with probability p, the volume about a lattice point in which the observed ones lie (a disc
    of sqrt(2) rmsd on the Ewald sphere times twice the rms delta psi to either side) over that of the reciprocal cell.
    n of N agree with probability at most (N p e / n)^n, and the number of trials is that of orientations and cells
    (10% of each free strain) that differ by more than the radius of the disc.

    Parameters
    ----------
    spots, h : Spots and (n, 3) int
        The spots of the lattice.
    n_searched : int
        Number of spots among which they were found.
    n_strains, n_rotations : int
        Free parameters of the cell, and rotations that make no difference to the lattice.
    volume : float
        Volume of the primitive cell, cubic angstrom.
    """
    n = len(spots)
    prediction = predict(h, lattice, spots.d_inverse, spots.s0)
    # millimetres on the panel times this are 1/angstrom on the Ewald sphere, but for the obliquity
    scale = np.einsum("nj,nj->n", spots.d_inverse[:, 2], prediction.s1)
    size = np.linalg.norm(spots.q, axis=1)
    # the residuals that the parameters took up are missing from the rmsd
    lost = np.sqrt(3 * n / max(3 * n - 3 - n_strains, 1))
    radius = lost * np.sqrt(2 * np.mean(((prediction.xy - spots.xy) ** 2).sum(axis=1) * scale**2))
    depth = lost * 2 * np.sqrt(np.mean((prediction.delta_psi * size) ** 2))
    agreeing = n_searched * min(1.0, 2 * np.pi * radius**2 * depth * volume)
    angle = radius / np.sqrt(np.mean(size**2))
    trials = np.log10(8 * np.pi**2 / n_rotations / angle**3) + n_strains * np.log10(max(1.0, 0.1 / angle))
    return float(n * np.log10(min(1.0, agreeing * np.e / n)) + trials)


def assign_indices(q: np.ndarray, direct: np.ndarray, tolerance: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Nearest lattice and Miller index of each spot, as far as it lies within `tolerance` of a lattice point.

    Of several spots at one lattice point the nearest keeps the index. The point 0 0 0 is none.

    Parameters
    ----------
    q : (n, 3) float64
        Scattering vectors.
    direct : (k, 3, 3) float64
        Direct primitive bases (rows) of k lattices.
    tolerance : float
        Largest distance in index space.

    Returns
    -------
    lattice : (n,) int64
        Number of the lattice, -1 where there is none.
    h : (n, 3) int64
        Index, 0 0 0 where there is none.
    """
    fractional = np.einsum("kij,nj->kni", direct, q)
    nearest = np.rint(fractional)
    square = ((fractional - nearest) ** 2).sum(axis=2)
    lattice = square.argmin(axis=0)
    each = np.arange(len(q))
    h = nearest[lattice, each].astype(np.int64)
    distance = square[lattice, each]
    good = (distance <= tolerance**2) & h.any(axis=1)
    # the nearest of the spots that share lattice and index: first in the order of (lattice, index, distance)
    order = np.lexsort((each, distance, h[:, 2], h[:, 1], h[:, 0], lattice))
    order = order[good[order]]
    key = np.concatenate([lattice[order, None], h[order]], axis=1)
    repeated = np.zeros(len(order), dtype=bool)
    repeated[1:] = (key[1:] == key[:-1]).all(axis=1)
    good[order[repeated]] = False
    return np.where(good, lattice, -1), np.where(good[:, None], h, 0)


def positional_outliers(distance: np.ndarray, fraction: float = 0.4) -> np.ndarray:
    """Spots too far from their predictions, by a Rayleigh distribution fitted to the nearest `fraction` of them.

    The observed cumulative distribution i / n of the sorted distances is followed until it lies to the right of the
    fitted one by more than a standard deviation; that spot and all that are farther away are outliers. The fitted curve
    is sampled every 0.002 mm up to 1 mm, as in DIALS.

    Parameters
    ----------
    distance : (n,) float64
        Distances in mm.

    Returns
    -------
    (n,) bool

    References
    ----------
    Sauter, N. K. & Poon, B. K. (2010). J. Appl. Cryst. 43, 611-616.
    """
    n = len(distance)
    outlier = np.zeros(n, dtype=bool)
    n_fit = int(fraction * n)
    if n_fit < 4:
        return outlier
    order = np.argsort(distance, kind="stable")
    radius = distance[order]
    sigma = _rayleigh_sigma(radius[:n_fit], np.arange(n_fit) / n)
    deviation = sigma * np.sqrt((4 - np.pi) / 2)
    model = np.arange(500) / 500.0
    cumulative = 1 - np.exp(-0.5 * (model / sigma) ** 2)
    # the step of the observed distribution at which it passes the fitted value
    upper = np.minimum(np.floor(cumulative * n).astype(np.int64) + 1, n)
    inside = upper < n
    above = radius[np.minimum(upper, n - 1)]
    below = radius[upper - 1]
    gap = inside & (above - model >= deviation) & (below - model > 0)
    if gap.any():
        outlier[order[upper[gap.argmax()] - 1 :]] = True
    return outlier


def _rayleigh_sigma(radius: np.ndarray, cumulative: np.ndarray) -> float:
    # least sum of |1 - exp(-r^2 / 2 sigma^2) - cumulative|, as in DIALS: each spot wants a sigma of its own, and the
    # best is the median of these, weighted with the slopes of the distribution, which depend on sigma a little
    wanted = np.full(len(radius), np.inf)
    inner = cumulative > 0
    wanted[inner] = radius[inner] / np.sqrt(-2 * np.log1p(-cumulative[inner]))
    order = np.argsort(wanted, kind="stable")
    wanted, t = wanted[order], 0.5 * radius[order] ** 2
    sigma = max(float(radius[-1]), 1e-9)
    for _ in range(20):
        weight = np.cumsum(t * np.exp(-t / sigma**2))
        best = max(float(wanted[np.searchsorted(weight, 0.5 * weight[-1])]), 1e-9)
        if best == sigma:
            break
        sigma = best
    return sigma
