"""Stands between a user and mpiexec: a request to stop goes to the ranks, which mpiexec itself would kill.

Launchers differ in which signals they pass on, and most answer SIGTERM by ending the ranks within a second. So the ranks
are asked directly; they finish what they have in hand, and mpiexec returns their exit code.

Started as ``python -m ssx_mpi.parallel.relay mpiexec ...``; imports nothing that is large.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def descendants(process: int) -> list[int]:
    """Processes of this machine that `process` has started, directly or not."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # the name of the program, in brackets, may hold anything
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    found, new = [], [process]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


def is_rank(process: int) -> bool:
    """Whether `process` is ``python -m`` one of our programs."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return words[1:2] == [b"-m"] and words[2].startswith(b"ssx_mpi")


def main(command: list[str]) -> int:
    """Run `command` and pass requests to stop on to the ranks that it starts; returns its exit code."""
    launcher = subprocess.Popen(command)

    def ask(number: int, frame) -> None:
        for rank in filter(is_rank, descendants(launcher.pid)):
            try:
                os.kill(rank, number)
            except ProcessLookupError:
                pass

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, ask)
    # the terminal sends it to the launcher too, which ends the ranks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = launcher.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
