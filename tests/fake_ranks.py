"""Ranks as threads of one process: a communicator of any size for unit tests, without MPI."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

# seconds after which ranks that do not meet are a fault of what is tested
_PATIENCE = 60.0


class FakeCommunicator:
    """One of `size` ranks, with the methods of :class:`ssx_mpi.parallel.communicator.Communicator`."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._slots = barrier, slots

    def allgather(self, obj: Any) -> list[Any]:
        self._slots[self.rank] = obj
        self._barrier.wait(_PATIENCE)
        found = list(self._slots)
        self._barrier.wait(_PATIENCE)
        return found

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self.allgather(obj)[root]

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        found = self.allgather(obj)
        return found if self.rank == root else None

    def alltoall(self, objects: list[Any]) -> list[Any]:
        return [sent[self.rank] for sent in self.allgather(objects)]

    def sum(self, values: np.ndarray) -> np.ndarray:
        return reduce(np.add, self.allgather(np.asarray(values)))

    def max(self, values: np.ndarray) -> np.ndarray:
        return reduce(np.maximum, self.allgather(np.asarray(values)))

    def barrier(self) -> None:
        self._barrier.wait(_PATIENCE)

    def abort(self, code: int) -> None:
        self._barrier.abort()
        raise SystemExit(code)


def on_fake_ranks(size: int, function: Callable[[FakeCommunicator], Any]) -> list[Any]:
    """What ``function(comm)`` returns on each of `size` ranks; the first exception of any of them is raised."""
    barrier, slots = threading.Barrier(size), [None] * size
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(FakeCommunicator(rank, size, barrier, slots))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.insert(0, error)
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _PATIENCE)
    if errors:
        raise errors[0]
    return results
