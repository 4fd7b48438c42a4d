"""Rows go to the rank that works on their thing, whole blocks to one rank, and come back in their order."""

from __future__ import annotations

import numpy as np
import pytest
from fake_ranks import on_fake_ranks

from ssx_mpi.parallel.redistribution import Redistribution

N_TOTAL, BLOCK = 23, 4


@pytest.mark.parametrize("size", [1, 2, 5])
def test_there_and_back(size):
    def on(comm):
        own = np.arange(N_TOTAL)[comm.rank :: comm.size]
        # a few rows for each thing, marked with the rank that they come from
        number = np.repeat(own, 1 + own % 3)
        rows = np.stack([number, np.arange(len(number)), np.full(len(number), comm.rank)], axis=1).astype(float)
        way = Redistribution(comm, number, N_TOTAL, BLOCK)
        there = way.there(rows)
        assert np.array_equal(there[:, 0], way.number), "by number"
        assert np.all(np.diff(way.number) >= 0)
        back = way.back(there * 2)
        assert np.array_equal(back, rows * 2)
        return np.unique(way.number), there

    parts = on_fake_ranks(size, on)
    everything = np.concatenate([numbers for numbers, _ in parts])
    assert everything.tolist() == list(range(N_TOTAL)), "each on one rank, in order of the ranks"
    for numbers, there in parts:
        # rows of one thing stay in their order
        for number in numbers:
            assert np.all(np.diff(there[there[:, 0] == number, 1]) > 0)
    blocks = [set(numbers // BLOCK) for numbers, _ in parts]
    assert sum(map(len, blocks)) == len(set().union(*blocks)), "no block on two ranks"


def test_a_rank_without_rows_takes_part():
    def on(comm):
        number = np.arange(6) if comm.rank == 1 else np.zeros(0, dtype=np.int64)
        way = Redistribution(comm, number, 6, 2)
        return way.number.tolist(), way.back(way.there(number.astype(float))).tolist()

    parts = on_fake_ranks(3, on)
    assert [numbers for numbers, _ in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [rows for _, rows in parts] == [[], [0, 1, 2, 3, 4, 5], []]
