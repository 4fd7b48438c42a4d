"""What can be wrong with a reduction that is not a fault of the program."""

from __future__ import annotations

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.user_input import InputError

__all__ = ["InputError", "NothingLeftError", "raise_together"]


class NothingLeftError(RuntimeError):
    """All crystals went on the way; the message says where. Exit code 3."""


def raise_together(comm: Communicator, message: str | None) -> None:
    """Raise the same :class:`InputError` on all ranks when any of them found something wrong.

    Collective. Of several messages that of the lowest rank is raised.
    """
    for found in comm.allgather(message):
        if found is not None:
            raise InputError(found)
