r"""Scales of crystals against merged intensities, and merged intensities given the scales.

An observation of reflection h on crystal c is modelled as :math:`m = g J_h` with

.. math:: \ln g = \ln k_c - 2 B_c s^2 + \tfrac12 [\ell - \ell' - u], \qquad s^2 = d^{*2} / 4, \quad
          u = w_c + W(d^*), \quad \ell' = \ell e^{-u},

and the variance :math:`v = a^2 [\sigma^2 + (b^2 + c^2 \ell') m^2]`, in which the model rather than the observation
stands, so that observations that came out low by chance do not get more weight.

**Partiality.** Intensities come divided by the partiality :math:`p = \exp(-\ell / 2)`, where :math:`\ell = \epsilon^2 /
S` is the squared Ewald offset over the variance S that integration gave to the reflections of the crystal. If the true
variance is :math:`S' = S e^u`, what a still records of a reflection is not p but :math:`\sqrt{S / S'} \exp(-\epsilon^2
/ 2 S')`: a reflection that is spread over more of the offset is weaker at each. A mosaicity that was fitted as one
number, where in truth reflections broaden with resolution, makes partial reflections at low resolution wrong by half
and more. The width :math:`w_c` of each crystal, and a trend W along :math:`d^*` that all have in common, piecewise
linear between knots, correct it.

**Scales.** The intensities are unknown, too. Where a reflection was seen once or twice, its merged intensity is hardly
better than the observation itself, and to fit scales to it is to fit them to their own noise. Wilson's statistics say
something about it beforehand: it is positive, and falls off exponentially with the mean :math:`\Sigma` at its
resolution. (Those of centric reflections fall off differently; they are few.) With that as a prior, as French & Wilson
have it, the merged intensity J with standard deviation :math:`\omega` gives a normal distribution about :math:`J -
\omega^2 / \Sigma` cut off at zero, of which x is the mean and :math:`\langle J^2 \rangle` the mean square. The scales
are those that maximise the expected likelihood, with the gradient :math:`\sum \rho (I g x - g^2 \langle J^2 \rangle) /
v` by :math:`\ln g`; :math:`\Sigma` is the mean of x over its shell. Repeating both is expectation maximisation:
crystals that share few reflections are scaled by their mean intensities, those that share many by what they share,
without a choice between the two. :math:`\rho` is the robust weight, 1 up to a normalised deviation of `bound` and
falling with its square beyond.

Only sums over unique reflections, and one equation for each knot, have to be combined between ranks: given these,
every crystal is a problem of its own with three parameters.

**Sums that do not depend on the order.** Where crystals share few reflections the iteration wanders a long way before
it rests, and takes the last digits of a sum along. So what is added up is rounded first, to a multiple of a power of
two that all ranks have in common: sums of such numbers are exact, in whatever order and on however many ranks.

References
----------
Hamilton, Rollett & Sparks (1965). Acta Cryst. 18, 129: scales and means by alternating least squares.
Dempster, Laird & Rubin (1977). J. R. Stat. Soc. B 39, 1: expectation maximisation.
Efron & Morris (1975). J. Am. Stat. Assoc. 70, 311: priors from the data themselves.
Wilson (1949). Acta Cryst. 2, 318; French & Wilson (1978). Acta Cryst. A34, 517: the prior.
White (2014). Phil. Trans. R. Soc. B 369, 20130330; Uervirojnangkoorn et al. (2015). eLife 4, e05421: partialities
refined against merged intensities.
Demmel & Nguyen (2013). 21st IEEE Symp. Computer Arithmetic, 163: reproducible sums by rounding beforehand.
Beaton & Tukey (1974). Technometrics 16, 147: iteratively reweighted least squares.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.special import erfcx

from ssx_mpi.kernels._library import array, c_double, c_int64, declare
from ssx_mpi.kernels.exact_sums import power_above
from ssx_mpi.kernels.reflections import Observations

N_KNOTS = 6
# largest change of the logarithm of a scale in one step: the exponential is not linear
_LARGEST_STEP = 1.0
# spread of log k, B (angstrom^2) and width that is assumed, for how many crystals that counts, and how far it may go
_SPREAD, _ASSUMED = np.array([1.0, 10.0, 0.3]), 4
_SPREAD_LIMITS = np.array([0.05, 0.5, 0.03]), np.array([5.0, 50.0, 0.6])


@dataclass(frozen=True)
class Trend:
    """A function of d*, the same for all crystals: values (n_knots,) at knots (n_knots,) in 1/angstrom."""

    knots: np.ndarray
    values: np.ndarray

    @classmethod
    def zero(cls, d_star_sq: np.ndarray | None = None) -> Trend:
        """Zero everywhere, its knots spread over some reflections."""
        if d_star_sq is None or not len(d_star_sq):
            return cls(np.linspace(0.0, 1.0, N_KNOTS), np.zeros(N_KNOTS))
        low, high = np.sqrt(d_star_sq.min()), np.sqrt(d_star_sq.max())
        return cls(np.linspace(low, max(high, low + 1e-3), N_KNOTS), np.zeros(N_KNOTS))

    def at(self, d_star_sq: np.ndarray) -> np.ndarray:
        """Values for reflections with 1/d^2 (n,)."""
        return np.interp(np.sqrt(d_star_sq), self.knots, self.values)

    def place(self, d_star_sq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Knot (n,) int32 below each reflection, and how far it is on the way to the next, (n,) from 0 to 1."""
        at = np.interp(np.sqrt(d_star_sq), self.knots, np.arange(len(self.knots), dtype=np.float64))
        knot = np.minimum(at.astype(np.int32), len(self.knots) - 2)
        return knot, at - knot


