"""Images whose pixels are no photons, by the whole program."""

from __future__ import annotations

import json
import re

import h5py
import numpy as np
import pytest
from small_chips import SYMMETRY, small_chip
from support import run_mpi, ssx_mpi


@pytest.fixture(scope="module")
def multiplied(tmp_path_factory):
    """A chip with 12.4 keV to a photon, and the same in photons."""
    folder = tmp_path_factory.mktemp("gain")
    files = []
    for name, gain in (("photons", 1.0), ("kev", 12.4)):
        (folder / name).mkdir()
        file = folder / name / "x.nxs"
        small_chip(file, n_images=8, seed=5, hit_rate=1.0)
        files.append(file)
        if gain == 1.0:
            continue
        for path in file.parent.glob("*.h5"):
            with h5py.File(path, "r+") as data:
                counts = data["/entry/data/data"][()]
                del data["/entry/data/data"]
                values = np.where(counts > 60000, -1e6, counts * gain).astype(np.float32)
                data.create_dataset("/entry/data/data", data=values, chunks=(1, *counts.shape[1:]), compression="gzip")
    return files


def go(file, folder, *more, ranks=1):
    steps = "steps=find_spots+index+integrate"
    arguments = (f"image={file}", *SYMMETRY, f"output.directory={folder}", steps, "report.html=False", *more)
    return ssx_mpi(*arguments) if ranks == 1 else run_mpi(ranks, ["-m", "ssx_mpi", *arguments], timeout=300)


def test_it_is_named_and_set(multiplied, tmp_path):
    photons, kev = multiplied
    good = go(photons, tmp_path / "photons")
    assert good.status == 0, good.text
    assert "gain" not in good.out.split("images in")[-1]
    named = go(kev, tmp_path / "named")
    assert re.search(r"Set gain=12\.[345], or gain=auto, with restart=True", named.out.splitlines()[-1]), named.text

    runs = [go(kev, tmp_path / f"{n}", "gain=auto", ranks=n) for n in (1, 2)]
    for run in runs:
        assert run.status == 0, run.text
        assert re.search(r"12\.[345]\d* pixel values to a photon", run.out)
    tables = [(tmp_path / n / "batch_1" / "integrated_1.refl").read_bytes() for n in ("1", "2")]
    assert tables[0] == tables[1]
    found = [json.loads((tmp_path / n / "ssx_mpi.json").read_text())["total"]["counts"] for n in ("photons", "1")]
    assert abs(found[0]["crystals"] - found[1]["crystals"]) <= 1 and found[0]["crystals"] > 4


def test_another_gain_is_another_run(multiplied, tmp_path):
    assert go(multiplied[0], tmp_path, "gain=1").status == 0
    refused = go(multiplied[0], tmp_path, "gain=2")
    assert refused.status == 2 and "gain" in refused.err


@pytest.mark.parametrize("value", ["0", "-1", "many", "nan", "inf"])
def test_what_is_no_gain_is_refused(value, tmp_path):
    refused = ssx_mpi("image=x.nxs", f"gain={value}", f"output.directory={tmp_path}")
    assert refused.status == 2 and "it must be a positive number, or auto" in refused.err
