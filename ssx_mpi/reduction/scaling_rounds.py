"""Scales, error model and merged intensities over the ranks, iterated until nothing moves.

Each rank holds its own crystals; what all ranks share are sums over unique reflections, and the trend of the widths.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels import error_model, merging, scaling
from ssx_mpi.kernels.error_model import Deviations
from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.kernels.scaling import Equations, Expectation, Indexed, Merged, Noise, Restraints, Scales, Trend
from ssx_mpi.parallel.collective import count, total
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ScalingSettings
from ssx_mpi.reduction.acceleration import Acceleration
from ssx_mpi.reduction.sums import exact_sum, largest_of

logger = logging.getLogger(__name__)

# Wilson's distribution as an error model: intensities scatter about their shell's mean by as much as that mean
_WILSON = Noise(a=1.0, b=1.0)
_RADIAL_ROUNDS = 5
_PRIOR_SHELLS = 20
# squared, in refined widths: a partiality of 0.14, of which a small error of the orientation makes anything
_MAX_OFFSET = 4.0
# as far as a crystal counts for the mean scale, B and width
_FARTHEST = np.array([5.0, 50.0, 1.0])
# Observations that share their reflection with another for each parameter, with which widths are refined. Simulated
# lysozyme, CC to truth without and with widths: with 12 of them 0.982 and 0.921, with 21 0.985 and 0.962, with 70 0.987
# and 0.988, with 88 0.985 and 0.988.
_SHARED = 40
# rounds between estimates of the error model while it is far from right
_SETTLING = 3


@dataclass(frozen=True)
class Scaled:
    """Result of scaling: scales of this rank's crystals, and what all ranks share.

    Parameters
    ----------
    include
        (n_crystals,) bool, those that could be scaled.
    sums
        (3, n_unique, 2); see :func:`ssx_mpi.kernels.scaling.accumulate`.
    rounds
        How many rounds of scaling it took.
    change
        Root mean square relative change of the scales in the last of them.
    converged
        Whether that is within the tolerance.
    model, simplified
        Name of the model that was refined, and whether it is not the one that was asked for.
    """

    include: np.ndarray
    scales: Scales
    noise: Noise
    merged: Merged
    sums: np.ndarray
    deviations: Deviations
    rounds: int
    change: float
    converged: bool
    model: str = ""
    simplified: bool = False


def radial_means(
    comm: Communicator, data: Indexed, unique: UniqueReflections, shells: Shells, widths: bool = True
) -> tuple[Scales, np.ndarray]:
    """Scale, B and width of each crystal against the mean intensity in resolution shells alone.

    No crystal need share a reflection with another for this, nor be indexed consistently with it: it is where
    scaling starts, and it normalises intensities for the comparison of settings.

    Returns
    -------
    scales : Scales
    expected : (n_unique,) float64
        Mean intensity of the reflection's shell, times epsilon; positive everywhere.
    """
    scales = replace(Scales.unit(data.observations.n_crystals, Trend.zero(unique.d_star_sq)), max_offset=_MAX_OFFSET)
    noise, merged = Noise(), Merged(np.zeros(len(unique)), np.zeros(len(unique)))
    expected, largest = np.ones(len(unique)), largest_of(comm, data.observations)
    for round_number in range(_RADIAL_ROUNDS + 1):
        sums = scaling.accumulate(data, scales, noise, merged, 0.0, largest)
        expected = _smooth_means(comm.sum(sums), unique, shells)
        if round_number == _RADIAL_ROUNDS:
            break
        merged, noise = Merged(expected, np.zeros(len(unique))), _WILSON
        restraints = _restraints(comm, data, widths and round_number > 1)
        if round_number == 0:
            restraints = replace(restraints, b_factor=None)
        for _ in range(3):
            expectation = Expectation(expected, expected**2)
            scales, _ = _improved(comm, data, scales, noise, merged, expectation, 0.0, restraints)
        scales, expected = _centred(comm, data, scales, expected)
    return scales, expected


@dataclass(frozen=True)
class ScalingModel:
    """What is refined of each crystal beside its scale, and for all of them."""

    name: str
    trend: bool = True
    widths: bool = True
    b_factors: bool = True
    scales: bool = True

    def restraints(self, full: Restraints) -> Restraints:
        """Those of the full model, with what this one does not refine held."""
        return replace(
            full,
            trend=full.trend if self.trend else None,
            width=full.width if self.widths else None,
            b_factor=full.b_factor if self.b_factors else None,
        )


#: from the whole model to what any data can tell
MODELS = (
    ScalingModel("scales, B factors, and widths of reflections with a trend"),
    ScalingModel("scales, B factors, and widths of reflections without a trend", trend=False),
    ScalingModel("scales and B factors", trend=False, widths=False),
    ScalingModel("scales", trend=False, widths=False, b_factors=False),
    ScalingModel("mean intensities", trend=False, widths=False, b_factors=False, scales=False),
)


def scale(
    comm: Communicator,
    data: Indexed,
    unique: UniqueReflections,
    start: Scales,
    expected: np.ndarray,
    settings: ScalingSettings,
    noise: Noise = Noise(a=1.0, b=0.1),  # noqa: B008  (frozen)
) -> Scaled:
    """Scale by the fullest model that converges; see :func:`scale_by`. Collective."""
    widths = settings.widths and _tells_widths(comm, data, len(unique))
    models = [model for model in MODELS if widths or not model.widths]
    for model in models:
        scaled = scale_by(model, comm, data, unique, start, expected, settings, noise)
        if scaled.converged:
            break
        if comm.rank == 0:
            logger.info("scaling by %s did not converge in %d rounds", model.name, scaled.rounds)
    return replace(scaled, simplified=scaled.model != models[0].name)


def _tells_widths(comm: Communicator, data: Indexed, n_unique: int) -> bool:
    # whether enough observations are of reflections that others saw: one alone does not say how much was recorded of it
    used = (data.unique >= 0) & data.include[data.observations.crystal()]
    number = comm.sum(np.bincount(data.unique[used], minlength=n_unique))
    n_shared, n_crystals = int(number[number > 1].sum()), count(comm, data.include)
    return n_shared >= _SHARED * (3 * n_crystals + scaling.N_KNOTS)


def _unrefined(scales: Scales, model: ScalingModel) -> Scales:
    # the scales to start from, without what the model does not have
    zero = np.zeros_like(scales.log_k)
    return replace(
        scales,
        b_factor=scales.b_factor if model.b_factors else zero,
        width=scales.width if model.widths else zero,
        trend=scales.trend if model.trend else Trend(scales.trend.knots, np.zeros(len(scales.trend.knots))),
    )


def scale_by(
    model: ScalingModel,
    comm: Communicator,
    data: Indexed,
    unique: UniqueReflections,
    start: Scales,
    expected: np.ndarray,
    settings: ScalingSettings,
    noise: Noise,
) -> Scaled:
    """Alternate scales and merged intensities to convergence, and the error model between them. Collective.

    The error model is estimated after a few rounds each time, until it has settled; then the scales are brought to
    convergence with it, and it is estimated once more.

    Parameters
    ----------
    start, expected
        From :func:`radial_means`, or the scales and merged intensities of an earlier run to continue from.
    noise
        Error model to start from.
    """
    bound, shells = settings.robust_bound, merging.resolution_shells(unique.d_star_sq, _PRIOR_SHELLS)
    restraints, measure = model.restraints(_restraints(comm, data, settings.widths)), _Measure.of(comm, data)
    scales, largest = _unrefined(start, model), largest_of(comm, data.observations)

    def merge(scales: Scales, noise: Noise, merged: Merged, bound: float) -> np.ndarray:
        return comm.sum(scaling.accumulate(data, scales, noise, merged, bound, largest))

    def estimate_noise(noise: Noise, merged: Merged) -> tuple[Noise, np.ndarray]:
        for _ in range(3):
            left = error_model.deviation_sums(data, scales, noise, merged)
            noise = error_model.refine_noise(comm.sum(left), noise)
            sums = merge(scales, noise, merged, bound)
            merged = Merged.from_sums(sums)
        return noise, sums

    # no deviation means anything before there are merged intensities: the first merge weighs by expectation alone
    sums = merge(scales, replace(noise, b=max(noise.b, 0.3)), Merged(expected, np.zeros(len(unique))), 0.0)
    merged = Merged.from_sums(sums)
    mean = _shell_means(np.maximum(expected, 0.0), expected > 0, unique, shells)
    acceleration, cycle, change = Acceleration(comm), 0, np.inf
    rounds = 0
    if not model.scales:
        # there is nothing to refine but the errors
        noise, sums = estimate_noise(noise, merged)
        merged, change = Merged.from_sums(sums), 0.0
    while model.scales and rounds < settings.max_rounds:
        rounds += 1
        expectation, mean = _posterior(merged, mean, unique, shells)
        improved, equations = _improved(comm, data, scales, noise, merged, expectation, bound, restraints)
        data = data.only(data.include & (equations.used >= settings.min_observations))
        improved, mean = _centred(comm, data, improved, mean)
        moved = measure(scales, improved, data.include)
        n_included = count(comm, data.include)
        change = float(np.sqrt(exact_sum(comm, moved[:, None] ** 2)[0] / max(n_included, 1)))
        settled = cycle >= settings.error_cycles
        scales = _unflat(acceleration.next(_flat(improved), moved), improved) if settled else improved
        sums = merge(scales, noise, merged, bound)
        merged = Merged.from_sums(sums)
        if change < settings.tolerance or (not settled and rounds % _SETTLING == 0):
            previous = noise
            noise, sums = estimate_noise(noise, merged)
            restraints = _learned(comm, scales, equations, data.include, restraints)
            merged = Merged.from_sums(sums)
            cycle += 1
            acceleration.forget()
            logger.debug("error model after %d rounds: %s", rounds, noise)
            still = (
                abs(noise.a / previous.a - 1) < 0.01 and np.hypot(noise.b - previous.b, noise.c - previous.c) < 0.002
            )
            if change < settings.tolerance and (still or cycle > 2 * settings.error_cycles):
                break
    converged = change < settings.tolerance
    left = comm.sum(error_model.deviation_sums(data, scales, noise, merged))
    return Scaled(
        *(data.include, scales, noise, merged, sums, error_model.deviations(left), rounds, change, converged),
        model=model.name,
    )


def as_scaled(comm: Communicator, data: Indexed, expected: np.ndarray) -> Scaled:
    """Observations that were scaled before, as a result of scaling: unit scales, and errors as they are. Collective."""
    scales, noise, largest = Scales.unit(data.observations.n_crystals), Noise(), largest_of(comm, data.observations)
    blank = Merged(expected, np.zeros(len(expected)))
    sums = comm.sum(scaling.accumulate(data, scales, noise, blank, 0.0, largest))
    merged = Merged.from_sums(sums)
    left = comm.sum(error_model.deviation_sums(data, scales, noise, merged))
    return Scaled(data.include, scales, noise, merged, sums, error_model.deviations(left), 0, 0.0, True)


def join_scales(
    data: Indexed,
    radial: Scales,
    earlier: Scales,
    known: np.ndarray,
    noise: Noise,
    merged: Merged,
    expected: np.ndarray,
    unique: UniqueReflections,
) -> Scales:
    """Scales to continue from when crystals are added: the earlier ones, and new ones fitted to what was merged.

    Parameters
    ----------
    radial
        Of all crystals, from :func:`radial_means`; for new crystals the start of the fit.
    earlier, known
        Scales of an earlier reduction, and the crystals (n_crystals,) bool that have them.
    merged, expected
        Of the earlier reduction, and mean intensities by resolution.
    """
    new = data.only(data.include & ~known)
    scales = Scales(
        np.where(known, earlier.log_k, radial.log_k),
        np.where(known, earlier.b_factor, radial.b_factor),
        np.where(known, earlier.width, 0.0),
        earlier.trend,
        radial.max_offset,
    )
    shells = merging.resolution_shells(unique.d_star_sq, _PRIOR_SHELLS)
    expectation, _ = _posterior(merged, expected, unique, shells)
    for _ in range(5):
        equations = scaling.scale_equations(new, scales, noise, merged, expectation, 0.0, Restraints())
        still = np.zeros(len(scales.trend.knots))
        scales = scaling.stepped(scales, equations.steps(still), still)
    return scales


@dataclass(frozen=True)
class _Measure:
    """How large a change of the scales is: its square is that of the relative change, summed over the crystals.

    Parameters
    ----------
    resolution, offset
        Mean and standard deviation of d*^2 / 2, and of half the squared offset, over the observations.
    of_trend
        Factor for the values of the trend, 0 on all ranks but the first: the trend is the same on all and counts once.
    """

    resolution: tuple[float, float]
    offset: tuple[float, float]
    of_trend: float

    @classmethod
    def of(cls, comm: Communicator, data: Indexed) -> _Measure:
        rows = (data.unique >= 0) & np.repeat(data.include, np.diff(data.observations.start))
        q, half = 0.5 * data.d_star_sq[data.unique[rows]], 0.5 * data.observations.offset_sq[rows].astype(np.float64)
        number = total(comm, len(q))
        sums = exact_sum(comm, np.column_stack([q, half, q**2, half**2]))
        mean_q, mean_half, square_q, square_half = sums / max(number, 1)
        spread_q, spread_half = np.sqrt(np.maximum([square_q - mean_q**2, square_half - mean_half**2], 0.0))
        n_crystals = count(comm, data.include)
        # each value is felt by its share of the observations
        of_trend = np.sqrt(square_half * n_crystals / scaling.N_KNOTS) if comm.rank == 0 else 0.0
        return cls((mean_q, spread_q), (mean_half, spread_half), float(of_trend))

    def __call__(self, before: Scales, after: Scales, include: np.ndarray) -> np.ndarray:
        """The change as numbers (3 n_crystals + n_knots,), of which squares add up; crystals left out stay."""
        log_k, b_factor = after.log_k - before.log_k, after.b_factor - before.b_factor
        width = after.width - before.width
        (mean_q, spread_q), (mean_half, spread_half) = self.resolution, self.offset
        of_crystals = np.stack(
            [log_k - mean_q * b_factor + mean_half * width, spread_q * b_factor, spread_half * width]
        )
        of_trend = self.of_trend * (after.trend.values - before.trend.values)
        return np.concatenate([np.where(include, of_crystals, 0.0).ravel(), of_trend])


def _restraints(comm: Communicator, data: Indexed, widths: bool) -> Restraints:
    # widths show in partial reflections alone
    partial = comm.max(np.array([data.observations.offset_sq.max(initial=0.0)]))[0] > 0.1
    return Restraints() if widths and partial else Restraints(width=None, trend=None)


def _flat(scales: Scales) -> np.ndarray:
    return np.concatenate([scales.log_k, scales.b_factor, scales.width, scales.trend.values])


def _unflat(values: np.ndarray, like: Scales) -> Scales:
    n = len(like.log_k)
    trend = Trend(like.trend.knots, values[3 * n :])
    return Scales(values[:n], values[n : 2 * n], values[2 * n : 3 * n], trend, like.max_offset)


def _improved(
    comm: Communicator,
    data: Indexed,
    scales: Scales,
    noise: Noise,
    merged: Merged,
    expectation: Expectation,
    bound: float,
    restraints: Restraints,
) -> tuple[Scales, Equations]:
    # one step of all scales and of the trend, and the equations that it came from
    equations = scaling.scale_equations(data, scales, noise, merged, expectation, bound, restraints)
    of_trend = np.zeros(len(scales.trend.knots))
    of_crystals = equations.reduced()
    reduced = exact_sum(comm, of_crystals)
    if restraints.trend is not None:
        matrix, gradient = reduced[:, :-1], reduced[:, -1]
        # a pull to zero, and a stronger one to a straight line: where the data say nothing the trend goes on
        bend = np.diff(np.eye(len(gradient)), 2, axis=0)
        precision = restraints.trend**-2 * (np.eye(len(gradient)) + 10.0 * bend.T @ bend)
        of_trend = np.linalg.solve(matrix + precision, gradient - precision @ scales.trend.values)
    return scaling.stepped(scales, equations.steps(of_trend), of_trend), equations


def _learned(
    comm: Communicator, scales: Scales, equations: Equations, include: np.ndarray, restraints: Restraints
) -> Restraints:
    # priors of the spread that the crystals have; one that does not fit at all counts as far as it does for the mean
    values = np.stack([scales.log_k, scales.b_factor, scales.width], axis=1)[include]
    squares = np.clip(values, -_FARTHEST, _FARTHEST) ** 2 + np.minimum(equations.variances()[include], _FARTHEST**2)
    number = total(comm, len(values))
    return restraints.learned(exact_sum(comm, squares), float(number))


def _centred(comm: Communicator, data: Indexed, scales: Scales, mean: np.ndarray) -> tuple[Scales, np.ndarray]:
    # The merged intensities can absorb a common scale and B, and the trend a common width: the mean crystal keeps 1, 0
    # and 0. A crystal far out (one that does not fit at all) must not drag the others along, hence the clipping. The
    # mean intensities go along: crystals pulled to those of another scale and B would never come to rest.
    kept = np.stack([scales.log_k, scales.b_factor, scales.width])[:, data.include]
    within = np.clip(kept, -_FARTHEST[:, None], _FARTHEST[:, None])
    number = total(comm, kept.shape[1])
    log_k, b_factor, width = exact_sum(comm, within.T) / max(number, 1)
    return scales.shifted(log_k, b_factor, width), mean * np.exp(log_k - 0.5 * b_factor * data.d_star_sq)


def _posterior(merged: Merged, mean: np.ndarray, unique: UniqueReflections, shells: Shells):
    # what is expected of the intensities, and the mean of that in shells, for the next time
    expectation = Expectation.posterior(merged, mean)
    return expectation, _shell_means(expectation.value, merged.weight > 0, unique, shells)


def mean_intensities(merged: Merged, unique: UniqueReflections, shells: Shells) -> np.ndarray:
    """Mean of the merged intensities at the resolution of each unique reflection, times epsilon, (n_unique,)."""
    return _shell_means(np.maximum(merged.intensity, 0.0), merged.weight > 0, unique, shells)


def _shell_means(intensity: np.ndarray, seen: np.ndarray, unique: UniqueReflections, shells: Shells) -> np.ndarray:
    total = shells.sum(np.where(seen, intensity / unique.epsilon, 0.0))
    return _smooth(total, shells.sum(seen.astype(float)), unique, shells)


def _smooth_means(sums: np.ndarray, unique: UniqueReflections, shells: Shells) -> np.ndarray:
    return _smooth(shells.sum(sums[0].sum(axis=1)), shells.sum(sums[1].sum(axis=1) * unique.epsilon), unique, shells)


def _smooth(total: np.ndarray, weight: np.ndarray, unique: UniqueReflections, shells: Shells) -> np.ndarray:
    # shells in which noise left a mean of zero or below take a small positive one: they expect nothing, which must
    # not become a division by it
    mean = np.divide(total, weight, out=np.zeros(len(shells)), where=weight > 0)
    highest = mean.max(initial=0.0)
    if highest <= 0:
        return np.ones(len(unique))
    mean = np.maximum(mean, 1e-3 * highest)
    centres = 0.5 * (shells.edges[1:] + shells.edges[:-1])
    return np.exp(np.interp(unique.d_star_sq, centres, np.log(mean))) * unique.epsilon
