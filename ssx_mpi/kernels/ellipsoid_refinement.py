"""Mosaicity, orientation and cell of one crystal by maximum likelihood on the shapes of its strong spots.

Each spot h gives, in the frame R of its own direction (:mod:`ssx_mpi.kernels.ellipsoid`), the mean x and covariance X
of its counts in the plane tangential to the Ewald sphere, and its total count w. A photon of it has the density of the
marginal at the sphere times the conditional density at its place, so that, with mean m and covariance C of the
conditional, V = X + (x - m)(x - m)ᵀ, and up to a constant (Parkhurst 2020, chapter 5),

    ln L = -1/2 sum_h w_h [ ln S_33 + epsilon²/S_33 + ln det C + tr(C⁻¹ V) ].

With a dot for the derivative by one parameter, and g = S_12,3 / S_33,

    g' = (S'_12,3 - g S'_33) / S_33         m' = mu'_12 + g' epsilon - g mu'_3       epsilon' = -mu'_3
    C' = S'_12,12 - g' S_3,12 - g S'_3,12
    ln L' = -1/2 sum w [ S'_33/S_33 (1 - epsilon²/S_33) - 2 epsilon mu'_3/S_33
                         + tr(C⁻¹ C' (1 - C⁻¹ V)) - 2 (x - m)ᵀ C⁻¹ m' ]

and the expectation of the second derivatives, by the normal distribution's Fisher information,

    I_pq = 1/2 sum w [ S'_p S'_q/S_33² + 2 mu'_p mu'_q/S_33 + tr(C⁻¹ C'_p C⁻¹ C'_q) + 2 m'_pᵀ C⁻¹ m'_q ].

Steps I⁻¹ ln L' are halved until the likelihood does not fall (Fisher scoring).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int, c_int64, declare
from ssx_mpi.kernels.ellipsoid import MosaicityModel, tangential_frames

# Below this no step can be told from rounding (the parameters are scaled by their standard errors)
_SMALLEST_STEP = 1e-7
# Standard deviations in 1/Å below this are a collapsed ellipsoid, as in DIALS
_SMALLEST_SIGMA = 1e-6


class EllipsoidError(ValueError):
    """A crystal whose ellipsoid cannot be refined or used; the message says why."""


@dataclass(frozen=True)
class SpotShapes:
    """Strong spots as the refinement sees them.

    Attributes
    ----------
    indices : (n, 3) float64
        Miller indices.
    directions : (n, 3) float64
        Unit vectors to the spots.
    weights : (n,) float64
        Total counts above background, damped.
    moments : (n, 5) float64
        Mean e1, e2 and covariance 11, 12, 22 of the counts, 1/Å and 1/Å².
    """

    indices: np.ndarray
    directions: np.ndarray
    weights: np.ndarray
    moments: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)


@dataclass(frozen=True)
class Lattice:
    """Orientation and cell: A = U B, with B lower triangular (a* b* c* in its columns), and its free metric.

    Attributes
    ----------
    U, B : (3, 3) float64
    metric_basis : (n_cell, 3, 3) float64
        Symmetric matrices that span the reciprocal metric tensors allowed by the point group.
    fix_orientation, fix_cell : bool
    """

    U: np.ndarray
    B: np.ndarray
    metric_basis: np.ndarray
    fix_orientation: bool = False
    fix_cell: bool = False

    @property
    def A(self) -> np.ndarray:
        return self.U @ self.B

    @property
    def volume(self) -> float:
        """Å³."""
        return 1 / abs(float(np.linalg.det(self.B)))

    def moved(self, step: np.ndarray) -> Lattice:
        """Turned by a rotation vector in radian (three numbers), its metric changed along the basis (the others)."""
        U, B = self.U, self.B
        if not self.fix_orientation:
            U, step = rotation(step[:3]) @ U, step[3:]
        if not self.fix_cell:
            B = _lower_factor(B.T @ B + np.tensordot(step, self.metric_basis, 1))
        return replace(self, U=U, B=B)

    def gradients(self, indices: np.ndarray) -> np.ndarray:
        """Derivatives of r = U B h by the numbers that :meth:`moved` takes: (n, n_parameters, 3) float64.

        A change of the metric G = BᵀB by E changes B by Phi(B⁻ᵀ E B⁻¹) B, where Phi keeps the lower triangle and half
        of the diagonal.
        """
        parts = []
        if not self.fix_orientation:
            parts.append(np.cross(np.eye(3)[None], (indices @ self.A.T)[:, None]))
        if not self.fix_cell:
            inverse = np.linalg.inv(self.B)
            change = inverse.T @ self.metric_basis @ inverse
            lower = np.tril(change) * (1 - np.eye(3) / 2)
            parts.append(np.einsum("ij,pjk,nk->npi", self.U, lower @ self.B, indices))
        return np.concatenate(parts, axis=1)


def rotation(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix of a rotation vector in radian (Rodrigues)."""
    angle = np.linalg.norm(vector)
    cross = np.array([[0, -vector[2], vector[1]], [vector[2], 0, -vector[0]], [-vector[1], vector[0], 0]])
    a, b = np.sinc(angle / np.pi), np.sinc(angle / (2 * np.pi)) ** 2 / 2
    return np.eye(3) + a * cross + b * cross @ cross


