"""A Slurm for the tests of this folder."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import slurm


@pytest.fixture(scope="session")
def cluster():
    """Two nodes; the tests are skipped where Slurm is not installed."""
    why = slurm.missing()
    if why:
        pytest.skip(why)
    # a short path that everyone may enter, for the sockets
    home = Path(tempfile.mkdtemp(prefix="slurm"))
    home.chmod(0o755)
    running = slurm.Cluster(home)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def programs() -> dict[str, str]:
    """The PATH of jobs, with the programs on it."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
