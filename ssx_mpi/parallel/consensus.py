"""How the ranks agree that nothing is under way any more.

The non-blocking consensus of Hoefler et al. (2010, PPoPP, "Scalable communication protocols for dynamic sparse data
exchange"): with synchronous sends a rank knows when what it sent is being received. Once it has no more to do it enters
a non-blocking barrier, and goes on receiving until all ranks are in it. A message may be answered by another one (a
result by news), so this is done twice: after the first barrier no results are on their way, after the second no news.
"""

from __future__ import annotations

from typing import Any

_BARRIERS = 2


class Consensus:
    """The barriers of one rank.

    Parameters
    ----------
    comm
        The mpi4py communicator.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self._barriers: list[Any] = []

    @property
    def begun(self) -> bool:
        """Whether this rank has entered the first barrier."""
        return bool(self._barriers)

    def enter(self) -> None:
        """Enter the first barrier: this rank begins nothing more, and all that it sent was received."""
        self._barriers.append(self._comm.Ibarrier())

    def reached(self, all_received: bool) -> bool:
        """Whether all ranks have agreed; enters the second barrier when they are through the first.

        Parameters
        ----------
        all_received
            Whether all that this rank has sent was received.
        """
        if not all_received or not self._barriers[-1].Test():
            return False
        if len(self._barriers) == _BARRIERS:
            return True
        self._barriers.append(self._comm.Ibarrier())
        return False
