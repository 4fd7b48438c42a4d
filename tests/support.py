"""Starting programs on MPI ranks from ordinary tests, so that no failure can hang the suite."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
# what a launcher around the tests themselves would have set
_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD", "OMPI_UNIVERSE", "PMI_", "PMIX_", "SLURM_", "MPI_LOCAL", "MV2_")


@dataclass(frozen=True)
class Finished:
    """How a program ended: `status` of the launcher, and what all ranks printed."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def plain_environment(**more: str) -> dict[str, str]:
    """The environment without any launcher's traces, in which Open MPI accepts root and more ranks than cores."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER_VARIABLES)}
    environment.update(
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        OMPI_MCA_rmaps_base_oversubscribe="1",
        PRTE_MCA_mapby=":oversubscribe",
        # several jobs at a time would otherwise all be tied to the first core
        OMPI_MCA_hwloc_base_binding_policy="none",
        PYTHONFAULTHANDLER="1",
        # a second for each of some hundred starts; tests/images/test_header_probe.py has its own
        SSX_MPI_PROBE_HEADERS="no",
    )
    return {**environment, **more}


def run_mpi(
    n: int, arguments: Sequence[str | Path], timeout: float, cwd: Path | None = None, **environment: str
) -> Finished:
    """Run Python with `arguments` (a script, or -m and a module) on `n` ranks that MPI connects.

    A launcher that belongs to another MPI starts `n` programs that know nothing of each other: here each rank checks
    the size of its world first. A job that takes longer than `timeout` seconds is ended, and fails the test.
    """
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec")
    checked = [sys.executable, str(TESTS / "on_ranks.py"), str(n), *map(str, arguments)]
    return run([mpiexec, "-n", str(n), *checked], timeout, cwd, **environment)


def run(command: Sequence[str], timeout: float, cwd: Path | None = None, **environment: str) -> Finished:
    """Run `command`; it is ended, and the test fails, after `timeout` seconds."""
    process = start(command, cwd, **environment)
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = end(process)
        pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{out}\n{err}")
    return Finished(process.returncode, out, err)


def start(command: Sequence[str], cwd: Path | None = None, **environment: str) -> subprocess.Popen:
    """Start `command` in a process group of its own."""
    return subprocess.Popen(
        command,
        cwd=cwd,
        env=plain_environment(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen) -> tuple[str, str]:
    """End a process and those that it started: mpiexec gets the time to end its ranks."""
    process.send_signal(signal.SIGTERM)
    try:
        return process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def ssx_mpi(*arguments: str) -> Finished:
    """Run the program on this process alone, as its users start it with ``nproc=1``; nothing of it stays behind."""
    from ssx_mpi.command_line import process

    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in signals]
    logger = logging.getLogger("ssx_mpi")
    logged = list(logger.handlers)
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            # dxtbx divides zero by zero where it looks for the step of an axis that does not turn
            warnings.simplefilter("ignore", RuntimeWarning)
            process.run([*arguments, "nproc=1"])
    except SystemExit as left:
        status = left.code
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = logged
        for number, before in zip(signals, handlers):
            signal.signal(number, before)
    assert isinstance(status, int), status
    return Finished(status, out.getvalue(), err.getvalue())


class PlainJob:
    """What a job for the dispatch has to have besides its work, for tests that do not care about it."""

    def note(self, value):
        return value

    def waiting(self):
        pass

    def silent(self, rank, seconds):
        raise AssertionError(f"rank {rank} is taken for silent")

    def progress(self, done):
        pass

    def stopping(self):
        return False
