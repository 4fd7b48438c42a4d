"""All ranks leave work that they do together at the same place."""

from __future__ import annotations

import numpy as np
import pytest

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parallel.stopping import StoppableCommunicator, StopRequested


class OfTwo(SerialCommunicator):
    """One of two ranks, of which the other wants to stop once `others` says so."""

    others = 0

    def max(self, values: np.ndarray) -> np.ndarray:
        return np.maximum(values, self.others)


@pytest.mark.parametrize("who", ["this", "other"])
def test_the_wish_of_one_rank_ends_the_next_sum_on_all(who):
    own = [False]
    comm = OfTwo()
    stoppable = StoppableCommunicator(comm, lambda: own[0])
    assert stoppable.sum(np.array([2.0])) == [2.0]
    if who == "this":
        own[0] = True
    else:
        comm.others = 1
    for together in (stoppable.sum, stoppable.max):
        with pytest.raises(StopRequested):
            together(np.zeros(1))
    with pytest.raises(StopRequested):
        stoppable.allgather(None)
