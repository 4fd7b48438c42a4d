"""What every test shares: a usable DIALS, and the real data where they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ssx_mpi import dials_compat

dials_compat.prepare()

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real images and results; the test is skipped where it is absent."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"real data are not at {REAL_DATA}")
    return REAL_DATA


@pytest.fixture(scope="session")
def thaumatin_images(real_data, tmp_path_factory) -> Path:
    """Folder with the thaumatin stills unpacked: ``thau_3_2_0001.cbf`` and so on."""
    import bz2

    folder = tmp_path_factory.mktemp("thaumatin")
    for packed in sorted((real_data / "thaumatin_grid").glob("*.cbf.bz2")):
        (folder / packed.stem).write_bytes(bz2.decompress(packed.read_bytes()))
    return folder


@dataclass(frozen=True)
class Chip:
    """A simulated chip: images in one file, the true geometry, and the images that have a crystal (from zero)."""

    image: Path
    truth: Path
    hits: tuple[int, ...]

    #: what a user gives for it
    symmetry = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90")


@pytest.fixture(scope="session")
def chip(tmp_path_factory) -> Chip:
    """24 images of 0.2 Mpx in data files of eight, nine of them with one strong lysozyme crystal."""
    import warnings

    from ssx_mpi.parallel.communicator import SerialCommunicator
    from ssx_mpi.simulation import parameters as p
    from ssx_mpi.simulation.data_set import simulate

    folder = tmp_path_factory.mktemp("chip")
    wanted = p.SimulationParameters(
        n_images=24,
        seed=5,
        hit_rate=0.6,
        lattices=(1.0,),
        crystal=p.CrystalParameters(d_min=2.2, brightness=3000.0, brightness_spread=0.3),
        detector=p.DetectorParameters("pilatus200k", 75.0),
        header=p.HeaderParameters((0.1, -0.05), 0.0),
        output=p.OutputParameters(folder / "lyso.nxs", images_per_file=8, compression="gzip"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truths = simulate(wanted, SerialCommunicator())
    assert truths is not None
    return Chip(folder / "lyso.nxs", folder / "truth.expt", tuple(t.index for t in truths if t.lattices))