def _lower_factor(metric: np.ndarray) -> np.ndarray:
    """Lower triangular B with BᵀB = metric."""
    try:
        return np.linalg.cholesky(metric[::-1, ::-1]).T[::-1, ::-1]
    except np.linalg.LinAlgError:
        raise EllipsoidError("the refined metric is not that of a cell") from None


def metric_basis(rotations: np.ndarray) -> np.ndarray:
    """Basis of the reciprocal metric tensors that a point group leaves alone.

    Parameters
    ----------
    rotations : (n_operations, 3, 3)
        Rotation parts of all operations of the group, acting on fractional coordinates.

    Returns
    -------
    (n_cell, 3, 3) float64
        Orthonormal symmetric matrices, between one (cubic) and six (triclinic).
    """
    rotations = np.asarray(rotations, dtype=float)
    elements = np.zeros((6, 3, 3))
    for k, (i, j) in enumerate(((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))):
        elements[k, i, j] = elements[k, j, i] = 1
    averaged = np.einsum("gia,kab,gjb->kij", rotations, elements, rotations) / len(rotations)
    _, values, vectors = np.linalg.svd(averaged.reshape(6, 9))
    return vectors[: int((values > 1e-9).sum())].reshape(-1, 3, 3)


@cache
def _likelihood() -> Any:
    floats, vectors, matrices = (array(np.float64, n) for n in (1, 2, 3))
    out = array(np.float64, 1, writeable=True), array(np.float64, 2, writeable=True)
    spots = c_double, matrices, floats, vectors, vectors
    model = matrices, c_int, c_int, matrices, c_int, array(np.float64, 4), c_int
    return declare("ssx_ellipsoid_likelihood", [c_int64, *spots, *model, c_int, *out], c_double)


