"""What can be wrong with a reduction that is not a fault of the program."""

from __future__ import annotations

from ssx_mpi.parameters.user_input import InputError

__all__ = ["InputError", "NothingLeftError"]


class NothingLeftError(RuntimeError):
    """All crystals went on the way; the message says where. Exit code 3."""
