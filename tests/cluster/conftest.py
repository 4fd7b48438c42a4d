"""A Slurm for the tests of this folder, and small data for its jobs."""

import os
import sys
from pathlib import Path

import pytest
import slurm

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes; the tests are skipped where Slurm is not installed."""
    why = slurm.missing()
    if why:
        pytest.skip(why)
    # the path of a socket may not be long
    home = tmp_path_factory.mktemp("slurm")
    running = slurm.Cluster(home)
    try:
        running.start()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def programs() -> dict[str, str]:
    """The PATH of jobs, with the programs on it."""
    return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
