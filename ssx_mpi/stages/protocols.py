"""What an engine is: one protocol for each stage, the same for the fast engine and for DIALS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from ssx_mpi.images.frames import Frame
from ssx_mpi.stages.still_results import Crystals, IntegratedLattices


class Reader(Protocol):
    """Reads the pixels of an image."""

    def __call__(self, imageset: Any) -> Frame:
        """Pixels and masks of the one image of `imageset`; raises BadImage."""


class SpotFinder(Protocol):
    """Finds the strong spots of a still."""

    def find(self, experiment: Any, frame: Frame) -> Any:
        """Reflection table of the strong spots, with shoeboxes, its ``id`` 0 throughout."""


class Indexer(Protocol):
    """Indexes the strong spots of a still."""

    def index(self, experiment: Any, strong: Any) -> Crystals:
        """Lattices and their spots, best first; no experiment where there is no lattice. `strong` is not altered."""


class Integrator(Protocol):
    """Integrates the lattices of a still."""

    def integrate(self, crystals: Crystals, frame: Frame) -> IntegratedLattices:
        """Integrated lattices, and why others were left out."""


@dataclass(frozen=True)
class Engine:
    """The algorithms of a run, one for each stage."""

    read: Reader
    spot_finder: SpotFinder
    indexer: Indexer
    integrator: Integrator
