"""How well many stills together determine the detector, and how that trades off against the cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

GLOBAL_NAMES = ("distance", "shift_fast", "shift_slow", "tilt_fast", "tilt_slow")
_STEP = 1e-5


@dataclass(frozen=True)
class Spots:
    """Indexed spots of all crystals.

    Attributes
    ----------
    hkl : (n, 3) float64
        Miller indices.
    crystal : (n,) int64
        Number of the crystal of each spot.
    origin, fast, slow : (n, 3) float64
        Panel of each spot: origin in mm, unit axes.
    residual : (n, 3) float64
        Observed less calculated x and y in mm, and delta-psi in radians.
    """

    hkl: np.ndarray
    crystal: np.ndarray
    origin: np.ndarray
    fast: np.ndarray
    slow: np.ndarray
    residual: np.ndarray


@dataclass(frozen=True)
class GeometryUncertainty:
    """Standard uncertainties (mm; radians for tilts) by name, and their correlation to the mean cell length."""

    sigma: dict[str, float]
    cell_correlation: dict[str, float]
    relative_cell_sigma: float


def strain_basis(rotations: np.ndarray) -> np.ndarray:
    """Orthonormal basis of the strains of a crystal that its point group allows.

    A symmetric strain E of the crystal's Cartesian frame keeps the symmetry when R E R^T = E for every rotation R of
    the group. Averaging R E R^T over the group projects on those strains; its eigenvectors of eigenvalue one are the
    basis (Nye, Physical Properties of Crystals, chapter I).

    Parameters
    ----------
    rotations : (m, 3, 3) float64
        The point group in the Cartesian frame.

    Returns
    -------
    (k, 3, 3) float64
        1 (cubic) to 6 (triclinic) symmetric matrices of Frobenius norm one.
    """
    unit = np.zeros((6, 3, 3))
    for k, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)]):
        unit[k, i, j] = unit[k, j, i] = 1.0 if i == j else np.sqrt(0.5)
    averaged = np.einsum("mij,kjl,mnl->kin", rotations, unit, rotations) / len(rotations)
    projector = np.einsum("kij,lij->kl", averaged, unit)
    values, vectors = np.linalg.eigh((projector + projector.T) / 2)
    return np.einsum("kl,kij->lij", vectors[:, values > 0.5], unit)


def predict(q: np.ndarray, s0: np.ndarray, origin: np.ndarray, fast: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """Where the reflections of a still fall, and how far they are from reflecting.

    The diffracted beam leaves along s1 = s0 + q. It meets the panel where origin + x fast + y slow = t s1. The
    rotation that would bring q onto the Ewald sphere is, to first order, (|s1|^2 - |s0|^2) / (2 |s0 x q|).

    Parameters
    ----------
    q : (n, 3) float64
        Reciprocal lattice vectors in the laboratory, 1/angstrom.
    s0 : (3,) float64
        Incident beam, of length 1/wavelength.
    origin, fast, slow : (n, 3) float64
        Panels.

    Returns
    -------
    (n, 3) float64
        x and y in mm on the panel, and delta-psi in radians.
    """
    s1 = s0 + q
    normal = np.cross(fast, slow)
    t = np.einsum("ij,ij->i", origin, normal) / np.einsum("ij,ij->i", s1, normal)
    hit = t[:, None] * s1 - origin
    x, y = np.einsum("ij,ij->i", hit, fast), np.einsum("ij,ij->i", hit, slow)
    off = np.einsum("ij,ij->i", s1, s1) - s0 @ s0
    return np.stack([x, y, off / (2 * np.linalg.norm(np.cross(s0, q), axis=1))], axis=1)


def geometry_uncertainty(
    spots: Spots, a_matrices: np.ndarray, basis: np.ndarray, b_matrices, s0
) -> GeometryUncertainty:
    """Uncertainty of the detector from all stills, each with its own orientation and cell.

    Least squares with the parameters g of the detector (distance, two shifts, two tilts), shared by all crystals, and
    c_k of crystal k (three rotations and the strains that its symmetry allows) has normal equations in which the c_k
    meet g only. Eliminating them (Schur complement),

        cov(g) = [N_gg - sum_k N_gk N_kk^-1 N_kg]^-1 .

    The mean over the crystals of the relative change of a cell length, m = 1/K sum_k w.c_k, has

        cov(m, g) = -(1/K) sum_k w^T N_kk^-1 N_kg cov(g) = -u^T cov(g),
        var(m) = 1/K^2 sum_k w^T N_kk^-1 w + u^T cov(g) u .

    Derivatives are central differences of :func:`predict`; x and y have one variance and delta-psi another, both from
    the residuals.

    Parameters
    ----------
    spots
        All indexed spots.
    a_matrices : (K, 3, 3) float64
        A = UB of each crystal, 1/angstrom.
    basis : (k, 3, 3) float64
        Allowed strains, from :func:`strain_basis`.
    b_matrices : (K, 3, 3) float64
        B of each crystal.
    s0 : (3,) float64
        Incident beam, 1/angstrom.
    """
    n_cell = len(basis)
    jacobian_g = _detector_derivatives(spots, np.einsum("nij,nj->ni", a_matrices[spots.crystal], spots.hkl), s0)
    jacobian_c = _crystal_derivatives(spots, a_matrices, b_matrices, basis, s0)
    xy, psi = np.mean(spots.residual[:, :2] ** 2), np.mean(spots.residual[:, 2] ** 2)
    scale = 1 / np.sqrt([xy, xy, psi])
    jacobian_g, jacobian_c = jacobian_g * scale[:, None], jacobian_c * scale[:, None]
    # the strain lengthens reciprocal vectors, so the direct cell shrinks
    w = np.concatenate([np.zeros(3), -np.trace(basis, axis1=1, axis2=2) / 3])
    schur = np.einsum("nrg,nrh->gh", jacobian_g, jacobian_g)
    n_crystals = len(a_matrices)
    u, own = np.zeros(len(GLOBAL_NAMES)), 0.0
    for k in range(n_crystals):
        mine = spots.crystal == k
        own_g, own_c = jacobian_g[mine], jacobian_c[mine]
        normal = np.einsum("nrc,nrd->cd", own_c, own_c)
        cross = np.einsum("nrc,nrg->cg", own_c, own_g)
        # a crystal with few spots may leave a strain open: the pseudo-inverse leaves that one alone
        inverse = np.linalg.pinv(normal, rcond=1e-10, hermitian=True)
        schur -= cross.T @ inverse @ cross
        u += cross.T @ inverse @ w / n_crystals
        own += w @ inverse @ w / n_crystals**2
    covariance = np.linalg.pinv(schur, rcond=1e-12, hermitian=True)
    sigma = np.sqrt(np.diag(covariance))
    sigma_cell = np.sqrt(own + u @ covariance @ u)
    correlation = -(u @ covariance) / (sigma * sigma_cell) if n_cell else np.zeros(len(GLOBAL_NAMES))
    return GeometryUncertainty(
        {name: float(s) for name, s in zip(GLOBAL_NAMES, sigma)},
        {name: float(c) for name, c in zip(GLOBAL_NAMES, correlation)},
        float(sigma_cell),
    )


def _detector_derivatives(spots: Spots, q: np.ndarray, s0: np.ndarray) -> np.ndarray:
    """(n, 3, 5): derivatives of :func:`predict` by the parameters of the whole detector, moved as one body."""
    fast, slow = spots.fast[0], spots.slow[0]
    normal = np.cross(fast, slow)
    # the distance grows along the normal, away from the crystal
    normal = normal if spots.origin[0] @ normal > 0 else -normal
    centre = spots.origin.mean(axis=0)

    def moved(index: int, step: float) -> np.ndarray:
        if index < 3:
            shift = step * (normal, fast, slow)[index]
            return predict(q, s0, spots.origin + shift, spots.fast, spots.slow)
        axis = (fast, slow)[index - 3]
        return predict(
            q,
            s0,
            centre + _turned(spots.origin - centre, axis, step),
            _turned(spots.fast, axis, step),
            _turned(spots.slow, axis, step),
        )

    steps = (1e-3, 1e-3, 1e-3, _STEP, _STEP)
    return np.stack([(moved(i, h) - moved(i, -h)) / (2 * h) for i, h in enumerate(steps)], axis=2)


def _turned(vectors: np.ndarray, axis: np.ndarray, angle: float) -> np.ndarray:
    """`vectors` rotated about `axis` by a small `angle` (Rodrigues)."""
    along = (vectors @ axis)[:, None] * axis
    return along + np.cos(angle) * (vectors - along) + np.sin(angle) * np.cross(axis, vectors)


def _crystal_derivatives(spots: Spots, a_matrices, b_matrices, basis, s0) -> np.ndarray:
    """(n, 3, 3 + k): derivatives of :func:`predict` by rotations about the laboratory axes and by the strains."""
    q = np.einsum("nij,nj->ni", a_matrices[spots.crystal], spots.hkl)
    u = a_matrices @ np.linalg.inv(b_matrices)
    own = np.einsum("nij,nj->ni", b_matrices[spots.crystal], spots.hkl)
    directions = [np.cross(axis, q) for axis in np.eye(3)]
    directions += [np.einsum("nij,nj->ni", u[spots.crystal], own @ strain) for strain in basis]

    def along(direction: np.ndarray, step: float) -> np.ndarray:
        return predict(q + step * direction, s0, spots.origin, spots.fast, spots.slow)

    return np.stack([(along(d, _STEP) - along(d, -_STEP)) / (2 * _STEP) for d in directions], axis=2)
