"""Sums over the ranks that do not depend on how the terms are spread over them."""

import numpy as np
from fake_ranks import on_fake_ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.reduction.sums import exact_sum


def summed(parts: list[np.ndarray]) -> np.ndarray:
    """The sum of the terms of all ranks, which is the same on each of them."""
    found = on_fake_ranks(len(parts), lambda comm: exact_sum(comm, parts[comm.rank]))
    assert all(np.array_equal(found[0], other) for other in found)
    return found[0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 7), st.floats(-8, 8))
def test_the_order_and_the_ranks_do_not_matter(seed, n_parts, exponent):
    random = np.random.default_rng(seed)
    terms = random.standard_normal((200, 3)) * 10.0**exponent * np.exp(2 * random.standard_normal((200, 1)))
    whole = summed([terms])
    np.testing.assert_array_equal(summed(np.array_split(random.permutation(terms), n_parts)), whole)
    np.testing.assert_allclose(whole, terms.sum(axis=0), atol=200 * 2.0**-27 * np.abs(terms).max())


def test_plain_sums_would_depend_on_it():
    terms = np.random.default_rng(1).standard_normal((999, 1)) / 3.0
    plain = {float(sum(part.sum() for part in np.array_split(terms, n))) for n in range(1, 8)}
    assert len(plain) > 1
    assert len({float(summed(np.array_split(terms, n))[0]) for n in range(1, 8)}) == 1


def test_a_rank_may_have_none():
    assert summed([np.zeros((0, 2)), np.array([[1.0, 2.0]])]).tolist() == [1.0, 2.0]
