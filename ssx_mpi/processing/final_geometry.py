"""The geometry refined once more, with all crystals of a run, when its batches are done.

Each rank reads a share of the batches, whose crystals are then spread over the ranks in blocks and eliminated there
(:mod:`ssx_mpi.kernels.detector_refinement`): no rank holds all of them.
"""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.geometry import first_crystals_of, log_parts, warn_if_not_converged
from ssx_mpi.processing.importing import Run
from ssx_mpi.processing.indexed_crystals import kept, shared_indexed
from ssx_mpi.records.files import DamagedFileError, read_state, replacing, write_json
from ssx_mpi.report import text
from ssx_mpi.report.assessment_report import command_with
from ssx_mpi.stages.fast import joint_refinement
from ssx_mpi.stages.fast.panel_tree import movement_px
from ssx_mpi.stages.packing import pack
from ssx_mpi.stages.still_results import StageError

logger = logging.getLogger("ssx_mpi")

_FINAL, _NUMBERS = "final.expt", "final_geometry.json"
# predictions that come closer to the spots by less than this are within what integration refines for each crystal
_WORTH_INTEGRATING = 0.03


def check_final(parameters: Parameters) -> None:
    """Make sure that there will be crystals to refine with.

    Raises
    ------
    InputError
        Where nothing is indexed, or what is indexed is not kept, or DIALS is to refine.
    """
    if not parameters.final_geometry:
        return
    given = "geometry_refinement.final=True"
    if "index" not in parameters.image_steps:
        raise InputError(f"{given} needs indexed crystals: steps= has no index")
    if not kept(parameters):
        raise InputError(f"{given} needs the indexed crystals of all batches: it goes with keep_intermediate=True")
    if parameters.engine == "dials" or parameters.refinement_phil is not None:
        raise InputError(f"{given} is not for the refinement by DIALS: use dials.refine on the indexed crystals")


def refine_final_geometry(comm: Communicator, run: Run, geometry: tuple[Any, Any]) -> None:
    """Refine with every indexed crystal of the run and write ``geometry_refinement/final.expt``. Collective.

    Parameters
    ----------
    geometry
        (detector, beam) with which the batches were processed, the same on every rank.
    """
    folder = run.directory / "geometry_refinement"
    before = _concluded_before(run, folder) if comm.rank == 0 else ""
    if comm.bcast(before != ""):
        if comm.rank == 0:
            logger.info("Geometry with all crystals as refined before, from %s", folder / _FINAL)
            logger.info("%s", before)
        return
    experiments, reflections, _, shared = shared_indexed(comm, run.batches, geometry)
    if comm.rank == 0:
        logger.info("\nGeometry with all %d crystals of the run", shared.n_total)
    parameters = run.parameters
    try:
        refined = joint_refinement.refine_fast(
            experiments,
            reflections,
            parameters.unit_cell if parameters.restrain_cell else None,
            parameters.hierarchy_level,
            parameters.panel_priors,
            shared,
            against_start=True,
        )
    except StageError as error:
        if comm.rank == 0:
            logger.warning("The geometry could not be refined with all crystals: %s", error)
        return
    if comm.rank == 0:
        logger.info(text.refinement_block(refined))
        warn_if_not_converged(refined)
        log_parts(refined)
    written = first_crystals_of(comm, refined)
    if written is None:
        return
    assert refined.closer is not None
    movement = movement_px(shared.detector, refined.detector)
    folder.mkdir(exist_ok=True)
    numbers = {**text.refinement_json(refined), "movement": movement, "closer": refined.closer}
    write_json(folder / _NUMBERS, numbers)
    with replacing(folder / "final.refl") as file:
        file.write(written[1].as_msgpack())
    with replacing(folder / _FINAL) as file:
        file.write(json.dumps(pack(written[0]), indent=1).encode())
    logger.info("Geometry with all crystals: %s", folder / _FINAL)
    logger.info("%s", _conclusion(run, movement, refined.closer))


def _concluded_before(run: Run, folder: Path) -> str:
    """What an earlier start came to; empty where there was none, or the file with its numbers is damaged."""
    if not (folder / _FINAL).exists():
        return ""
    try:
        numbers = read_state(folder / _NUMBERS, {"movement": list, "closer": list})
        return _conclusion(run, numbers["movement"], numbers["closer"])
    except (DamagedFileError, OSError, TypeError, ValueError) as error:
        said = error if isinstance(error, DamagedFileError) else f"{folder / _NUMBERS} is missing or damaged"
        logger.warning("%s: the geometry is refined with all crystals again", said)
        return ""


def _conclusion(run: Run, movement: tuple[float, float], closer: tuple[float, float]) -> str:
    gain, error = closer
    said = (
        f"Spots would move by {movement[0]:.2f} pixels (root mean square over the detector), {movement[1]:.2f} at "
        f"most; predictions come closer to spots by {100 * gain:.1f}({100 * error:.1f})%"
    )
    if gain < max(2 * error, _WORTH_INTEGRATING):
        return f"{said}. Integrating again would gain little"
    where = run.directory.with_name(run.directory.name + "_final")
    path = run.directory / "geometry_refinement" / _FINAL
    command = command_with(run.parameters, {"reference_geometry": path, "output.directory": where})
    return f"{said}. Integrating again would gain; the command:\n  {shlex.join(command)}"