def log_likelihood(
    spots: SpotShapes,
    frames: np.ndarray,
    s0: np.ndarray,
    s2: np.ndarray,
    sigmas: np.ndarray,
    d_s2: np.ndarray | None = None,
    d_sigmas: np.ndarray | None = None,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log-likelihood, and with derivatives given its score and Fisher information, in the order crystal, mosaicity.

    Parameters
    ----------
    spots : SpotShapes
    frames : (n, 3, 3) float64
        Of the spots' directions.
    s0 : (3,) float64
    s2 : (n, 3) float64
    sigmas : (n or 1, 3, 3) float64
    d_s2 : (n, n_crystal, 3) float64, optional
    d_sigmas : (n or 1, n_mosaicity, 3, 3) float64, optional

    Returns
    -------
    likelihood : float
        -inf where a covariance is not positive definite.
    score : (n_parameters,) float64
    information : (n_parameters, n_parameters) float64
    """
    n, gradients = len(spots), d_s2 is not None or d_sigmas is not None
    d_s2 = np.zeros((n, 0, 3)) if d_s2 is None else np.ascontiguousarray(d_s2)
    d_sigmas = np.zeros((1, 0, 3, 3)) if d_sigmas is None else np.ascontiguousarray(d_sigmas)
    n_parameters = d_s2.shape[1] + d_sigmas.shape[1]
    score, information = np.zeros(n_parameters), np.zeros((n_parameters, n_parameters))
    likelihood = _likelihood()(
        n,
        float(np.linalg.norm(s0)),
        frames,
        spots.weights,
        spots.moments,
        np.ascontiguousarray(s2),
        np.ascontiguousarray(sigmas),
        int(len(sigmas) > 1),
        d_s2.shape[1],
        d_s2,
        d_sigmas.shape[1],
        d_sigmas,
        int(len(d_sigmas) > 1),
        int(gradients),
        score,
        information,
    )
    return likelihood, score, information


def refine_mosaicity(
    spots: SpotShapes,
    s0: np.ndarray,
    A: np.ndarray,
    model: MosaicityModel,
    start: np.ndarray,
    largest_sigma: float = 0.004,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> np.ndarray:
    """Parameters of the mosaicity model at the maximum of the likelihood, the crystal being fixed.

    Parameters
    ----------
    spots : SpotShapes
    s0 : (3,) float64
    A : (3, 3) float64
    model : MosaicityModel
    start : (n_parameters,) float64
    largest_sigma : float
        1/Å; a larger standard deviation is no mosaicity.
    max_iterations : int
    tolerance : float
        Change of the log-likelihood at which to stop.

    Raises
    ------
    EllipsoidError
        When the ellipsoid grows beyond `largest_sigma` or collapses.
    """
    frames, r = tangential_frames(spots.directions, s0), spots.indices @ A.T

    def value(parameters):
        return log_likelihood(spots, frames, s0, s0 + r, model.sigmas(parameters, r, s0))[0]

    def derivatives(parameters):
        sigmas, gradients = model.sigmas(parameters, r, s0), model.gradients(parameters, r, s0)
        return log_likelihood(spots, frames, s0, s0 + r, sigmas, d_sigmas=gradients)

    parameters = _score(start, value, derivatives, lambda p, step: p + step, max_iterations, tolerance)
    eigenvalues = np.linalg.eigvalsh(model.sigma(parameters))
    if eigenvalues[2] > largest_sigma**2:
        raise EllipsoidError(f"mosaicity of {np.sqrt(eigenvalues[2]):.4f} 1/Å is unphysically large")
    if eigenvalues[0] < _SMALLEST_SIGMA**2:
        raise EllipsoidError("mosaicity is unphysically small in one direction")
    return parameters


def refine_lattice(
    spots: SpotShapes,
    s0: np.ndarray,
    lattice: Lattice,
    model: MosaicityModel,
    parameters: np.ndarray,
    max_volume_change: float = 0.2,
    max_iterations: int = 100,
    tolerance: float = 1e-3,
) -> Lattice:
    """Orientation and cell at the maximum of the likelihood, the ellipsoids being fixed as they are at the start.

    Parameters
    ----------
    spots : SpotShapes
    s0 : (3,) float64
    lattice : Lattice
    model : MosaicityModel
    parameters : (n_parameters,) float64
        Of the mosaicity.
    max_volume_change : float
        Fraction of the cell's volume.
    max_iterations, tolerance
        As for :func:`refine_mosaicity`.

    Raises
    ------
    EllipsoidError
        When the cell's volume changes by more.
    """
    if lattice.fix_orientation and lattice.fix_cell:
        return lattice
    frames = tangential_frames(spots.directions, s0)
    sigmas = model.sigmas(parameters, spots.indices @ lattice.A.T, s0)

    def value(state):
        return log_likelihood(spots, frames, s0, s0 + spots.indices @ state.A.T, sigmas)[0]

    def derivatives(state):
        s2 = s0 + spots.indices @ state.A.T
        return log_likelihood(spots, frames, s0, s2, sigmas, d_s2=state.gradients(spots.indices))

    refined = _score(lattice, value, derivatives, Lattice.moved, max_iterations, tolerance)
    change = abs(refined.volume / lattice.volume - 1)
    if change > max_volume_change:
        raise EllipsoidError(f"cell volume changed by {change:.0%} in refinement")
    return refined


def _score(state, value: Callable, derivatives: Callable, moved: Callable, max_iterations: int, tolerance: float):
    """Fisher scoring with step halving from `state`; `moved(state, step)` applies a step."""
    for _ in range(max_iterations):
        likelihood, score, information = derivatives(state)
        if not np.isfinite(likelihood):
            raise EllipsoidError("the ellipsoid has no likelihood")
        scale = 1 / np.sqrt(np.maximum(np.diag(information), np.finfo(float).tiny))
        try:
            step = np.linalg.solve(information * np.outer(scale, scale), score * scale) * scale
        except np.linalg.LinAlgError:
            raise EllipsoidError("the spots do not determine the model") from None
        new, gain = _climb(state, step, likelihood, value, moved, float(np.linalg.norm(step / scale)))
        if new is None:  # a singular information can point downhill; its diagonal cannot
            step = score * scale**2
            new, gain = _climb(state, step, likelihood, value, moved, float(np.linalg.norm(step / scale)))
        if new is None:
            return state
        state = new
        if gain < tolerance:
            break
    return state


def _climb(state, step: np.ndarray, likelihood: float, value: Callable, moved: Callable, length: float):
    """The state after the first of the step, half of it and so on that does not lower the likelihood, and the gain."""
    fraction = 1.0
    while fraction * length > _SMALLEST_STEP:
        try:
            new = moved(state, fraction * step)
        except EllipsoidError:
            fraction /= 2
            continue
        gain = value(new) - likelihood
        if gain >= 0:
            return new, gain
        fraction /= 2
    return None, 0.0
