"""Sums over the ranks that are the same, to the last bit, on any number of them."""

from __future__ import annotations

import numpy as np

from ssx_mpi.kernels.exact_sums import on_grid
from ssx_mpi.kernels.reflections import Observations
from ssx_mpi.kernels.scaling import Largest
from ssx_mpi.parallel.communicator import Communicator


def exact_sum(comm: Communicator, terms: np.ndarray) -> np.ndarray:
    """Sum of the terms (n, ...) of all ranks over n, (...) float64; a rank may have none. Collective.

    The terms are rounded to 28 bits of the largest in their column, so that the sum does not depend on the order.
    """
    largest = comm.max(np.abs(terms).max(axis=0, initial=0.0))
    return comm.sum(on_grid(terms, largest).sum(axis=0))


def largest_of(comm: Communicator, observations: Observations) -> Largest:
    """Largest weight and intensity of all ranks. Collective."""
    own = Largest.of(observations)
    return Largest(*comm.max(np.array([own.weight, own.intensity])))
