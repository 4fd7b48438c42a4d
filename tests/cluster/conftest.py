"""A Slurm for the tests of this folder, and small data for its jobs."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import slurm

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))

from stills import Stills, reflections


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


@pytest.fixture(scope="session")
def stills(tmp_path_factory) -> Stills:
    """24 stills of 0.2 Mpx, half of them hits with one lattice."""
    return Stills.simulated(tmp_path_factory.mktemp("simulated") / "x.nxs")


@pytest.fixture(scope="session")
def undisturbed(stills, tmp_path_factory) -> dict[str, tuple]:
    """The reflection files of a run that nobody interrupted."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert stills.run(directory, nproc=1) == 0
    return reflections(directory)
