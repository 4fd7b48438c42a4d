"""Mosaic spread and domain size of a crystal from the delta psi of its spots on one still, by maximum likelihood.

A crystal of domains of size D with full mosaic spread eta reflects at spacing d within |delta psi| < psi_m,

    psi_m = (d alpha + eta) / 2,  alpha = 2 / D.

The probability of a delta psi is a box of that half width with soft edges: with nu = 10 and B = nu / psi_m,

    p(psi) = 1 / (2 psi_m) * (1 + e^nu)^2 / [(1 + e^(B (psi + psi_m))) (1 + e^(-B (psi - psi_m)))],

and -sum log p is minimised over alpha and eta, both kept positive, by damped Newton steps with analytic derivatives.

References
----------
Sauter, N. K. et al. (2014). Acta Cryst. D70, 3299-3309, Appendix B.
Nave, C. (2014). J. Synchrotron Rad. 21, 537-546.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int64, declare

_HARDNESS = 10.0
# the spots that DIALS predicts fill the reflecting zone this much wider than the likelihood says
EXPANSION = 1.4
# alpha and eta: domains of 1 angstrom to 0.1 mm, spreads of 0.0006 to 60 degrees; the likelihood is flat beyond
_LOWEST = np.array([2e-6, 1e-5])
_HIGHEST = np.array([2.0, 1.0])
# a step that gains less than this in log likelihood is the last
_SMALLEST_GAIN = 1e-4


@dataclass(frozen=True)
class Mosaicity:
    """Full mosaic spread `eta` in radian and domain size in angstrom, as the likelihood gives them.

    `accepted` (n,) bool marks the spots whose delta psi is inside the zone of these two.
    """

    eta: float
    domain_size: float
    accepted: np.ndarray

    @property
    def half_mosaicity_deg(self) -> float:
        """Half the spread in degrees, widened by :data:`EXPANSION`: what a crystal model of DIALS carries."""
        return float(np.degrees(self.eta / 2) * EXPANSION)

    @property
    def expanded_domain_size(self) -> float:
        """Domain size in angstrom, reduced by :data:`EXPANSION`: what a crystal model of DIALS carries."""
        return self.domain_size / EXPANSION


def negative_log_likelihood(x: np.ndarray, d: np.ndarray, psi: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """-sum log p with its gradient (2,) and its second derivatives (2, 2) by x = (alpha, eta)."""
    out = np.empty(6)
    _likelihood()(d, psi, len(d), float(x[0]), float(x[1]), _HARDNESS, out)
    value, g0, g1, h00, h01, h11 = out
    constant = 2 * len(d) * np.logaddexp(0.0, _HARDNESS)
    return float(value - constant), np.array([g0, g1]), np.array([[h00, h01], [h01, h11]])


@cache
def _likelihood():
    reals = array(np.float64, 1)
    return declare(
        "ssx_mosaicity_likelihood",
        [reals, reals, c_int64, c_double, c_double, c_double, array(np.float64, 1, writeable=True)],
    )


def _envelope(d: np.ndarray, psi: np.ndarray) -> tuple[float, float]:
    # straight line through the largest |psi| in bins of resolution: at least three bins, about 25 spots in each
    n_bins = min(max(3, len(d) // 25), 50)
    size = len(d) // n_bins
    order = np.argsort(-d, kind="stable")[: n_bins * size].reshape(n_bins, size)
    x, y = d[order].mean(axis=1), np.abs(psi[order]).max(axis=1)
    slope, intercept = np.linalg.lstsq(np.stack([x, np.ones(n_bins)], axis=1), y, rcond=None)[0]
    return float(slope), float(intercept)


def fit_mosaicity(d: np.ndarray, psi: np.ndarray, volume: float, max_steps: int = 60) -> Mosaicity:
    """Most likely mosaic spread and domain size.

    Parameters
    ----------
    d : (n,) float64
        Spacings of the spots, angstrom.
    psi : (n,) float64
        delta psi, radian.
    volume : float
        Volume of the cell, cubic angstrom: the search starts at domains of at least three cells.

    Raises
    ------
    ValueError
        When there are fewer than three spots.
    """
    if len(d) < 3:
        raise ValueError(f"{len(d)} spots are too few for a mosaic spread")
    d, psi = np.ascontiguousarray(d, dtype=float), np.ascontiguousarray(psi, dtype=float)
    slope, intercept = _envelope(d, psi)
    smallest = 3 * volume ** (1 / 3)
    start_size = max(1 / (2 * slope) if slope != 0 else smallest, smallest)
    x = np.clip([2 / start_size, abs(2 * intercept)], _LOWEST, _HIGHEST)
    value, gradient, hessian = negative_log_likelihood(x, d, psi)
    damping = 1e-3
    for _ in range(max_steps):
        held = ((x <= _LOWEST) & (gradient > 0)) | ((x >= _HIGHEST) & (gradient < 0))
        if held.all():
            break
        trial = np.clip(x + _newton_step(x, gradient, hessian, held, damping), _LOWEST, _HIGHEST)
        new = negative_log_likelihood(trial, d, psi)
        if not new[0] <= value:
            damping = 10 * damping
            if damping > 1e8:
                break
            continue
        gain = value - new[0]
        x, (value, gradient, hessian) = trial, new
        damping = max(damping / 10, 1e-6)
        if gain < _SMALLEST_GAIN:
            break
    alpha, eta = x
    # the share of the domains is d alpha / 2 = d / D
    return Mosaicity(float(eta), float(2 / alpha), np.abs(psi) < 0.5 * (d * alpha + eta))


def _newton_step(
    x: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, held: np.ndarray, damping: float
) -> np.ndarray:
    (h00, h01), (_, h11) = hessian.tolist()
    g0, g1 = gradient.tolist()
    d0, d1 = abs(h00) + 1e-12, abs(h11) + 1e-12
    if held[0]:
        step = [0.0, -g1 / (d1 * (1 + damping))]
    elif held[1]:
        step = [-g0 / (d0 * (1 + damping)), 0.0]
    else:
        # damped until the matrix is positive definite, for a descent
        while (h00 + damping * d0) <= 0 or (h00 + damping * d0) * (h11 + damping * d1) <= 1.0001 * h01 * h01:
            damping = max(2 * damping, 0.1)
        m00, m11 = h00 + damping * d0, h11 + damping * d1
        determinant = m00 * m11 - h01 * h01
        step = [-(m11 * g0 - h01 * g1) / determinant, -(m00 * g1 - h01 * g0) / determinant]
        for one, (other, slope, curvature) in enumerate(((1, g1, d1), (0, g0, d0))):
            # a parameter that meets its bound stops there, and the other takes the step that is best then
            if x[one] + step[one] < _LOWEST[one]:
                step[one] = _LOWEST[one] - x[one]
                step[other] = -(slope + h01 * step[one]) / (curvature * (1 + damping))
    # beyond the outermost spots the likelihood drops steeply: neither parameter changes by more than a factor of 3
    return np.clip(step, np.where(x > 10 * _LOWEST, -x * 2 / 3, _LOWEST - x), np.maximum(2 * x, 1e-3))


def ewald_proximal_volume(wavelength: float, d_min: float, mosaicity: Mosaicity) -> float:
    """Volume of reciprocal space (1/angstrom^3) outside the Ewald sphere whose points reflect, up to `d_min`.

    The shell of the domain size and, integrated over the scattering angle phi in 100 steps, the wedge that the mosaic
    spread adds.
    """
    radius = 1 / wavelength
    angle = 2 * np.arcsin(min(1.0, wavelength / (2 * d_min)))
    cap = np.pi * 2 / 3 * (1 - np.cos(angle))
    outer = radius + 1 / mosaicity.domain_size
    phi = np.arange(100) / 100 * angle
    wedge = (outer + mosaicity.eta * radius * np.sin(phi) / 2) ** 3 - outer**3
    spread = 2 / 3 * np.pi * np.sum(wedge * np.sin(phi)) * angle / 100
    return float(cap * (outer**3 - radius**3) + spread)
