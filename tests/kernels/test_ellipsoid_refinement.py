"""Maximum likelihood of mosaicity, orientation and cell, against DIALS, finite differences and simulated truth."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels.ellipsoid import MODELS, on_ewald_sphere, tangential_frames
from ssx_mpi.kernels.ellipsoid_refinement import (
    EllipsoidError,
    Lattice,
    SpotShapes,
    log_likelihood,
    metric_basis,
    refine_lattice,
    refine_mosaicity,
)
from ssx_mpi.kernels.prediction import indices_near_ewald_sphere

S0 = np.array([0.0, 0.0, -1.0])
FOURFOLD = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
TETRAGONAL = np.array([np.linalg.matrix_power(FOURFOLD, k) for k in range(4)])
TRUTH = np.array([6e-4, 1e-4, 5e-4, -5e-5, 1e-4, 3e-4])


def lattice(turn=(0.4, -0.3, 0.9), cell=(58.0, 58.0, 150.0), operations=TETRAGONAL) -> Lattice:
    return Lattice(Rotation.from_rotvec(turn).as_matrix(), np.diag(1 / np.array(cell)), metric_basis(operations))


def simulated(crystal: Lattice, model, parameters, d_min=1.8) -> SpotShapes:
    """Spots with the moments of the distributions on the Ewald sphere, weighted by what is seen of them."""
    indices = indices_near_ewald_sphere(crystal.A, S0, d_min, 2.5e-3).astype(float)
    r = indices @ crystal.A.T
    seen = on_ewald_sphere(S0, S0 + r, model.sigmas(parameters, r, S0))
    weights = 1e3 * np.exp(-(seen.epsilon**2) / seen.variance / 2) * np.sqrt(1e-8 / seen.variance)
    # moments are taken in the frame of the spot, not of the reciprocal lattice point
    height = np.full((len(r), 1), np.linalg.norm(S0))
    directions = np.einsum("nk,nki->ni", np.hstack([seen.mean, height]), seen.frames)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    change = tangential_frames(directions, S0)[:, :2] @ seen.frames[:, :2].transpose(0, 2, 1)
    c = change @ seen.covariance @ change.transpose(0, 2, 1)
    moments = np.column_stack([np.zeros((len(r), 2)), c[:, 0, 0], c[:, 0, 1], c[:, 1, 1]])
    return SpotShapes(indices, directions, weights, moments)


def disturbed(spots: SpotShapes, rng) -> SpotShapes:
    moments = spots.moments * rng.uniform(0.7, 1.4, (len(spots), 1))
    moments[:, :2] += rng.normal(scale=1e-4, size=(len(spots), 2))
    return replace(spots, moments=moments)


def likelihood_of(spots, crystal, model, parameters):
    r = spots.indices @ crystal.A.T
    return log_likelihood(spots, tangential_frames(spots.directions, S0), S0, S0 + r, model.sigmas(parameters, r, S0))[
        0
    ]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_score_of_the_mosaicity_is_that_of_finite_differences(model):
    rng = np.random.default_rng(1)
    crystal, parameters = lattice(), model.start(5e-4) + rng.normal(scale=5e-5, size=model.n_parameters)
    spots = disturbed(simulated(crystal, MODELS["simple6"], TRUTH, d_min=4), rng)
    r = spots.indices @ crystal.A.T
    _, score, information = log_likelihood(
        spots,
        tangential_frames(spots.directions, S0),
        S0,
        S0 + r,
        model.sigmas(parameters, r, S0),
        d_sigmas=model.gradients(parameters, r, S0),
    )
    for p, step in enumerate(np.eye(model.n_parameters) * 1e-8):
        above, below = (likelihood_of(spots, crystal, model, parameters + sign * step) for sign in (1, -1))
        assert score[p] == pytest.approx((above - below) / 2e-8, rel=1e-4, abs=1e-5 * abs(score).max())
    assert (np.linalg.eigvalsh(information) > 0).all()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_score_of_orientation_and_cell_is_that_of_finite_differences(model):
    rng = np.random.default_rng(2)
    crystal = lattice(operations=np.eye(3)[None])
    parameters = model.start(5e-4)
    spots = disturbed(simulated(crystal, MODELS["simple6"], TRUTH, d_min=4), rng)
    sigmas = model.sigmas(parameters, spots.indices @ crystal.A.T, S0)
    frames = tangential_frames(spots.directions, S0)

    def evaluate(state, **gradients):
        return log_likelihood(spots, frames, S0, S0 + spots.indices @ state.A.T, sigmas, **gradients)

    _, score, _ = evaluate(crystal, d_s2=crystal.gradients(spots.indices))
    assert len(score) == 9
    steps = np.diag(np.r_[np.full(3, 1e-7), np.full(6, 1e-10)])
    for p, step in enumerate(steps):
        difference = evaluate(crystal.moved(step))[0] - evaluate(crystal.moved(-step))[0]
        assert score[p] == pytest.approx(difference / (2 * step[p]), rel=1e-4)


def test_likelihood_score_and_information_are_those_of_dials():
    from dials.algorithms.profile_model.ellipsoid.parameterisation import ModelState, Simple6MosaicityParameterisation
    from dials.algorithms.profile_model.ellipsoid.refiner import ReflectionLikelihood
    from dxtbx.model import Crystal, Experiment

    crystal, model = lattice(), MODELS["simple6"]
    spots = disturbed(simulated(crystal, model, TRUTH, d_min=5), np.random.default_rng(3))
    axes = [tuple(row) for row in np.linalg.inv(crystal.A)]
    experiment = Experiment(crystal=Crystal(*axes, space_group_symbol="P 4"))
    frames, s2 = tangential_frames(spots.directions, S0), S0 + spots.indices @ crystal.A.T

    def theirs(**fixed):
        state = ModelState(experiment, Simple6MosaicityParameterisation(TRUTH), **fixed)
        terms = [
            ReflectionLikelihood(
                state,
                S0.reshape(3, 1),
                direction,
                index,
                weight,
                moment[:2],
                np.array([[moment[2], moment[3]], [moment[3], moment[4]]]),
            )
            for direction, index, weight, moment in zip(spots.directions, spots.indices, spots.weights, spots.moments)
        ]
        information = sum(np.array(term.fisher_information()).reshape(len(TRUTH[:n]), -1) for term in terms)
        return sum(t.log_likelihood() for t in terms), sum(t.first_derivatives() for t in terms), information

    n = 6
    expected = theirs(fix_orientation=True, fix_unit_cell=True)
    sigmas, gradients = model.sigmas(TRUTH, s2 - S0, S0), model.gradients(TRUTH, s2 - S0, S0)
    found = log_likelihood(spots, frames, S0, s2, sigmas, d_sigmas=gradients)
    for ours, dials in zip(found, expected):
        np.testing.assert_allclose(ours, dials, rtol=1e-9, atol=1e-9 * np.abs(dials).max())

    # another parameterisation of orientation and cell: the gain that a step promises is the same
    n = 5
    _, score, information = theirs(fix_mosaic_spread=True)
    _, our_score, our_information = log_likelihood(spots, frames, S0, s2, sigmas, d_s2=crystal.gradients(spots.indices))
    promised = our_score @ np.linalg.solve(our_information, our_score)
    assert promised == pytest.approx(score @ np.linalg.solve(information, score), rel=1e-6)


@pytest.mark.parametrize(
    "name, truth",
    [
        ("simple1", [5e-4]),
        ("simple6", TRUTH),
        ("simple1angular1", [3e-4, 1e-3]),
        ("simple1angular3", [3e-4, 1e-3, 2e-4, 6e-4]),
    ],
)
def test_mosaicity_is_recovered(name, truth):
    model, crystal = MODELS[name], lattice()
    spots = simulated(crystal, model, np.array(truth))
    found = refine_mosaicity(spots, S0, crystal.A, model, model.start(6e-4))
    # the number of spots near the sphere limits how well the variance across it is known
    expected = np.linalg.eigvalsh(model.sigma(np.array(truth)))
    np.testing.assert_allclose(np.linalg.eigvalsh(model.sigma(found)), expected, rtol=0.1)
    angular = np.linalg.eigvalsh(model.sigma_angular(np.array(truth)))
    np.testing.assert_allclose(np.linalg.eigvalsh(model.sigma_angular(found)), angular, rtol=0.1, atol=1e-12)


def test_orientation_and_cell_are_recovered():
    model, truth = MODELS["simple6"], lattice()
    spots = simulated(truth, model, TRUTH)
    turned = replace(truth, U=Rotation.from_rotvec([1e-3, -5e-4, 8e-4]).as_matrix() @ truth.U)
    start = replace(turned, B=np.diag(1 / np.array([58.1, 58.1, 149.7])))
    found = refine_lattice(spots, S0, start, model, TRUTH)
    np.testing.assert_allclose(found.B, truth.B, atol=1e-6)
    assert np.degrees(Rotation.from_matrix(found.U @ truth.U.T).magnitude()) < 2e-3
    a, b, _ = np.linalg.norm(np.linalg.inv(found.A), axis=1)
    assert a == pytest.approx(b, rel=1e-12)

    fixed = refine_lattice(spots, S0, replace(start, fix_cell=True), model, TRUTH)
    np.testing.assert_array_equal(fixed.B, start.B)
    unturned = refine_lattice(spots, S0, replace(start, fix_orientation=True), model, TRUTH)
    np.testing.assert_array_equal(unturned.U, start.U)
    assert refine_lattice(spots, S0, replace(start, fix_cell=True, fix_orientation=True), model, TRUTH).U is start.U


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_result_does_not_depend_on_order_setting_or_laboratory(seed):
    rng = np.random.default_rng(seed)
    model, crystal = MODELS["simple6"], lattice()
    spots = disturbed(simulated(crystal, model, TRUTH, d_min=3), rng)
    start = model.start(5e-4)
    found = model.sigma(refine_mosaicity(spots, S0, crystal.A, model, start))

    order = rng.permutation(len(spots))
    shuffled = SpotShapes(*(getattr(spots, name)[order] for name in ("indices", "directions", "weights", "moments")))
    again = model.sigma(refine_mosaicity(shuffled, S0, crystal.A, model, start))
    np.testing.assert_allclose(again, found, atol=1e-6 * np.trace(found))

    change = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])
    reindexed = replace(spots, indices=spots.indices @ change.T)
    again = model.sigma(refine_mosaicity(reindexed, S0, crystal.A @ np.linalg.inv(change), model, start))
    np.testing.assert_allclose(again, found, atol=1e-6 * np.trace(found))

    turn = Rotation.random(random_state=seed % 2**31).as_matrix()
    turned = replace(spots, directions=spots.directions @ turn.T)
    again = model.sigma(refine_mosaicity(turned, turn @ S0, turn @ crystal.A, model, start))
    np.testing.assert_allclose(again, turn @ found @ turn.T, atol=1e-4 * np.trace(found))


CYCLE = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])
CUBIC = [
    np.linalg.matrix_power(CYCLE, k) @ np.diag(signs)
    for k in range(3)
    for signs in ([1, 1, 1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1])
]


@pytest.mark.parametrize(
    "operations, n_cell",
    [(np.eye(3)[None], 6), ([np.eye(3), np.diag([-1, 1, -1])], 4), (TETRAGONAL, 2), (CUBIC, 1)],
    ids=["triclinic", "monoclinic", "tetragonal", "cubic"],
)
def test_number_of_free_cell_parameters(operations, n_cell):
    basis = metric_basis(np.array(operations))
    assert len(basis) == n_cell
    for operation in operations:
        np.testing.assert_allclose(operation @ basis @ np.transpose(operation), basis, atol=1e-12)


def test_hopeless_crystals_are_refused_with_a_reason():
    model, crystal = MODELS["simple6"], lattice()
    spots = simulated(crystal, model, TRUTH, d_min=3)
    with pytest.raises(EllipsoidError, match="unphysically large"):
        refine_mosaicity(spots, S0, crystal.A, model, model.start(5e-4), largest_sigma=1e-4)
    with pytest.raises(EllipsoidError, match="unphysically small"):
        on_sphere = spots.directions - S0
        points = replace(spots, indices=on_sphere, moments=spots.moments * 1e-8)
        refine_mosaicity(points, S0, np.eye(3), model, model.start(5e-4))
    with pytest.raises(EllipsoidError, match="volume changed"):
        start = replace(crystal, B=crystal.B * 1.003)
        refine_lattice(spots, S0, start, model, TRUTH, max_volume_change=1e-3)
