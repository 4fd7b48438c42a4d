"""Crystals that do not belong are found among those that do, however many and however bad they are."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import poisons

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import CrystalFilter

BY_DELTA_CC = CrystalFilter(delta_cc_half=True)


@pytest.mark.parametrize("kind", poisons.POISONS)
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_poisons_are_found_and_good_crystals_are_not_lost(kind, share):
    data = poisons.planted((kind,), share, 100, 300, seed=3)
    outcome = poisons.filtered(SerialCommunicator(), data, BY_DELTA_CC)
    assert outcome.found > 0.9
    assert outcome.lost < 0.01
    assert outcome.cc_before < outcome.cc_after
    assert outcome.cc_after > outcome.cc_good - 0.002


def test_nothing_goes_where_nothing_is_wrong():
    data = poisons.planted(("scaled",), 0.02, 100, 200, seed=4)
    outcome = poisons.filtered(SerialCommunicator(), data, BY_DELTA_CC)
    assert (outcome.found, outcome.lost) == (0.0, 0.0)


def test_no_more_go_than_may():
    data = poisons.planted(("wrong cell",), 0.2, 100, 200, seed=5)
    few = CrystalFilter(delta_cc_half=True, max_percent_removed=5.0)
    outcome = poisons.filtered(SerialCommunicator(), data, few)
    assert outcome.found == pytest.approx(0.25)
    assert outcome.lost == 0.0
