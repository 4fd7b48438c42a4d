"""Numbers of images add up in any order, and medians from histograms are those of the values."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ssx_mpi.report.statistics import Histogram, Statistics

positive = st.floats(1e-3, 1e4)
cells = st.tuples(*[st.floats(20, 400)] * 3, *[st.floats(60, 120)] * 3)
lattices = st.fixed_dictionaries(
    {"n_indexed": st.integers(10, 500), "rmsd_x": positive, "rmsd_y": positive, "cell": cells, "d_min": positive}
)
crystals = st.fixed_dictionaries(
    {
        "n_reflections": st.integers(0, 5000),
        "i_over_sigma": st.floats(-5, 100),
        "cell": cells,
        "mosaicity": st.none() | st.floats(0, 1),
    }
)
# times as counts of a clock whose sums are exact
seconds = st.dictionaries(
    st.sampled_from(["find_spots", "index", "integrate"]), st.integers(0, 1000).map(lambda n: n / 64)
)
images = st.fixed_dictionaries(
    {
        "name": st.text("abc", min_size=1, max_size=3),
        "hit": st.booleans(),
        "lattices": st.lists(lattices, max_size=2),
        "crystals": st.lists(crystals, max_size=2),
        "failures": st.lists(st.tuples(st.sampled_from(["read", "index"]), st.sampled_from(["x", "y"])), max_size=2),
        "seconds": seconds,
    }
)


def of(some) -> Statistics:
    total = Statistics()
    for image in some:
        total.add_image(image)
    return total


several = st.lists(images, max_size=3)


@given(several, several, several)
@settings(deadline=None, max_examples=20)
def test_statistics_are_a_commutative_monoid(first, second, third):
    a, b, c = of(first), of(second), of(third)
    assert (a + b) + c == a + (b + c)
    assert a + b == b + a
    assert a + Statistics() == Statistics() + a == a
    assert a + b + c == of([*first, *second, *third])


@given(several)
@settings(deadline=None, max_examples=40)
def test_statistics_survive_json_but_for_rounded_times(some):
    before = of(some)
    after = Statistics.from_json(json.loads(json.dumps(before.as_json())))
    for name in ("counts", "failures"):
        assert +getattr(after, name) == +getattr(before, name)
    assert after.values == before.values
    assert after.seconds == pytest.approx(before.seconds, abs=1e-3)
    assert after.slowest[1] == before.slowest[1]
    assert after.as_json() == before.as_json()


@given(several)
@settings(deadline=None, max_examples=40)
def test_counts_are_those_of_the_images(some):
    counts = of(some).counts
    assert counts["images"] == len(some)
    assert counts["hits"] == sum(i["hit"] for i in some)
    assert counts["indexed"] == sum(bool(i["lattices"]) for i in some)
    assert counts["lattices"] == sum(len(i["lattices"]) for i in some)
    assert counts["crystals"] == sum(len(i["crystals"]) for i in some)
    assert counts["reflections"] == sum(c["n_reflections"] for i in some for c in i["crystals"])


@given(st.lists(positive, min_size=1, max_size=60), st.sampled_from([1e-4, 1e-2]))
@settings(deadline=None)
def test_quantiles_are_within_a_bin_of_the_values(values, step):
    histogram = Histogram(step)
    for value in values:
        histogram.add(value)
    ordered = sorted(values)
    assert histogram.n == len(values)
    for q in (0.25, 0.5, 0.75):
        at = q * len(values)
        below, above = ordered[max(0, math.ceil(at) - 1)], ordered[min(len(values) - 1, math.floor(at))]
        found = histogram.quantile(q)
        assert below * (1 - 1.01 * step) <= found <= above * (1 + 1.01 * step)


def test_the_median_cell_of_many_crystals_is_known_to_a_part_in_ten_thousand():
    rng = np.random.default_rng(1)
    edges = rng.normal(79.1, 0.08, 1001)
    total = Statistics()
    for edge in edges:
        crystal = {"n_reflections": 1, "i_over_sigma": 1.0, "cell": (edge, edge, 38.2, 90, 90, 90), "mosaicity": 0.1}
        image = {"name": "x", "hit": True, "lattices": [], "crystals": [crystal], "failures": [], "seconds": {}}
        total.add_image(image)
    assert total.median_cell is not None
    assert total.median_cell[0] == pytest.approx(np.median(edges), rel=1e-4)
    assert total.values["a"].spread == pytest.approx(0.08, rel=0.1)


@given(st.lists(positive, min_size=2, max_size=50))
@settings(deadline=None)
def test_few_distinct_values_have_no_more_spread_than_they_have(values):
    assume(max(values) > min(values))
    histogram = Histogram(1e-4)
    for value in values:
        histogram.add(value)
    assert histogram.spread <= (max(values) - min(values)) / 1.349 + 2e-4 * max(values)


def test_what_is_no_positive_number_is_not_counted():
    histogram = Histogram()
    for value in (0.0, -1.0, math.nan, math.inf):
        histogram.add(value)
    assert (histogram.n, histogram.median, histogram.spread) == (0, None, None)
    assert Statistics().median_cell is None


def test_cells_are_those_of_integrated_crystals_where_there_are_any():
    lattice = {"n_indexed": 50, "rmsd_x": 3.0, "rmsd_y": 4.0, "cell": (50,) * 3 + (90,) * 3, "d_min": 2.0}
    crystal = {"n_reflections": 9, "i_over_sigma": 2.0, "cell": (60,) * 3 + (90,) * 3, "mosaicity": 0.1}
    image = {"name": "x", "hit": True, "lattices": [lattice], "crystals": [], "failures": [], "seconds": {}}
    only_indexed, integrated = of([image]), of([{**image, "crystals": [crystal]}])
    assert only_indexed.median_cell[0] == pytest.approx(50, rel=1e-4)
    assert integrated.median_cell[0] == pytest.approx(60, rel=1e-4)
    assert only_indexed.values["rmsd"].median == pytest.approx(5, rel=1e-2)
