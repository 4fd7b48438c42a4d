"""Lines of JSON for each image: the keys that others read, and a file that a kill does not spoil."""

from __future__ import annotations

import json

import pytest
from test_image_table import image

from ssx_mpi.records.live_lines import NAME, LiveLines, line_of


def test_a_line_has_the_keys_that_plotters_read():
    found = json.loads(line_of(image(3, lattices=2), "P43212"))
    assert (found["file"], found["file-number"], found["n_spots_total"]) == ("a.nxs", 4, 30)
    assert [lattice["n_indexed"] for lattice in found["lattices"]] == [23, 23]
    assert found["lattices"][0]["unit_cell"] == [79.0, 79.0, 38.0, 90, 90, 90]
    assert found["lattices"][0]["space_group"] == "P43212"
    # two lattices may share spots
    assert found["n_unindexed"] == 0
    assert json.loads(line_of(image(3), "P1"))["n_unindexed"] == 7


def test_the_number_of_a_file_of_one_image_is_that_in_its_name():
    assert json.loads(line_of(image(6), None))["file-number"] == 6


def test_an_image_has_one_line(tmp_path):
    lines = LiveLines(tmp_path, 8)
    for number in (2, 0, 2):
        lines.add(number, line_of(image(number), "P1"))
    lines.close()
    again = LiveLines(tmp_path, 8)
    again.add_earlier([image(k) for k in range(4)], "P1")
    again.close()
    assert [json.loads(line)["image"] for line in (tmp_path / NAME).read_text().splitlines()] == [2, 0, 1, 3]


@pytest.mark.parametrize("rest", [b'{"image": 1, "n', b'{"image": 1}', b"\x00\x00\x00\n", b'{"image": 99}\n'])
def test_what_a_kill_left_of_a_line_is_taken_away(tmp_path, rest):
    whole = line_of(image(0), "P1").encode() + b"\n"
    (tmp_path / NAME).write_bytes(whole + rest)
    lines = LiveLines(tmp_path, 8)
    lines.add(1, line_of(image(1), "P1"))
    lines.close()
    assert (tmp_path / NAME).read_bytes() == whole + line_of(image(1), "P1").encode() + b"\n"
