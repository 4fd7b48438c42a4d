"""Files appear whole or not at all; links point where they should."""

from __future__ import annotations

import json

import pytest

from ssx_mpi.records.files import link, replacing, write_json


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with replacing(path) as file:
        file.write(b"half of")
        file.flush()
        assert json.loads(path.read_text()) == {"old": 1}
        file.write(b" it")
    assert path.read_text() == "half of it"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_no_trace(tmp_path, fault):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(fault), replacing(path) as file:
        file.write(b"half")
        raise fault
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        write_json(path, {"not json": object()})
    assert path.read_text() == "old"


def test_a_link_is_relative_and_can_be_moved_with_its_folder(tmp_path):
    run = tmp_path / "run"
    (run / "batch_1").mkdir(parents=True)
    (run / "batch_1" / "a.refl").write_text("1")
    link(run / "DataFiles" / "a_1.refl", run / "batch_1" / "a.refl")
    run.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "DataFiles" / "a_1.refl").read_text() == "1"


def test_a_link_made_again_points_to_the_new_target(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        link(tmp_path / "there", tmp_path / name)
        link(tmp_path / "there", tmp_path / name)
        assert (tmp_path / "there").read_text() == name


def test_a_file_is_safe_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    from ssx_mpi.records import files

    path, done = tmp_path / "x.json", []
    fsync = files.os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: done.append(path.exists()) or fsync(number))
    files.write_json(path, {"a": 1})
    assert done == [False]
    assert path.exists()
