"""Detectors that move along a run are found, those that do not are left alone, on any number of parties."""

from __future__ import annotations

import numpy as np
import pytest
from fake_ranks import on_fake_ranks

from ssx_mpi.kernels.detector_refinement import crystal_shifts, refine_crystals
from ssx_mpi.kernels.drift import fit_drift
from ssx_mpi.kernels.exact_sums import Alone, exact_binned_sums


def crystals(n: int, seed: int, way=None, jitter: float = 0.0):
    """Information and score of n crystals that each know the shift to some 0.01 mm, and their places in the run."""
    rng = np.random.default_rng(seed)
    position = np.sort(rng.random(n))
    root = rng.normal(size=(n, 3, 3)) * [[[60.0], [60.0], [3.0]]]
    information = root @ root.transpose(0, 2, 1) + np.diag([2e3, 2e3, 5.0])
    shift = np.zeros((n, 3)) if way is None else way(position)
    shift = shift + rng.normal(size=(n, 3)) * [jitter, jitter, 0]
    noise = np.einsum("kab,kb->ka", np.linalg.cholesky(information), rng.normal(size=(n, 3)))
    return information, np.einsum("kab,kb->ka", information, shift) + noise, position


@pytest.mark.parametrize("jitter", [0.0, 0.03])
def test_none_is_claimed_without_one(jitter):
    assert all(fit_drift(*crystals(200, seed, jitter=jitter), Alone()) is None for seed in range(40))
    assert fit_drift(*crystals(20, 1, lambda t: np.outer(t, [1, 1, 0])), Alone()) is None, "too few crystals"


def test_a_straight_way_is_found_with_its_uncertainty():
    off = []
    for seed in range(20):
        found = fit_drift(*crystals(300, seed, lambda t: np.outer(t, [0.06, -0.02, 0.0])), Alone())
        assert found is not None and found.pieces == 0
        total = found.shift[-1] - found.shift[0]
        sigma = np.array(found.extent_sigma) * np.sqrt(2)
        assert total[:2] == pytest.approx([0.06, -0.02], abs=0.01)
        assert found.extent[0] == pytest.approx(0.06, abs=0.01)
        off.append((total - [0.06, -0.02, 0.0]) / sigma)
    # sigmas of a difference of two ends that move against each other
    assert 0.4 < np.std(off) < 1.6


def test_a_jump_that_settles_is_a_spline():
    def way(t):
        return np.outer(0.1 * np.tanh(12 * (t - 0.4)), [0, 1, 0])

    found = fit_drift(*crystals(600, 3, way, jitter=0.02), Alone())
    assert found is not None and found.pieces >= 2
    expected = way(found.position)
    assert found.shift[:, 1] == pytest.approx(expected[:, 1] - expected[:, 1].mean(), abs=0.025)
    assert found.extent[1] == pytest.approx(0.2, abs=0.03) and found.extent[0] < 0.02


def test_crystals_that_are_far_off_do_not_matter():
    information, score, position = crystals(300, 5)
    score[::20] += 40 * np.sqrt(np.einsum("kaa->ka", information[::20])) * position[::20, None]
    assert fit_drift(information, score, position, Alone()) is None


def test_any_number_of_parties_finds_the_same_bits():
    information, score, position = crystals(300, 7, lambda t: np.outer(t**2, [0.05, 0.0, 0.3]))

    def on(comm):
        own = slice(comm.rank, None, comm.size)
        found = fit_drift(information[own], score[own], position[own], comm)
        return found.shift.tobytes(), found.sigma.tobytes(), found.significance

    (alone,) = on_fake_ranks(1, on)
    assert all(part == alone for size in (2, 5) for part in on_fake_ranks(size, on))


def test_binned_sums_are_those_of_numpy():
    rng = np.random.default_rng(1)
    terms, bins = rng.normal(size=(500, 3)), rng.integers(0, 7, 500)
    expected = np.stack([np.bincount(bins, column, 9) for column in terms.T], axis=1)
    assert exact_binned_sums(Alone(), terms, bins, 9) == pytest.approx(expected, abs=1e-12)


def test_crystals_tell_of_a_detector_that_stood_elsewhere():
    """Spots seen on a detector that was moved: the shift that a crystal tells is the one, and its error as claimed."""
    from panel_stills import detector, stills

    from ssx_mpi.stages.fast import joint_refinement

    true = detector()
    true.hierarchy().set_local_frame((1, 0, 0), (0, -1, 0), (0.005, 0.003, -100.0))
    experiments, reflections = stills(true, 40, seed=2)
    allowed = joint_refinement._allowed_strains(experiments[0].crystal)
    header, beam = experiments[0].detector, experiments[0].beam
    spots, start, strains = joint_refinement._arrays(experiments, reflections, header, beam, allowed)
    s0 = np.array(beam.get_s0())
    refined = refine_crystals(spots, start, strains, s0)
    information, score = crystal_shifts(spots, refined.geometry, strains, s0)
    covariance = np.linalg.inv(information)
    told = np.einsum("kab,kb->ka", covariance, score)
    # slow axis of the panels along -y
    expected = np.array([0.005, -0.003])
    off = (told[:, :2] - expected) / np.sqrt(np.einsum("kaa->ka", covariance)[:, :2])
    mean = np.linalg.solve(information.sum(axis=0), score.sum(axis=0))
    assert mean[:2] == pytest.approx(expected, abs=2e-3)
    assert 0.6 < np.median(np.abs(off)) / 0.6745 < 2
