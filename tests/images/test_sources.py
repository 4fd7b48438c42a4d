"""The images that a user names: files, wildcards, and which files of a folder lead to the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssx_mpi.images.sources import expand, find_images
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.parameters.user_input import InputError


def test_wildcards_are_the_files_that_match_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 1):
        (tmp_path / f"shot_{number}.cbf").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    found = find_images((Source("image", str(tmp_path / "shot_*.cbf")),))
    assert [found.name(k) for k in range(len(found))] == ["shot_1.cbf", "shot_9.cbf", "shot_10.cbf"]
    with pytest.raises(InputError, match=r"none_\*.cbf: no file matches"):
        find_images((Source("image", str(tmp_path / "none_*.cbf")),))


def test_a_file_that_has_the_name_of_a_pattern_is_itself(tmp_path):
    for name in ("a[1].cbf", "a1.cbf"):
        (tmp_path / name).write_bytes(b"")
    found = find_images((Source("image", str(tmp_path / "a[1].cbf")),))
    assert [found.name(k) for k in range(len(found))] == ["a[1].cbf"]


def test_of_hdf5_files_that_match_the_masters_lead(tmp_path):
    names = ("a_1_master.h5", "a_2_master.h5", "a_1_data_000001.h5")
    for name in names:
        (tmp_path / name).write_bytes(b"")
    found = [Path(one.name).name for one in expand(Source("image", str(tmp_path / "a_*.h5"), 1, 5))]
    assert found == ["a_1_master.h5", "a_2_master.h5"]
