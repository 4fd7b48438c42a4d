"""Rows of arrays sent to the ranks that work on them, and back."""

from __future__ import annotations

import numpy as np

from ssx_mpi.parallel.communicator import Communicator


class Redistribution:
    """A way there and back for rows, each of which belongs to a numbered thing that one rank works on. Collective.

    Parameters
    ----------
    comm
        Communicator.
    number : (n,) int64
        Number of the thing that each row of this rank belongs to; those of one thing lie on one rank.
    n_total : int
        How many things there are on all ranks.
    block : int
        Things with consecutive numbers that stay together: whole blocks go to one rank.
    """

    def __init__(self, comm: Communicator, number: np.ndarray, n_total: int, block: int):
        self._comm = comm
        n_blocks = max(-(-n_total // block), 1)
        rank = (number // block) * comm.size // n_blocks
        self._order = np.argsort(rank, kind="stable")
        self._ends = np.cumsum(np.bincount(rank, minlength=comm.size))
        arrived = comm.alltoall(np.split(number[self._order], self._ends[:-1]))
        self._arrived_ends = np.cumsum([len(part) for part in arrived])
        together = np.concatenate(arrived)
        self._sort = np.argsort(together, kind="stable")
        #: numbers of the things of the rows that came here, ascending
        self.number = together[self._sort]

    def there(self, values: np.ndarray) -> np.ndarray:
        """The rows (n, ...) of this rank to where they are worked on; what came here, by number. Collective."""
        parts = self._comm.alltoall(np.split(values[self._order], self._ends[:-1]))
        return np.concatenate(parts)[self._sort]

    def back(self, values: np.ndarray) -> np.ndarray:
        """Rows that belong to those which came here to the ranks that these came from. Collective."""
        together = np.empty_like(values)
        together[self._sort] = values
        parts = self._comm.alltoall(np.split(together, self._arrived_ends[:-1]))
        result = np.concatenate(parts)
        own = np.empty_like(result)
        own[self._order] = result
        return own
