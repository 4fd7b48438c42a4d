"""Small data sets for the tests of the simulator."""

import warnings

import pytest

from ssx_mpi.simulation.simulation_parameters import (
    CrystalParameters,
    DetectorParameters,
    HeaderParameters,
    OutputParameters,
    SimulationParameters,
)

with warnings.catch_warnings():
    # dxtbx loads pint for NeXus, which warns at import
    warnings.simplefilter("ignore")
    import dxtbx.nexus  # noqa: F401


@pytest.fixture
def small(tmp_path):
    """Makes parameters of a quick data set: few low-resolution reflections on a detector of 0.2 Mpx."""

    def make(**changes) -> SimulationParameters:
        output = {"file": tmp_path / "x.nxs", "images_per_file": 2, **changes.pop("output", {})}
        values = {
            "n_images": 5,
            "hit_rate": 0.6,
            "seed": 3,
            "crystal": CrystalParameters(d_min=2.5),
            "detector": DetectorParameters("pilatus200k", 100.0, bad_pixels=20),
            "header": HeaderParameters((0.3, -0.2), 0.4),
            "output": OutputParameters(**output),
            **changes,
        }
        return SimulationParameters(**values)

    return make
