"""What the program does, from images to merged intensities, as a story; the same on every rank.

Import, then assess the crystals where their symmetry is unknown and stop; otherwise refine the geometry with the first
crystals unless it is given, process all images in batches, refine the geometry with all crystals where that is
wanted, and reduce what was integrated; at the end, write the page that tells of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import REDUCE, STEPS, Parameters
from ssx_mpi.processing.batches import process_batches
from ssx_mpi.processing.gain import say_gain, with_gain
from ssx_mpi.processing.geometry import geometry_refined_before, given_geometry, refine_geometry
from ssx_mpi.processing.importing import import_images
from ssx_mpi.processing.reducing import reduce_crystals
from ssx_mpi.processing.resume import check_steps
from ssx_mpi.processing.watch import Watch

# images that show the way of a detector along the run, at the very least
_FEWEST_TO_DRIFT = 20


def process(comm: Communicator, parameters: Parameters, watch: Watch, claimed: Callable[[], None]) -> ExitCode:
    """Do all that `parameters` ask for; collective.

    Parameters
    ----------
    comm
        The ranks.
    parameters
        Of the run.
    watch
        Of this rank; tells when to stop.
    claimed
        Called on every rank when all input is found good and the output folder is ours.

    Returns
    -------
    ExitCode
        The same on every rank.

    Raises
    ------
    InputError
        On every rank, for input that cannot be processed; nothing was written over.
    """
    status = _process(comm, parameters, watch, claimed)
    if comm.rank == 0:
        say_gain(parameters.directory)
    if parameters.report.html and comm.rank == 0:
        # what the first rank alone needs
        from ssx_mpi.processing.reporting import write_page

        write_page(comm, parameters.directory, parameters.report)
    return status


def _process(comm: Communicator, parameters: Parameters, watch: Watch, claimed: Callable[[], None]) -> ExitCode:
    began = time.monotonic()
    if parameters.final_geometry:
        # loaded where it is asked for
        from ssx_mpi.processing.final_geometry import check_final

        check_final(parameters)
    run = import_images(comm, parameters, watch)
    claimed()
    run = with_gain(comm, run)
    if not parameters.symmetry_known:
        from ssx_mpi.processing.assessing import assess_crystals

        return assess_crystals(comm, run)
    if parameters.steps == (REDUCE,):
        return reduce_crystals(comm, run)
    if parameters.image_steps and parameters.image_steps[0] != STEPS[0]:
        # before the geometry is refined for nothing
        check_steps(comm, run.batches, run.identity, parameters.image_steps)
    geometry = given_geometry(comm, run)
    if geometry is None:
        geometry = geometry_refined_before(comm, run)
    if geometry is None:
        geometry, status = refine_geometry(comm, run)
        if geometry is None:
            return status
    if not parameters.steps:
        return ExitCode.DONE
    status = process_batches(comm, run, geometry, began)
    if status == ExitCode.DONE and len(run.images) >= _FEWEST_TO_DRIFT:
        # loaded when it is due
        from ssx_mpi.processing.drift_check import look_for_drift

        look_for_drift(comm, run, geometry)
    if status == ExitCode.DONE and parameters.final_geometry:
        from ssx_mpi.processing.final_geometry import refine_final_geometry

        refine_final_geometry(comm, run, geometry)
    if status != ExitCode.DONE or REDUCE not in parameters.steps:
        return status
    return reduce_crystals(comm, run)
