"""Assessing the crystals where their cell or space group is unknown."""

from __future__ import annotations

import logging

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.processing.failures import advice, log_failures
from ssx_mpi.processing.first_crystals import find_first_crystals
from ssx_mpi.processing.importing import Run, image_range
from ssx_mpi.records.files import write_json
from ssx_mpi.report import assessment_report
from ssx_mpi.stages import cell_assessment
from ssx_mpi.stages.packing import unpack

logger = logging.getLogger("ssx_mpi")


def assess_crystals(comm: Communicator, run: Run) -> ExitCode:
    """Cluster the cells of the first crystals, say what to run next, and stop. Collective."""
    selection = run.parameters.assess
    found = find_first_crystals(comm, run, selection, run.processor(), "assessing crystals")
    statistics = found.crystals.statistics(comm)
    packed = found.crystals.gather_lattices(comm)
    status = ExitCode.DONE
    if packed is not None:
        counts = statistics.counts
        logger.info(
            "Assessed %d images: %s hits, %d lattices on %d images",
            found.end - image_range(run.images, selection)[0],
            *(counts["hits"], counts["lattices"], counts["indexed"]),
        )
        log_failures(statistics)
        experiments, _ = unpack(packed)
        if found.stopped:
            status = ExitCode.STOPPED
        elif len(experiments) == 0:
            logger.warning("No crystal could be indexed. %s", advice(statistics))
            status = ExitCode.NOTHING_FOUND
        else:
            _report(run, cell_assessment.assess(experiments))
    return comm.bcast(status)


def _report(run: Run, assessment: cell_assessment.Assessment) -> None:
    folder = run.directory / "assess_crystals"
    folder.mkdir(exist_ok=True)
    logger.info(assessment_report.table(assessment))
    command = assessment_report.next_command(assessment, run.parameters)
    write_json(folder / "assess_crystals.json", assessment_report.as_json(assessment, command))
    assessment_report.plot(assessment, folder / "unit_cells.png")
    logger.info("To process with the most populous cell, run:\n  %s", command)
