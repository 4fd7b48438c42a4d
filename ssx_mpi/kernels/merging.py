r"""Merging statistics in resolution shells, from sums over unique reflections.

Half-sets are made of crystals, not of observations, because the errors of one crystal's observations are not
independent; which half a crystal is in follows from its number and the number of the repeat alone, so that it does not
depend on how the crystals are distributed.

.. math::
    CC^* = \sqrt{\frac{2\,CC_{1/2}}{1 + CC_{1/2}}}, \qquad
    R_{split} = \frac{1}{\sqrt 2} \frac{\sum |I_1 - I_2|}{\tfrac12 \sum (I_1 + I_2)}

References
----------
Karplus & Diederichs (2012). Science 336, 1030: CC1/2 and CC*.
White et al. (2012). J. Appl. Cryst. 45, 335: Rsplit.
Diederichs & Karplus (1997). Nat. Struct. Biol. 4, 269; Weiss (2001). J. Appl. Cryst. 34, 130: Rmeas, Rpim.
Assmann, Brehm & Diederichs (2016). J. Appl. Cryst. 49, 1021: delta-CC1/2 by the sigma-tau method.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels._library import array, declare
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import CRYSTALS, Indexed, Merged, Scales, crystals

_MIN_FOR_CORRELATION = 3
# fewer reflections in both half-sets than this, and CC1/2 is chance: its standard deviation is 0.14 where there is none
LEAST_PAIRS = 50
# a correlation of 10 numbers has a standard error of 0.3 where there is none
_MIN_PAIRS = 10
# reflections in a shell by which the resolution is estimated, at least
_PER_SHELL = 40


@dataclass(frozen=True)
class Shells:
    """Resolution shells with about the same number of unique reflections each.

    Parameters
    ----------
    edges
        (n_shells + 1,) d*^2 in 1/angstrom^2, ascending.
    number
        (n_unique,) int64, shell of each unique reflection; -1 outside the resolution limits.
    """

    edges: np.ndarray
    number: np.ndarray

    def __len__(self) -> int:
        return len(self.edges) - 1

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum of (n_unique,) values in each shell."""
        inside = self.number >= 0
        return np.bincount(self.number[inside], weights=values[inside], minlength=len(self))


