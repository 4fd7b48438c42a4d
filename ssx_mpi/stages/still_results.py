"""What the stages hand on: spots, lattices and integrated crystals of one still, and failures as values."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from traceback import walk_tb
from typing import Any, NamedTuple

from ssx_mpi.images.frames import Frame


@dataclass(frozen=True)
class Failure:
    """Why an image, or a lattice on it, was left out.

    Attributes
    ----------
    stage
        Where it failed.
    reason
        Normalised reason: short, and the same for the same cause.
    traceback
        Of the first failure with this reason on this rank; empty otherwise.
    """

    stage: str
    reason: str
    traceback: str = field(default="", compare=False)


class StageError(Exception):
    """A stage that has no result for this still; the message is the reason."""


class Crystals(NamedTuple):
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
class LatticeNumbers:
    """Numbers about one indexed lattice: rmsds in pixels, cell in angstrom and degrees, d_min in angstrom."""

    n_indexed: int
    rmsd_x: float
    rmsd_y: float
    cell: tuple[float, ...]
    d_min: float


@dataclass(frozen=True)
class CrystalNumbers:
    """Numbers about one integrated crystal: mosaicity in degrees, None where its model has none."""

    n_reflections: int
    i_over_sigma: float
    cell: tuple[float, ...]
    mosaicity: float | None


@dataclass(frozen=True)
class ImageNumbers:
    """Numbers about an image, None where they are not known.

    Attributes
    ----------
    background
        Mean of the pixels between the spots, counts.
    ice
        By how much the strongest ring of ice exceeds the background beside it, relative to that; 0 without.
    n_saturated
        Pixels above the trusted range.
    wavelength
        Angstrom.
    spots_d_min
        Resolution within which 95% of the strong spots lie, angstrom.
    ice_spots
        Share of the strong spots on rings of ice.
    """

    background: float | None = None
    ice: float | None = None
    n_saturated: int | None = None
    wavelength: float | None = None
    spots_d_min: float | None = None
    ice_spots: float | None = None


@dataclass(frozen=True)
class Spots:
    """Strong spots of one still.

    Attributes
    ----------
    n_spots
        How many there are.
    hit
        Whether these are enough to index the still.
    table : dials reflection_table, optional
        The spots; None where they are not kept.
    experiment : dxtbx Experiment, optional
        Of the image, while it is at work.
    frame
        Its pixels, while it is at work.
    numbers
        What pixels and spots say of the image.
    """

    n_spots: int = 0
    hit: bool = False
    table: Any = None
    experiment: Any = None
    frame: Frame | None = None
    numbers: ImageNumbers = ImageNumbers()


@dataclass(frozen=True)
class Indexed:
    """Indexed lattices of one still: their numbers, and the crystals unless the image is lost since."""

    lattices: tuple[LatticeNumbers, ...]
    crystals: Crystals | None


@dataclass(frozen=True)
class Integrated:
    """Integrated crystals of one still and their numbers."""

    numbers: tuple[CrystalNumbers, ...]
    crystals: Crystals


@dataclass(frozen=True)
class IntegratedLattices:
    """What an integrator made of the lattices of one still.

    Attributes
    ----------
    experiments : dxtbx ExperimentList
        Refined crystals, with their profile models; empty when no lattice could be integrated.
    reflections : dials reflection_table
        Their reflections; ``id`` is the row in `experiments`.
    failures
        Identifier and reason of each lattice that was not integrated.
    """

    experiments: Any
    reflections: Any
    failures: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Still:
    """What became of one still so far.

    Attributes
    ----------
    image
        Its number, from zero.
    spots, indexed, integrated
        Results of the stages; None where there is none.
    failures
        Of all stages, in order.
    seconds
        CPU-seconds by stage.
    """

    image: int
    spots: Spots = Spots()
    indexed: Indexed | None = None
    integrated: Integrated | None = None
    failures: tuple[Failure, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def hit(self) -> bool:
        """Whether the still has enough spots to be indexed."""
        return self.spots.hit

    @property
    def n_lattices(self) -> int:
        """Number of indexed lattices."""
        return len(self.indexed.lattices) if self.indexed else 0

    @property
    def n_crystals(self) -> int:
        """Number of integrated crystals."""
        return len(self.integrated.numbers) if self.integrated else 0

    @property
    def crystals(self) -> Crystals | None:
        """The indexed lattices, where there are any."""
        return self.indexed.crystals if self.indexed else None

    def failed(self, *failures: Failure) -> Still:
        """The same still with `failures` added."""
        return replace(self, failures=self.failures + failures) if failures else self

    def took(self, stage: str, seconds: float) -> Still:
        """The same still with the CPU-seconds of a stage."""
        return replace(self, seconds={**self.seconds, stage: seconds})

    def without_pixels(self) -> Still:
        """What is worth keeping when the pixels are not wanted again: of a blank, no table of spots either.

        Image sets, which the experiments hold, keep the image that they read last: they let go of it.
        """
        experiments = [] if self.crystals is None else list(self.crystals.experiments)
        for experiment in [self.spots.experiment, *experiments]:
            if experiment is not None and experiment.imageset is not None:
                experiment.imageset.clear_cache()
        return replace(self, spots=replace(self.spots, frame=None, table=self.spots.table if self.hit else None))

    def without_experiment(self) -> Still:
        """The same without the experiment of the image too."""
        still = self.without_pixels()
        return replace(still, spots=replace(still.spots, experiment=None))


def by_lattice(crystals: Crystals):
    """Each experiment of `crystals` with its reflections alone, their ``id`` 0."""
    from dials.array_family import flex

    for lattice, experiment in enumerate(crystals.experiments):
        own = crystals.reflections.select(crystals.reflections["id"] == lattice)
        own["id"] = flex.int(len(own), 0)
        identify(own, [experiment.identifier])
        yield experiment, own


def identify(table, identifiers: Iterable[str]) -> None:
    """Make `identifiers` those of the experiments 0, 1, ... of a reflection table, instead of those it has."""
    known = table.experiment_identifiers()
    for key in list(known.keys()):
        del known[key]
    for number, identifier in enumerate(identifiers):
        known[number] = identifier


def joined(parts: list[Crystals]) -> Crystals:
    """Lattices of one still, each alone in its part, together again."""
    from dials.array_family import flex
    from dxtbx.model import ExperimentList

    experiments, reflections = ExperimentList(), flex.reflection_table()
    for lattice, part in enumerate(parts):
        experiments.extend(part.experiments)
        table = part.reflections
        identify(table, [])
        table["id"] = flex.int(len(table), lattice)
        reflections.extend(table)
    identify(reflections, [experiment.identifier for experiment in experiments])
    return Crystals(experiments, reflections)


def library_errors() -> tuple[type[BaseException], ...]:
    """What DIALS and cctbx raise for data that they cannot handle.

    Errors that mean a fault in the program, such as TypeError or NameError, are not among them and end the job. The
    others may come from our own code as well: see :func:`is_fault_of_ours`.
    """
    from dials.algorithms.indexing import DialsIndexError
    from libtbx.utils import Sorry

    return (DialsIndexError, Sorry, RuntimeError, OSError, ArithmeticError, *_AMBIGUOUS)


# raised by libraries for data that they cannot handle, and by a wrong index or assumption of our own
_AMBIGUOUS = (ValueError, AssertionError, LookupError)
_PACKAGE = __name__.partition(".")[0]


def is_fault_of_ours(error: BaseException) -> bool:
    """Whether `error` was raised by the code of this package, by a wrong index or a broken assumption."""
    if not isinstance(error, _AMBIGUOUS) or error.__traceback__ is None:
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE


class FailureRecorder:
    """Makes failures of exceptions; the first of each reason keeps its traceback."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def of(self, stage: str, error: BaseException) -> Failure:
        """The failure of a stage by `error`; a fault of ours is named as such, with its place."""
        reason = short_reason(error)
        if is_fault_of_ours(error):
            *_, (frame, line) = walk_tb(error.__traceback__)
            place = f"{frame.f_globals['__name__']}:{line}"
            reason = f"fault in the program ({type(error).__name__} at {place})"
        return self.because(stage, reason, error)

    def because(self, stage: str, reason: str, error: BaseException) -> Failure:
        """The failure of a stage for `reason`, by `error`."""
        if (stage, reason) in self._seen:
            return Failure(stage, reason)
        self._seen.add((stage, reason))
        return Failure(stage, reason, "".join(traceback.format_exception(error)))


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
