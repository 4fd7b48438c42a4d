"""What every test shares: a usable DIALS, and the real data where they are."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from ssx_mpi import dials_compat

dials_compat.prepare()
# it costs a second for each of some hundred starts; tests/images/test_header_probe.py turns it on
os.environ["SSX_MPI_PROBE_HEADERS"] = "no"

from small_chips import SYMMETRY, small_chip  # noqa: E402
from stills import Stills, reflections  # noqa: E402

from ssx_mpi.simulation.simulation_parameters import HeaderParameters  # noqa: E402

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
    symmetry = SYMMETRY

    def with_wavelengths(self, folder: Path, of_shots) -> Path:
        """A copy of the images in `folder` whose header has a wavelength (angstrom) for each of them."""
        import h5py

        for path in self.image.parent.glob(f"{self.image.stem}*"):
            shutil.copy(path, folder)
        with h5py.File(folder / self.image.name, "r+") as file:
            name = "entry/instrument/beam/incident_wavelength"
            units = file[name].attrs["units"]
            del file[name]
            file.create_dataset(name, data=of_shots).attrs["units"] = units
        return folder / self.image.name


@pytest.fixture(scope="session")
def chip(tmp_path_factory) -> Chip:
    """24 images of 0.2 Mpx in data files of eight, nine of them with one strong lysozyme crystal."""
    folder = tmp_path_factory.mktemp("chip")
    header = HeaderParameters((0.1, -0.05), 0.0)
    truths = small_chip(folder / "lyso.nxs", n_images=24, seed=5, hit_rate=0.6, header=header)
    return Chip(folder / "lyso.nxs", folder / "truth.expt", tuple(t.index for t in truths if t.lattices))


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
