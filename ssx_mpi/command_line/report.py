"""Program ssx_mpi.report: write ssx_mpi.html about a run, or a reduction, at any time.

Examples::

  ssx_mpi.report lyso

  ssx_mpi.report . forecast.d_min=1.6 report.copy_to=/somewhere/for/the/logbook

The page is one file that needs no network: a verdict, Table 1, what happened along the images, cells, geometry, why
images gave nothing, merging statistics, and how many more crystals a resolution takes. It is made from what the run has
recorded so far, and reads no image.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ssx_mpi.command_line import parsing
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters import declaration
from ssx_mpi.parameters.declaration import parameter
from ssx_mpi.parameters.user_input import InputError, PathReader

USAGE = "ssx_mpi.report [options] FOLDER"


@dataclass(frozen=True)
class ReportParameters:
    """What the page is about, and where a copy of it goes."""

    folder: Path | None = parameter("folder", "folder", None, "Output folder of a run or of a reduction.")
    forecast_d_min: float | None = parameter(
        "forecast.d_min",
        "float",
        None,
        "Resolution for which the crystals still needed are forecast, angstrom; by default a tenth beyond the data.",
        least=0.1,
    )
    copy_to: Path | None = parameter(
        "report.copy_to",
        "folder",
        None,
        "Folder that gets a copy of the page as report.html, as electronic logbooks look for it.",
    )


def read_arguments(arguments: list[str]) -> ReportParameters:
    """The parameters on a command line.

    Raises
    ------
    InputError
        For an unknown parameter, and when there is not one folder.
    """
    program = parsing.Program(USAGE, declaration.definitions(ReportParameters), bare=None, epilog=__doc__)
    given = parsing.parse(program, arguments)
    path = PathReader(Path.cwd())
    found = declaration.read(ReportParameters, given.extract, path)
    folders = [*([found.folder] if found.folder else []), *(path.absolute(name) for name in given.files)]
    if len(folders) != 1:
        raise InputError("give one folder: that of a run, or of a reduction")
    if not folders[0].is_dir():
        raise InputError(f"{folders[0]}: there is no such folder")
    return ReportParameters(folders[0], found.forecast_d_min, found.copy_to)


def main(arguments: list[str]) -> int:
    """Write the page that `arguments` ask for, and print its path; returns an exit code."""
    from ssx_mpi.records.files import StorageError
    from ssx_mpi.report.page import write_report

    try:
        parameters = read_arguments(arguments)
        assert parameters.folder is not None
        print(write_report(parameters.folder, parameters.forecast_d_min, parameters.copy_to))
    except (InputError, StorageError) as error:
        print(f"ssx_mpi.report: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    except ImportError as error:
        print(f"ssx_mpi.report: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return ExitCode.REFUSED
    return ExitCode.DONE


def run(arguments: list[str] | None = None) -> None:
    """Entry point of the program ``ssx_mpi.report``."""
    parsing.run_alone("ssx_mpi.report", main, arguments)


if __name__ == "__main__":
    run()
