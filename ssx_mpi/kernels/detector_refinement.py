"""One detector fitted to many stills at once, each with an orientation and a cell of its own.

The unknowns are five of the detector, moved as one body (distance, two shifts, tilts about its fast and slow axes),
and for crystal k three rotations and the strains that its symmetry allows. Residuals are x and y on the panel and
delta psi, as in :mod:`ssx_mpi.kernels.lattice_refinement`, which also has the derivatives by the crystals; those by the
detector are central differences.

With g the parameters of the detector and c_k those of crystal k, the normal equations of Gauss and Newton are

    [ N_gg   N_gk ... ] [dg ]   [b_g]
    [ N_kg   N_kk     ] [dc_k] = [b_k] ,

and no crystal meets another. Eliminating the crystals (Schur complement) leaves five equations,

    (N_gg - sum_k N_gk N_kk^-1 N_kg) dg = b_g - sum_k N_gk N_kk^-1 b_k ,   dc_k = N_kk^-1 (b_k - N_kg dg) ,

so that a step costs a time proportional to the number of spots, where a dense solver pays for the square of the number
of crystals. The inverse of the matrix on the left is the covariance of g. The mean over the crystals of the relative
change of a cell length, m = 1/K sum_k w.c_k, has, with u = 1/K sum_k N_gk N_kk^-1 w,

    cov(m, g) = -u^T cov(g),   var(m) = 1/K^2 sum_k w^T N_kk^-1 w + u^T cov(g) u .

Outliers get Tukey's weights from the median absolute deviations of the residuals, afresh in every step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels.lattice_refinement import prediction_gradients
from ssx_mpi.kernels.rotations import GENERATORS, rotation_matrices

GLOBAL_NAMES = ("distance", "shift_fast", "shift_slow", "tilt_fast", "tilt_slow")
# steps of the differences: mm for the distance and shifts, radians for tilts
_STEPS = (1e-3, 1e-3, 1e-3, 1e-5, 1e-5)
# 95% efficient for normal residuals, with two degrees of freedom for a position and one for delta psi
_TUKEY_XY, _TUKEY_PSI = 6.0, 5.0
# median of |x| of a normal distribution of width one, and of its length in two dimensions
_MEDIAN_1, _MEDIAN_2 = 0.6745, 1.1774


@dataclass(frozen=True)
class DetectorSpots:
    """Indexed spots of all crystals.

    Attributes
    ----------
    hkl : (n, 3) float64
        Miller indices.
    crystal : (n,) int64
        Number of the crystal of each spot, ascending.
    panel : (n,) int64
        Number of its panel.
    xy : (n, 2) float64
        Observed position on the panel, mm.
    """

    hkl: np.ndarray
    crystal: np.ndarray
    panel: np.ndarray
    xy: np.ndarray


@dataclass(frozen=True)
class Geometry:
    """Everything that is refined.

    Attributes
    ----------
    panels : (n_panels, 3, 3) float64
        Matrix d of each panel, its columns the fast axis, the slow axis and the origin (mm).
    a_matrices : (K, 3, 3) float64
        A = U B of each crystal, 1/angstrom.
    rotation, translation : (3, 3) and (3,) float64
        Motion of the detector since the start: x -> rotation x + translation.
    """

    panels: np.ndarray
    a_matrices: np.ndarray
    rotation: np.ndarray
    translation: np.ndarray


@dataclass(frozen=True)
class GeometryUncertainty:
    """Standard uncertainties (mm; radians for tilts) by name, and their correlation to the mean cell length."""

    sigma: dict[str, float]
    cell_correlation: dict[str, float]
    relative_cell_sigma: float


@dataclass(frozen=True)
class RefinementStep:
    """Spots with weight, and the weighted rmsds of x and y (mm) and delta psi (radians) before a step."""

    n_spots: int
    rmsd: tuple[float, float, float]


@dataclass(frozen=True)
class RefinedDetector:
    """Outcome: the geometry, residuals (n, 3) observed less calculated, weights (n,), steps and uncertainty."""

    geometry: Geometry
    residual: np.ndarray
    weight: np.ndarray
    steps: tuple[RefinementStep, ...]
    uncertainty: GeometryUncertainty


def start_geometry(panels: np.ndarray, a_matrices: np.ndarray) -> Geometry:
    """The geometry before any motion of the detector."""
    return Geometry(panels, a_matrices, np.eye(3), np.zeros(3))


def refine_detector(
    spots: DetectorSpots, start: Geometry, strains: np.ndarray, s0: np.ndarray, max_steps: int = 60
) -> RefinedDetector:
    """Fit the detector and all crystals to the spots.

    Parameters
    ----------
    spots
        At least a few hundred, of at least one crystal.
    start
        Close enough for the Miller indices to be right.
    strains : (K, m, 3, 3) float64
        Strains in the laboratory frame that the symmetry of each crystal allows (m = 0: cells are held).
    s0 : (3,) float64
        Incident beam, 1/angstrom.
    max_steps : int
        A step that moves the detector by less than a hundredth of its uncertainty is the last.
    """
    geometry, steps = start, []
    for _ in range(max_steps):
        residual, jacobian_g, jacobian_c = _derivatives(spots, geometry, strains, s0)
        weight, scale = _weights(residual)
        steps.append(_step(residual, weight))
        solved = _solve(spots, residual, jacobian_g, jacobian_c, weight, scale, len(geometry.a_matrices))
        geometry, strains = _moved(geometry, strains, solved.detector, solved.crystals)
        if np.all(np.abs(solved.detector) < 0.01 * solved.sigma):
            break
    residual, jacobian_g, jacobian_c = _derivatives(spots, geometry, strains, s0)
    weight, scale = _weights(residual)
    steps.append(_step(residual, weight))
    solved = _solve(spots, residual, jacobian_g, jacobian_c, weight, scale, len(geometry.a_matrices))
    return RefinedDetector(geometry, residual, weight, tuple(steps), _uncertainty(solved, strains))


def geometry_uncertainty(
    spots: DetectorSpots, geometry: Geometry, strains: np.ndarray, s0: np.ndarray
) -> GeometryUncertainty:
    """The uncertainty of a geometry that was refined elsewhere; parameters as in :func:`refine_detector`."""
    residual, jacobian_g, jacobian_c = _derivatives(spots, geometry, strains, s0)
    weight, scale = _weights(residual)
    solved = _solve(spots, residual, jacobian_g, jacobian_c, weight, scale, len(geometry.a_matrices))
    return _uncertainty(solved, strains)


def _derivatives(spots: DetectorSpots, geometry: Geometry, strains: np.ndarray, s0: np.ndarray):
    """Residuals (n, 3) and derivatives of the prediction (n, 3, 5) by the detector and (n, 3, 3 + m) by the crystal."""
    q = np.einsum("nij,nj->ni", geometry.a_matrices[spots.crystal], spots.hkl)
    along = [q @ generator.T for generator in GENERATORS]
    along += [np.einsum("nij,nj->ni", strains[spots.crystal, k], q) for k in range(strains.shape[1])]
    d_inverse = np.linalg.inv(geometry.panels)[spots.panel]
    predicted, dxy, dpsi = prediction_gradients(q, np.array(along), d_inverse, s0)
    jacobian_c = np.concatenate([dxy.transpose(1, 2, 0), dpsi.T[:, None, :]], axis=1)
    nothing = np.empty((0, len(q), 3))

    def position(step: np.ndarray) -> np.ndarray:
        panels = _move_panels(geometry.panels, *_motion(geometry.panels, step))
        return prediction_gradients(q, nothing, np.linalg.inv(panels)[spots.panel], s0)[0].xy

    jacobian_g = np.zeros((len(q), 3, len(GLOBAL_NAMES)))
    for k, h in enumerate(_STEPS):
        step = np.eye(len(GLOBAL_NAMES))[k] * h
        jacobian_g[:, :2, k] = (position(step) - position(-step)) / (2 * h)
    residual = np.concatenate([spots.xy - predicted.xy, -predicted.delta_psi[:, None]], axis=1)
    return residual, jacobian_g, jacobian_c


def _weights(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tukey's weight of each spot, (n,), and 1 / width of x, y and delta psi, (3,)."""
    distance = np.hypot(residual[:, 0], residual[:, 1])
    xy = max(float(np.median(distance)) / _MEDIAN_2, 1e-9)
    psi = max(float(np.median(np.abs(residual[:, 2]))) / _MEDIAN_1, 1e-12)
    # a spot counts as one observation: it is an outlier when either its place or its delta psi is
    off = np.maximum(distance / (xy * _TUKEY_XY), np.abs(residual[:, 2]) / (psi * _TUKEY_PSI))
    return np.maximum(0.0, 1 - off**2) ** 2, 1 / np.array([xy, xy, psi])


