"""What the stages make of the answers that DIALS of different versions gives."""

import types

import pytest
from dials.algorithms.indexing.ssx import processing
from dxtbx.model import Crystal, Experiment, ExperimentList

from ssx_mpi import dials_compat
from ssx_mpi.stages.dials.dials_stages import DialsIndexer


class _Spots:
    def centroid_px_to_mm(self, experiments):
        pass

    def map_centroids_to_reciprocal_space(self, experiments):
        pass


@pytest.fixture
def index(monkeypatch):
    """Index a still where ``index_one`` of DIALS has a given answer."""
    scope = dials_compat.program_phil("ssx_index").extract()

    def with_answer(answer):
        monkeypatch.setattr(processing, "index_one", lambda *arguments: answer)
        return DialsIndexer(scope).index(Experiment(), _Spots())

    return with_answer


@pytest.mark.parametrize("further", [(), ("the spots that are left",)], ids=["before 3.29", "3.29"])
def test_lattices_are_taken_with_or_without_the_spots_that_are_left(index, further):
    found = ExperimentList([Experiment(crystal=Crystal((1, 0, 0), (0, 1, 0), (0, 0, 1), "P1"))])
    indexed = types.SimpleNamespace()
    crystals = index((found, indexed, *further))
    assert (crystals.experiments, crystals.reflections) == (found, indexed)


@pytest.mark.parametrize("answer", [None, (None, None), (None, None, None), (ExperimentList(), None)])
def test_a_still_without_lattices_has_no_experiment(index, answer):
    assert len(index(answer).experiments) == 0
