"""Small chips for tests: lysozyme on a detector of 0.2 Mpx."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.simulation import simulation_parameters as p
from ssx_mpi.simulation.data_set import simulate
from ssx_mpi.simulation.still_images import ImageTruth

CELL = "unit_cell=79.1,79.1,38.2,90,90,90"
SYMMETRY = ("space_group=P43212", CELL)


def small_chip(file: Path, distance: float = 75.0, strong: bool = True, **changes: Any) -> list[ImageTruth]:
    """Images in `file`, by default with one strong crystal where there is one; returns what is on them.

    Parameters
    ----------
    file
        ``.nxs`` for data files of eight images each, ``.cbf`` for a file each.
    distance
        Of the detector, in millimetres.
    changes
        Other fields of the parameters of the simulation.
    """
    if file.suffix == ".cbf":
        output = p.OutputParameters(file, format="cbf")
    else:
        output = p.OutputParameters(file, images_per_file=8, compression="gzip")
    bright = {"brightness": 3000.0, "brightness_spread": 0.3} if strong else {}
    wanted = {
        "lattices": (1.0,),
        "crystal": p.CrystalParameters(d_min=2.2, **bright),
        "detector": p.DetectorParameters("pilatus200k", distance),
        "output": output,
        **changes,
    }
    with warnings.catch_warnings():
        # dxtbx loads pint for NeXus, which warns at import
        warnings.simplefilter("ignore")
        truths = simulate(p.SimulationParameters(**wanted), SerialCommunicator())
    assert truths is not None
    return truths
