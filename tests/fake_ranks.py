"""Ranks in one process: a communicator of any size for unit tests, without MPI, the same at every run."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from fake_mpi import World


class FakeCommunicator:
    """One of `size` ranks, with the methods of :class:`ssx_mpi.parallel.communicator.Communicator`.

    Ranks that do not all come to the same collective end with :class:`fake_mpi.Stuck`.
    """

    def __init__(self, world: World, rank: int) -> None:
        self.rank, self.size = rank, world.size
        self._world = world
        self._number = 0
        #: names of the collectives that this rank took part in
        self.calls: list[str] = []

    def _exchange(self, name: str, obj: Any) -> list[Any]:
        # as MPI does: what arrives is never the object of another rank itself
        self.calls.append(name)
        slots = self._world.slots[self._number]
        self._number += 1
        slots[self.rank] = pickle.dumps((name, obj))
        # nothing else takes time here: a long sleep finds soon that the others do not come
        self._world.wait_until(lambda: len(slots) == self.size, 5.0)
        found = [pickle.loads(slots[rank]) for rank in range(self.size)]
        names = {name for name, _ in found}
        assert len(names) == 1, f"ranks meet in different collectives: {names}"
        return [obj for _, obj in found]

    def allgather(self, obj: Any) -> list[Any]:
        return self._exchange("allgather", obj)

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return self._exchange("bcast", obj if self.rank == root else None)[root]

    def gather(self, obj: Any, root: int = 0) -> list[Any] | None:
        found = self._exchange("gather", obj)
        return found if self.rank == root else None

    def alltoall(self, objects: list[Any]) -> list[Any]:
        assert len(objects) == self.size
        return [sent[self.rank] for sent in self._exchange("alltoall", objects)]

    def sum(self, values: np.ndarray) -> np.ndarray:
        return reduce(np.add, self._exchange("sum", np.asarray(values)))

    def max(self, values: np.ndarray) -> np.ndarray:
        return reduce(np.maximum, self._exchange("max", np.asarray(values)))

    def barrier(self) -> None:
        self._exchange("barrier", None)

    def abort(self, code: int) -> None:
        raise SystemExit(code)


def on_fake_ranks(size: int, function: Callable[[FakeCommunicator], Any], seed: int = 0) -> list[Any]:
    """What ``function(comm)`` returns on each of `size` ranks; the first exception of any of them is raised."""
    world = World(size, seed, 0.0)
    return world.run(lambda rank: function(FakeCommunicator(world, rank)))


def outcomes_on_fake_ranks(size: int, function: Callable[[FakeCommunicator], Any], seed: int = 0) -> list[Any]:
    """As :func:`on_fake_ranks`, with the exception of a rank in place of its result."""

    def caught(comm: FakeCommunicator) -> Any:
        try:
            return function(comm)
        except Exception as error:
            return error

    return on_fake_ranks(size, caught, seed)
