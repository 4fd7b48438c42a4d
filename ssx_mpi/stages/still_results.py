"""What the stages hand on: crystals of one still, numbers about them, and failures as values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ssx_mpi.images.frames import Frame


@dataclass(frozen=True)
class Failure:
    """Why an image, or a lattice on it, was left out at `stage`; `reason` is short and the same for the same cause."""

    stage: str
    reason: str


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


@dataclass(frozen=True)
class Lattice:
    """Numbers about one indexed lattice: rmsds in pixels, cell in angstrom and degrees, d_min in angstrom."""

    n_indexed: int
    rmsd_x: float
    rmsd_y: float
    cell: tuple[float, ...]
    d_min: float


@dataclass(frozen=True)
class IntegratedCrystal:
    """Numbers about one integrated crystal: mosaicity in degrees, None where its model has none."""

    n_reflections: int
    i_over_sigma: float
    cell: tuple[float, ...]
    mosaicity: float | None


@dataclass
class StillResult:
    """What became of one still: numbers, the tables of the steps that were done and, while at work, its pixels."""

    image: int
    n_spots: int = 0
    hit: bool = False
    lattices: list[Lattice] = field(default_factory=list)
    crystals: list[IntegratedCrystal] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    experiment: Any = None
    frame: Frame | None = None
    strong: Any = None
    indexed: Crystals | None = None
    integrated: Crystals | None = None


def by_lattice(crystals: Crystals):
    """Each experiment of `crystals` with its reflections alone, their ``id`` 0."""
    from dials.array_family import flex

    for lattice, experiment in enumerate(crystals.experiments):
        own = crystals.reflections.select(crystals.reflections["id"] == lattice)
        identifiers = own.experiment_identifiers()
        for key in list(identifiers.keys()):
            del identifiers[key]
        own["id"] = flex.int(len(own), 0)
        identifiers[0] = experiment.identifier
        yield experiment, own


def joined(parts: list[Crystals]) -> Crystals:
    """Lattices of one still, each alone in its part, together again."""
    from dials.array_family import flex
    from dxtbx.model import ExperimentList

    experiments, reflections = ExperimentList(), flex.reflection_table()
    identifiers = {}
    for lattice, part in enumerate(parts):
        experiments.extend(part.experiments)
        table = part.reflections
        identifiers[lattice] = part.experiments[0].identifier
        for key in list(table.experiment_identifiers().keys()):
            del table.experiment_identifiers()[key]
        table["id"] = flex.int(len(table), lattice)
        reflections.extend(table)
    for lattice, identifier in identifiers.items():
        reflections.experiment_identifiers()[lattice] = identifier
    return Crystals(experiments, reflections)


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

    from dxtbx import IncorrectFormatError

    if isinstance(error, IncorrectFormatError):
        # says only which object found it out
        return "not of the format of the other images"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"\1", text)
    text = re.sub(r"(/[\w.+-]+)+", "…", text)
    text = re.sub(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?", "#", text)
    return text[:120]
