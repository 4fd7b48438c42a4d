"""ssx_mpi.reduce: integrated crystals to merged intensities, over any number of MPI ranks.

Examples::

  mpirun -n 64 ssx_mpi.reduce run1/batch_*/integrated* run2/DataFiles/integrated_*.{expt,refl}

  mpirun -n 64 ssx_mpi.reduce directory=run1 directory=run2 reference=model.pdb d_min=1.8

  ssx_mpi.reduce directory=run1 dose_series_repeat=5 filtering.method=deltacchalf

  ssx_mpi.reduce run1/batch_1 run1/batch_2 nproc=4

Started plainly it uses all cores of this machine, or as many as nproc= says.
"""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ssx_mpi import dials_compat
from ssx_mpi.command_line import parsing
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters import declaration, reduction_parameters
from ssx_mpi.parameters.declaration import AUTO, Definition

if TYPE_CHECKING:
    from ssx_mpi.processing.watch import Watch

#: what this program has besides the parameters of the reduction
DEFINITIONS = (
    Definition(
        "input.directory",
        "path",
        None,
        "Output folder of an earlier run, or one of its batches, or any folder of integrated*.expt and .refl; may be "
        "given more than once.",
        multiple=True,
    ),
    Definition("input.experiments", "path", None, "Integrated experiments, as a file named alone.", 1, multiple=True),
    Definition("input.reflections", "path", None, "The reflections that go with them.", 1, multiple=True),
    Definition(
        "nproc",
        "int",
        AUTO,
        "MPI ranks to start when not under mpirun or srun already; Auto is the cores this process may use.",
        least=1,
        aliases=("multiprocessing.nproc",),
    ),
    Definition("output.folder", "path", ".", "Where DataFiles, LogFiles and data_reduction go."),
    Definition("output.log", "str", "ssx_mpi.reduce.log", "Name of the log in that folder.", level=1),
)

logger = logging.getLogger("ssx_mpi")


def main(comm: Communicator, args: list[str], watch: Watch | None = None) -> int:
    """Parse, reduce, and turn what went wrong into an exit code; the same on all ranks.

    Parameters
    ----------
    watch
        Of this rank; tells when to stop. None never does.
    """
    from ssx_mpi.command_line.process import end_unwritten
    from ssx_mpi.parallel.stopping import StoppableCommunicator, StopRequested
    from ssx_mpi.parameters.user_input import InputError, PathReader
    from ssx_mpi.records.files import StorageError, storing
    from ssx_mpi.reduction import loading, run_step
    from ssx_mpi.report.text import reduction_block

    try:
        given = _parse(args)
    except InputError as error:
        return _refuse(comm, error, ExitCode.REFUSED)
    params = given.extract
    files = [*given.files, *filter(None, (*params.input.experiments, *params.input.reflections))]
    folder = Path(params.output.folder).absolute()
    try:
        if comm.rank == 0:
            with storing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with storing(folder / params.output.log):
                _log_to(folder / params.output.log)
            for note in given.notes:
                logger.info("%s", note)
            for name in filter(None, params.input.directory):
                if any(Path(name).glob("batch_*/journal")):
                    logger.warning("%s: the run is not finished; its finished batches alone are reduced", name)
        settings = reduction_parameters.read(params, PathReader(Path.cwd()))
        sources = loading.find_sources(
            [Path(name) for name in files],
            [Path(name).absolute() for name in params.input.directory if name],
            scaled="scale" not in settings.steps,
        )
        if watch is not None:
            watch.together(comm)
        stoppable = comm if watch is None else StoppableCommunicator(comm, watch.stopping)
        from ssx_mpi.parameters.run_parameters import ReportSettings
        from ssx_mpi.processing.reporting import write_page

        numbers = run_step.reduce_files(stoppable, sources, settings, folder)
    except InputError as error:
        return _refuse(comm, error, ExitCode.REFUSED)
    except StorageError as error:
        return end_unwritten(comm, error)
    except StopRequested:
        if comm.rank == 0 and watch is not None:
            logger.info("Stopped %s: the same command begins the reduction anew", watch.reason or "on request")
        return ExitCode.STOPPED
    if numbers["state"] != "done":
        return _refuse(comm, numbers["reason"], ExitCode.NOTHING_FOUND)
    if comm.rank == 0:
        if "merge" in settings.steps:
            logger.info("\nMerged intensities: %s", folder / "DataFiles" / "merged.mtz")
        logger.info("%s", reduction_block(numbers))
    write_page(comm, folder, ReportSettings())
    return ExitCode.NOTHING_FOUND if settings.strict and numbers["warnings"] else ExitCode.DONE


def run(args: list[str] | None = None) -> None:
    """Entry point of the program."""
    from ssx_mpi.command_line.process import refuse
    from ssx_mpi.parallel.launching import LaunchError, guarded, launcher_size, start_on_ranks, usable_cores
    from ssx_mpi.parameters.user_input import InputError
    from ssx_mpi.processing.watch import Watch

    arguments = sys.argv[1:] if args is None else args
    try:
        dials_compat.prepare()
        if launcher_size() is None:
            # the arguments are checked before ranks are started for them
            nproc = _parse(arguments).extract.nproc
            start_on_ranks(
                "ssx_mpi.command_line.reduce", arguments, nproc if isinstance(nproc, int) else usable_cores()
            )
    except (dials_compat.DialsError, LaunchError, InputError) as error:
        sys.exit(refuse(error))
    # no images here, so none that takes too long
    watch = Watch(time_limit=None, image_timeout=math.inf)
    guarded(lambda comm: main(comm, arguments, watch))


def definitions() -> list[declaration.Definition]:
    """All parameters of this program."""
    return [*DEFINITIONS, *declaration.definitions(reduction_parameters.ReductionParameters)]


def _parse(args: list[str]) -> parsing.Given:
    usage = "ssx_mpi.reduce [options] integrated_*.expt integrated_*.refl"
    program = parsing.Program(
        usage, definitions(), bare=None, epilog=__doc__, without_meaning=reduction_parameters.WITHOUT_MEANING
    )
    return parsing.parse(program, args)


def _log_to(path: Path) -> None:
    to_terminal, to_file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, mode="w")
    # errors go to stderr, once
    to_terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    for handler in (to_terminal, to_file):
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _refuse(comm: Communicator, error: Exception | str, code: int) -> int:
    if comm.rank == 0:
        # to the file of the log, once there is one; without handlers logging would say it a second time
        if logger.handlers:
            logger.error("%s", error)
        print(error, file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
