"""Communicators as the rest of the program sees them: MPI ranks, or one process alone.

Both classes have the same methods, so every function that takes a communicator runs under MPI and, in a unit test or
with ``nproc=1``, without it. Objects travel pickled, arrays as buffers; all messages are two-sided.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np


class Communicator(Protocol):
    """What every communicator can do; methods without `rank` arguments are collective."""

    rank: int
    size: int

    def bcast(self, obj: Any, root: int = 0) -> Any:
        """`obj` of rank `root`, on every rank."""

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        """On `root` the objects of all ranks in rank order, elsewhere None."""

    def allgather(self, obj: Any) -> list[Any]:
        """The objects of all ranks in rank order, on every rank."""

    def alltoall(self, objects: list[Any]) -> list[Any]:
        """Send ``objects[r]`` to rank r; return what each rank sent here, in rank order."""

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over the ranks of an array of one shape and dtype, on every rank.

        The order of summation is that of the ranks, so that a result depends on their number by rounding alone.
        """

    def max(self, values: np.ndarray) -> np.ndarray:
        """Elementwise maximum over the ranks, on every rank."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def abort(self, code: int) -> None:
        """End all ranks at once with exit status `code`."""


class SerialCommunicator:
    """The communicator of one process alone."""

    rank = 0
    size = 1

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return obj

    def gather(self, obj: Any, root: int = 0) -> list[Any]:
        return [obj]

    def allgather(self, obj: Any) -> list[Any]:
        return [obj]

    def alltoall(self, objects: list[Any]) -> list[Any]:
        return list(objects)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return np.array(values)

    def max(self, values: np.ndarray) -> np.ndarray:
        return np.array(values)

    def barrier(self) -> None:
        return None

    def abort(self, code: int) -> None:
        sys.exit(code)


class MpiCommunicator:
    """An mpi4py intracommunicator behind the methods of :class:`Communicator`.

    Parameters
    ----------
    comm
        The mpi4py communicator; it is kept as :attr:`comm` for the modules of this layer.
    """

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank: int = comm.rank
        self.size: int = comm.size

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self.comm.bcast(obj, root=root)

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        return self.comm.gather(obj, root=root)

    def allgather(self, obj: Any) -> list[Any]:
        return self.comm.allgather(obj)

    def alltoall(self, objects: list[Any]) -> list[Any]:
        return self.comm.alltoall(objects)

    def sum(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, "SUM")

    def max(self, values: np.ndarray) -> np.ndarray:
        return self._reduce(values, "MAX")

    def _reduce(self, values: np.ndarray, operation: str) -> np.ndarray:
        from mpi4py import MPI

        send = np.ascontiguousarray(values)
        received = np.empty_like(send)
        self.comm.Allreduce(send, received, op=getattr(MPI, operation))
        # an array without dimensions became one with one
        return received.reshape(np.shape(values))

    def barrier(self) -> None:
        self.comm.Barrier()

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.comm.Abort(code)
