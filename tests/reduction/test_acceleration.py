"""Fixed-point iterations that come to rest sooner."""

import numpy as np

from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.reduction.acceleration import Acceleration


def rounds(g, start, accelerated, most=500):
    acceleration, x = Acceleration(SerialCommunicator()), start
    for n in range(1, most + 1):
        after = g(x)
        if np.linalg.norm(after - x) < 1e-6:
            return n, x
        x = acceleration.next(after, after - x) if accelerated else after
    return most, x


def test_slow_modes_are_done_away_with():
    rng = np.random.default_rng(1)
    basis, _ = np.linalg.qr(rng.normal(size=(20, 20)))
    matrix, end = basis @ np.diag(np.r_[0.98, 0.95, 0.9, np.full(17, 0.3)]) @ basis.T, rng.normal(size=20)

    def g(x):
        return end + matrix @ (x - end)

    slow, _ = rounds(g, np.zeros(20), accelerated=False)
    fast, found = rounds(g, np.zeros(20), accelerated=True)
    assert fast < 20 < 200 < slow
    np.testing.assert_allclose(found, end, atol=1e-4)


def test_steps_that_are_nearly_alike_do_not_lead_far_away():
    # two steps that differ by noise alone tell nothing about where the end is
    acceleration = Acceleration(SerialCommunicator())
    step = np.ones(4)
    acceleration.next(np.zeros(4), step)
    found = acceleration.next(np.ones(4), step * (1 - 1e-9))
    assert np.abs(found - 1.0).max() < 1.0


def test_a_longer_step_than_one_before_drops_the_history():
    acceleration = Acceleration(SerialCommunicator())
    acceleration.next(np.zeros(2), np.array([1.0, 0.0]))
    acceleration.next(np.array([1.0, 0.0]), np.array([0.5, 0.0]))
    state = np.array([3.0, 3.0])
    np.testing.assert_array_equal(acceleration.next(state, np.array([2.0, 2.0])), state)
