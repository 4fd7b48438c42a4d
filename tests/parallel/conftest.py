"""A small simulated data set and what an undisturbed run makes of it."""

import pytest
from stills import Stills, reflections


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
