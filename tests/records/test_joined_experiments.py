"""Experiment lists joined as plain dicts are what DIALS reads and would have joined."""

from __future__ import annotations

import copy

import pytest
from dxtbx.model import BeamFactory, Crystal, DetectorFactory, Experiment, ExperimentList
from dxtbx.model.experiment_list import ExperimentListFactory

from ssx_mpi.records.joined_experiments import COMMON, join, with_common


def experiments(*edges: float, wavelength: float = 1.0):
    """One still with a lattice for each edge of a cubic cell; detectors equal in all of them."""
    beam = BeamFactory.simple(wavelength)
    detector = DetectorFactory.simple("PAD", 100, (5, 5), "+x", "-y", (0.1, 0.1), (100, 100), (0, 100))
    made = ExperimentList()
    for edge in edges:
        crystal = Crystal((edge, 0, 0), (0, edge, 0), (0, 0, edge), space_group_symbol="P 1")
        made.append(Experiment(beam=beam, detector=detector, crystal=crystal, identifier=f"edge-{edge}"))
    return made


def test_joined_lists_read_as_those_that_they_are_made_of():
    parts = [experiments(10, 11), experiments(), experiments(12, wavelength=1.1)]
    joined = join(p.to_dict() for p in parts)
    read = ExperimentListFactory.from_dict(copy.deepcopy(joined), check_format=False)
    expected = [e for p in parts for e in p]
    assert len(read) == 3
    for own, theirs in zip(read, expected):
        assert own.identifier == theirs.identifier
        assert own.crystal == theirs.crystal
        assert own.beam == theirs.beam
        assert own.detector == theirs.detector


def test_equal_detectors_and_beams_are_kept_once_and_crystals_each():
    joined = join(p.to_dict() for p in [experiments(10), experiments(10), experiments(10, wavelength=1.1)])
    assert [len(joined[m]) for m in ("detector", "beam", "crystal")] == [1, 2, 3]
    assert [e["beam"] for e in joined["experiment"]] == [0, 0, 1]
    assert [e["crystal"] for e in joined["experiment"]] == [0, 1, 2]


def test_nothing_joined_is_an_empty_list():
    assert len(ExperimentListFactory.from_dict(join([]), check_format=False)) == 0


def test_shared_models_come_back_into_their_places():
    own = experiments(10, 11).to_dict()
    common = {"detector": own["detector"][0], "beam": own["beam"][0]}
    short = {**own, "detector": [COMMON], "beam": [COMMON]}
    assert with_common(short, common) == own
    assert with_common({**short, "beam": own["beam"]}, common) == own


def test_the_parts_are_left_as_they_were():
    parts = [experiments(10).to_dict(), experiments(11).to_dict()]
    before = copy.deepcopy(parts)
    join(parts)
    assert parts == before


@pytest.mark.parametrize("n", [1, 5])
def test_lattices_of_a_still_share_its_models(n):
    joined = join([experiments(*range(10, 10 + n)).to_dict()])
    assert {e["detector"] for e in joined["experiment"]} == {0}
    assert len(joined["detector"]) == 1
