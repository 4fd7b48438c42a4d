"""ssx_mpi: serial-crystallography stills to merged intensities, over any number of MPI ranks."""

from __future__ import annotations

import logging
import logging.handlers
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

from ssx_mpi import __version__, dials_compat
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parallel import launching
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.watch import Watch, holding_requests

USAGE = """ssx_mpi [options] image=data_master.h5 space_group=P43212 unit_cell=79.1,79.1,38.2,90,90,90

Processes serial-crystallography stills from images to merged intensities. Start it plainly to use all cores of this
machine, or under mpirun or srun to use the ranks of a job. Without space_group or unit_cell it assesses the crystals
and stops. -c shows the parameters, -e 2 those for experts too."""

logger = logging.getLogger("ssx_mpi")

# set by job scripts that start the same command once more: restart=True was meant for the first start
_GO_ON = "SSX_MPI_GO_ON"


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the program ``ssx_mpi``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print(f"ssx_mpi {__version__}")
        return
    try:
        # a request to stop waits until something listens: here, or what stands in this place next
        with holding_requests():
            dials_compat.prepare()
            if launching.launcher_size() is None:
                # the arguments are checked before ranks are started for them
                parameters = read_arguments(arguments)[0]
                probe_headers(parameters)
                n_ranks = parameters.nproc or launching.usable_cores()
                launching.start_on_ranks("ssx_mpi", arguments, n_ranks)
            launching.guarded(lambda comm: _main(comm, arguments))
    except (dials_compat.DialsError, launching.LaunchError, InputError) as error:
        sys.exit(refuse(error))


def probe_headers(parameters: Parameters) -> None:
    """Find out which headers end or hang whatever reads them, where that was not done for this run before."""
    from ssx_mpi.images.header_probe import probe_sources

    if parameters.restart or not (parameters.directory / "import" / "imported.expt").exists():
        probe_sources(parameters.sources)


def _main(comm: Communicator, arguments: list[str]) -> int:
    from ssx_mpi.parallel.collective import on_root
    from ssx_mpi.processing import pipeline
    from ssx_mpi.records.files import DamagedFileError, StorageError, refusals
    from ssx_mpi.stages.fast.joint_refinement import quiet_dials

    try:
        # the other ranks load no parser and no PHIL of DIALS
        parameters, verbosity = on_root(comm, lambda: read_arguments(arguments), InputError)
        if os.environ.get(_GO_ON):
            parameters = replace(parameters, restart=False)
        with _Folder(comm, parameters) as folder:
            watch = Watch(parameters.time_limit, parameters.image_timeout)
            to_file = _nothing
            if comm.rank == 0:
                to_file = _start_log(parameters.directory, verbosity)
                logger.info("ssx_mpi %s on %d ranks: %s", __version__, comm.size, shlex.join(arguments))
                for note in parameters.notes:
                    logger.info("%s", note)
            quiet_dials()

            def claimed() -> None:
                folder.lock()
                to_file()
                watch.open(comm, parameters.directory)

            with refusals(parameters.directory):
                status = pipeline.process(comm, parameters, watch, claimed)
                watch.close(comm)
            return status
    except StorageError as error:
        return end_unwritten(comm, error)
    except DamagedFileError as error:
        return end_damaged(comm, error)
    except (InputError, dials_compat.DialsError) as error:
        # every rank comes here with the same error
        if comm.rank == 0:
            refuse(error)
        comm.barrier()
        return ExitCode.REFUSED


def end_unwritten(comm: Communicator, error: Exception) -> int:
    """End all ranks because one could not write a file; that one alone comes here, and what is finished is whole."""
    print(f"ssx_mpi: rank {comm.rank}: {error}; the same command goes on once it can", file=sys.stderr, flush=True)
    comm.abort(ExitCode.FAULT)
    return ExitCode.FAULT


def end_damaged(comm: Communicator, error: Exception) -> int:
    """End all ranks because one cannot read what an earlier step left; that one alone comes here."""
    print(
        f"ssx_mpi: rank {comm.rank}: {error}: remove the folder that it is in, and all steps do that batch again",
        file=sys.stderr,
        flush=True,
    )
    comm.abort(ExitCode.REFUSED)
    return ExitCode.REFUSED


class _Folder:
    """The folder of the run, kept from other runs by rank 0 while this is entered."""

    def __init__(self, comm: Communicator, parameters: Parameters) -> None:
        self._comm = comm
        self._directory = parameters.directory
        self._held: IO[bytes] | None = None

    def __enter__(self) -> _Folder:
        self.lock()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._held is not None:
            self._held.close()

    def lock(self) -> None:
        """Take the lock where it is not held yet, or was removed with what an earlier run had left; collective."""
        from ssx_mpi.parallel.collective import on_root
        from ssx_mpi.records.run_folder import lock

        def take() -> None:
            if self._held is not None:
                self._held.close()
            self._held = lock(self._directory)

        on_root(self._comm, take, InputError)


def refuse(error: Exception) -> int:
    """Say why on the terminal; returns the exit code."""
    sys.stdout.flush()
    print(f"ssx_mpi: {error}", file=sys.stderr, flush=True)
    return ExitCode.REFUSED


def read_arguments(arguments: list[str]) -> tuple[Parameters, int]:
    """Parameters and verbosity from the command line, with the behaviour of DIALS programs.

    Raises
    ------
    InputError
        For an unknown parameter, or one with an impossible value.
    """
    # one rank alone parses
    from ssx_mpi.command_line import parsing
    from ssx_mpi.parameters import declaration, run_parameters

    program = parsing.Program(
        USAGE,
        declaration.definitions(run_parameters.Parameters),
        "images are given as image=, template= or directory=",
        without_meaning=run_parameters.WITHOUT_MEANING,
    )
    if not arguments:
        parsing.print_help(program)
        raise InputError("no images given: use image=, template= or directory=")
    given = parsing.parse(program, arguments)
    return run_parameters.read(given.extract, Path.cwd(), given.typed, given.notes), given.verbosity


def _start_log(directory: Path, verbosity: int) -> Callable[[], None]:
    """Log to the terminal at once; what is returned writes it to ``ssx_mpi.log`` in `directory` too, from the start.

    Until the input is known to be good, nothing is written.
    """
    ours = logging.getLogger("ssx_mpi")
    ours.setLevel(logging.DEBUG if verbosity else logging.INFO)
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    held = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
    ours.handlers[:] = [terminal, held]

    def to_file() -> None:
        file = _LogFile(directory / "ssx_mpi.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        held.setTarget(file)
        held.flush()
        ours.handlers[:] = [terminal, file]

    return to_file


class _LogFile(logging.FileHandler):
    """A log file that ends the run when it cannot be written, as any other file does."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        from ssx_mpi.records.files import StorageError

        raise StorageError(f"{self.baseFilename} cannot be written: {error.strerror}") from error


def _nothing() -> None:
    """The log is written by rank 0 alone."""
