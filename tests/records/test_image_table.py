"""The table of all images: a row for each, batch by batch, made again from the batches where it is damaged."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from ssx_mpi.records import image_table
from ssx_mpi.records.batch_files import Batch
from ssx_mpi.records.files import StorageError
from ssx_mpi.records.image_table import COLUMNS, NAME, ImageTable, read_columns


def image(number: int, hit: bool = True, lattices: int = 1, failure: str = "") -> dict:
    lattice = {
        "n_indexed": 20 + number,
        "rmsd_x": 0.3,
        "rmsd_y": 0.4,
        "cell": [79.0, 79.0, 38.0, 90, 90, 90],
        "d_min": 2.1,
    }
    crystal = {"n_reflections": 500, "i_over_sigma": 3.0, "cell": [79.1, 79.1, 38.1, 90, 90, 90], "mosaicity": 0.05}
    return {
        "image": number,
        "name": f"a.nxs:{number + 1}" if number < 6 else f"b_{number:05d}.cbf",
        "n_spots": 30 if hit else 2,
        "hit": hit,
        "measured": {"background": 1.5, "ice": 0.25, "n_saturated": 4, "spots_d_min": None},
        "lattices": [lattice] * lattices,
        "crystals": [crystal] * lattices,
        "failures": [failure.split(": ", 1)] if failure else [],
        "seconds": {"find_spots": 0.1, "index": 0.2},
    }


@pytest.fixture
def batches(tmp_path):
    """Two batches of five and three images; one image of the first was left out of its files."""
    made = []
    for number, (first, stop) in enumerate(((0, 5), (5, 8)), start=1):
        folder = tmp_path / f"batch_{number}"
        folder.mkdir()
        images = [
            image(k, hit=k != 1, lattices=int(k not in (1, 2)), failure="index: none" if k == 2 else "")
            for k in range(first, stop)
        ]
        (folder / "images.json").write_text(json.dumps(images))
        made.append(Batch(number, first, stop, folder))
    return made


def test_rows_say_what_became_of_the_images(tmp_path, batches):
    table = ImageTable(tmp_path, 8)
    for batch in batches:
        table.add(batch)
    columns = read_columns(tmp_path)
    assert columns["image"].tolist() == list(range(8))
    assert columns["hit"].tolist() == [1, 0, 1, 1, 1, 1, 1, 1]
    assert columns["n_lattices"].tolist() == [1, 0, 0, 1, 1, 1, 1, 1]
    assert columns["n_indexed"].tolist() == [20, 0, 0, 23, 24, 25, 26, 27]
    assert columns["rmsd"][0] == pytest.approx(0.5) and np.isnan(columns["rmsd"][1])
    assert columns["a"][0] == pytest.approx(79.1), "of the integrated crystal"
    assert columns["cpu_seconds"][0] == pytest.approx(0.3)
    assert [columns["reasons"][k] if k >= 0 else "" for k in columns["reason"]] == ["", "", "index: none", *[""] * 5]
    assert [columns["files"][k] for k in columns["file"]] == ["a.nxs"] * 6 + ["b_00006.cbf", "b_00007.cbf"]
    assert columns["frame"].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]


def test_what_is_not_finished_is_not_there(tmp_path, batches):
    ImageTable(tmp_path, 8).add(batches[1])
    columns = read_columns(tmp_path)
    assert columns["image"].tolist() == [5, 6, 7]
    assert read_columns(tmp_path / "batch_1") is None


def test_a_reader_does_not_keep_the_run_from_writing(tmp_path, batches):
    table = ImageTable(tmp_path, 8)
    table.add(batches[0])
    code = (
        "import h5py, sys; f = h5py.File(sys.argv[1], 'r'); print(f['images/finished'][:].sum(), flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout.readline().strip() == "5"
        table.add(batches[1])
        reader.communicate("\n", timeout=60)
    assert len(read_columns(tmp_path)["image"]) == 8


@pytest.mark.parametrize("damage", ["missing", "cut", "nonsense", "other run"])
def test_a_damaged_table_is_made_again(tmp_path, batches, damage):
    ImageTable(tmp_path, 8).complete(batches)
    path = tmp_path / NAME
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "nonsense":
        path.write_bytes(b"nothing that HDF5 knows")
    else:
        path.unlink()
        ImageTable(tmp_path, 3).complete([])
    ImageTable(tmp_path, 8).complete(batches)
    assert len(read_columns(tmp_path)["image"]) == 8


def test_batches_that_are_missing_are_added_and_no_others_read(tmp_path, batches):
    table = ImageTable(tmp_path, 8)
    table.complete(batches[:1])
    # whoever reads it again fails
    (batches[0].folder / "images.json").unlink()
    table.complete(batches)
    assert len(read_columns(tmp_path)["image"]) == 8


def test_rows_from_before_a_further_step_are_not_its_outcome(tmp_path, batches):
    # found spots are in the table; the second batch is to be indexed, and the run is killed when that is written
    ImageTable(tmp_path, 8).complete(batches)
    ImageTable(tmp_path, 8).complete(batches[:1])
    assert read_columns(tmp_path)["image"].tolist() == [0, 1, 2, 3, 4]
    path = batches[1].folder / "images.json"
    images = json.loads(path.read_text())
    for each in images:
        each["n_spots"] = 77
    path.write_text(json.dumps(images))
    ImageTable(tmp_path, 8).complete(batches)
    assert read_columns(tmp_path)["n_spots"][5:].tolist() == [77, 77, 77]


def test_names_are_written_once_and_go_on_where_another_start_left_them(tmp_path, batches):
    table = ImageTable(tmp_path, 8)
    table.add(batches[0])
    table.add(batches[0])
    assert read_columns(tmp_path)["files"] == ["a.nxs"]
    ImageTable(tmp_path, 8).add(batches[1])
    columns = read_columns(tmp_path)
    assert columns["files"] == ["a.nxs", "b_00006.cbf", "b_00007.cbf"]
    assert [columns["files"][k] for k in columns["file"]] == ["a.nxs"] * 6 + ["b_00006.cbf", "b_00007.cbf"]


def test_columns_have_units_and_meanings(tmp_path, batches):
    ImageTable(tmp_path, 8).complete(batches)
    with h5py.File(tmp_path / NAME, "r") as file:
        assert set(file["images"]) == set(COLUMNS)
        assert file["images"]["a"].attrs["units"] == "angstrom"
        assert all("units" in column.attrs and "long_name" in column.attrs for column in file["images"].values())
        assert file.attrs["version"] == 2


def test_many_images_take_little_room(tmp_path):
    ImageTable(tmp_path, 10_000_000).complete([])
    assert (tmp_path / NAME).stat().st_size < 1_000_000


@pytest.mark.parametrize("content", ["{", "[1]", '[{"image": 0, "lattices": []}]', '[{"image": 999}]'])
def test_a_batch_whose_numbers_are_damaged_is_named_and_others_are_there(tmp_path, batches, content):
    path = batches[0].folder / "images.json"
    path.write_text(content)
    (said,) = ImageTable(tmp_path, 8).complete(batches)
    assert said == f"{path} is damaged: images.h5 lacks the images of batch 1"
    assert read_columns(tmp_path)["image"].tolist() == [5, 6, 7]


def test_what_was_measured_has_columns(tmp_path, batches):
    ImageTable(tmp_path, 8).complete(batches)
    columns = read_columns(tmp_path)
    assert set(columns["background"]) == {1.5} and set(columns["ice"]) == {0.25} and set(columns["n_saturated"]) == {4}
    assert np.isnan(columns["spots_d_min"]).all()


def test_a_table_without_a_column_is_read(tmp_path, batches):
    ImageTable(tmp_path, 8).complete(batches)
    with h5py.File(tmp_path / NAME, "r+") as file:
        del file["images"]["ice"], file["images"]["n_saturated"]
    columns = read_columns(tmp_path)
    assert np.isnan(columns["ice"]).all() and set(columns["n_saturated"]) == {-1} and len(columns["a"]) == 8


def test_room_is_made_sure_of_before_a_batch_is_written(tmp_path, monkeypatch):
    # a library that finds a full disk when it closes its file ends the process
    rng, n, asked = np.random.default_rng(1), 2000, []
    monkeypatch.setattr(image_table, "make_sure_of_room", lambda path, n_bytes: asked.append(n_bytes))
    table = ImageTable(tmp_path, 40_000)
    # the second lies in two chunks
    for number, first in ((1, 0), (2, 15_500)):
        images = []
        for k in range(first, first + n):
            one = image(k)
            one["name"] = f"/{'folder' * 20}/{k:08d}_{rng.integers(1 << 40)}.cbf"
            one["n_spots"] = int(rng.integers(1 << 30))
            one["measured"] = {name: float(rng.normal()) for name in ("background", "ice", "spots_d_min", "wavelength")}
            images.append(one)
        folder = tmp_path / f"batch_{number}"
        folder.mkdir()
        (folder / "images.json").write_text(json.dumps(images))
        table.complete([])
        before = (tmp_path / NAME).stat().st_size
        table.add(Batch(number, first, first + n, folder))
        assert (tmp_path / NAME).stat().st_size - before < asked[-1]


def test_a_full_disk_is_named_and_leaves_the_table_as_it_was(tmp_path, batches, monkeypatch):
    table = ImageTable(tmp_path, 8)
    table.add(batches[0])
    before = (tmp_path / NAME).read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=f"{NAME} cannot be written: No space left on device"):
        table.add(batches[1])
    assert (tmp_path / NAME).read_bytes() == before
    assert not list(tmp_path.glob(".room*"))
