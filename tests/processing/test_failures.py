"""How failures are counted, and when a reason has more than its share."""

import pytest

from ssx_mpi.processing.failures import FailureShare, Outcome, advice
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.stages.still_results import CrystalNumbers, Failure, Indexed, Integrated, LatticeNumbers, Spots, Still


def counted(most: float, *outcomes: tuple[int, Outcome]) -> FailureShare:
    share = FailureShare(most)
    for times, outcome in outcomes:
        for _ in range(times):
            share.add(outcome)
    return share


BLANK = Outcome(False, False)
GOOD = Outcome(True, True)
UNINDEXED = Outcome(True, False, "index: no lattice found")


def test_a_share_is_that_of_the_images_that_came_to_the_stage():
    # a thousand blanks do not make it better that no hit could be indexed
    share = counted(0.98, (1000, BLANK), (250, UNINDEXED))
    assert share.verdict == "200 of 200 hits failed in one way (index: no lattice found), over max_failures=0.98"


def test_some_are_needed_to_judge():
    assert counted(0.5, (199, UNINDEXED)).verdict == ""
    assert counted(0.5, (200, UNINDEXED)).verdict


def test_reasons_count_each_for_itself():
    other = Outcome(True, False, "index: something else")
    share = FailureShare(0.6)
    for _ in range(300):
        share.add(UNINDEXED)
        share.add(other)
    assert share.verdict == ""


def test_one_never_stops():
    assert counted(1.0, (500, UNINDEXED)).verdict == ""


@pytest.mark.parametrize(("n_good", "stops"), [(3, True), (5, False)])
def test_integration_counts_of_the_indexed_images(n_good, stops):
    failed = Outcome(True, True, "integrate: no counts")
    share = counted(0.98, (300, BLANK), (n_good, GOOD), (197, failed))
    assert bool(share.verdict) == stops


def test_an_outcome_is_lost_only_with_nothing_to_show():
    lattice = LatticeNumbers(50, 0.1, 0.1, (79.0,) * 6, 2.0)
    crystal = CrystalNumbers(100, 5.0, (79.0,) * 6, 0.05)
    failed = Failure("integrate", "no counts", "a traceback")
    indexed = Still(1, Spots(60, True), Indexed((lattice, lattice), None), failures=(failed,))
    assert Outcome.of(indexed) == Outcome(True, True, "integrate: no counts", "a traceback")
    saved = Still(1, Spots(60, True), Indexed((lattice, lattice), None), Integrated((crystal,), None), (failed,))
    assert Outcome.of(saved).failure == ""
    assert Outcome.of(Still(2)) == BLANK


def test_advice_fits_the_failure():
    def statistics(n_spots, hit, failures=()):
        found = Statistics()
        numbers = {"image": 0, "name": "x", "n_spots": n_spots, "hit": hit, "lattices": [], "crystals": []}
        found.add_image({**numbers, "failures": [list(f) for f in failures], "seconds": {}})
        return found

    assert "No image could be read" in advice(statistics(0, False, [("read", "damaged")]))
    assert "min_spots" in advice(statistics(3, False))
    assert "beam centre" in advice(statistics(100, True, [("index", "no lattice found")]))
