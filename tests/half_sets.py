"""Merged data and half-sets whose CC1/2 falls to 0.3 at a known resolution."""

import numpy as np

from ssx_mpi.kernels import merging


def observe(n_unique, multiplicity, seed, limit=0.25):
    """Sums, half-sets, shells and 1/d^2, up to 0.45, of reflections whose CC1/2 falls to 0.3 at the 1/d^2 `limit`."""
    rng = np.random.default_rng(seed)
    d_star_sq = rng.uniform(0.0005, 0.3, n_unique) ** (2 / 3)
    mean = np.exp(-12.5 * d_star_sq)
    number = rng.poisson(multiplicity, n_unique)
    # what the mean of a half-set has of the variance of an observation
    first = rng.binomial(number, 0.5)
    share = np.mean(1.0 / first[(first > 0) & (first < number)])
    variance = np.exp(-25.0 * limit) * (1 / 0.3 - 1) / share
    of = np.repeat(np.arange(n_unique), number)
    observed = (rng.exponential(1.0, n_unique) * mean)[of] + rng.normal(0, np.sqrt(variance), len(of))

    def sums(rows):
        n = np.bincount(of[rows], minlength=n_unique)
        one_mate = np.array([np.bincount(of[rows], observed[rows], minlength=n_unique) / variance, n / variance, n])
        return np.stack([one_mate, np.zeros_like(one_mate)], axis=2)

    shells = merging.resolution_shells(d_star_sq, 20, seen=number > 0)
    splits = rng.random((10, len(of))) < 0.5
    comparisons = [merging.compare_half_sets(sums(split), sums(~split), shells) for split in splits]
    halves = merging.HalfSets(*(np.array(rows) for rows in zip(*comparisons)))
    return sums(np.ones(len(of), dtype=bool)), halves, shells, d_star_sq
