"""Reciprocal lattice points as three-dimensional normal distributions.

The intensity of a reciprocal lattice point is spread about r = A h with a covariance sigma (Parkhurst 2020, chapter 5;
Beilsten-Edmands et al. 2024). In reciprocal space every point has the same static part, and the angular models add one
that grows with |r| and turns with it:

    sigma(r) = L Lᵀ + |r|² Qᵀ W Wᵀ Q,    rows of Q: (r x s0, r x (r x s0), r) normalised,

where L is lower triangular (simple6) or a multiple of unity (simple1), and W acts in the plane tangential to r, again
either isotropic (angular1) or lower triangular (angular3).

A still sees the distribution on the Ewald sphere. In the frame R of a direction s, with rows (s x s0, s x (s x s0), s)
normalised, the sphere is the plane of third coordinate |s0|. With mu = R s2 and S = R sigma Rᵀ, and the distance
epsilon = |s0| - mu_3 from the sphere, the amount seen is the marginal of the third coordinate, N(epsilon; 0, S_33), and
what is seen in the plane is the conditional distribution, with

    mean        mu_12 + S_12,3 epsilon / S_33
    covariance  S_12,12 - S_12,3 S_3,12 / S_33

References
----------
Parkhurst (2020), "Statistically robust methods for the integration and analysis of X-ray diffraction data from pixel
array detectors", thesis, University of Cambridge.
Beilsten-Edmands et al. (2024), Methods in Enzymology 709, 207-244.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincinv

_LOWER = ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2))


@dataclass(frozen=True)
class MosaicityModel:
    """Which of the elements of L and W are free.

    Attributes
    ----------
    name : str
    static : int
        1 (a multiple of unity) or 6 (lower triangular) parameters of L.
    angular : int
        0, 1 or 3 parameters of W.
    """

    name: str
    static: int
    angular: int

    @property
    def n_parameters(self) -> int:
        return self.static + self.angular

    def start(self, sigma: float) -> np.ndarray:
        """Parameters of the isotropic distribution with standard deviation `sigma`, in L and in W."""
        static = [sigma] if self.static == 1 else [sigma, 0, sigma, 0, 0, sigma]
        angular = {0: [], 1: [sigma], 3: [sigma, 0, sigma]}[self.angular]
        return np.array(static + angular, dtype=float)

    def factors(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """L and W, (3, 3) float64."""
        L, W = np.zeros((3, 3)), np.zeros((3, 3))
        for p, (row, column) in self._elements():
            (L if p < self.static else W)[row, column] = parameters[p]
        return L, W

    def sigma(self, parameters: np.ndarray) -> np.ndarray:
        """Static covariance L Lᵀ, (3, 3) float64 in 1/Å²."""
        L, _ = self.factors(parameters)
        return L @ L.T

    def sigma_angular(self, parameters: np.ndarray) -> np.ndarray:
        """Angular covariance W Wᵀ, (3, 3) float64 in radian²."""
        _, W = self.factors(parameters)
        return W @ W.T

    def sigmas(self, parameters: np.ndarray, r: np.ndarray, s0: np.ndarray) -> np.ndarray:
        """Covariance of each reciprocal lattice point.

        Parameters
        ----------
        parameters : (n_parameters,) float64
        r : (n, 3) float64
            1/Å.
        s0 : (3,) float64

        Returns
        -------
        (n, 3, 3) float64, or (1, 3, 3) when it is the same for all
        """
        sigma = self.sigma(parameters)[None]
        return sigma + _turned(self.sigma_angular(parameters)[None], r, s0)[:, 0] if self.angular else sigma

    def gradients(self, parameters: np.ndarray, r: np.ndarray, s0: np.ndarray) -> np.ndarray:
        """Derivatives of :meth:`sigmas`: (n or 1, n_parameters, 3, 3) float64."""
        L, W = self.factors(parameters)
        static, angular = np.zeros((self.static, 3, 3)), np.zeros((self.angular, 3, 3))
        for p, (row, column) in self._elements():
            factor, gradient = (L, static[p]) if p < self.static else (W, angular[p - self.static])
            gradient[row] += factor[:, column]
            gradient[:, row] += factor[:, column]
        if not self.angular:
            return static[None]
        turned = _turned(angular, r, s0)
        return np.concatenate([np.broadcast_to(static, (len(r), *static.shape)), turned], axis=1)

    def _elements(self) -> list[tuple[int, tuple[int, int]]]:
        """Pairs of parameter number and element of L, or of W after those of L."""
        static = [(0, (k, k)) for k in range(3)] if self.static == 1 else list(enumerate(_LOWER))
        n = self.static
        angular = {0: [], 1: [(n, (0, 0)), (n, (1, 1))], 3: [(n + k, _LOWER[k]) for k in range(3)]}[self.angular]
        return static + angular


MODELS = {
    model.name: model
    for model in (
        MosaicityModel("simple1", 1, 0),
        MosaicityModel("simple6", 6, 0),
        MosaicityModel("simple1angular1", 1, 1),
        MosaicityModel("simple1angular3", 1, 3),
        MosaicityModel("simple6angular1", 6, 1),
    )
}


def squared_radius(probability: float, n_dimensions: int) -> float:
    """Squared Mahalanobis distance within which the part `probability` of a normal distribution lies: chi² quantile."""
    return 2 * float(gammaincinv(n_dimensions / 2, probability))


def _turned(matrices: np.ndarray, r: np.ndarray, s0: np.ndarray) -> np.ndarray:
    """|r|² Qᵀ M Q for every r and every M: (n, m, 3, 3)."""
    Q = tangential_frames(r, s0)
    r2 = np.einsum("ni,ni->n", r, r)
    return np.einsum("n,nai,mab,nbj->nmij", r2, Q, matrices, Q, optimize=True)


def tangential_frames(v: np.ndarray, s0: np.ndarray) -> np.ndarray:
    """Orthonormal frames with rows v x s0, v x (v x s0) and v.

    Parameters
    ----------
    v : (n, 3) float64
    s0 : (3,) float64

    Returns
    -------
    (n, 3, 3) float64
    """
    e1 = np.cross(v, s0)
    e2 = np.cross(v, e1)
    frames = np.stack([e1, e2, v], axis=1)
    return frames / np.linalg.norm(frames, axis=2, keepdims=True)


@dataclass(frozen=True)
class OnEwaldSphere:
    """What of each reciprocal lattice point lies on the Ewald sphere.

    Attributes
    ----------
    frames : (n, 3, 3) float64
        R, about the direction of s2.
    epsilon : (n,) float64
        Distance from the sphere along s2, 1/Å.
    variance : (n,) float64
        S_33, of the distance.
    mean : (n, 2) float64
        In the plane, 1/Å.
    covariance : (n, 2, 2) float64
        In the plane, 1/Å².
    """

    frames: np.ndarray
    epsilon: np.ndarray
    variance: np.ndarray
    mean: np.ndarray
    covariance: np.ndarray


def on_ewald_sphere(s0: np.ndarray, s2: np.ndarray, sigmas: np.ndarray) -> OnEwaldSphere:
    """Marginal and conditional distributions on the Ewald sphere.

    Parameters
    ----------
    s0 : (3,) float64
    s2 : (n, 3) float64
        s0 + r, to the centres of the distributions.
    sigmas : (n or 1, 3, 3) float64
        Their covariances.
    """
    R = tangential_frames(s2, s0)
    S = R @ sigmas @ R.transpose(0, 2, 1)
    epsilon = np.linalg.norm(s0) - np.linalg.norm(s2, axis=1)  # mu_12 = 0 in the frame of s2
    ratio = S[:, :2, 2] / S[:, 2, 2:]
    covariance = S[:, :2, :2] - ratio[:, :, None] * S[:, None, 2, :2]
    return OnEwaldSphere(R, epsilon, S[:, 2, 2], ratio * epsilon[:, None], covariance)


def least_eigenvalue(matrix: np.ndarray) -> float:
    """Least eigenvalue of a symmetric (3, 3) `matrix`, in closed form: a + 2 p cos((arccos(det(B)/2) + 2 pi) / 3).

    LAPACK's last digit depends on where its work space lies in memory, so on what a rank did before; results must not.

    References
    ----------
    Smith (1961). Commun. ACM 4, 168, "Eigenvalues of a symmetric 3 x 3 matrix"
    """
    (m00, m01, m02), (_, m11, m12), (_, _, m22) = matrix.tolist()
    mean = (m00 + m11 + m22) / 3
    d0, d1, d2 = m00 - mean, m11 - mean, m22 - mean
    p = math.sqrt((d0 * d0 + d1 * d1 + d2 * d2 + 2 * (m01 * m01 + m02 * m02 + m12 * m12)) / 6)
    if p == 0:
        return mean
    det = d0 * (d1 * d2 - m12 * m12) - m01 * (m01 * d2 - m12 * m02) + m02 * (m01 * m12 - d1 * m02)
    angle = math.acos(min(1.0, max(-1.0, det / (2 * p**3)))) / 3
    return mean + 2 * p * math.cos(angle + 2 * math.pi / 3)


def partialities(seen: OnEwaldSphere, sigma: np.ndarray, n_observed: int) -> tuple[np.ndarray, np.ndarray]:
    """Part of each reflection that is seen, relative to the most that a still can see of any.

    The most is seen of a point that is centred on the sphere and has the smallest variance across it, the least
    eigenvalue v of the static covariance. So p = sqrt(v / S_33) exp(-epsilon²/(2 S_33)), and, with the distance
    known to S_33 / n after n observations, the variance of 1/p is (S_33/n) epsilon² exp(epsilon²/S_33) / (v S_33).

    Parameters
    ----------
    seen : OnEwaldSphere
    sigma : (3, 3) float64
        Static covariance.
    n_observed : int
        Spots that the model was refined against.

    Returns
    -------
    partiality, variance_of_inverse : (n,) float64
    """
    least = least_eigenvalue(sigma)
    q = seen.epsilon**2 / seen.variance
    partiality = np.exp(-q / 2) * np.sqrt(least / seen.variance)
    return partiality, seen.epsilon**2 * np.exp(q) / (n_observed * least)
