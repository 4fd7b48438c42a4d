"""What every test shares: a usable DIALS, and the real data where they are."""

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
