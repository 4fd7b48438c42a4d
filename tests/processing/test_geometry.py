"""The geometry that all ranks, and all starts of a run, share."""

import pickle

import numpy as np
from dxtbx.model import BeamFactory, DetectorFactory

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.processing.geometry import shared_geometry


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
