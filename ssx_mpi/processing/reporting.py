"""The page about the run, at its end."""

from __future__ import annotations

import logging
from pathlib import Path

from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import ReportSettings

logger = logging.getLogger("ssx_mpi")


def write_page(comm: Communicator, directory: Path, settings: ReportSettings) -> None:
    """Write ``ssx_mpi.html`` on rank 0. What the run has found is on the disk by now: no failure here may lose it."""
    if comm.rank != 0:
        return
    try:
        # libraries that no other step needs
        from ssx_mpi.report.run_summary import RunSummary

        summary = RunSummary.read(directory)
        for finding in summary.findings:
            logger.warning("%s", finding[0].upper() + finding[1:])
        from ssx_mpi.report.page import write_summary

        path = write_summary(summary, settings.d_min, settings.copy_to)
    except Exception as error:
        logger.debug("The report failed", exc_info=True)
        reason = f"{error.name} is missing (pip install {error.name})" if isinstance(error, ImportError) else error
        logger.warning("The report could not be written: %s; the results are not touched by that", reason)
    else:
        logger.info("Report: %s", path)
