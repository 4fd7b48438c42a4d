"""How many more crystals a wanted resolution takes.

In a shell of resolution let V be the variance of the true intensities about their mean, and s^2 / n that of the error
of a mean over n crystals. Half-sets have n / 2 crystals each, so that

    CC1/2 = V / (V + 2 s^2 / n) ,   that is   CC1/2 / (1 - CC1/2) = n V / (2 s^2) :

the odds of CC1/2 grow in proportion to the number of crystals (the same argument as for CC*, Karplus & Diederichs,
2012). So n (odds wanted) / (odds now) crystals give the CC1/2 that is wanted. To use more than one shell, the odds are
those of a line: their logarithm falls with 1/d^2 (as a Wilson factor does). CC1/2 of all shells is fitted with it,
weighted by the errors and by the nearness to the wanted resolution; beyond the last shell the line is followed.

References
----------
Karplus, P. A. & Diederichs, K. (2012). Science 336, 1030-1033.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# where CC1/2 falls to this, a data set is said to end
WANTED_CC_HALF = 0.3
# CC1/2 is never known better; shells with signal without which nothing is said; of log odds beyond which nothing is
_LEAST_ERROR, _FEWEST_SHELLS, _LARGEST_DEVIATION = 0.005, 4, 1.5
_MOST_STEPS = 100


@dataclass(frozen=True)
class Forecast:
    """How many crystals give CC1/2 of `cc_half` at `d_min`.

    Attributes
    ----------
    d_min : float
        Angstrom.
    cc_half : float
    n_now : int
        Crystals merged so far.
    n_wanted : float
        In all.
    low, high : float
        One standard deviation below and above.
    """

    d_min: float
    cc_half: float
    n_now: int
    n_wanted: float
    low: float
    high: float

    @property
    def n_more(self) -> int:
        return max(0, math.ceil(self.n_wanted - self.n_now))


def forecast(
    d_star_sq: Sequence[float],
    cc_half: Sequence[float | None],
    sd: Sequence[float | None],
    n_crystals: int,
    d_min: float,
    wanted: float = WANTED_CC_HALF,
) -> Forecast | None:
    """The number of crystals for CC1/2 of `wanted` at `d_min`; None where the data do not tell.

    Parameters
    ----------
    d_star_sq, cc_half, sd : (n,)
        Middle of each shell (1/angstrom^2), its CC1/2 and the standard deviation of that; None where there is none.
    n_crystals : int
        Of these data.
    d_min : float
        Resolution wanted, angstrom.
    """
    table = np.array([[np.nan if v is None else v for v in row] for row in zip(d_star_sq, cc_half, sd)], float)
    x, cc, error = table[np.isfinite(table).all(axis=1)].reshape(-1, 3).T if len(table) else np.zeros((3, 0))
    error = np.maximum(error, _LEAST_ERROR)
    if n_crystals < 2 or np.sum(cc > 3 * error) < _FEWEST_SHELLS:
        return None
    x = x - d_min**-2
    # the odds bend where radiation damage and background set in: shells near the wanted resolution count most
    nearness = np.exp(-0.5 * (x / max(0.5 * float(np.ptp(x)), 1e-9)) ** 2)
    fitted = _fit(x, cc, error, nearness)
    if fitted is None:
        return None
    log_odds, deviation = fitted
    ratio = math.log(wanted / (1 - wanted)) - log_odds
    n, low, high = (n_crystals * math.exp(ratio + k * deviation) for k in (0, -1, 1))
    return Forecast(d_min, wanted, n_crystals, n, low, high)


def _fit(x: np.ndarray, cc: np.ndarray, error: np.ndarray, nearness: np.ndarray) -> tuple[float, float] | None:
    """Logarithm of the odds at x = 0 and its standard deviation; None where the fit does not tell.

    Least squares of CC1/2 itself against odds / (1 + odds), damped Gauss-Newton steps. The logarithms of observed odds
    would be biased: where noise takes a CC1/2 below zero there is none.
    """
    weight = nearness / error**2
    parameters = np.array([0.0, -1.0])

    def evaluate(p: np.ndarray):
        model = 1 / (1 + np.exp(-np.clip(p[0] + p[1] * x, -50, 50)))
        jacobian = (model * (1 - model))[:, None] * np.stack([np.ones(len(x)), x], axis=1)
        return cc - model, jacobian, float(np.sum(weight * (cc - model) ** 2))

    residual, jacobian, target = evaluate(parameters)
    damping = 1e-3
    for _ in range(_MOST_STEPS):
        normal = jacobian.T @ (jacobian * weight[:, None])
        step = np.linalg.solve(
            normal + damping * np.diag(np.diag(normal)) + 1e-12 * np.eye(2), jacobian.T @ (weight * residual)
        )
        trial = evaluate(parameters + step)
        if trial[2] <= target:
            done = target - trial[2] < 1e-10 * max(target, 1e-12)
            parameters, (residual, jacobian, target) = parameters + step, trial
            damping = max(damping / 10, 1e-9)
            if done:
                break
        else:
            damping *= 10
            if damping > 1e9:
                break
    inverse = np.linalg.pinv(jacobian.T @ (jacobian * weight[:, None]))
    # weights that are not inverse variances: the sandwich of both, and more where the line does not fit
    spread = max(1.0, float(np.sum(nearness * (residual / error) ** 2) / np.sum(nearness)))
    meat = jacobian.T @ (jacobian * (weight**2 * error**2)[:, None])
    variance = float((inverse @ meat @ inverse)[0, 0]) * spread
    if not 0 < variance < _LARGEST_DEVIATION**2:
        return None
    return float(parameters[0]), math.sqrt(variance)
