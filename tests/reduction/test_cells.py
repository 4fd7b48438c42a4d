"""Cells over the ranks: the median, and which crystals are left out."""

import numpy as np
import pytest
from fake_ranks import on_fake_ranks

from ssx_mpi.kernels.exact_sums import exact_median


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_median_is_that_of_all_values(n, size):
    # of an even number, the mean of the two in the middle
    values = np.random.default_rng(n).normal(80.0, 1.0, (n, 2))
    parts = np.array_split(values, size)
    for found in on_fake_ranks(size, lambda comm: exact_median(comm, parts[comm.rank])):
        np.testing.assert_allclose(found, np.median(values, axis=0), atol=1e-9)
