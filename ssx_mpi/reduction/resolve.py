"""Indexing ambiguity over the ranks: one setting for every crystal.

The random starts run on a sample of the crystals, and the result they agree on is the reference to which all crystals
are then fitted, so that the cost stays linear in the number of crystals with a small factor.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np

from ssx_mpi.kernels import ambiguity, scaling
from ssx_mpi.kernels.ambiguity import Agreement, Normalised
from ssx_mpi.kernels.merging import scramble
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Scales
from ssx_mpi.parallel.collective import count, total
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import AmbiguitySettings

logger = logging.getLogger(__name__)

_MAX_ROUNDS = 60
# temperatures of the first rounds, falling by this factor per round to 1
_HOTTEST = 30.0
_COOLING = 0.8
_FINAL_ROUNDS = 5
# crystals up to which the outcome is compared with chance, how often, and the random numbers for it
_TESTED, _MIXED, _MIXED_STREAM = 200, 3, 40_000
#: share of the crystals that another start must set as the best one does; below, more are made, up to so many times
SETTLED, _MORE_STARTS = 0.9, 4


@dataclass(frozen=True)
class Resolved:
    """Setting of each crystal of this rank, and how sure that is.

    Parameters
    ----------
    setting
        (n_crystals,) int64, row in the settings.
    decided
        (n_crystals,) bool.
    margin
        (n_crystals,) log-likelihood above the second-best setting.
    correlation
        (n_crystals, n_settings) with the merged intensities of the others.
    start_agreement
        (starts,) share of the sampled crystals that each random start sets like the best one; empty with a reference.
    counts
        (n_settings,) crystals of all ranks per setting.
    above_chance
        Log-likelihood of the best start over that which the same crystals reach when each of their observations is put
        into a setting of its own by chance; None where that was not tried. Starts that agree, and crystals with clear
        margins, mean nothing where it is about 1: few crystals always agree with what they were merged into.
    """

    setting: np.ndarray
    decided: np.ndarray
    margin: np.ndarray
    correlation: np.ndarray
    start_agreement: np.ndarray
    counts: np.ndarray
    above_chance: float | None = None


def locate_settings(observations: Observations, unique: UniqueReflections, settings: np.ndarray) -> np.ndarray:
    """Unique reflection of each observation in each setting, (n_settings, n) int32."""
    rows = np.stack([unique.locate(observations.hkl, setting)[0] for setting in settings])
    rows[:, ~observations.within()] = -1
    return rows


def index_in_settings(
    observations: Observations,
    unique: UniqueReflections,
    settings: np.ndarray,
    setting: np.ndarray,
) -> Indexed:
    """Where all observations that were read belong once each crystal is in its setting; all crystals take part."""
    of_observation = np.repeat(setting, np.diff(observations.start))
    at, minus = np.full(len(of_observation), -1, dtype=np.int32), np.zeros(len(of_observation), dtype=np.uint8)
    for number in np.unique(setting):
        rows = of_observation == number
        at[rows], minus[rows] = unique.locate(observations.hkl[rows], settings[number])
    return Indexed(observations, unique.d_star_sq, at, minus, np.ones(len(setting), dtype=bool))


def normalised(
    observations: Observations,
    include: np.ndarray,
    unique: UniqueReflections,
    settings: np.ndarray,
    scales: Scales,
    expected: np.ndarray,
) -> Normalised:
    """Normalised intensities of the included crystals; those of the others have weight 0."""
    setting_unique = locate_settings(observations, unique, settings)
    anywhere = setting_unique.max(axis=0)
    # all settings of an index have the same resolution
    data = Indexed(observations, unique.d_star_sq, anywhere, np.zeros(len(anywhere), dtype=np.uint8), include)
    g = scaling.scale_factors(data, scales)
    x, w = ambiguity.normalise(observations.intensity, observations.variance, g * expected[anywhere])
    far = scaling.refined_offsets(data, scales) > scales.max_offset
    w[(anywhere < 0) | far | ~include[observations.crystal()]] = 0.0
    return Normalised(observations.start, setting_unique, x, w)


def resolve(
    comm: Communicator,
    data: Normalised,
    include: np.ndarray,
    crystal_number: np.ndarray,
    n_total: int,
    n_unique: int,
    table: np.ndarray,
    settings: AmbiguitySettings,
) -> Resolved:
    """Resolve the ambiguity by the crystals alone.

    Where no other random start sets 90% of the crystals as the best one does, more are made.

    Parameters
    ----------
    include
        (n_crystals,) bool.
    crystal_number
        (n_crystals,) int64, number of each crystal in the whole data set: what is random depends on it alone.
    n_total
        Crystals of all ranks.
    table
        Of compositions, :func:`ssx_mpi.kernels.ambiguity.composition_table`.
    """
    every = max(1, -(-n_total // settings.sample))
    sampled = include & (crystal_number % every == 0)
    sample, numbers = data.select(sampled), crystal_number[sampled]
    best_score, best_setting, merged = -np.inf, np.zeros(len(numbers), dtype=np.int64), (np.zeros(0), np.zeros(0))
    outcomes = []
    size, start = total(comm, len(numbers)), 0
    wanted = settings.starts
    while start < wanted:
        probability, found, score, rounds = _one_start(comm, sample, numbers, n_unique, start, settings)
        setting = np.argmax(probability, axis=1)
        outcomes.append(setting)
        logger.debug("ambiguity start %d: score %.1f after %d rounds", start + 1, score, rounds)
        if score > best_score:
            best_score, best_setting, merged = score, setting, found
        start += 1
        if start < wanted:
            continue
        alike = np.array([ambiguity.relative_agreement(best_setting, outcome, table) for outcome in outcomes])
        start_agreement = comm.sum(alike).max(axis=1) / max(size, 1)
        # the best one agrees with itself: where no other does, it may be one of many that are wrong
        if _second(start_agreement) < SETTLED and wanted < _MORE_STARTS * settings.starts:
            wanted += settings.starts

    one = np.eye(data.n_settings)
    own = np.zeros((data.n_crystals, data.n_settings))
    own[sampled] = one[best_setting]
    result = ambiguity.agreement(data, own, *merged)
    for _ in range(_FINAL_ROUNDS):
        chosen = result.best()
        own = np.where(include[:, None], one[chosen], 0.0)
        merged = _merge(comm, data, own, n_unique)
        result = ambiguity.agreement(data, own, *merged)
        moved = count(comm, (result.best() != chosen) & include)
        if moved == 0:
            break
    shift = _shift_to_most_common(comm, result.best()[include], table)
    resolved = _resolved(comm, result, include, settings, start_agreement, shift)
    if size > _TESTED:
        return resolved
    by_chance = max(
        _one_start(comm, _mixed(sample, numbers, test), numbers, n_unique, test, settings)[2] for test in range(_MIXED)
    )
    return replace(resolved, above_chance=best_score / by_chance if by_chance > 0 else None)


def _mixed(data: Normalised, crystal_number: np.ndarray, test: int) -> Normalised:
    # each observation in a setting of its own, drawn by chance: the crystals keep all that does not tell settings apart
    # (equivalents by the lattice resemble each other, too)
    place = np.arange(len(data.x)) - np.repeat(data.start[:-1], np.diff(data.start))
    number = (np.repeat(crystal_number, np.diff(data.start)) << 24) + place
    drawn = [scramble(number, _MIXED_STREAM + test * data.n_settings + row) for row in range(data.n_settings)]
    order = np.argsort(np.stack(drawn), axis=0, kind="stable")
    return replace(data, setting_unique=np.ascontiguousarray(np.take_along_axis(data.setting_unique, order, axis=0)))


def _second(agreement: np.ndarray) -> float:
    return float(np.sort(agreement)[-2]) if len(agreement) > 1 else 1.0


def resolve_against(
    comm: Communicator, data: Normalised, include: np.ndarray, reference: Merged, settings: AmbiguitySettings
) -> Resolved:
    """Put every crystal into the setting in which it agrees best with a reference.

    Parameters
    ----------
    reference
        Normalised intensities (mean 1 in each resolution shell), weight 0 where there is none.
    """
    known = np.where(reference.weight > 0, 1e3, 0.0)
    none = np.zeros((data.n_crystals, data.n_settings))
    result = ambiguity.agreement(data, none, reference.intensity * known, known)
    return _resolved(comm, result, include, settings, np.zeros(0), np.arange(data.n_settings))


def _one_start(
    comm: Communicator,
    data: Normalised,
    crystal_number: np.ndarray,
    n_unique: int,
    start: int,
    settings: AmbiguitySettings,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], float, int]:
    probability = np.eye(data.n_settings)[_random_settings(crystal_number, start, settings.seed, data.n_settings)]
    temperature, score, rounds = _HOTTEST, -np.inf, 0
    merged = _merge(comm, data, probability, n_unique)
    while rounds < _MAX_ROUNDS:
        rounds += 1
        agreement = ambiguity.agreement(data, probability, *merged)
        temperature = max(1.0, temperature * _COOLING)
        updated = ambiguity.probabilities(agreement.log_likelihood, temperature)
        change = np.abs(updated - probability).max(axis=1, initial=0.0)
        probability = updated
        merged = _merge(comm, data, probability, n_unique)
        largest = np.max(agreement.log_likelihood, axis=1, initial=0.0)
        moved, score = comm.sum(np.array([np.count_nonzero(change > 0.1), largest.sum()], dtype=float))
        if temperature == 1.0 and moved == 0:
            break
    return probability, merged, float(score), rounds


def _merge(comm: Communicator, data: Normalised, probability: np.ndarray, n_unique: int):
    merged = comm.sum(np.stack(ambiguity.spread(data, probability, n_unique)))
    return merged[0], merged[1]


def _random_settings(crystal_number: np.ndarray, start: int, seed: int, n_settings: int) -> np.ndarray:
    # the low bits decide on half-sets; the first setting must not have to do with them
    return ((scramble(crystal_number, 1000 * seed + start) >> np.uint64(8)) % np.uint64(n_settings)).astype(np.int64)


def _shift_to_most_common(comm: Communicator, chosen: np.ndarray, table: np.ndarray) -> np.ndarray:
    # all crystals can be reindexed together: let the setting that most of them are in be the one as indexed
    counts = comm.sum(np.bincount(chosen, minlength=len(table)))
    allowed = [t for t in range(len(table)) if table[0, t] >= 0]
    most = max(allowed, key=lambda t: (counts[np.flatnonzero(table[:, t] == 0)].sum(), -t))
    return table[:, most]


def _resolved(
    comm: Communicator,
    result: Agreement,
    include: np.ndarray,
    settings: AmbiguitySettings,
    start_agreement: np.ndarray,
    shift: np.ndarray,
) -> Resolved:
    setting = shift[result.best()]
    margin = result.margin()
    decided = include & (margin >= settings.min_margin)
    counts = comm.sum(np.bincount(setting[decided], minlength=len(shift)))
    correlation = np.empty_like(result.correlation)
    correlation[:, shift] = result.correlation
    return Resolved(setting, decided, margin, correlation, start_agreement, counts)
