"""The geometry that all ranks, and all starts of a run, share."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from dxtbx.model import BeamFactory, DetectorFactory
from panel_stills import detector

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.run_parameters import PanelPriors
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.geometry import check_level, shared_geometry, verdict, worth_moving


class OtherRank(SerialCommunicator):
    """A rank that hears from rank 0 through pickles."""

    rank = 1

    def __init__(self, sent: list) -> None:
        super().__init__()
        self._sent = sent

    def bcast(self, value):
        return pickle.loads(self._sent.pop(0))


class Root(SerialCommunicator):
    """Rank 0, which others hear."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def bcast(self, value):
        self.sent.append(pickle.dumps(value))
        return value


def test_every_rank_holds_the_same_numbers_to_the_last_digit():
    rng = np.random.default_rng(1)
    for _ in range(200):
        axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
        detector = DetectorFactory.simple("PAD", 100.0, (50.0, 60.0), "+x", "-y", (0.1, 0.1), (1000, 1000), (0, 1e6))
        detector[0].set_frame(axes[0], axes[1], rng.normal(size=3) * 100)
        beam = BeamFactory.make_beam(sample_to_source=tuple(rng.normal(size=3)), wavelength=1.0 + rng.random())
        root = Root()
        here = shared_geometry(root, (detector, beam))
        there = shared_geometry(OtherRank(root.sent), None)
        assert [model.to_dict() for model in here] == [model.to_dict() for model in there]


def test_no_geometry_is_none_everywhere():
    root = Root()
    assert shared_geometry(root, None) is None
    assert shared_geometry(OtherRank(root.sent), None) is None


@pytest.mark.parametrize(
    ("significance", "before", "explained", "moved"),
    [(6.1, 0.30, 0.36, True), (5.9, 0.30, 0.90, False), (60.0, 0.30, 0.34, False), (60.0, 0.9, 0.3, False)],
)
def test_the_beam_is_moved_only_for_good_reasons(significance, before, explained, moved):
    found = SimpleNamespace(significance=significance, explained_before=before, explained=explained)
    assert worth_moving(found) is moved


def refined(n_crystals=100, rmsd=0.1, distance=70.0, sigma=0.01):
    uncertainty = SimpleNamespace(sigma={"distance": sigma})
    after = SimpleNamespace(distance=distance)
    return SimpleNamespace(n_crystals=n_crystals, rmsd=rmsd, after=after, uncertainty=uncertainty)


@pytest.mark.parametrize(
    ("before", "after", "answer"),
    [
        (None, None, (False, False)),
        (None, refined(), (True, True)),
        (refined(), None, (False, False)),
        # fewer crystals are not taken, however well they fit
        (refined(), refined(99, 0.01), (False, False)),
        (refined(), refined(101, 0.2), (True, True)),
        # a little less scatter is taken and does not go on
        (refined(), refined(100, 0.096), (True, False)),
        (refined(), refined(100, 0.094), (True, True)),
        (refined(), refined(100, 0.1, 70.011), (True, True)),
        (refined(), refined(100, 0.1, 70.009), (True, False)),
        (refined(), refined(100, 0.11), (False, False)),
    ],
)
def test_rounds_go_on_while_they_gain(before, after, answer):
    assert verdict(before, after) == answer


@pytest.mark.parametrize(
    ("level", "engine", "refused"),
    [
        (2, "fast", None),
        (None, "dials", None),
        (3, "fast", "hierarchy_level=3: the detector has no such level, its last level is 2"),
        (1, "dials", "hierarchy_level=1: for the refinement by DIALS set detector.hierarchy_level"),
    ],
)
def test_a_level_that_is_not_there_is_refused_before_anything_is_indexed(level, engine, refused):
    parameters = SimpleNamespace(hierarchy_level=level, engine=engine, refinement_phil=None, panel_priors=PanelPriors())
    maker = SimpleNamespace(first_readable=lambda: 0, experiment=lambda image: SimpleNamespace(detector=detector()))
    run = SimpleNamespace(parameters=parameters, maker=maker)
    if refused is None:
        check_level(run)
        return
    with pytest.raises(InputError, match=refused) as error:
        check_level(run)
    assert "\n" not in str(error.value)
