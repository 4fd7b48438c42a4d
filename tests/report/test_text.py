"""Blocks of text say what the numbers say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ssx_mpi.report import text
from ssx_mpi.report.statistics import Statistics


def statistics(n_images: int, n_hits: int) -> Statistics:
    total = Statistics()
    lattice = {"n_indexed": 50, "rmsd_x": 0.3, "rmsd_y": 0.4, "cell": (79.1, 79.1, 38.2, 90, 90, 90), "d_min": 2.0}
    for k in range(n_images):
        hit = k < n_hits
        total.add_image(
            {
                "name": f"x_{k}.cbf",
                "hit": hit,
                "lattices": [lattice] if hit else [],
                "crystals": [],
                "failures": [("integrate", "no room")] if hit else [],
                "seconds": {"find_spots": 0.5},
            }
        )
    return total


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "1 min"), (3599, "59 min"), (3600, "1 h 00 min"), (90_000, "25 h 00 min")],
)
def test_durations(seconds, words):
    assert text.duration(seconds) == words


def test_shares_of_nothing_are_counts():
    assert text.share(0, 0) == "0"
    assert text.share(1, 3) == "1 (33.3%)"


def test_a_batch_stands_beside_all_so_far():
    block = text.progress_block("Batch 2 of 9", statistics(4, 1), statistics(10, 5), 3.25, 150.0)
    lines = block.splitlines()
    assert lines[0] == "Batch 2 of 9"
    assert next(l for l in lines if l.startswith("hits")).split() == ["hits", "1", "(25.0%)", "5", "(50.0%)"]
    assert lines[-1] == "3.25 images/s, about 2 min left"


def test_an_empty_batch_has_dashes_for_what_is_not_known():
    block = text.progress_block("Batch", statistics(4, 0), statistics(4, 0), 0.0, None)
    assert next(l for l in block.splitlines() if l.startswith("rmsd")).split()[-2:] == ["-", "-"]


def test_the_end_says_what_was_left_out_and_where_the_time_went():
    block = text.final_block(statistics(10, 5), 6, 20.0, 4)
    assert "5  integrate: no room" in block
    assert "find_spots 5.0" in block
    assert "6 images in 20 s on 4 ranks, 0.30 images/s" in block


def refined(cell_a: float, distance: float):
    return SimpleNamespace(
        cell_after=(cell_a, cell_a, 38.2, 90, 90, 90),
        before=SimpleNamespace(distance=100.0),
        after=SimpleNamespace(distance=distance),
    )


def test_a_cell_that_moved_is_warned_of_with_both_explanations():
    given = (79.1, 79.1, 38.2, 90, 90, 90)
    assert text.cell_warning(refined(79.1 * 1.004, 100.4), given) is None
    warning = text.cell_warning(refined(79.1 * 0.986, 98.6), given)
    assert warning is not None
    for words in ("-1.40%", "the distance in the header", "the cell given", "restrain_cell=True"):
        assert words in warning


def test_a_cell_that_is_not_known_is_a_dash():
    assert text.cell(None) == "-"
    assert text.cell((79.123, 79.1, 38.2, 90, 90, 120)) == "79.12, 79.10, 38.20, 90.0, 90.0, 120.0"


def test_parts_are_named_by_what_tells_them_apart():
    from ssx_mpi.report.text import _short

    assert _short(["/e/d/p0/offset", "/e/d/p1/offset", "/e/d/q"]) == ["p0/offset", "p1/offset", "d/q"]
    assert _short(["/e/a", "/e/b"]) == ["a", "b"]
    assert _short(["side 0", "side 1"]) == ["side 0", "side 1"]
    assert _short([]) == []