def _step(residual: np.ndarray, weight: np.ndarray) -> RefinementStep:
    rmsd = np.sqrt((weight[:, None] * residual**2).sum(axis=0) / max(weight.sum(), 1e-300))
    return RefinementStep(int(np.count_nonzero(weight)), tuple(rmsd.tolist()))


@dataclass(frozen=True)
class _Solution:
    """A step of the detector (5,) and of the crystals (K, 3 + m), with what the uncertainty needs."""

    detector: np.ndarray
    crystals: np.ndarray
    covariance: np.ndarray
    inverse: np.ndarray
    cross: np.ndarray

    @property
    def sigma(self) -> np.ndarray:
        return np.sqrt(np.diag(self.covariance))


def _solve(spots, residual, jacobian_g, jacobian_c, weight, scale, n_crystals: int) -> _Solution:
    root = np.sqrt(weight)[:, None] * scale
    r = residual * root
    g, c = jacobian_g * root[..., None], jacobian_c * root[..., None]

    def sums(per_spot: np.ndarray) -> np.ndarray:
        total = np.zeros((n_crystals, *per_spot.shape[1:]))
        np.add.at(total, spots.crystal, per_spot)
        return total

    normal = sums(np.einsum("nri,nrj->nij", c, c))
    cross = sums(np.einsum("nri,nrj->nij", c, g))
    right = sums(np.einsum("nri,nr->ni", c, r))
    # a crystal with few spots may leave a strain open: the pseudo-inverse leaves that one as it is
    inverse = np.linalg.pinv(normal, rcond=1e-10, hermitian=True)
    schur = np.einsum("nri,nrj->ij", g, g) - np.einsum("kci,kcd,kdj->ij", cross, inverse, cross)
    rest = np.einsum("nri,nr->i", g, r) - np.einsum("kci,kcd,kd->i", cross, inverse, right)
    # mm and radians differ by orders of magnitude
    size = np.sqrt(np.maximum(np.diag(schur), 1e-300))
    covariance = np.linalg.pinv(schur / np.outer(size, size), rcond=1e-12, hermitian=True) / np.outer(size, size)
    detector = covariance @ rest
    crystals = np.einsum("kcd,kd->kc", inverse, right - cross @ detector)
    return _Solution(detector, crystals, covariance, inverse, cross)


