"""What ranks do together: count, do something on one rank for all, fail alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from ssx_mpi.parallel.communicator import Communicator

T = TypeVar("T")

Expected = type[Exception] | tuple[type[Exception], ...]


def count(comm: Communicator, mask: np.ndarray) -> int:
    """Number of entries of `mask` that are true, over all ranks; the same on every rank. Collective."""
    return total(comm, int(np.count_nonzero(mask)))


def total(comm: Communicator, number: int) -> int:
    """Sum of `number` over all ranks, the same on every rank. Collective."""
    return int(comm.sum(np.array([number]))[0])


def on_root(
    comm: Communicator, function: Callable[[], T], expected: Expected, raised: type[Exception] | None = None
) -> T:
    """Call `function` on rank 0 and give its result to every rank; collective.

    Parameters
    ----------
    function
        Called on rank 0 alone.
    expected
        Exceptions that are raised on every rank alike; any other is raised on rank 0 alone, where it ends the job.
    raised
        Raised in place of them, with the same message.
    """
    result: T | None = None
    error: Exception | None = None
    if comm.rank == 0:
        try:
            result = function()
        except expected as caught:
            error = caught if raised is None else raised(str(caught))
    result, error = comm.bcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


@contextmanager
def on_every_rank(comm: Communicator, expected: Expected, raised: type[Exception] | None = None) -> Iterator[None]:
    """What fails within the block on one rank fails on all of them; its end is collective, the block must not be.

    Parameters
    ----------
    expected
        Exceptions that are raised on every rank alike, that of the lowest rank where there are several; any other is
        raised on its rank alone, where it ends the job.
    raised
        Raised in place of them, with the same message.
    """
    error: Exception | None = None
    try:
        yield
    except expected as caught:
        error = caught if raised is None else raised(str(caught))
    for found in comm.allgather(error):
        if found is not None:
            raise found
