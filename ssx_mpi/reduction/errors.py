"""What can be wrong with a reduction that is not a fault of the program."""

from __future__ import annotations

from ssx_mpi.parallel.communicator import Communicator


class InputError(ValueError):
    """Files or parameters that cannot be reduced; the message is one line for the user. Exit code 2."""


class NothingLeftError(RuntimeError):
    """All crystals went on the way; the message says where. Exit code 3."""


def raise_together(comm: Communicator, message: str | None) -> None:
    """Raise the same :class:`InputError` on all ranks when any of them found something wrong.

    Collective. Of several messages that of the lowest rank is raised.
    """
    for found in comm.allgather(message):
        if found is not None:
            raise InputError(found)
