"""Pytest on every rank of an MPI job: one voice, and no rank left waiting for another that failed.

A test that fails on one rank while the others are inside a collective would hang, so the first failure ends all ranks.
A fault below Python that nobody notices ends in the traceback of all threads after a time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from mpi4py import MPI

_LONGEST = 100.0


class EndAllRanks:
    """Reports the failure of a test on this rank, and ends the job with it."""

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            rank = f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size}"
            print(f"{report.nodeid} failed on {rank} ({report.when})\n{report.longreprtext}", file=sys.__stderr__)
            sys.__stderr__.flush()
            MPI.COMM_WORLD.Abort(1)


def main(arguments: list[str]) -> int:
    """Run pytest; the worst status of all ranks."""
    faulthandler.dump_traceback_later(_LONGEST, exit=True)
    rank = MPI.COMM_WORLD.rank
    with contextlib.ExitStack() as stack:
        # a folder for each, or one rank removes as old what another has just made
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if rank > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
        options = ["-p", "no:cacheprovider", "--color=no", f"--basetemp={folder}/rank_{rank}"]
        try:
            status = pytest.main([*options, *arguments], plugins=[EndAllRanks()])
        except BaseException:
            traceback.print_exc()
            MPI.COMM_WORLD.Abort(1)
            raise
        # rank 0 made the folders that all share: it stays until all are through
        return MPI.COMM_WORLD.allreduce(int(status), op=MPI.MAX)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
