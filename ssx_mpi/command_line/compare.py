"""ssx_mpi.compare: how a processed run compares with the truth of the simulation that it processed.

Examples::

  ssx_mpi.compare sim run_sim

  ssx_mpi.compare truth=sim run=run_sim output.json=comparison.json

The truth is the folder that ssx_mpi.simulate wrote into, the run an output folder of ssx_mpi, or one with the
integrated or indexed files of DIALS programs.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ssx_mpi.command_line import parsing
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters import declaration
from ssx_mpi.parameters.declaration import parameter
from ssx_mpi.parameters.user_input import InputError, PathReader

USAGE = "ssx_mpi.compare [options] TRUTH_FOLDER RUN_FOLDER"


@dataclass(frozen=True)
class ComparisonParameters:
    """The two folders, and where the numbers go."""

    truth: Path | None = parameter("truth", "folder", None, "Folder with truth.expt, truth.mtz and truth.json.")
    run: Path | None = parameter("run", "folder", None, "Output folder of the run.")
    json: Path | None = parameter("output.json", "folder", None, "Write the numbers to this file, too.", level=1)


def read_arguments(arguments: list[str]) -> ComparisonParameters:
    """The parameters on a command line.

    Raises
    ------
    InputError
        For an unknown parameter, and when not both folders are named or one is not there.
    """
    program = parsing.Program(USAGE, declaration.definitions(ComparisonParameters), bare=None, epilog=__doc__)
    given = parsing.parse(program, arguments)
    path = PathReader(Path.cwd())
    found = declaration.read(ComparisonParameters, given.extract, path)
    folders = [found.truth, found.run]
    for name in given.files:
        if None not in folders:
            raise InputError(f"{name}: two folders are compared, the truth and the run")
        folders[folders.index(None)] = path.absolute(name)
    truth, run = folders
    if truth is None or run is None:
        raise InputError("give two folders: the one that ssx_mpi.simulate wrote into, and that of the run")
    for folder in (truth, run):
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
    return ComparisonParameters(truth, run, found.json)


def main(arguments: list[str]) -> int:
    """Print the comparison; returns the exit code."""
    try:
        parameters = read_arguments(arguments)
        assert parameters.truth is not None
        assert parameters.run is not None
        from ssx_mpi.simulation.truth import compare_run, table

        comparison = compare_run(parameters.truth, parameters.run)
        print(table(comparison))
        if parameters.json is not None:
            parameters.json.write_text(json.dumps(asdict(comparison), indent=1) + "\n")
    except (InputError, OSError) as error:
        print(f"ssx_mpi.compare: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    return ExitCode.DONE


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the program ``ssx_mpi.compare``."""
    parsing.run_alone("ssx_mpi.compare", main, arguments)


if __name__ == "__main__":
    run()
