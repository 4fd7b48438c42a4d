"""Reduction as the last step of a run."""

from __future__ import annotations

import logging
from typing import Any

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parallel.stopping import StoppableCommunicator, StopRequested
from ssx_mpi.parameters.run_parameters import REDUCE
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.importing import Run
from ssx_mpi.report import text
from ssx_mpi.report.run_report import record_reduction

logger = logging.getLogger("ssx_mpi")


def reduce_crystals(comm: Communicator, run: Run) -> ExitCode:
    """Merge the integrated crystals of this run; too few of them to merge are no failure of the run. Collective."""
    # loaded only where there is a reduction
    from ssx_mpi.reduction import run_step

    parameters, watch = run.parameters, run.watch
    alone = parameters.steps == (REDUCE,)
    watch.together(comm)
    if comm.rank == 0:
        logger.info("\nReduction of the integrated crystals")
    try:
        numbers = run_step.reduce_run(
            StoppableCommunicator(comm, watch.stopping), run.directory, parameters.reduction, run.identity
        )
    except StopRequested:
        if comm.rank == 0:
            say_stopped(run)
            record_reduction(run.directory, "stopped", None)
        return ExitCode.STOPPED
    except InputError as error:
        if comm.rank == 0 and not alone:
            logger.warning("The crystals are integrated, but not reduced: %s", error)
            record_reduction(run.directory, "not_reduced", {"state": "refused", "reason": str(error)})
        raise
    warned = bool(numbers.get("warnings"))
    if comm.rank == 0:
        record_reduction(run.directory, "done_with_warnings" if warned else "done", numbers)
        _conclude(run, numbers)
    failed = (warned and parameters.reduction.strict) or (numbers["state"] != "done" and alone)
    return ExitCode.NOTHING_FOUND if failed else ExitCode.DONE


def say_stopped(run: Run) -> None:
    """Say in the log why the run was stopped."""
    logger.info("Stopped %s: the same command goes on from here", run.watch.reason or "on request")


def _conclude(run: Run, numbers: dict[str, Any]) -> None:
    if numbers["state"] != "done":
        logger.warning("No merged intensities: %s. The integrated crystals are kept", numbers["reason"])
        return
    if "merge" in run.parameters.reduction.steps:
        logger.info("\nMerged intensities: %s", run.directory / "DataFiles" / "merged.mtz")
    logger.info("%s", text.reduction_block(numbers))
