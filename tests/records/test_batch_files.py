"""The folder of a batch: its journal while it is worked on, its files and its summary when it is complete."""

from __future__ import annotations

import json

import pytest
from dials.array_family import flex
from dxtbx.model.experiment_list import ExperimentListFactory
from test_joined_experiments import experiments

from ssx_mpi.records.batch_files import BatchRecords, batches, read_summary
from ssx_mpi.records.joined_experiments import COMMON
from ssx_mpi.records.joined_tables import take_apart
from ssx_mpi.records.journal import encode

IDENTITY = {"run": "abc"}
STEPS = ("find_spots", "index", "integrate")
MODELS = experiments(10).to_dict()
SHARED = {"detector": MODELS["detector"][0], "beam": MODELS["beam"][0]}


def reflections(n: int, names: list[str]):
    table = flex.reflection_table()
    table["id"] = flex.int([k % len(names) for k in range(n)])
    table["imageset_id"] = flex.int(n, 0)
    table["value"] = flex.double(range(n))
    for k, name in enumerate(names):
        table.experiment_identifiers()[k] = name
    return take_apart(table.as_msgpack())


def record(image: int, n_lattices: int) -> bytes:
    """The record of an image with lattices, or of a blank."""
    edges = [10 + image + k / 10 for k in range(n_lattices)]
    own = {**experiments(*edges).to_dict(), "detector": [COMMON], "beam": [COMMON]}
    imported = {**own, "crystal": [], "experiment": [{"identifier": f"image-{image}", "detector": 0, "beam": 0}]}
    tables, lists = {"strong": reflections(4 + image, [f"image-{image}"])}, {"imported": imported}
    if n_lattices:
        names = [e["identifier"] for e in own["experiment"]]
        tables |= {name: reflections(6 + image, names) for name in ("indexed", "integrated")}
        lists |= {"indexed": own, "integrated": own}
    return encode(image, {"numbers": {"image": image}, "experiments": lists}, tables)


@pytest.fixture
def batch(tmp_path):
    """Images 8 to 11: the third batch of four."""
    return batches(tmp_path, 14, 4)[2]


def records(batch, keep=True, steps=STEPS) -> BatchRecords:
    return BatchRecords(batch, IDENTITY, steps, SHARED, keep)


def test_batches_cover_the_images_in_order(tmp_path):
    made = batches(tmp_path, 14, 4)
    assert [(b.number, b.first, b.stop) for b in made] == [(1, 0, 4), (2, 4, 8), (3, 8, 12), (4, 12, 14)]
    assert made[3].folder == tmp_path / "batch_4"
    assert batches(tmp_path, 0, 4) == []


def test_what_is_missing_is_known_after_a_kill(batch):
    begun = records(batch)
    assert begun.missing == [(8, 12)]
    begun.add(record(9, 1))
    begun.close()
    again = records(batch)
    assert (again.missing, again.complete) == ([(8, 9), (10, 12)], False)
    assert BatchRecords.begun(batch) == STEPS
    again.close()


@pytest.mark.parametrize("order", [(8, 9, 10, 11), (11, 9, 8, 10)])
def test_files_are_in_the_order_of_the_images(batch, order):
    own = records(batch)
    for image in order:
        own.add(record(image, n_lattices=(image - 8) % 3))
    assert own.complete
    own.finish({"any": 1}, list(STEPS), [])
    made = ExperimentListFactory.from_json_file(str(batch.folder / "integrated_1.expt"), check_format=False)
    table = flex.reflection_table.from_file(str(batch.folder / "integrated_1.refl"))
    assert [e.identifier for e in made] == ["edge-19.0", "edge-20.0", "edge-20.1"]
    assert dict(table.experiment_identifiers()) == dict(enumerate(e.identifier for e in made))
    assert sorted(set(table["id"])) == [0, 1, 2]
    assert list(table["value"]) == [*range(15), *range(16)]
    assert len({id(e.detector) for e in made}) == 1 or len(made.detectors()) == 1
    assert json.loads((batch.folder / "images.json").read_text()) == [{"image": i} for i in range(8, 12)]
    assert not BatchRecords.begun(batch)


def test_intermediate_files_are_left_out_on_request(batch):
    own = records(batch, keep=False)
    for image in range(8, 12):
        own.add(record(image, 1))
    own.finish({}, list(STEPS), [])
    names = {p.name for p in batch.folder.iterdir()}
    assert names == {"integrated_1.expt", "integrated_1.refl", "images.json", "batch.json"}


def test_the_last_step_is_written_even_then(batch):
    own = records(batch, keep=False, steps=("find_spots",))
    for image in range(8, 12):
        own.add(record(image, 0))
    own.finish({}, ["find_spots"], [])
    assert {"strong.refl", "imported.expt"} <= {p.name for p in batch.folder.iterdir()}
    imported = ExperimentListFactory.from_json_file(str(batch.folder / "imported.expt"), check_format=False)
    strong = flex.reflection_table.from_file(str(batch.folder / "strong.refl"))
    assert [e.identifier for e in imported] == list(dict(strong.experiment_identifiers()).values())


def test_nothing_indexed_gives_no_such_files(batch):
    own = records(batch)
    for image in range(8, 12):
        own.add(record(image, 0))
    own.finish({}, list(STEPS), [])
    assert not list(batch.folder.glob("in[dt]e*"))


def test_a_summary_is_that_of_one_run(batch):
    assert read_summary(batch, IDENTITY) is None
    own = records(batch)
    for image in range(8, 12):
        own.add(record(image, 1))
    own.finish({"counts": 4}, list(STEPS), [])
    summary = read_summary(batch, IDENTITY)
    assert summary is not None
    assert (summary["first"], summary["stop"], summary["statistics"]) == (8, 12, {"counts": 4})
    assert summary["steps"] == list(STEPS)
    assert read_summary(batch, {"run": "other"}) is None


def test_the_summary_is_written_when_all_else_is_there(tmp_path, monkeypatch):
    from ssx_mpi.records import batch_files

    (batch,) = batches(tmp_path, 2, 2)
    records = BatchRecords(batch, IDENTITY, STEPS, SHARED)
    for image in range(2):
        records.add(record(image, 1))
    there = {}
    write = batch_files.write_json
    monkeypatch.setattr(
        batch_files,
        "write_json",
        lambda path, content: (
            there.update({path.name: {p.name for p in batch.folder.iterdir()}}) or write(path, content)
        ),
    )
    records.finish({}, list(STEPS), [])
    wanted = {"strong.refl", "indexed.refl", "integrated_1.refl", "imported.expt", "indexed.expt", "integrated_1.expt"}
    assert wanted | {"images.json", "journal"} <= there["batch.json"]
    assert not (batch.folder / "journal").exists()
