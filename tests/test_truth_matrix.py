"""A cell of the matrix of truth, from images to merged intensities, and how cells are judged."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import truth_matrix


@pytest.mark.parametrize(("name", "n", "cc"), [("6 images", 1300, 0.97), ("12 images", 2100, 0.975)])
def test_few_crystals_are_not_behind_plain_averaging(name, n, cc, tmp_path):
    numbers = truth_matrix.run_cell(truth_matrix.CELLS[name], tmp_path, dials=False)
    assert truth_matrix.behind(numbers) == []
    assert numbers["hits_indexed"] == numbers["hits"] and numbers["false_lattices"] == 0
    assert numbers["n"] > n
    # plain averaging of these has 0.957 and 0.942
    assert numbers["plain"]["ours"] > cc
    assert 0.8 < numbers["deviation"] < 1.3
    # what was done is taken
    assert truth_matrix.run_cell(truth_matrix.CELLS[name], tmp_path, dials=False) == numbers


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ({"hits": 3}, ["nothing merged"]),
        ({"n": 100, "plain": {"ours": 0.9, "theirs": 0.904}}, []),
        ({"n": 100, "plain": {"ours": 0.9, "theirs": 0.91}}, ["CC behind plain by 0.010"]),
        ({"n": 100, "dials": {"n": 120, "ours": 0.9, "theirs": 0.8}}, ["17% fewer reflections than dials"]),
        ({"n": 100, "dials": {"n": 120, "ours": 0.9, "theirs": 0.8, "cc_alone": 0.2}}, []),
    ],
)
def test_what_falls_short_is_said(numbers, found):
    assert truth_matrix.behind(numbers) == found


def test_cells_have_names_of_their_own():
    assert len(truth_matrix.CELLS) == len(truth_matrix._cells()) > 50
