r"""The width of reflections across the Ewald sphere, told by the recorded intensities themselves.

A still records of a reflection what lies on the Ewald sphere. With the excitation error :math:`\epsilon = |s_0 + q| -
|s_0|` and a reciprocal lattice point of variance S in that direction, the recorded share is proportional to

.. math:: p \propto S^{-1/2} \exp(-\epsilon^2 / 2 S).

Integration estimates S from the shapes and positions of strong spots. Shapes say little about it where pixels are
large: their size widens the lattice point in the plane of the detector, and at high resolution that plane is not normal
to the scattering vector. (On 172 µm pixels at 45 mm the width comes out at twice to three times the true one: most of
what is predicted is not excited at all.) The recorded intensities know better. Averaged over many reflections, which
are as strong on one side of the sphere as on the other, they fall off with :math:`\epsilon` as p does:

.. math:: \langle I \rangle(\epsilon) = A\, e^{-\epsilon^2 / 2 S} + C, \qquad S(d^*) = S_0 + S_1 d^{*2},

with A and C for each shell of resolution (C takes what is left of neighbours, tails and background), and two numbers
for all: a part that all reflections have in common, from the size of the coherent domains, and a part from bandwidth,
mosaicity and orientation, which grows with the length of the scattering vector. Since intensities follow Wilson's
distribution, the variance of a mean of n observations is that of one, :math:`\langle I \rangle^2 + \sigma^2`, over n.

What is individual to a crystal, and what differs from this form, is left to scaling, which begins with it.

References
----------
Rossmann et al. (1979). J. Appl. Cryst. 12, 570: partialities refined against intensities.
White (2014). Phil. Trans. R. Soc. B 369, 20130330; Sauter (2015). J. Synchrotron Rad. 22, 239: excitation errors and
partiality of stills.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

N_SHELLS, N_BINS = 10, 64
# 1/d^2 of the resolution at which the full intensity is what is recorded on the sphere
_REFERENCE = 0.04
# fewer observations than this in a bin say nothing
_LEAST_IN_BIN = 5
# improvement of chi squared over no fall at all, for four standard deviations with two parameters
_EVIDENCE = 20.0
_REWEIGHTINGS = 3
# grid of variances, over the square of the largest excitation error, and of the share that all resolutions have
_VARIANCES = np.geomspace(1e-5, 4.0, 60)
_SHARES = np.linspace(0.0, 1.0, 6)


@dataclass(frozen=True)
class EwaldWidth:
    """Variance of a reciprocal lattice point across the Ewald sphere, in 1/angstrom^2.

    Parameters
    ----------
    common
        Part that all reflections have.
    growth
        Part in proportion to the square of the scattering vector, without unit.
    """

    common: float
    growth: float

    def at(self, d_star_sq: np.ndarray) -> np.ndarray:
        """Variances of reflections with 1/d^2 (n,), in 1/angstrom^2."""
        return self.common + self.growth * d_star_sq

    def spread(self, variance: np.ndarray) -> np.ndarray:
        """What the full intensity is over that recorded on the sphere: the square root of the variance.

        It is taken over that at 5 angstrom, so that intensities stay counts of about what was recorded.
        """
        return np.sqrt(variance / self.at(np.array(_REFERENCE)))


@dataclass(frozen=True)
class ProfileBins:
    """Bins of resolution and excitation error.

    Parameters
    ----------
    resolution
        (N_SHELLS + 1,) edges, of 1/d^2 in 1/angstrom^2.
    excitation
        (N_BINS + 1,) edges, of the absolute excitation error in 1/angstrom; finer near the sphere.
    """

    resolution: np.ndarray
    excitation: np.ndarray

    @classmethod
    def up_to(cls, d_star_sq: float, excitation: float) -> ProfileBins:
        """Bins up to the largest values of a data set."""
        return cls(np.linspace(0.0, d_star_sq, N_SHELLS + 1), excitation * np.linspace(0.0, 1.0, N_BINS + 1) ** 2)

    def sums(self, d_star_sq: np.ndarray, excitation: np.ndarray, intensity: np.ndarray) -> np.ndarray:
        """Number, sum and sum of squares of intensities in each bin, (3, N_SHELLS, N_BINS).

        They add up over ranks; exactly, where the intensities have been rounded for it.
        """
        shell = np.clip(np.searchsorted(self.resolution, d_star_sq, side="right") - 1, 0, N_SHELLS - 1)
        bin_ = np.clip(np.searchsorted(self.excitation, excitation, side="right") - 1, 0, N_BINS - 1)
        at = shell * N_BINS + bin_
        terms = (np.ones(len(at)), intensity, intensity**2)
        return np.stack([np.bincount(at, term, N_SHELLS * N_BINS).reshape(N_SHELLS, N_BINS) for term in terms])


def fit_width(bins: ProfileBins, sums: np.ndarray) -> EwaldWidth | None:
    """The width that the fall of the mean intensity with the excitation error shows.

    Parameters
    ----------
    sums
        (3, N_SHELLS, N_BINS), see :meth:`ProfileBins.sums`.

    Returns
    -------
    EwaldWidth or None
        None where the intensities show no fall: there are too few, or they were recorded whole.
    """
    number, total, squares = sums
    used = number >= _LEAST_IN_BIN
    n = np.maximum(number, 1)
    mean = total / n
    centre_sq = (0.5 * (bins.excitation[1:] + bins.excitation[:-1])) ** 2
    shells = 0.5 * (bins.resolution[1:] + bins.resolution[:-1])
    scatter = _scatter(number, total, squares)
    # means of nothing by chance do not get all the weight
    scatter = np.maximum(scatter, 1e-6 * np.max(np.where(used, squares / n, 0.0)))
    variance = np.maximum(mean, 0.0) ** 2 + scatter[:, None]
    found: _Fit | None = None
    for _ in range(_REWEIGHTINGS):
        weight = np.where(used & (variance > 0), n / np.where(variance > 0, variance, 1.0), 0.0)
        found = _search(mean, weight, centre_sq, shells, found)
        variance = np.maximum(found.model, 0.0) ** 2 + scatter[:, None]
    assert found is not None
    flat, _ = _fitted(mean, weight, np.zeros_like(mean))
    if not flat.sum() - found.chi_sq > _EVIDENCE:
        return None
    return EwaldWidth(found.variance * found.share, found.variance * (1.0 - found.share) / shells[-1])


@dataclass(frozen=True)
class _Fit:
    """Chi squared, variance in the last shell and the share of it that all shells have, and the model of the means."""

    chi_sq: float
    variance: float
    share: float
    model: np.ndarray


def _scatter(number: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    # variance of an observation that is hardly excited, for each shell: the smallest of those of four parts
    parts = [s.reshape(N_SHELLS, 4, -1).sum(axis=2) for s in (number, total, squares)]
    n = np.maximum(parts[0], 1)
    of_part = parts[2] / n - (parts[1] / n) ** 2
    of_part = np.where(parts[0] >= 4 * _LEAST_IN_BIN, of_part, np.inf)
    return np.where(np.isfinite(of_part.min(axis=1)), of_part.min(axis=1), 0.0)


def _search(mean, weight, centre_sq, shells, start: _Fit | None) -> _Fit:
    # the best of a grid, or `start`; then the best of finer and finer ones about it
    best = start
    for finer in range(0 if best is None else 1, 4):
        if best is None:
            variances, shares = _VARIANCES * centre_sq[-1], _SHARES
        else:
            step, width = 1.25 ** (0.3 ** (finer - 1)), 0.2 * 0.3 ** (finer - 1)
            variances = best.variance * np.geomspace(1 / step, step, 7)
            shares = np.clip(best.share + width * np.linspace(-1.0, 1.0, 7), 0.0, 1.0)
        fits = []
        for variance in variances:
            for share in shares:
                of_shell = variance * (share + (1.0 - share) * shells / shells[-1])
                chi_sq, model = _fitted(mean, weight, np.exp(-0.5 * centre_sq / of_shell[:, None]))
                fits.append(_Fit(float(chi_sq.sum()), float(variance), float(share), model))
        best = min(fits, key=lambda fit: fit.chi_sq)
    assert best is not None
    return best


def _fitted(mean: np.ndarray, weight: np.ndarray, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # A and C, none of them negative, of each shell by weighted least squares: chi squared, and the model
    def dot(one, other):
        return np.sum(weight * one * other, axis=1)

    ones = np.ones_like(mean)
    aa, ac, cc, ay, cy, yy = (
        dot(*each) for each in ((shape, shape), (shape, ones), (ones, ones), (shape, mean), (ones, mean), (mean, mean))
    )
    # a shape that is nowhere in the bins that were seen stands for nothing
    alone_a = np.maximum(ay, 0) / np.where(aa > 1e-12 * cc, aa, np.inf)
    alone_c = np.maximum(cy, 0) / np.where(cc > 0, cc, np.inf)
    determinant = aa * cc - ac**2
    safe = np.where((determinant > 1e-12 * aa * cc) & (aa > 1e-12 * cc), determinant, np.inf)
    both_a, both_c = (cc * ay - ac * cy) / safe, (aa * cy - ac * ay) / safe
    candidates = [(alone_a, 0 * alone_a), (0 * alone_c, alone_c)]
    good = (both_a >= 0) & (both_c >= 0) & np.isfinite(safe)
    candidates.append((np.where(good, both_a, alone_a), np.where(good, both_c, 0.0)))
    values = [yy - 2 * (a * ay + c * cy) + a * a * aa + 2 * a * c * ac + c * c * cc for a, c in candidates]
    chosen = np.argmin(values, axis=0)
    a, c = (np.choose(chosen, [candidate[k] for candidate in candidates]) for k in (0, 1))
    return np.min(values, axis=0), a[:, None] * shape + c[:, None]
