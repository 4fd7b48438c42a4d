"""A fault of the sample is named, and only that one; a good run is told of none."""

from __future__ import annotations

import re

import numpy as np
import pytest

from ssx_mpi.report.findings import findings

CELL = {"a": 79.1, "b": 79.1, "c": 38.2}
# relative spread of the cells of good crystals
SPREAD = 0.002


def table(seed: int, n: int = 1000, rate: float = 0.4) -> tuple[dict, np.random.Generator]:
    rng = np.random.default_rng(seed)
    hit = (rng.random(n) < rate).astype(np.uint8)
    indexed = (hit > 0) & (rng.random(n) < 0.8)
    columns = {"image": np.arange(n), "hit": hit}
    for name, length in CELL.items():
        values = length * (1 + SPREAD * rng.normal(size=n))
        # some lattices fit by chance
        values = np.where(rng.random(n) < 0.02, length * rng.uniform(0.9, 1.1, n), values)
        columns[name] = np.where(indexed, values, np.nan).astype(np.float32)
    return columns, rng


@pytest.mark.parametrize("n", [30, 200, 1000, 20000])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.4, 0.9, 1.0])
def test_nothing_is_found_in_good_runs(n, rate):
    for seed in range(10):
        columns, rng = table(seed, n, rate)
        assert findings(columns, [rng.normal(10, 5, 200)]) == []


def test_a_run_without_hits_or_images_has_no_blank_part():
    columns, _ = table(0, 300, 0.0)
    assert findings(columns) == []
    assert findings({name: column[:0] for name, column in columns.items()}) == []
    assert findings(None) == []


@pytest.mark.parametrize("false_hits", [0.0, 0.01])
def test_a_blank_half_of_a_chip_is_found(false_hits):
    columns, rng = table(1)
    blank = slice(500, 1000)
    columns["hit"][blank] = rng.random(500) < false_hits
    for name in "abc":
        columns[name][blank] = np.nan
    (found,) = findings(columns)
    first, last = (int(word) for word in found.split()[1:4:2])
    # where the first hit happens to lie, at 40% hits
    assert abs(first - 501) < 20 and abs(last - 1000) < 20
    assert "next to no hits" in found


def test_a_cell_that_drifts_is_found_and_its_kind_is_said():
    columns, _ = table(2)
    columns["c"] = columns["c"] * np.linspace(1, 0.99, 1000, dtype=np.float32)
    (found,) = findings(columns)
    assert "drifts" in found and "not all axes alike" in found and "c -0." in found and " a " not in found.split(";")[0]
    columns, _ = table(3)
    for name in "abc":
        columns[name] = columns[name] * np.linspace(1, 1.01, 1000, dtype=np.float32)
    (found,) = findings(columns)
    assert "drifts" in found and "; all axes alike" in found


@pytest.mark.parametrize("in_turn", [False, True])
def test_two_forms_are_found(in_turn):
    columns, rng = table(4)
    other = np.arange(1000) >= 600 if in_turn else rng.random(1000) < 0.3
    columns["c"] = np.where(other, columns["c"] * np.float32(0.96), columns["c"])
    (found,) = findings(columns)
    lengths = [float(length) for length in re.findall(r"([\d.]+) Å", found)]
    # three standard errors of the medians
    assert "two forms: c is" in found and lengths == pytest.approx([0.96 * 38.2, 38.2], abs=0.03)


def test_radiation_damage_is_found_and_a_falling_b_is_none():
    rng = np.random.default_rng(5)
    rising = np.linspace(0, 15, 300) + rng.normal(0, 5, 300)
    (found,) = findings(None, [rising[:100], rising[100:]])
    assert "B rises" in found
    assert findings(None, [rising[::-1]]) == []
