"""Ending work that all ranks do together, on all of them at the same place, when one of them is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ssx_mpi.parallel.communicator import Communicator


class StopRequested(Exception):
    """A rank wants to stop; raised on all of them alike."""


class StoppableCommunicator:
    """A communicator whose ranks agree, before each sum, maximum and exchange with all, whether to go on.

    Between these a rank is alone with its work, so that no other waits for one that has left. The agreement costs one
    more reduction, of a single number.

    Parameters
    ----------
    comm
        Does the work.
    stopping
        Whether this rank wants to stop.
    """

    def __init__(self, comm: Communicator, stopping: Callable[[], bool]) -> None:
        self._comm = comm
        self._stopping = stopping
        self.rank, self.size = comm.rank, comm.size

    def agree(self) -> None:
        """Go on, or not; collective.

        Raises
        ------
        StopRequested
            On every rank, when one of them wants to stop.
        """
        if self._comm.max(np.array([int(self._stopping())]))[0]:
            raise StopRequested

    def sum(self, values: np.ndarray) -> np.ndarray:
        self.agree()
        return self._comm.sum(values)

    def max(self, values: np.ndarray) -> np.ndarray:
        self.agree()
        return self._comm.max(values)

    def allgather(self, obj: Any) -> list[Any]:
        self.agree()
        return self._comm.allgather(obj)

    def alltoall(self, objects: list[Any]) -> list[Any]:
        self.agree()
        return self._comm.alltoall(objects)

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self._comm.bcast(obj, root)

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        return self._comm.gather(obj, root)

    def barrier(self) -> None:
        self._comm.barrier()

    def abort(self, code: int) -> None:
        self._comm.abort(code)