def _uncertainty(solved: _Solution, strains: np.ndarray) -> GeometryUncertainty:
    n_crystals = len(strains)
    # a strain that lengthens reciprocal vectors shortens the cell
    w = np.concatenate([np.zeros((n_crystals, 3)), -np.trace(strains, axis1=2, axis2=3) / 3], axis=1)
    u = np.einsum("kcg,kcd,kd->g", solved.cross, solved.inverse, w) / n_crystals
    own = np.einsum("kc,kcd,kd->", w, solved.inverse, w) / n_crystals**2
    sigma_cell = float(np.sqrt(max(own + u @ solved.covariance @ u, 1e-300)))
    correlation = -(solved.covariance @ u) / (solved.sigma * sigma_cell)
    return GeometryUncertainty(
        dict(zip(GLOBAL_NAMES, solved.sigma.tolist())),
        dict(zip(GLOBAL_NAMES, correlation.tolist())),
        sigma_cell,
    )


def _motion(panels: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and translation for a step of the five parameters; tilts turn the detector about its centre."""
    fast, slow, origin = panels[0].T
    normal = np.cross(fast, slow)
    # the distance grows along the normal, away from the crystal
    normal = normal if origin @ normal > 0 else -normal
    rotation = rotation_matrices(step[3] * fast) @ rotation_matrices(step[4] * slow)
    centre = panels[:, :, 2].mean(axis=0)
    shift = step[0] * normal + step[1] * fast + step[2] * slow
    return rotation, centre - rotation @ centre + shift


def _move_panels(panels: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
    moved = rotation @ panels
    moved[:, :, 2] += translation
    return moved


def _moved(geometry: Geometry, strains: np.ndarray, detector: np.ndarray, crystals: np.ndarray):
    """The geometry after a step, and the strains turned with the crystals."""
    rotation, translation = _motion(geometry.panels, detector)
    turns = rotation_matrices(crystals[:, :3])
    stretch = np.eye(3) + np.einsum("km,kmij->kij", crystals[:, 3:], strains)
    moved = replace(
        geometry,
        panels=_move_panels(geometry.panels, rotation, translation),
        a_matrices=turns @ stretch @ geometry.a_matrices,
        rotation=rotation @ geometry.rotation,
        translation=rotation @ geometry.translation + translation,
    )
    return moved, np.einsum("kij,kmjl,knl->kmin", turns, strains, turns)
