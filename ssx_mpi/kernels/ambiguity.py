r"""Indexing ambiguity at linear cost: every crystal against the current merged intensities in each setting.

The lattice can have rotations that the space group lacks. Each coset of the space group's rotations among those of the
lattice is a setting, and an indexing program picks one at random for every crystal. Comparing crystals in pairs
(Brehm & Diederichs, 2014) costs the square of their number. Here the crystals are spread over the settings at
random, merged, and compared with the merged intensities, each without its own contribution; then spread again by how
well each setting fits, and so on. The imbalance that chance made grows from round to round, as in a power iteration
on the matrix of pairwise agreement, until all crystals agree. Spreading by probability, with a temperature that falls
to 1, keeps early rounds from freezing a mixture.

Intensities are normalised (divided by the crystal's scale and the mean of their resolution shell), so that Wilson's
distribution gives them variance 1, and weighted by :math:`1 / (1 + \sigma^2)`. For a crystal with weighted correlation
CC to the merged intensities over n effective reflections, the logarithm of the likelihood of a setting is
:math:`-\frac{n}{2} \ln(1 - CC^2)` up to a constant.

References
----------
Brehm & Diederichs (2014). Acta Cryst. D70, 101.
Kabsch (2014). Acta Cryst. D70, 2204.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int64, declare

# of merged weight (about: observations) that a value must have to be compared with
LEAST_WEIGHT = 0.5


@dataclass(frozen=True)
class Normalised:
    """Normalised intensities of crystals, and where they go in each setting.

    Parameters
    ----------
    start
        (n_crystals + 1,) int64.
    setting_unique
        (n_settings, n) int32, unique reflection or -1.
    x, w
        (n,) float64, normalised intensity and weight.
    """

    start: np.ndarray
    setting_unique: np.ndarray
    x: np.ndarray
    w: np.ndarray

    @property
    def n_crystals(self) -> int:
        return len(self.start) - 1

    @property
    def n_settings(self) -> int:
        return len(self.setting_unique)

    def select(self, crystals: np.ndarray) -> Normalised:
        """Those of the crystals where the mask (n_crystals,) bool is true."""
        counts = np.diff(self.start)
        rows = np.repeat(crystals, counts)
        start = np.concatenate([[0], np.cumsum(counts[crystals])]).astype(np.int64)
        return Normalised(start, np.ascontiguousarray(self.setting_unique[:, rows]), self.x[rows], self.w[rows])


@dataclass(frozen=True)
class Agreement:
    """Of each crystal in each setting with merged intensities: (n_crystals, n_settings) float64."""

    correlation: np.ndarray
    log_likelihood: np.ndarray

    def best(self) -> np.ndarray:
        """The likeliest setting, (n_crystals,) int64."""
        return np.argmax(self.log_likelihood, axis=1)

    def margin(self) -> np.ndarray:
        """Log-likelihood of the best setting above the second best, (n_crystals,) float64; infinite for one setting."""
        if self.log_likelihood.shape[1] < 2:
            return np.full(len(self.log_likelihood), np.inf)
        second, first = np.sort(self.log_likelihood, axis=1)[:, -2:].T
        return first - second


def normalise(
    intensity: np.ndarray, variance: np.ndarray, expected: np.ndarray, outlier: float = 5.0
) -> tuple[np.ndarray, np.ndarray]:
    """Intensities over what their resolution and crystal let expect, and their weights, (n,) each.

    Parameters
    ----------
    expected
        (n,) expected intensity: scale of the crystal times mean of the shell times epsilon; must be positive.
    outlier
        Values further than this many standard deviations (Wilson's and the noise) from 1 are drawn in to there.
    """
    sigma_sq = variance / expected**2
    spread = outlier * np.sqrt(1.0 + sigma_sq)
    return np.clip(intensity / expected, 1.0 - spread, 1.0 + spread), 1.0 / (1.0 + sigma_sq)


def agreement(
    data: Normalised, probability: np.ndarray, merged_sum: np.ndarray, merged_weight: np.ndarray
) -> Agreement:
    """Correlation and likelihood of every crystal in every setting.

    Parameters
    ----------
    probability
        (n_crystals, n_settings), with which the crystals contributed to the merged sums: that much of their own is
        taken out again. Zeros for a reference that they are not part of.
    merged_sum, merged_weight
        (n_unique,) float64.
    """
    sums = np.zeros((data.n_crystals, data.n_settings, 7))
    _moments(
        data.n_crystals,
        data.start,
        len(data.x),
        data.n_settings,
        data.setting_unique,
        data.x,
        data.w,
        np.ascontiguousarray(probability),
        merged_sum,
        merged_weight,
        LEAST_WEIGHT,
        sums,
    )
    square, sw, sx, sy, sxx, syy, sxy = np.moveaxis(sums, 2, 0)
    safe = np.where(sw > 0, sw, 1.0)
    var_x, var_y = sxx / safe - (sx / safe) ** 2, syy / safe - (sy / safe) ** 2
    covariance = sxy / safe - sx * sy / safe**2
    both = var_x * var_y
    correlation = np.where(both > 0, covariance / np.sqrt(np.where(both > 0, both, 1.0)), 0.0)
    n = np.where(square > 0, sw**2 / np.where(square > 0, square, 1.0), 0.0)
    # at least the noise of a correlation of n numbers; an anticorrelation is no likelier than none
    limited = np.clip(correlation, 0.0, 0.9999)
    return Agreement(correlation, np.maximum(n - 3, 0) * -0.5 * np.log1p(-(limited**2)))


def spread(data: Normalised, probability: np.ndarray, n_unique: int) -> tuple[np.ndarray, np.ndarray]:
    """Merged sum and weight, (n_unique,) each, of crystals spread over settings by probability; ranks add up."""
    merged_sum, merged_weight = np.zeros(n_unique), np.zeros(n_unique)
    _accumulate(
        data.n_crystals,
        data.start,
        len(data.x),
        data.n_settings,
        data.setting_unique,
        data.x,
        data.w,
        np.ascontiguousarray(probability),
        merged_sum,
        merged_weight,
    )
    return merged_sum, merged_weight


def probabilities(log_likelihood: np.ndarray, temperature: float) -> np.ndarray:
    """Of each setting for each crystal, (n_crystals, n_settings), at a temperature."""
    scaled = (log_likelihood - log_likelihood.max(axis=1, keepdims=True)) / temperature
    weight = np.exp(scaled)
    return weight / weight.sum(axis=1, keepdims=True)


def composition_table(settings: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Which setting follows from reindexing by one and then by another.

    Parameters
    ----------
    settings
        (n_settings, 3, 3), representatives T of the cosets T H of the point group H; the first is the identity.
    rotations
        (m, 3, 3), the point group H.

    Returns
    -------
    table : (n_settings, n_settings) int64
        ``table[s, t]`` is the setting of ``settings[s] @ settings[t]``, and -1 in column t where t does not leave the
        point group as it is, so that it cannot be applied to merged data.
    """
    n = len(settings)
    table = np.full((n, n), -1, dtype=np.int64)
    members = [settings[s] @ rotations for s in range(n)]
    for t in range(n):
        inverse = np.linalg.inv(settings[t])
        if not all(_contains(rotations, inverse @ r @ settings[t]) for r in rotations):
            continue
        for s in range(n):
            product = settings[s] @ settings[t]
            table[s, t] = next(u for u in range(n) if _contains(members[u], product))
    return table


def find_setting(matrix: np.ndarray, settings: np.ndarray, rotations: np.ndarray) -> int:
    """The setting in whose coset a (3, 3) matrix lies; -1 for none."""
    for number, setting in enumerate(settings):
        if _contains(setting @ rotations, matrix):
            return number
    return -1


def relative_agreement(first: np.ndarray, second: np.ndarray, table: np.ndarray) -> np.ndarray:
    """How many crystals two solutions set alike, for each common setting t between them: (n_settings,) int64.

    Parameters
    ----------
    first, second
        (n_crystals,) settings.
    table
        From :func:`composition_table`.
    """
    return np.array([np.count_nonzero(table[first, t] == second) for t in range(len(table))], dtype=np.int64)


def _contains(matrices: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.any(np.all(np.abs(matrices - wanted) < 1e-6, axis=(1, 2))))


_floats = array(np.float64, 1)
_crystals = [c_int64, array(np.int64, 1), c_int64, c_int64, array(np.int32, 2), _floats, _floats, array(np.float64, 2)]
_moments = declare(
    "ssx_setting_moments",
    [*_crystals, _floats, _floats, c_double, array(np.float64, 3, writeable=True)],
)
_accumulate = declare(
    "ssx_setting_accumulate",
    [*_crystals, array(np.float64, 1, writeable=True), array(np.float64, 1, writeable=True)],
)
