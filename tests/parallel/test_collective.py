"""Counting over ranks, doing something once for all, failing alike."""

from __future__ import annotations

import numpy as np
import pytest
from fake_mpi import Stuck
from fake_ranks import on_fake_ranks, outcomes_on_fake_ranks

from ssx_mpi.parallel.collective import count, on_every_rank, on_root, total
from ssx_mpi.parallel.stopping import StoppableCommunicator, StopRequested


class Refused(Exception):
    """Something that is expected."""


class Other(Exception):
    """What a library says."""


@pytest.mark.parametrize("size", [1, 2, 5])
def test_counts_are_those_of_all_ranks(size):
    masks = [np.arange(rank + 3) > 1 for rank in range(size)]
    found = on_fake_ranks(size, lambda comm: (count(comm, masks[comm.rank]), total(comm, comm.rank + 1)))
    assert found == [(sum(int(m.sum()) for m in masks), size * (size + 1) // 2)] * size
    assert all(type(number) is int for number in found[0])


def test_one_rank_does_it_for_all():
    called = []

    def once(comm):
        return on_root(comm, lambda: called.append(comm.rank) or {"found": 3}, Refused)

    assert on_fake_ranks(4, once) == [{"found": 3}] * 4
    assert called == [0]


def test_what_rank_0_refuses_all_refuse():
    def refuse():
        raise Refused("not this")

    found = outcomes_on_fake_ranks(3, lambda comm: on_root(comm, refuse, Refused))
    assert [(type(error), str(error)) for error in found] == [(Refused, "not this")] * 3


def test_the_words_of_a_library_become_ours():
    def refuse():
        raise Other("what it says")

    found = outcomes_on_fake_ranks(2, lambda comm: on_root(comm, refuse, (Other, Refused), ValueError))
    assert [(type(error), str(error)) for error in found] == [(ValueError, "what it says")] * 2


def test_what_nobody_expects_is_raised_where_it_happens():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_fake_ranks(3, lambda comm: on_root(comm, fail, Refused))


@pytest.mark.parametrize(("failing", "said"), [((), None), ((2,), "rank 2"), ((3, 1), "rank 1"), ((0, 3), "rank 0")])
def test_what_fails_on_one_rank_fails_on_all(failing, said):
    def work(comm):
        with on_every_rank(comm, Refused):
            if comm.rank in failing:
                raise Refused(f"rank {comm.rank}")
        return comm.rank

    found = outcomes_on_fake_ranks(4, work)
    if said is None:
        assert found == [0, 1, 2, 3]
    else:
        assert [(type(error), str(error)) for error in found] == [(Refused, said)] * 4


def test_failing_alike_in_our_words():
    def work(comm):
        with on_every_rank(comm, Other, Refused):
            if comm.rank == 1:
                raise Other("as a library says it")

    found = outcomes_on_fake_ranks(2, work)
    assert [(type(error), str(error)) for error in found] == [(Refused, "as a library says it")] * 2


def test_the_agreement_is_one_exchange():
    def work(comm):
        with on_every_rank(comm, Refused):
            pass
        return comm.calls

    assert on_fake_ranks(2, work) == [["allgather"]] * 2


def test_a_fault_within_the_block_is_not_hidden():
    def work(comm):
        with on_every_rank(comm, Refused):
            if comm.rank == 1:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        on_fake_ranks(2, work)


@pytest.mark.parametrize("together", ["sum", "max", "allgather", "alltoall"])
def test_a_request_to_one_rank_ends_all_at_the_same_exchange(together):
    def work(comm):
        own = [False]
        stoppable = StoppableCommunicator(comm, lambda: own[0])
        arguments = {"allgather": comm.rank, "alltoall": [comm.rank] * 3}
        for step in range(5):
            own[0] = own[0] or (comm.rank == 2 and step == 3)
            try:
                getattr(stoppable, together)(arguments.get(together, np.ones(2)))
            except StopRequested:
                return step
        return None

    assert on_fake_ranks(3, work) == [3, 3, 3]


def test_what_does_not_ask_goes_through_a_stoppable_communicator():
    def work(comm):
        stoppable = StoppableCommunicator(comm, lambda: True)
        stoppable.barrier()
        return stoppable.bcast(comm.rank + 7), stoppable.gather(comm.rank), stoppable.rank, stoppable.size

    assert on_fake_ranks(2, work) == [(7, [0, 1], 0, 2), (7, None, 1, 2)]


def test_ranks_that_do_not_all_come_are_found():
    def work(comm):
        if comm.rank != 1:
            comm.barrier()

    with pytest.raises(Stuck):
        on_fake_ranks(3, work)
