"""Program ssx_mpi.monitor: how runs stand, while they are at work or afterwards.

Examples::

  ssx_mpi.monitor lyso

  ssx_mpi.monitor --watch /data/visit/processed

  ssx_mpi.monitor --json lyso

On a terminal the view fills the screen and is drawn again every two seconds, until the run has ended or Ctrl-C is
pressed. Into a pipe or a file it is written once, as plain text. It reads only what the runs write, so that it works on
any machine that sees their folders, and does not slow them.

Options::

  --watch      several runs at once: all that are found at and below the folders, also those that begin later
  --json       once, for programs: an object for each run, in a list
  --every S    seconds between two looks (default 2)
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters.user_input import InputError

USAGE = "ssx_mpi.monitor [--watch] [--json] [--every SECONDS] FOLDER [FOLDER ...]"
# states of a run that is still to write something
_AT_WORK = ("starting", "running", "reducing", "silent")


def run(args: list[str] | None = None) -> None:
    """Entry point."""
    sys.exit(main(sys.argv[1:] if args is None else args))


def main(args: list[str]) -> int:
    """Show the runs that `args` name; returns an exit code."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="ssx_mpi.monitor", usage=USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--every", type=float, default=2.0, help=argparse.SUPPRESS)
    given = parser.parse_args(args)
    try:
        if given.every <= 0:
            raise InputError(f"--every {given.every:g}: give seconds above 0")
        if given.json:
            statuses = _statuses(given.folders, given.watch)
            print(json.dumps([status.as_json() for status in statuses], indent=1))
        elif not sys.stdout.isatty():
            from ssx_mpi.report.monitoring import plain

            print(plain(_statuses(given.folders, given.watch)))
        else:
            _show(given.folders, given.watch, given.every)
    except InputError as error:
        print(f"ssx_mpi.monitor: {error}", file=sys.stderr)
        return ExitCode.REFUSED
    except ImportError as error:
        print(f"ssx_mpi.monitor: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        return ExitCode.REFUSED
    except KeyboardInterrupt:
        pass
    return ExitCode.DONE


def _statuses(folders: list[Path], watch: bool) -> list:
    from ssx_mpi.report.monitoring import RunStatus, find_runs

    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: there is no such folder")
    if watch:
        found = [run_folder for folder in folders for run_folder in find_runs(folder)]
        return [RunStatus.read(folder) for folder in dict.fromkeys(found)]
    return [RunStatus.read(folder) for folder in folders]


def _show(folders: list[Path], watch: bool, every: float) -> None:
    from rich.console import Console
    from rich.live import Live

    from ssx_mpi.report.monitoring import screen

    console = Console()
    statuses = _statuses(folders, watch)
    with Live(screen(statuses), console=console, screen=True, auto_refresh=False) as live:
        while watch or any(status.state in _AT_WORK for status in statuses):
            time.sleep(every)
            statuses = _statuses(folders, watch)
            live.update(screen(statuses), refresh=True)
    # what stays on the terminal when the view is gone
    console.print(screen(statuses))
