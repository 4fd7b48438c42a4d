"""Whether the detector, or the beam, moved during a run; looked for when its batches are done."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.kernels.drift import FEWEST_CRYSTALS, Drift
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.importing import Run
from ssx_mpi.processing.indexed_crystals import kept, shared_indexed
from ssx_mpi.records.files import DamagedFileError, read_state, write_json
from ssx_mpi.report import text
from ssx_mpi.stages.fast import joint_refinement
from ssx_mpi.stages.still_results import StageError

logger = logging.getLogger("ssx_mpi")

# of a long run so many batches, from the first to the last, tell
_MOST_BATCHES = 20


def look_for_drift(comm: Communicator, run: Run, geometry: tuple[Any, Any]) -> None:
    """Say in the log, and in ``geometry_refinement/drift.json``, where the detector moved. Collective.

    Runs that keep no indexed crystals, or have few, are not looked at.

    Parameters
    ----------
    geometry
        (detector, beam) with which the batches were processed, the same on every rank.
    """
    parameters, n_images = run.parameters, len(run.images)
    if "index" not in parameters.image_steps or not kept(parameters):
        return
    path = run.directory / "geometry_refinement" / "drift.json"
    before = _found_before(path) if comm.rank == 0 else None
    if comm.bcast(before is not None):
        if before is not None:
            _say(before, n_images)
        return
    chosen = np.unique(np.linspace(0, len(run.batches) - 1, _MOST_BATCHES).round().astype(int))
    try:
        experiments, reflections, images, shared = shared_indexed(comm, [run.batches[k] for k in chosen], geometry)
        if shared.n_total < FEWEST_CRYSTALS:
            return
        found = joint_refinement.find_drift(experiments, reflections, (images + 0.5) / n_images, shared)
    except (InputError, StageError) as error:
        # on every rank: what was integrated is whole
        if comm.rank == 0:
            logger.warning("Whether the detector moved is not known: %s", error)
        return
    if comm.rank == 0:
        path.parent.mkdir(exist_ok=True)
        content = as_json(found)
        write_json(path, content)
        _say(content, n_images)


def _found_before(path: Path) -> dict[str, Any] | None:
    """What an earlier start found; None where there was none, or its file is damaged."""
    if not path.exists():
        return None
    try:
        content = read_state(path, {})
        if content:
            text.drift_line(content, 1)
    except DamagedFileError as error:
        logger.warning("%s: the way of the detector is looked for again", error)
    except (KeyError, TypeError, ValueError, IndexError):
        logger.warning("%s is damaged: the way of the detector is looked for again", path)
    else:
        return content
    return None


def as_json(found: Drift | None) -> dict[str, Any]:
    """A drift as plain data; empty where there is none."""
    if found is None:
        return {}
    numbers = {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(found).items()
    }
    return {**numbers, "extent": found.extent, "extent_sigma": found.extent_sigma}


def _say(content: dict[str, Any], n_images: int) -> None:
    if content:
        logger.warning("%s", text.drift_line(content, n_images))
