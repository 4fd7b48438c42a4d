"""Doing something on one rank for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from ssx_mpi.parallel.communicator import Communicator

T = TypeVar("T")


def on_root(comm: Communicator, function: Callable[[], T], expected: type[Exception]) -> T:
    """Call `function` on rank 0 and give its result to every rank; collective.

    An exception of type `expected` is raised on every rank alike; any other is raised on rank 0 alone, where it ends
    the job.
    """
    result: T | None = None
    error: Exception | None = None
    if comm.rank == 0:
        try:
            result = function()
        except expected as caught:
            error = caught
    result, error = comm.bcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