def resolution_shells(
    d_star_sq: np.ndarray,
    n_shells: int,
    d_min: float | None = None,
    d_max: float | None = None,
    seen: np.ndarray | None = None,
) -> Shells:
    """Shells between resolution limits, by default those of the table of unique reflections.

    Parameters
    ----------
    seen
        (n_unique,) bool, the reflections of which each shell has the same number and at least 40, up to the last of
        them; all by default.

    Raises
    ------
    ValueError
        When no unique reflection lies between the limits.
    """
    inside = np.ones(len(d_star_sq), dtype=bool)
    if d_min is not None:
        inside &= d_star_sq <= 1.0 / d_min**2 * (1 + 1e-9)
    if d_max is not None:
        inside &= d_star_sq >= 1.0 / d_max**2 * (1 - 1e-9)
    ordered = np.sort(d_star_sq[inside if seen is None else inside & seen])
    if not len(ordered):
        raise ValueError(f"no reflection between {d_max} and {d_min} angstrom")
    n_shells = max(1, min(n_shells, len(ordered) if seen is None else len(ordered) // _PER_SHELL))
    cuts = ordered[(len(ordered) * np.arange(1, n_shells)) // n_shells]
    edges = np.concatenate([ordered[:1], cuts, ordered[-1:]])
    number = np.searchsorted(edges[1:-1], d_star_sq, side="right")
    return Shells(edges, np.where(inside & (d_star_sq <= ordered[-1]), number, -1))


@dataclass(frozen=True)
class RFactors:
    """R factors of the observations against their means, (n_shells + 1,) each, the last for all shells."""

    r_merge: np.ndarray
    r_meas: np.ndarray
    r_pim: np.ndarray


@dataclass(frozen=True)
class Scatter:
    """What R factors need of each unique reflection, (n,) each: number, sum, and sum of absolute deviations."""

    number: np.ndarray
    total: np.ndarray
    absolute: np.ndarray


@dataclass(frozen=True)
class ShellStatistics:
    """Merging statistics, an array per quantity with a row per shell and a last row for all; nan where undefined.

    Spreads (`_sd`) are standard deviations over the repeats of the random split into half-sets. R factors are those of
    all observations of a reflection, and (`_anom`) of the observations of each Friedel mate for itself.

    `anom_over_sigma` is the mean of :math:`|\\Delta I| / \\sigma(\\Delta I)` over the Friedel pairs, 0.80 where
    there is no anomalous signal and the sigmas are right. To first order it is that of the amplitudes as well.
    """

    d_max: np.ndarray
    d_min: np.ndarray
    n_obs: np.ndarray
    n_unique: np.ndarray
    n_possible: np.ndarray
    mean_intensity: np.ndarray
    mean_i_over_sigma: np.ndarray
    cc_half: np.ndarray
    cc_half_sd: np.ndarray
    r_split: np.ndarray
    r_split_sd: np.ndarray
    r_factors: RFactors
    r_factors_anom: RFactors
    anom_completeness: np.ndarray
    anom_multiplicity: np.ndarray
    cc_anom: np.ndarray
    anom_over_sigma: np.ndarray
    cc_reference: np.ndarray

    @property
    def n_shells(self) -> int:
        return len(self.d_min) - 1

    @property
    def completeness(self) -> np.ndarray:
        return _ratio(self.n_unique, self.n_possible)

    @property
    def multiplicity(self) -> np.ndarray:
        return _ratio(self.n_obs, self.n_unique)

    @property
    def cc_star(self) -> np.ndarray:
        cc = np.where(self.cc_half > 0, self.cc_half, np.nan)
        return np.sqrt(2 * cc / (1 + cc))


@dataclass(frozen=True)
class HalfSets:
    """Agreement between half-sets, a row per repeat: (n_repeats, n_shells + 1) each."""

    cc_half: np.ndarray
    r_split: np.ndarray
    cc_anom: np.ndarray
    #: reflections that are in both half-sets
    pairs: np.ndarray

    def meaningful(self, values: np.ndarray) -> np.ndarray:
        """Values (n_shells + 1,), nan where there are too few pairs for a correlation."""
        return np.where(self.pairs.mean(axis=0) >= LEAST_PAIRS, values, np.nan)


def half_set(crystal_number: np.ndarray, repeat: int) -> np.ndarray:
    """Which crystals, by their numbers in the whole data set, are in the first half: (n,) bool."""
    return (scramble(crystal_number, repeat) & np.uint64(1)).astype(bool)


def scramble(number: np.ndarray, stream: int) -> np.ndarray:
    """Random-looking integers, (n,) uint64, that depend on a number and a stream alone, on whichever rank.

    The finaliser of the splitmix64 generator (Steele, Lea & Flood, 2014), a bijection of the integers.
    """
    with np.errstate(over="ignore"):
        x = number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(stream + 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def compare_half_sets(first: np.ndarray, second: np.ndarray, shells: Shells) -> tuple[np.ndarray, ...]:
    """CC1/2, Rsplit and anomalous CC1/2 of two half-sets, and how many reflections are in both.

    Parameters
    ----------
    first, second
        (3, n_unique, 2) sums as :func:`ssx_mpi.kernels.scaling.accumulate` makes them.

    Returns
    -------
    cc_half, r_split, cc_anom, pairs : (n_shells + 1,) float64 each, the last for all shells together
    """
    one, two = Merged.from_sums(first), Merged.from_sums(second)
    both = (one.weight > 0) & (two.weight > 0)
    cc_half = shell_correlation(one.intensity, two.intensity, both, shells)
    difference = np.where(both, np.abs(one.intensity - two.intensity), 0.0)
    mean = np.where(both, 0.5 * (one.intensity + two.intensity), 0.0)
    r_split = _ratio(with_total(shells.sum(difference)), np.sqrt(2.0) * with_total(shells.sum(mean)))
    paired = np.all(first[1] > 0, axis=1) & np.all(second[1] > 0, axis=1)
    cc_anom = shell_correlation(_anomalous_difference(first), _anomalous_difference(second), paired, shells)
    return cc_half, r_split, cc_anom, with_total(shells.sum(both.astype(np.float64)))


def shell_correlation(x: np.ndarray, y: np.ndarray, use: np.ndarray, shells: Shells) -> np.ndarray:
    """Pearson correlation of selected unique reflections in each shell, and in all, (n_shells + 1,); nan for few."""
    result = np.full(len(shells) + 1, np.nan)
    for k in range(len(shells) + 1):
        inside = use & ((shells.number == k) if k < len(shells) else (shells.number >= 0))
        if np.count_nonzero(inside) < _MIN_FOR_CORRELATION:
            continue
        a, b = x[inside] - x[inside].mean(), y[inside] - y[inside].mean()
        product = np.sum(a * a) * np.sum(b * b)
        if product > 0:
            result[k] = np.sum(a * b) / np.sqrt(product)
    return result


def statistics(
    sums: np.ndarray,
    scatter: Scatter,
    scatter_of_mates: Scatter,
    halves: HalfSets,
    unique: UniqueReflections,
    shells: Shells,
    reference: Merged | None = None,
) -> ShellStatistics:
    """Merging statistics of all observations.

    Parameters
    ----------
    sums
        (3, n_unique, 2) of :func:`ssx_mpi.kernels.scaling.accumulate`, of all crystals of all ranks.
    scatter, scatter_of_mates
        Of the n_unique reflections, and of the 2 n_unique ones at 2 * unique + minus.
    reference
        Intensities to correlate with (weight 0 where there is none).
    """
    merged = Merged.from_sums(sums)
    count = sums[2]
    n = count.sum(axis=1)
    seen = merged.weight > 0
    sigma = np.divide(1.0, np.sqrt(merged.weight), out=np.zeros_like(merged.weight), where=seen)
    ratio = np.divide(merged.intensity, sigma, out=np.zeros_like(sigma), where=seen)

    def total(values: np.ndarray) -> np.ndarray:
        return with_total(shells.sum(np.asarray(values, dtype=np.float64)))

    acentric = ~unique.centric
    mates = np.all(count > 0, axis=1) & acentric
    n_unique = total(seen)
    if reference is None:
        cc_reference = np.full(len(shells) + 1, np.nan)
    else:
        cc_reference = shell_correlation(merged.intensity, reference.intensity, seen & (reference.weight > 0), shells)
    edges = shells.edges
    return ShellStatistics(
        d_max=edges[np.append(np.arange(len(shells)), 0)] ** -0.5,
        d_min=edges[np.append(np.arange(1, len(shells) + 1), len(shells))] ** -0.5,
        n_obs=total(n).astype(np.int64),
        n_unique=n_unique.astype(np.int64),
        n_possible=total(np.ones(len(n))).astype(np.int64),
        mean_intensity=_ratio(total(np.where(seen, merged.intensity, 0.0)), n_unique),
        mean_i_over_sigma=_ratio(total(ratio), n_unique),
        cc_half=halves.meaningful(_mean(halves.cc_half)),
        cc_half_sd=halves.meaningful(_spread(halves.cc_half)),
        r_split=_mean(halves.r_split),
        r_split_sd=_spread(halves.r_split),
        r_factors=r_factors(scatter, shells),
        r_factors_anom=r_factors(scatter_of_mates, Shells(shells.edges, np.repeat(shells.number, 2))),
        anom_completeness=_ratio(total(mates), total(acentric)),
        anom_multiplicity=_ratio(total(n), total(np.count_nonzero(count > 0, axis=1))),
        cc_anom=_mean(halves.cc_anom),
        anom_over_sigma=_ratio(total(np.where(mates, anomalous_significance(sums), 0.0)), total(mates)),
        cc_reference=cc_reference,
    )


def r_factors(scatter: Scatter, shells: Shells) -> RFactors:
    """R factors over the reflections with two or more observations."""
    n = scatter.number
    repeated, excess = n > 1, np.maximum(n - 1, 1)
    intensity = with_total(shells.sum(np.where(repeated, scatter.total, 0.0)))

    def ratio(factor: np.ndarray) -> np.ndarray:
        return _ratio(with_total(shells.sum(np.where(repeated, scatter.absolute * factor, 0.0))), intensity)

    return RFactors(ratio(np.ones(len(n))), ratio(np.sqrt(n / excess)), ratio(np.sqrt(1 / excess)))


def moments(data: Indexed, scales: Scales) -> np.ndarray:
    """Number, sum and sum of squares of the scaled observations of each unique reflection: (n_unique, 3)."""
    sums = np.zeros((len(data.d_star_sq), 3))
    _moments(*crystals(data, scales), sums)
    return sums


def absolute_deviations(data: Indexed, scales: Scales, merged: Merged) -> np.ndarray:
    """Sum of the absolute deviations of scaled observations from the merged intensity, (n_unique,)."""
    sums = np.zeros(len(data.d_star_sq))
    _absolute(*crystals(data, scales), merged.intensity, sums)
    return sums


def cc_half_sigma_tau(moment: np.ndarray, unit: np.ndarray) -> tuple[float, np.ndarray]:
    """CC1/2 without half-sets, from the variance between and within unique reflections, and the sums it came from.

    With y the mean of the observations of a unique reflection in units of its shell's mean intensity, and e the
    variance of that mean, :math:`CC_{1/2} = (\\sigma_y^2 - e) / (\\sigma_y^2 + e)`: a half-set's mean has the
    variance 2 e, and the variance of the true intensities is :math:`\\sigma_y^2 - e`.

    Parameters
    ----------
    moment
        (n_unique, 3) from :func:`moments`, of all ranks.
    unit
        (n_unique,) mean intensity of the shell; 0 for reflections to leave out.

    Returns
    -------
    cc_half : float
    sums : (4,) float64
        Number of unique reflections with two or more observations, and sums of y, y^2 and e over them.
    """
    use = (moment[:, 0] > 1) & (unit > 0)
    n, s, ss = moment[use].T
    y = s / n / unit[use]
    e = (ss / unit[use] ** 2 - n * y * y) / (n * (n - 1))
    sums = np.array([len(y), y.sum(), np.sum(y * y), e.sum()])
    return float(_sigma_tau(sums)), sums


def delta_cc_half(data: Indexed, scales: Scales, moment: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """CC1/2 of all crystals minus CC1/2 without the crystal, in percent, (n_crystals,): negative for harmful ones.

    Parameters are those of :func:`cc_half_sigma_tau` and :func:`moments`. Costs one pass over the observations.
    """
    changes = np.zeros((data.observations.n_crystals, 4))
    _leave_out(*crystals(data, scales), moment, unit, changes)
    whole, sums = cc_half_sigma_tau(moment, unit)
    return 100 * (whole - _sigma_tau((sums + changes).T))


def expected_cc_half(sums: np.ndarray, shells: Shells) -> tuple[np.ndarray, np.ndarray]:
    r"""CC1/2 to be expected of the reflections that were observed once: (n_shells,), and their number.

    Nobody can see how two observations of them agree, but intensities and sigmas tell: true intensities that follow
    Wilson's distribution with the mean :math:`\Sigma` have the variance :math:`\Sigma^2`, and two observations of
    variance v the correlation :math:`\Sigma^2 / (\Sigma^2 + v)`.
    """
    merged, number = Merged.from_sums(sums), sums[2].sum(axis=1)
    seen, once = merged.weight > 0, (merged.weight > 0) & (number < 1.5)
    mean = np.maximum(_ratio(shells.sum(np.where(seen, merged.intensity, 0.0)), shells.sum(seen.astype(float))), 0.0)
    variance = np.divide(1.0, merged.weight, out=np.zeros_like(merged.weight), where=once)
    n_once = shells.sum(once.astype(float))
    return _ratio(mean**2, mean**2 + _ratio(shells.sum(variance), n_once)), n_once


def resolution_estimate(
    sums: np.ndarray, halves: HalfSets, shells: Shells, d_star_sq: np.ndarray, cutoff: float = 0.3
) -> float | None:
    r"""Resolution where a smooth curve through CC1/2 falls to a cutoff.

    Where the mean intensity falls off exponentially with :math:`s^2 = d^{*2}` over a constant noise, the correlation is

    .. math:: CC(s^2) = \left[\frac1p + \exp\frac{s^2 - s_0^2}{r}\right]^{-1},

    with errors in proportion to the intensity in :math:`p \le 1`. It is fitted by least squares to all shells, so that
    one noisy shell does not decide. Each reflection counts once: one that was observed twice or more in the agreement
    of half-sets, one observed once in what :func:`expected_cc_half` says. Sparse data have hardly any of the former,
    least of all in the shells that matter.

    Parameters
    ----------
    sums
        (3, n_unique, 2) of :func:`ssx_mpi.kernels.scaling.accumulate`.
    d_star_sq
        (n_unique,) in 1/angstrom^2.

    Returns
    -------
    d_min : float or None
        None where the curve stays above the cutoff, or below it, within the data, or nothing can be said.
    """
    number = sums[2].sum(axis=1)
    expected, n_once = expected_cc_half(sums, shells)
    twice, seen = (number > 1.5).astype(float), d_star_sq[(number > 0.5) & (shells.number >= 0)]
    s_sq = np.concatenate(
        [_ratio(shells.sum(where * d_star_sq), shells.sum(where)) for where in (twice, (number > 0.5) - twice)]
    )
    cc, weight = np.concatenate([_mean(halves.cc_half)[:-1], expected]), np.concatenate([shells.sum(twice), n_once])
    known = np.isfinite(cc) & np.isfinite(s_sq) & (weight >= _MIN_PAIRS)
    if np.count_nonzero(known) < _MIN_FOR_CORRELATION:
        return None
    at = _where_curve_falls(s_sq[known], cc[known], weight[known], cutoff)
    return float(at**-0.5) if seen.min() < at < seen.max() else None


def _where_curve_falls(s_sq: np.ndarray, cc: np.ndarray, weight: np.ndarray, cutoff: float) -> float:
    # least squares over grids of the three parameters, each finer than the one before and around its best
    low, high = s_sq.min(), s_sq.max()
    extent = max(high - low, 1e-9)
    lowest = 0.5 * (1.0 + cutoff)
    centre, width, plateau = (low - extent, high + 2 * extent), (0.01 * extent, 2 * extent), (lowest, 1.0)
    for _ in range(6):
        s0, r, p = np.meshgrid(np.linspace(*centre, 31), np.geomspace(*width, 25), np.linspace(*plateau, 9))
        exponent = np.clip((s_sq - s0[..., None]) / r[..., None], -50.0, 50.0)
        misfit = np.sum(weight * (1.0 / (1.0 / p[..., None] + np.exp(exponent)) - cc) ** 2, axis=-1)
        best = np.unravel_index(np.argmin(misfit), misfit.shape)
        step, factor = (centre[1] - centre[0]) / 12, (width[1] / width[0]) ** 0.1
        centre, width = (s0[best] - step, s0[best] + step), (r[best] / factor, r[best] * factor)
        step = (plateau[1] - plateau[0]) / 4
        plateau = (max(p[best] - step, lowest), min(p[best] + step, 1.0))
    return float(s0[best] + r[best] * np.log(1.0 / cutoff - 1.0 / p[best]))


def with_total(per_shell: np.ndarray) -> np.ndarray:
    """The values of the shells and, last, their sum."""
    return np.append(per_shell, per_shell.sum())


def _anomalous_difference(sums: np.ndarray) -> np.ndarray:
    numerator, weight = sums[0], sums[1]
    mates = np.divide(numerator, weight, out=np.zeros_like(weight), where=weight > 0)
    return mates[:, 0] - mates[:, 1]


def anomalous_significance(sums: np.ndarray) -> np.ndarray:
    """Absolute difference of Friedel mates over its error, (n_unique,); 0 where a mate is missing."""
    variance = np.divide(1.0, sums[1], out=np.full(sums[1].shape, np.inf), where=sums[1] > 0).sum(axis=1)
    return np.abs(_anomalous_difference(sums)) / np.sqrt(variance)


def _sigma_tau(sums: np.ndarray) -> np.ndarray:
    n, y, yy, e = sums
    n = np.maximum(n, 1)
    variance, error = yy / n - (y / n) ** 2, e / n
    return _ratio(variance - error, variance + error)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    out = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=out, where=np.asarray(denominator) != 0)


def _mean(repeats: np.ndarray) -> np.ndarray:
    known = np.isfinite(repeats)
    return _ratio(np.where(known, repeats, 0.0).sum(axis=0), known.sum(axis=0))


def _spread(repeats: np.ndarray) -> np.ndarray:
    known = np.isfinite(repeats)
    deviation = np.where(known, repeats - _mean(repeats), 0.0)
    n = known.sum(axis=0)
    return np.sqrt(_ratio(np.sum(deviation**2, axis=0), np.where(n > 1, n - 1, 0)))


_floats = array(np.float64, 1)
_table = array(np.float64, 2, writeable=True)
_moments = declare("ssx_moments", [*CRYSTALS, _table])
_absolute = declare("ssx_absolute_deviations", [*CRYSTALS, _floats, array(np.float64, 1, writeable=True)])
_leave_out = declare("ssx_leave_out", [*CRYSTALS, array(np.float64, 2), _floats, _table])
