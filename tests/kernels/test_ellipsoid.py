"""The distributions of reciprocal lattice points, against DIALS, finite differences and their own symmetries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels.ellipsoid import MODELS, on_ewald_sphere, partialities, tangential_frames

S0 = np.array([0.01, -0.02, -1.02])


def some_parameters(model, rng):
    return model.start(5e-4) + rng.normal(scale=1e-4, size=model.n_parameters)


def some_points(rng, n=20):
    """Reciprocal lattice vectors that end within 1e-3/Å of the Ewald sphere."""
    s1 = rng.normal(size=(n, 3)) * 0.3 + S0
    s1 *= np.linalg.norm(S0) / np.linalg.norm(s1, axis=1, keepdims=True)
    return s1 * (1 + rng.uniform(-1e-3, 1e-3, size=(n, 1))) - S0


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_gradients_of_the_covariance_are_those_of_finite_differences(model):
    rng = np.random.default_rng(1)
    parameters, r = some_parameters(model, rng), some_points(rng)
    gradients = model.gradients(parameters, r, S0)
    for p, step in enumerate(np.eye(model.n_parameters) * 1e-7):
        difference = (model.sigmas(parameters + step, r, S0) - model.sigmas(parameters - step, r, S0)) / 2e-7
        np.testing.assert_allclose(gradients[:, p], difference, atol=1e-9)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_angular_part_turns_with_the_point_and_grows_with_its_length(model):
    rng = np.random.default_rng(2)
    parameters, r = some_parameters(model, rng), some_points(rng)
    turn = Rotation.from_rotvec([0.3, -0.8, 0.4]).as_matrix()
    angular = model.sigmas(parameters, r, S0) - model.sigma(parameters)
    turned = model.sigmas(parameters, r @ turn.T, turn @ S0) - model.sigma(parameters)
    np.testing.assert_allclose(turned, turn @ angular @ turn.T, atol=1e-15)
    longer = model.sigmas(parameters, 2 * r, S0) - model.sigma(parameters)
    np.testing.assert_allclose(longer, 4 * angular, atol=1e-15)
    # no spread along the point itself
    np.testing.assert_allclose(np.einsum("nij,nj->ni", np.broadcast_to(angular, (len(r), 3, 3)), r), 0, atol=1e-15)


def test_starting_parameters_are_isotropic():
    for model in MODELS.values():
        np.testing.assert_allclose(model.sigma(model.start(3e-4)), 9e-8 * np.eye(3))
        expected = np.diag([9e-8, 9e-8, 0]) if model.angular else np.zeros((3, 3))
        np.testing.assert_allclose(model.sigma_angular(model.start(3e-4)), expected)


def test_distribution_on_the_sphere_is_that_of_dials():
    from dials.algorithms.profile_model.ellipsoid.model import compute_change_of_basis_operation
    from dials.algorithms.profile_model.ellipsoid.refiner import ConditionalDistribution

    rng = np.random.default_rng(3)
    model = MODELS["simple6"]
    parameters, r = some_parameters(model, rng), some_points(rng)
    seen = on_ewald_sphere(S0, S0 + r, model.sigmas(parameters, r, S0))
    nothing = np.zeros((3, 0)), np.zeros((3, 3, 0))
    for k, s2 in enumerate(S0 + r):
        R = compute_change_of_basis_operation(S0, s2)
        S = R @ model.sigma(parameters) @ R.T
        theirs = ConditionalDistribution(np.linalg.norm(S0), (R @ s2).reshape(3, 1), nothing[0], S, nothing[1])
        np.testing.assert_allclose(seen.frames[k], R, atol=1e-12)
        np.testing.assert_allclose(seen.epsilon[k], theirs.epsilon, atol=1e-12)
        np.testing.assert_allclose(seen.mean[k], theirs.mean()[:, 0], atol=1e-12)
        np.testing.assert_allclose(seen.covariance[k], theirs.sigma(), rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(MODELS)))
def test_partialities_lie_between_nothing_and_all(seed, name):
    rng, model = np.random.default_rng(seed), MODELS[name]
    parameters = model.start(1e-3) * rng.uniform(0.2, 2, model.n_parameters) + rng.normal(scale=1e-4)
    r = some_points(rng)
    seen = on_ewald_sphere(S0, S0 + r, model.sigmas(parameters, r, S0))
    partiality, inverse_variance = partialities(seen, model.sigma(parameters), 100)
    assert ((partiality >= 0) & (partiality <= 1 + 1e-12)).all()
    assert (inverse_variance >= 0).all()


def test_partiality_is_whole_across_the_thinnest_direction_of_a_centred_point():
    sigma = np.diag([9e-8, 4e-8, 1e-8])
    s0 = np.array([0, 0, -1.0])
    s2 = np.array([[1e-9, 0, -1.0], [0.6, 0, -0.8]])
    partiality, _ = partialities(on_ewald_sphere(s0, s2, sigma[None]), sigma, 10)
    np.testing.assert_allclose(partiality, [1, np.sqrt(1e-8 / (0.36 * 9e-8 + 0.64 * 1e-8))], rtol=1e-6)


def test_frames_are_orthonormal():
    frames = tangential_frames(some_points(np.random.default_rng(4)), S0)
    np.testing.assert_allclose(frames @ frames.transpose(0, 2, 1), np.broadcast_to(np.eye(3), frames.shape), atol=1e-12)
