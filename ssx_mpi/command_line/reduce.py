"""ssx_mpi.reduce: integrated crystals to merged intensities, over any number of MPI ranks.

Examples::

  mpirun -n 64 ssx_mpi.reduce run1/batch_*/integrated* run2/DataFiles/integrated_*.{expt,refl}

  mpirun -n 64 ssx_mpi.reduce directory=run1 directory=run2 reference=model.pdb d_min=1.8

  ssx_mpi.reduce directory=run1 dose_series_repeat=5 filtering.method=deltacchalf
"""

from __future__ import annotations

import difflib
import logging
import sys
from pathlib import Path

from ssx_mpi import dials_compat
from ssx_mpi.parallel.communicator import Communicator

PHIL = """
input {
  directory = None
    .type = path
    .multiple = True
    .help = "Output folder of an earlier run, whose integrated crystals are taken; may be given more than once."
}
output {
  folder = .
    .type = path
    .help = "Where DataFiles, LogFiles and data_reduction go."
  log = ssx_mpi.reduce.log
    .type = str
}
"""

logger = logging.getLogger("ssx_mpi")

BAD_INPUT = 2
NO_CRYSTALS = 3


def main(comm: Communicator, args: list[str]) -> int:
    """Parse, reduce, and turn what went wrong into an exit code; the same on all ranks."""
    from ssx_mpi.reduction import loading, parameters, pipeline
    from ssx_mpi.reduction.errors import InputError, NothingLeftError

    try:
        params, files = _parse(args, PHIL + parameters.REDUCTION_PHIL)
    except InputError as error:
        return _refuse(comm, error, BAD_INPUT)
    folder = Path(params.output.folder).absolute()
    if comm.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        _log_to(folder / params.output.log)
    try:
        settings = parameters.from_phil(params)
        sources = loading.find_sources(
            [Path(name) for name in files],
            [Path(name).absolute() for name in params.input.directory if name],
            scaled="scale" not in settings.steps,
        )
        summary = pipeline.reduce(comm, sources, settings, folder)
    except InputError as error:
        return _refuse(comm, error, BAD_INPUT)
    except NothingLeftError as error:
        return _refuse(comm, error, NO_CRYSTALS)
    if comm.rank == 0:
        for what, number in summary.fates.items():
            logger.info("%7d crystals %s", number, what)
        logger.info("merged intensities: %s", folder / "DataFiles" / "merged.mtz")
    return 0


def run(args: list[str] | None = None) -> None:
    """Entry point of the program."""
    dials_compat.prepare()
    from ssx_mpi.parallel.launch import guarded

    arguments = sys.argv[1:] if args is None else args
    guarded(lambda comm: main(comm, arguments))


def _parse(args: list[str], phil: str):
    from dials.util.options import ArgumentParser
    from iotbx.phil import parse
    from libtbx.utils import Sorry

    from ssx_mpi.reduction.errors import InputError

    parser = ArgumentParser(
        usage="ssx_mpi.reduce [options] integrated_*.expt integrated_*.refl",
        phil=parse(phil),
        epilog=__doc__,
        check_format=False,
    )
    try:
        params, _, files = parser.parse_args(args=args, show_diff_phil=False, return_unhandled=True)
    except (RuntimeError, Sorry) as error:
        # of PHIL: a value of the wrong type, a name that fits several parameters
        raise InputError(str(error).splitlines()[0]) from None
    for name in files:
        if "=" in name:
            raise InputError(_unknown(name.split("=")[0], parser.phil))
    return params, files


def _unknown(name: str, scope) -> str:
    known = [found.path for found in scope.all_definitions()]
    by_last = {path.split(".")[-1]: path for path in known}
    close = difflib.get_close_matches(name, known + list(by_last), n=1, cutoff=0.5)
    hint = f"; did you mean {by_last.get(close[0], close[0])}?" if close else ""
    return f"there is no parameter {name}{hint}"


def _log_to(path: Path) -> None:
    to_terminal, to_file = logging.StreamHandler(sys.stdout), logging.FileHandler(path, mode="w")
    # errors go to stderr, once
    to_terminal.addFilter(lambda record: record.levelno < logging.ERROR)
    for handler in (to_terminal, to_file):
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _refuse(comm: Communicator, error: Exception, code: int) -> int:
    if comm.rank == 0:
        # to the file of the log, once there is one; without handlers logging would say it a second time
        if logger.handlers:
            logger.error("%s", error)
        print(error, file=sys.stderr)
    return code


if __name__ == "__main__":
    run()
