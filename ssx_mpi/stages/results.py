"""What the stages hand on: crystals of one still, numbers about them, and failures as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Failure:
    """Why an image, or a lattice on it, was left out at `stage`; `reason` is short and the same for the same cause."""

    stage: str
    reason: str


class BadImage(Exception):
    """An image that cannot be read or does not fit its detector; the message is the reason."""


class StageError(Exception):
    """A stage that has no result for this still; the message is the reason."""


@dataclass(frozen=True)
class Crystals:
    """Lattices of one still.

    Attributes
    ----------
    experiments : dxtbx ExperimentList
        One experiment a lattice, sharing one imageset.
    reflections : dials reflection_table
        Their reflections; ``id`` is the number of the lattice.
    """

    experiments: Any
    reflections: Any


def library_errors() -> tuple[type[BaseException], ...]:
    """What DIALS and cctbx raise for data that they cannot handle.

    Errors that mean a fault in the program, such as TypeError or NameError, are not among them and end the job.
    """
    from dials.algorithms.indexing import DialsIndexError
    from libtbx.utils import Sorry

    return (
        DialsIndexError,
        Sorry,
        RuntimeError,
        ValueError,
        AssertionError,
        ArithmeticError,
        LookupError,
        OSError,
    )


def short_reason(error: BaseException) -> str:
    """One line for the log and the counts, without the numbers and paths that would make each case its own."""
    import re

    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(r"(/[\w.+-]+)+", "…", text)
    text = re.sub(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", "#", text)
    return text[:120]
