"""A small simulated data set and what an undisturbed run makes of it."""

import warnings

import pytest
from stills import Stills, reflections

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.parameters import (
    CrystalParameters,
    DetectorParameters,
    OutputParameters,
    SimulationParameters,
)

with warnings.catch_warnings():
    # dxtbx loads pint for NeXus, which warns at import
    warnings.simplefilter("ignore")
    import dxtbx.nexus  # noqa: F401


@pytest.fixture(scope="session")
def stills(tmp_path_factory) -> Stills:
    """24 stills of 0.2 Mpx, half of them hits with one lattice."""
    image = tmp_path_factory.mktemp("simulated") / "x.nxs"
    parameters = SimulationParameters(
        n_images=24,
        hit_rate=0.5,
        seed=5,
        lattices=(1.0,),
        crystal=CrystalParameters(d_min=2.2),
        detector=DetectorParameters("pilatus200k", 100.0),
        output=OutputParameters(file=image, compression="gzip", images_per_file=8),
    )
    simulate(parameters, SerialCommunicator())
    return Stills(image)


@pytest.fixture(scope="session")
def undisturbed(stills, tmp_path_factory) -> dict[str, tuple]:
    """The reflection files of a run that nobody interrupted."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    assert stills.run(directory, nproc=1) == 0
    return reflections(directory)
