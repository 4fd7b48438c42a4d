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
from pathlib import Path

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters.user_input import InputError

USAGE = "ssx_mpi.report FOLDER [forecast.d_min=ANGSTROM] [report.copy_to=FOLDER]"


def run(args: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:] if args is None else args))


def main(args: list[str]) -> int:
    """Write the report that `args` ask for; returns an exit code."""
    from ssx_mpi.records.files import StorageError
    from ssx_mpi.report.page import write_report

    if not args or any(arg in ("-h", "--help") for arg in args):
        print(f"{__doc__}\nUsage: {USAGE}")
        return ExitCode.DONE if args else ExitCode.REFUSED
    try:
        folder, d_min, copy_to = _parse(args)
        path = write_report(folder, d_min, copy_to)
    except (InputError, StorageError) as error:
        print(f"ssx_mpi.report: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    except ImportError as error:
        print(f"ssx_mpi.report: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return ExitCode.REFUSED
    print(path)
    return ExitCode.DONE


def _parse(args: list[str]) -> tuple[Path, float | None, Path | None]:
    folders = [arg for arg in args if "=" not in arg]
    if len(folders) != 1:
        raise InputError(f"give one folder: {USAGE}")
    d_min: float | None = None
    copy_to: Path | None = None
    for name, _, value in (arg.partition("=") for arg in args if "=" in arg):
        if name == "forecast.d_min":
            try:
                d_min = float(value)
            except ValueError:
                d_min = -1.0
            if not d_min > 0:
                raise InputError(f"forecast.d_min={value}: give angstroms above 0")
        elif name == "report.copy_to":
            copy_to = Path(value)
        else:
            raise InputError(f"{name}=: there is no such parameter; {USAGE}")
    folder = Path(folders[0])
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    return folder, d_min, copy_to
