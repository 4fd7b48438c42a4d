"""What all steps of a reduction refer to."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ssx_mpi.kernels.merging import Shells
from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.parallel.collective import count
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction.crystal_list import FATE_TEXT, Crystals, Fate
from ssx_mpi.reduction.errors import NothingLeftError
from ssx_mpi.reduction.loading import Loaded, Source
from ssx_mpi.stages.intensities.reflection_data import Selection

logger = logging.getLogger("ssx_mpi.reduction")


@dataclass(frozen=True)
class Frame:
    """Symmetry, unique reflections, shells for normalisation, and the settings a crystal can be indexed in.

    Parameters
    ----------
    cell
        Of the merged data, angstrom and degrees.
    space_group
        Symbol as cctbx reads it.
    settings
        (n_settings, 3, 3), see :func:`ssx_mpi.stages.intensities.reflection_data.reindexing_settings`.
    """

    cell: tuple[float, ...]
    space_group: str
    unique: UniqueReflections
    shells: Shells
    settings: np.ndarray


@dataclass(frozen=True)
class Job:
    """One reduction on one rank: its data, and what all ranks share. `folder` takes the results."""

    comm: Communicator
    sources: list[Source]
    loaded: Loaded
    frame: Frame
    parameters: ReductionParameters
    folder: Path

    def with_observations(self, observations: Observations) -> Job:
        """The same job with other observations, as of crystals that were rotated."""
        return replace(self, loaded=replace(self.loaded, observations=observations))

    @property
    def crystals(self) -> Crystals:
        return self.loaded.crystals

    @property
    def observations(self) -> Observations:
        return self.loaded.observations

    @property
    def selection(self) -> Selection:
        """Limits under which observations were read."""
        return self.loaded.selection

    def count(self, mask: np.ndarray) -> int:
        """How many entries are true on all ranks. Collective."""
        return count(self.comm, mask)


def say(comm: Communicator, message: str, *values: object) -> None:
    """A line for the log, once."""
    if comm.rank == 0:
        logger.info(message, *values)


def require_some(comm: Communicator, fate: np.ndarray) -> None:
    """Stop when no crystal is left. Collective.

    Raises
    ------
    NothingLeftError
        Saying what became of them.
    """
    counts = comm.sum(np.bincount(fate, minlength=len(Fate)))
    if counts[Fate.KEPT] == 0:
        reasons = ", ".join(f"{counts[f]} {FATE_TEXT[f]}" for f in Fate if counts[f])
        raise NothingLeftError(f"no crystal is left to merge: {reasons}")