@dataclass(frozen=True)
class Scales:
    """Logarithm of the scale, B in angstrom^2, and width of each crystal, (n_crystals,) float64 each; common trend.

    Width and trend add up to the logarithm of the variance of a reflection over that which integration gave it.
    Observations further from the Ewald sphere than `max_offset`, squared and in refined widths, are left out, and those
    from half of it on lose weight.
    """

    log_k: np.ndarray
    b_factor: np.ndarray
    width: np.ndarray
    trend: Trend
    max_offset: float = np.inf

    @classmethod
    def unit(cls, n_crystals: int, trend: Trend | None = None) -> Scales:
        zero = Trend.zero() if trend is None else Trend(trend.knots, np.zeros(len(trend.knots)))
        return cls(np.zeros(n_crystals), np.zeros(n_crystals), np.zeros(n_crystals), zero)

    def shifted(self, log_k: float, b_factor: float, width: float) -> Scales:
        """With the given amounts taken off all crystals; that of the width goes into the trend, and nothing changes."""
        trend = Trend(self.trend.knots, self.trend.values + width)
        return Scales(self.log_k - log_k, self.b_factor - b_factor, self.width - width, trend, self.max_offset)


@dataclass(frozen=True)
class Noise:
    """Error model: the variance of an observation is a^2 (sigma^2 + (b^2 + c^2 l) m^2).

    m is the expected intensity and l the squared offset from the Ewald sphere over the refined width: an error of the
    offset changes the logarithm of the partiality in proportion to its square root.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0

    def squares(self) -> tuple[float, float, float]:
        return self.a**2, self.b**2, self.c**2


@dataclass(frozen=True)
class Merged:
    """Merged intensities and their weights (1/variance; 0 where nothing was observed), (n_unique,) float64 each.

    `count` is the number of observations. Where it is not known, outliers are not looked for.
    """

    intensity: np.ndarray
    weight: np.ndarray
    count: np.ndarray | None = None

    @classmethod
    def from_sums(cls, sums: np.ndarray) -> Merged:
        """From the (3, n_unique, 2) sums of :func:`accumulate`, Friedel mates taken together."""
        numerator, weight, count = sums.sum(axis=2)
        return cls(np.divide(numerator, weight, out=np.zeros_like(weight), where=weight > 0), weight, count)

    def numbers(self) -> np.ndarray:
        """:attr:`count`, or zeros."""
        return np.zeros_like(self.weight) if self.count is None else self.count


@dataclass(frozen=True)
class Indexed:
    """Observations, where they belong, and the crystals that take part.

    Parameters
    ----------
    d_star_sq
        (n_unique,) float64 of the unique reflections, in 1/angstrom^2.
    unique, minus
        (n,) int32 and uint8: unique reflection of each observation, -1 for none, and which Friedel mate it is.
    include
        (n_crystals,) bool.
    """

    observations: Observations
    d_star_sq: np.ndarray
    unique: np.ndarray
    minus: np.ndarray
    include: np.ndarray

    def used(self) -> Indexed:
        """The same without the observations beyond their limit."""
        return replace(self, unique=np.where(self.observations.within(), self.unique, -1).astype(np.int32))

    def only(self, include: np.ndarray) -> Indexed:
        """The same with other crystals that take part."""
        return replace(self, include=include)


@dataclass(frozen=True)
class Expectation:
    """Expected intensity and expected square of it, (n_unique,) float64 each."""

    value: np.ndarray
    square: np.ndarray

    @classmethod
    def posterior(cls, merged: Merged, mean: np.ndarray) -> Expectation:
        """Merged intensities with Wilson's prior: a normal distribution, cut off at zero.

        Parameters
        ----------
        mean
            (n_unique,) mean intensity at the reflection's resolution times epsilon; positive.
        """
        seen = merged.weight > 0
        sigma = 1.0 / np.sqrt(np.where(seen, merged.weight, 1.0))
        # a measurement a hundred times less certain than the prior says nothing
        seen &= sigma < 100.0 * mean
        sigma = np.where(seen, sigma, mean)
        shift = np.where(seen, sigma / mean - merged.intensity / sigma, 0.0)
        # density over the upper tail of the normal distribution, minus the argument; for large ones by its series
        hazard = np.sqrt(2 / np.pi) / erfcx(np.minimum(shift, 1e3) / np.sqrt(2))
        far = np.maximum(shift, 20.0)
        excess = np.where(shift > 20.0, 1 / far - 2 / far**3, hazard - shift)
        spread = np.where(shift > 20.0, 1 / far**2 - 6 / far**4, 1.0 - hazard * (hazard - shift))
        value = np.where(seen, sigma * excess, mean)
        return cls(value, np.where(seen, value**2 + sigma**2 * spread, 2 * mean**2))


@dataclass(frozen=True)
class Largest:
    """Largest weight (1/variance) and intensity of the observations of all ranks."""

    weight: float
    intensity: float

    @classmethod
    def of(cls, observations: Observations) -> Largest:
        """Of one rank."""
        least = float(observations.variance.min(initial=np.inf))
        return cls(1.0 / least, float(np.abs(observations.intensity).max(initial=0.0)))


def _grids(merged: Merged, noise: Noise, largest: Largest) -> tuple[np.ndarray, np.ndarray]:
    # of numerators and weights of the unique reflections; with 46 bits for what they were in the round before they may
    # grow a hundredfold
    known, size = merged.weight > 0, np.abs(merged.intensity)
    weight = np.full(len(size), largest.weight)
    if noise.b > 0:
        weight = np.minimum(weight, (noise.a * noise.b * np.maximum(size, 1e-100)) ** -2.0)
    weight = np.where(known, merged.weight, weight)
    usual = np.maximum(size, 1.0 / np.sqrt(weight))
    intensity = np.where(known, usual, np.minimum(largest.intensity, 4096.0 * usual))
    return power_above(weight * intensity, 46), power_above(weight, 46)


def accumulate(
    data: Indexed, scales: Scales, noise: Noise, merged: Merged, bound: float, largest: Largest | None = None
) -> np.ndarray:
    """Sums that make merged intensities.

    Parameters
    ----------
    merged
        Of the round before: they give the variances, and where they have counts they find the outliers.
    bound
        Normalised deviation beyond which an observation loses weight; 0 for never.
    largest
        Of all ranks, by which they round where `merged` has no weight; those of these observations by default.

    Returns
    -------
    sums : (3, n_unique, 2) float64
        Numerator, weight and number of observations per unique reflection, apart for the reflection and its Friedel
        mate. Sums of several ranks add up, exactly.
    """
    sums = np.zeros((3, 2 * len(data.d_star_sq)))
    _accumulate(
        *crystals(data, scales),
        data.minus,
        data.observations.variance,
        merged.intensity,
        merged.numbers(),
        *noise.squares(),
        bound,
        *_grids(merged, noise, largest or Largest.of(data.observations)),
        *sums,
    )
    return sums.reshape(3, -1, 2)


@dataclass(frozen=True)
class Equations:
    """Normal equations for a step of the scales.

    Parameters
    ----------
    own, own_gradient
        (n_crystals, 3, 3) and (n_crystals, 3): of log k, B and width of each crystal.
    cross
        (n_crystals, 3, n_knots) between these and the trend.
    common
        (n_crystals, n_knots, n_knots + 1): of the trend, from each crystal; the gradient in the last column.
    used
        (n_crystals,) int64, observations that took part.
    """

    own: np.ndarray
    own_gradient: np.ndarray
    cross: np.ndarray
    common: np.ndarray
    used: np.ndarray

    def reduced(self) -> np.ndarray:
        """Equations of the trend alone, the crystals eliminated; those of all crystals add up.

        Returns
        -------
        reduced : (n_crystals, n_knots, n_knots + 1) float64
            Matrix, and gradient in the last column.
        """
        right = np.concatenate([self.cross, self.own_gradient[:, :, None]], axis=2)
        solved = np.linalg.solve(self.own, right)
        return self.common - _over(1, self.cross[:, :, :, None] * solved[:, :, None, :])

    def variances(self) -> np.ndarray:
        """Variances (n_crystals, 3) of the parameters of the crystals, the trend given."""
        return np.diagonal(np.linalg.inv(self.own), axis1=1, axis2=2)

    def steps(self, of_trend: np.ndarray) -> np.ndarray:
        """Steps of the crystals, (n_crystals, 3), that go with a step (n_knots,) of the trend."""
        right = self.own_gradient - _over(2, self.cross * of_trend)
        return np.linalg.solve(self.own, right[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Restraints:
    """Standard deviations of the priors about zero; None holds a parameter where it is.

    Those of the crystals are learned from the crystals themselves, see :meth:`learned`.

    Parameters
    ----------
    b_factor
        In angstrom^2.
    width
        Of a crystal about the trend.
    trend
        Of each value of the trend.
    log_k
        Of the logarithm of the scale; infinite for no prior.
    """

    b_factor: float | None = 30.0
    width: float | None = 0.3
    trend: float | None = 1.0
    log_k: float = np.inf

    def learned(self, squares: np.ndarray, number: float) -> Restraints:
        r"""The same with the spread of the crystals in place of that which was assumed (empirical Bayes).

        Scale, B and width of a crystal are drawn from normal distributions of which the variances are unknown. Given
        the present ones, the expected square of a parameter is that of its estimate plus its variance a posteriori;
        the mean of it over the crystals is the next variance (expectation maximisation). A few crystals do not tell
        their spread: the assumed one counts as :data:`_ASSUMED` crystals. With plenty of reflections the estimates are
        what they are without a prior, and with few they stay near the others.

        Parameters
        ----------
        squares
            (3,) sums of these squares over the crystals, of log k, B and width.
        number
            Of crystals.
        """
        variance = (squares + _ASSUMED * _SPREAD**2) / (number + _ASSUMED)
        log_k, b_factor, width = np.clip(np.sqrt(variance), *_SPREAD_LIMITS)
        return Restraints(
            None if self.b_factor is None else float(b_factor),
            None if self.width is None else float(width),
            self.trend,
            float(log_k),
        )


def scale_equations(
    data: Indexed,
    scales: Scales,
    noise: Noise,
    merged: Merged,
    expectation: Expectation,
    bound: float,
    restraints: Restraints,
) -> Equations:
    """Normal equations of one step of all scales, restraints of the crystals included; those of the trend are not.

    Parameters
    ----------
    merged
        Finds the outliers, where it has counts.
    expectation
        What the scales are fitted to.

    Notes
    -----
    The limit on offsets is not applied. It follows the widths, so narrower ones would leave out the observations that
    speak against them, until nothing was left.
    """
    scales = replace(scales, max_offset=np.inf)
    n, n_knots = data.observations.n_crystals, len(scales.trend.knots)
    own, own_gradient, cross = np.zeros((n, 3, 3)), np.zeros((n, 3)), np.zeros((n, 3, n_knots))
    common = np.zeros((n, n_knots, n_knots + 1))
    used = np.empty(n, dtype=np.int64)
    _scale_equations(
        *crystals(data, scales),
        data.observations.variance,
        merged.intensity,
        merged.numbers(),
        expectation.value,
        expectation.square,
        *noise.squares(),
        bound,
        n_knots,
        *scales.trend.place(data.d_star_sq),
        own,
        own_gradient,
        cross,
        common,
        used,
    )
    for p, (value, sigma) in enumerate(((scales.b_factor, restraints.b_factor), (scales.width, restraints.width)), 1):
        if sigma is not None:
            own[:, p, p] += sigma**-2
            own_gradient[:, p] -= value / sigma**2
        else:
            own[:, p, :] = own[:, :, p] = own_gradient[:, p] = 0.0
            own[:, p, p] = 1.0
            cross[:, p] = 0.0
    # crystals that nothing is known about stay where they are
    idle = (used < 2) | (own[:, 0, 0] <= 0)
    own[:, 0, 0] += restraints.log_k**-2
    own_gradient[:, 0] -= scales.log_k / restraints.log_k**2
    own[idle], own_gradient[idle], cross[idle] = np.eye(3), 0.0, 0.0
    return Equations(own, own_gradient, cross, common, used)


def _over(axis: int, terms: np.ndarray) -> np.ndarray:
    # unlike products of matrices, which round a row by its place among the others, this gives each crystal the same sum
    # wherever it is
    return np.add.reduce(np.moveaxis(terms, axis, 0))


def stepped(scales: Scales, steps: np.ndarray, of_trend: np.ndarray) -> Scales:
    """Scales after steps (n_crystals, 3) of the crystals and (n_knots,) of the trend, shortened where they are long."""
    highest = scales.trend.knots[-1] ** 2
    size = _over(1, np.abs(steps) * np.array([1.0, 0.5 * highest, 0.5]))
    steps = steps * (_LARGEST_STEP / np.maximum(size, _LARGEST_STEP))[:, None]
    trend = Trend(scales.trend.knots, scales.trend.values + np.clip(of_trend, -_LARGEST_STEP, _LARGEST_STEP))
    log_k, b_factor, width = np.stack([scales.log_k, scales.b_factor, scales.width]) + steps.T
    return Scales(log_k, b_factor, width, trend, scales.max_offset)


def refined_offsets(data: Indexed, scales: Scales) -> np.ndarray:
    """Squared offset of each observation over the refined variance of its reflection, (n,) float64."""
    width = scales.width[data.observations.crystal()] + scales.trend.at(data.d_star_sq)[data.unique]
    return data.observations.offset_sq * np.exp(-width)


def scale_factors(data: Indexed, scales: Scales) -> np.ndarray:
    """g of each observation, (n,) float64; dividing the intensity by it puts it on the common scale."""
    crystal, of_unique = data.observations.crystal(), data.unique
    width = scales.width[crystal] + scales.trend.at(data.d_star_sq)[of_unique]
    return np.exp(
        scales.log_k[crystal]
        - 0.5 * scales.b_factor[crystal] * data.d_star_sq[of_unique]
        + 0.5 * (data.observations.offset_sq * (1.0 - np.exp(-width)) - width)
    )


def variances(data: Indexed, scales: Scales, noise: Noise, merged: Merged) -> np.ndarray:
    """v of each observation by the error model, (n,) float64, before the scale factor is divided out."""
    expected = scale_factors(data, scales) * np.maximum(merged.intensity[data.unique], 0.0)
    relative = noise.b**2 + noise.c**2 * refined_offsets(data, scales)
    return noise.a**2 * (data.observations.variance + relative * expected**2)


def crystals(data: Indexed, scales: Scales) -> tuple:
    """The first arguments of every compiled loop over crystals, of the types :data:`CRYSTALS`."""
    observations = data.observations
    return (
        observations.n_crystals,
        observations.start,
        np.ascontiguousarray(data.include, dtype=np.uint8),
        data.unique,
        observations.intensity,
        observations.offset_sq,
        scales.log_k,
        scales.b_factor,
        scales.width,
        data.d_star_sq,
        scales.trend.at(data.d_star_sq),
        scales.max_offset,
    )


_floats = array(np.float64, 1)
_out_floats = array(np.float64, 1, writeable=True)
_out_tables = array(np.float64, 3, writeable=True)
CRYSTALS = [
    c_int64,
    array(np.int64, 1),
    array(np.uint8, 1),
    array(np.int32, 1),
    _floats,
    array(np.float32, 1),
    *[_floats] * 5,
    c_double,
]
_accumulate = declare(
    "ssx_accumulate",
    [*CRYSTALS, array(np.uint8, 1), *[_floats] * 3, *[c_double] * 4, *[_floats] * 2, *[_out_floats] * 3],
)
_scale_equations = declare(
    "ssx_scale_equations",
    [
        *CRYSTALS,
        *[_floats] * 5,
        *[c_double] * 4,
        c_int64,
        array(np.int32, 1),
        _floats,
        _out_tables,
        array(np.float64, 2, writeable=True),
        _out_tables,
        _out_tables,
        array(np.int64, 1, writeable=True),
    ],
)
