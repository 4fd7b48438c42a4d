r"""Error model of the observations: how much larger than counting statistics the deviations are.

The variance of an observation with expected intensity m is :math:`v = a^2 [\sigma^2 + (b^2 + c^2 \ell') m^2]`, with
the squared Ewald offset :math:`\ell'` over the refined width of the reflection. An observation that contributes the
share :math:`h = g^2 / (v W)` to its merged intensity deviates from it with the variance :math:`v (1 - h)`; with the
current a, b and c, :math:`z^2 = (I - m)^2 / (v (1 - h))`. In a bin of observations of similar signal-to-noise and
offset the means obey

.. math:: \langle z^2 \rangle = \alpha \langle \sigma^2 / v \rangle + \beta \langle m^2 / v \rangle
          + \gamma \langle \ell' m^2 / v \rangle, \qquad \alpha = a'^2, \quad \beta = a'^2 b'^2,
          \quad \gamma = a'^2 c'^2,

linear in the new parameters, so a small non-negative least-squares problem over the bins gives them, and repeating
it with new weights converges. Only sums per bin have to be combined between ranks.

References
----------
Evans (2011). Acta Cryst. D67, 282: normalised deviations and their use for error models.
Assmann, Brehm & Diederichs (2016). J. Appl. Cryst. 49, 1021 (per-crystal statistics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels._library import array, c_double, c_int64, declare
from ssx_mpi.kernels.scaling import CRYSTALS, Indexed, Merged, Noise, Scales, crystals

# of m / sigma; an octave and a half or so each, the first bin holds what is expected to be weak or absent
BIN_EDGES = np.array([0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 30.0, 50.0, 80.0, 120.0, 200.0, 500.0, 1000.0])
# of the squared offset; full reflections, and partial ones of less and less
OFFSET_EDGES = np.array([0.0, 0.3, 1.0, 2.0, 4.0])
# normalised deviations beyond this are outliers, not noise (a Gaussian loses 0.001 of its variance)
CUT = 4.5
LEAST_IN_BIN = 50
LEAST_AT_ALL = 20


@dataclass(frozen=True)
class Deviations:
    """Normalised deviations per bin of signal-to-noise, (n_bins,) each: number, rms, mean expected intensity."""

    number: np.ndarray
    rms: np.ndarray
    intensity: np.ndarray

    @property
    def overall(self) -> float:
        """Root mean square over all bins."""
        total = self.number.sum()
        return math.sqrt(np.sum(self.number * self.rms**2) / total) if total else float("nan")


def deviation_sums(data: Indexed, scales: Scales, noise: Noise, merged: Merged) -> np.ndarray:
    """Sums per bin of :data:`BIN_EDGES`, which add up over ranks.

    Returns
    -------
    sums : (n_bins, n_offsets, 6) float64
        Number of observations, and sums of z^2, sigma^2 / v, m^2 / v, l m^2 / v and m.
    """
    sums = np.zeros((len(BIN_EDGES), len(OFFSET_EDGES), 6))
    _deviations(
        *crystals(data, scales),
        data.observations.variance,
        merged.intensity,
        merged.weight,
        *noise.squares(),
        CUT,
        len(BIN_EDGES),
        np.append(BIN_EDGES, np.inf),
        len(OFFSET_EDGES),
        np.append(OFFSET_EDGES, np.inf),
        sums,
    )
    return sums


def refine_noise(sums: np.ndarray, noise: Noise) -> Noise:
    """New a, b and c from the sums that :func:`deviation_sums` made with the current ones.

    Where the data do not tell (no bin with enough observations that have a partner) all errors are scaled by one
    factor, and left as they are where there are hardly any such observations at all.
    """
    bins = sums.reshape(-1, sums.shape[-1])
    used = bins[:, 0] >= LEAST_IN_BIN
    if not np.any(used):
        number, total = bins[:, :2].sum(axis=0)
        return replace(noise, a=noise.a * math.sqrt(total / number)) if number >= LEAST_AT_ALL else noise
    number = bins[used, 0]
    # each bin counts by the square root of its size: the strong reflections that fix b and c are few
    weight = np.sqrt(np.sqrt(number))
    means = bins[used, 1:5] / number[:, None]
    # a hundred modules that ranks at images do not need
    from scipy.optimize import nnls

    (alpha, beta, gamma), _ = nnls(means[:, 1:] * weight[:, None], means[:, 0] * weight)
    if alpha <= 0:
        # no bin in which counting statistics matter: keep their share
        alpha = noise.a**2
    return Noise(math.sqrt(alpha), math.sqrt(beta / alpha), math.sqrt(gamma / alpha))


def deviations(sums: np.ndarray) -> Deviations:
    """What is left of the deviations per bin; all rms are 1 where the model holds."""
    of_bin = sums.sum(axis=1)
    number = of_bin[:, 0]
    safe = np.maximum(number, 1)
    return Deviations(number.astype(np.int64), np.sqrt(of_bin[:, 1] / safe), of_bin[:, 5] / safe)


_floats = array(np.float64, 1)
_deviations = declare(
    "ssx_deviations",
    [*CRYSTALS, *[_floats] * 3, *[c_double] * 4, *[c_int64, _floats] * 2, array(np.float64, 3, writeable=True)],
)
