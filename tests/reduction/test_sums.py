"""Sums over the ranks that do not depend on how the terms are spread over them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.reduction.sums import exact_sum


class Ranks:
    """Stands for the ranks: what one contributes is added to what the others would."""

    def __init__(self, parts):
        self._parts = parts

    def max(self, values):
        return np.max([np.abs(part).max(axis=0, initial=0.0) for part in self._parts], axis=0)

    def sum(self, values):
        # each rank rounds by the same grid; the order of the ranks is that of the parts
        from ssx_mpi.kernels.scaling import on_grid

        return np.sum([on_grid(part, self.max(values)).sum(axis=0) for part in self._parts], axis=0)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(-8, 8))
def test_the_order_and_the_ranks_do_not_matter(seed, n_parts, exponent):
    random = np.random.default_rng(seed)
    terms = random.standard_normal((200, 3)) * 10.0**exponent * np.exp(2 * random.standard_normal((200, 1)))
    whole = exact_sum(Ranks([terms]), terms)
    shuffled = np.array_split(random.permutation(terms), n_parts)
    np.testing.assert_array_equal(exact_sum(Ranks(shuffled), shuffled[0]), whole)
    np.testing.assert_allclose(whole, terms.sum(axis=0), atol=200 * 2.0**-27 * np.abs(terms).max())
