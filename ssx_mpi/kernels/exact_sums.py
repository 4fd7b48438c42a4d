"""Sums and medians over parties that are the same, to the last bit, however the terms are shared among them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

_BISECTIONS = 52
# bits that a term keeps in each of the two sums; 2^24 terms of 28 bits add up exactly in a float64
_BITS = 28


class Reducer(Protocol):
    """Elementwise sums and maxima over all parties; a communicator is one."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Sum over the parties, on each of them."""

    def max(self, values: np.ndarray) -> np.ndarray:
        """Maximum over the parties, on each of them."""


class Alone:
    """The reducer of one party."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.array(values)

    def max(self, values: np.ndarray) -> np.ndarray:
        return np.array(values)


def power_above(values: np.ndarray, bits: int) -> np.ndarray:
    """The power of two above positive `values`, over two to the number of `bits`; free of rounding."""
    _, exponent = np.frexp(np.maximum(values, 1e-200))
    return np.ldexp(1.0, exponent - bits)


def on_grid(terms: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Terms (n, ...) rounded to 28 bits of the largest, so that sums over n, up to 2^24 in number, are exact.

    Parameters
    ----------
    largest
        (...) largest absolute value of each column, over all that are added up.
    """
    grid = power_above(largest, _BITS)
    return np.rint(terms / grid) * grid


def exact_sums(reducer: Reducer, terms: np.ndarray) -> np.ndarray:
    """Sum of the terms (n, ...) of all parties over n, (...) float64, the same bits for any order; n may be 0.

    The terms are rounded to 56 bits of the largest of their column, added up as two halves of 28.
    """
    largest = reducer.max(np.abs(terms).max(axis=0, initial=0.0))
    high = on_grid(terms, largest)
    rest = np.ldexp(largest, -_BITS)
    low = on_grid(terms - high, rest)
    return reducer.sum(high.sum(axis=0)) + reducer.sum(low.sum(axis=0))


def exact_binned_sums(reducer: Reducer, terms: np.ndarray, bins: np.ndarray, n_bins: int) -> np.ndarray:
    """Sums of the terms (n, m) of all parties by their `bins` (n,), (n_bins, m), as :func:`exact_sums`."""
    largest = reducer.max(np.abs(terms).max(axis=0, initial=0.0))
    high = on_grid(terms, largest)
    low = on_grid(terms - high, np.ldexp(largest, -_BITS))
    halves = np.zeros((2, n_bins, terms.shape[1]))
    for half, part in zip(halves, (high, low)):
        np.add.at(half, bins, part)
    return reducer.sum(halves[0]) + reducer.sum(halves[1])


class GridSum:
    """A sum of arrays, taken one by one, that does not depend on their order nor on the party that adds them.

    Parameters
    ----------
    bound
        Array that bounds the absolute values of each array that is added.
    """

    def __init__(self, bound: np.ndarray):
        self._coarse = power_above(bound, _BITS)
        self._fine = power_above(np.ldexp(bound, -_BITS), _BITS)
        self._high, self._low = np.zeros_like(bound), np.zeros_like(bound)

    def add(self, term: np.ndarray) -> None:
        """Add an array, rounded to 56 bits of the bound."""
        high = np.rint(term / self._coarse) * self._coarse
        self._high += high
        self._low += np.rint((term - high) / self._fine) * self._fine

    def over(self, reducer: Reducer) -> np.ndarray:
        """The sum over all parties. Collective."""
        return reducer.sum(self._high) + reducer.sum(self._low)


def exact_median(reducer: Reducer, values: np.ndarray) -> np.ndarray:
    """Median of each column of `values` (n, m) over all parties, by bisection, (m,) float64.

    What is exchanged does not grow with the number of values. The counts that steer the bisection are integers, so the
    result is the same, to the last bit, for any number of parties. n may be 0, but not for all.
    """
    high = reducer.max(values.max(axis=0, initial=-np.inf))
    low = -reducer.max((-values).max(axis=0, initial=-np.inf))
    n = int(reducer.sum(np.array([len(values)]))[0])
    ordered = np.sort(values, axis=0)
    # the mean of the two middle values where n is even
    ranks = np.array([(n - 1) // 2, n // 2])[:, None]
    below, above = np.stack([low, low]), np.stack([high, high])
    for _ in range(_BISECTIONS):
        middle = 0.5 * (below + above)
        counts = [np.searchsorted(column, middle[:, k], "right") for k, column in enumerate(ordered.T)]
        enough = reducer.sum(np.stack(counts, axis=1)) > ranks
        above, below = np.where(enough, middle, above), np.where(enough, below, middle)
    return above.mean(axis=0)
