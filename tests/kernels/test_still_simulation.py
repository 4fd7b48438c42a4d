"""The physics of a simulated still against sampling, closed forms and NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ssx_mpi.kernels.still_simulation import (
    RlpShape,
    add_spots,
    partiality,
    poisson_counts,
    polarization_factor,
    random_rotation,
    rlp_covariance,
    still_spots,
)

S0 = np.array([0.0, 0.0, -1.0])


def test_rotations_are_proper_and_point_everywhere():
    rng = np.random.default_rng(1)
    rotations = np.array([random_rotation(rng) for _ in range(4000)])
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3), atol=1e-12)
    assert np.allclose(np.linalg.det(rotations), 1)
    # under the uniform distribution each element has mean 0 and mean square 1/3
    assert np.abs(rotations.mean(axis=0)).max() < 5 * np.sqrt(1 / 3 / 4000)
    assert np.allclose((rotations**2).mean(axis=0), 1 / 3, atol=0.03)


def one_reflection(q, shape):
    """The spot of a single rlp at q: h = (1, 0, 0) of a crystal with this vector as a*."""
    A = np.column_stack([q, np.cross(q, [0.3, 0.5, 0.1]), np.cross(q, [0.1, -0.4, 0.7])])
    return still_spots(np.array([[1.0, 0.0, 0.0]]), A, S0, shape, d_min=0.6)


def near_ewald(two_theta, azimuth, offset):
    """An rlp whose distance from the Ewald sphere (radius 1) is `offset`."""
    s2 = np.array([np.sin(two_theta) * np.cos(azimuth), np.sin(two_theta) * np.sin(azimuth), -np.cos(two_theta)])
    return (1 - offset) * s2 - S0


def test_cut_through_an_rlp_agrees_with_sampling_it():
    shape = RlpShape(mosaicity=0.004, domain=0.0008)
    q = near_ewald(0.5, 0.8, 0.001)
    spot = one_reflection(q, shape)
    rng = np.random.default_rng(2)
    sample = rng.multivariate_normal(q, rlp_covariance(q[None], shape)[0], size=800_000)
    s = sample + S0
    length = np.linalg.norm(s, axis=1)
    thickness = 2e-4
    on_sphere = np.abs(length - 1) < thickness / 2
    density = on_sphere.mean() / thickness
    expected = partiality(spot.offset, spot.width, 1.0)[0] / np.sqrt(2 * np.pi)
    assert density == pytest.approx(expected, rel=0.03)
    direction = s[on_sphere] / length[on_sphere, None]
    error = np.sqrt(np.trace(spot.covariance[0]) / on_sphere.sum())
    # the sphere is not quite flat across the rlp: (width)²/2 away
    assert np.allclose(direction.mean(axis=0), spot.s1[0], atol=5 * error + 1e-5)
    assert np.allclose(np.cov(direction.T), spot.covariance[0], atol=0.05 * spot.covariance[0].max())


@settings(deadline=None)
@given(
    two_theta=st.floats(0.05, 0.9),
    azimuth=st.floats(0, 6.2),
    domain=st.floats(1e-4, 1e-3),
    mosaicity=st.floats(0, 2e-3),
    bandwidth=st.floats(0, 1e-3),
    divergence=st.floats(0, 1e-3),
)
def test_width_across_the_sphere_has_its_closed_form(two_theta, azimuth, domain, mosaicity, bandwidth, divergence):
    spot = one_reflection(near_ewald(two_theta, azimuth, 0.0), RlpShape(mosaicity, domain, bandwidth, divergence))
    # on the sphere |q| = 2 sin θ, at 90° - θ to the diffracted beam: across it lies cos θ of the mosaic disc
    mosaic = mosaicity * 2 * np.sin(two_theta / 2) * np.cos(two_theta / 2)
    band = bandwidth * (1 - np.cos(two_theta))
    spread = divergence * np.sin(two_theta)
    assert spot.width[0] ** 2 == pytest.approx(domain**2 + mosaic**2 + band**2 + spread**2, rel=1e-6)
    assert np.allclose(spot.s1[0], near_ewald(two_theta, azimuth, 0.0) + S0, atol=1e-9)


@settings(deadline=None)
@given(width=st.floats(1e-4, 1e-2))
def test_all_stills_together_record_the_same_whatever_the_width(width):
    offset = np.linspace(-8 * width, 8 * width, 4001)
    share = partiality(offset, np.full_like(offset, width), 4e-4)
    assert np.sum(share) * (offset[1] - offset[0]) == pytest.approx(4e-4 * np.sqrt(2 * np.pi), rel=1e-6)


def test_every_reflection_within_the_cutoff_is_found_and_no_other():
    rng = np.random.default_rng(3)
    A = random_rotation(rng) / 60.0
    hkl = np.stack(np.meshgrid(*[np.arange(-40.0, 41)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    shape = RlpShape(mosaicity=0.001, domain=2e-4, bandwidth=3e-4, divergence=2e-4)
    spots = still_spots(hkl, A, S0, shape, d_min=1.8)
    q = hkl @ A.T
    length = np.linalg.norm(q + S0, axis=1)
    n = (q + S0) / length[:, None]
    normal_variance = np.einsum("ni,nij,nj->n", n, rlp_covariance(q, shape), n)
    cos = n @ S0
    normal_variance += (3e-4 * (1 - cos)) ** 2 + (2e-4) ** 2 * (1 - cos**2)
    inside = (np.abs(1 - length) < 4 * np.sqrt(normal_variance)) & (np.linalg.norm(q, axis=1) <= 1 / 1.8)
    assert np.array_equal(spots.index, np.flatnonzero(inside))
    assert len(spots.index) > 100


def test_polarization_extinguishes_along_the_electric_field():
    normal = np.array([0.0, 1.0, 0.0])
    s1 = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0]])
    assert np.allclose(polarization_factor(s1, S0, normal, 1.0), [0, 1, 1])
    assert np.allclose(polarization_factor(s1, S0, normal, 0.5), [0.5, 0.5, 1])


@settings(deadline=None, max_examples=40)
@given(
    x=st.floats(15, 25),
    y=st.floats(15, 25),
    sx=st.floats(0.8, 2),
    sy=st.floats(0.8, 2),
    rho=st.floats(-0.8, 0.8),
)
def test_drawn_spot_has_the_moments_asked_for(x, y, sx, sy, rho):
    image = np.zeros((40, 40), np.float32)
    covariance = np.array([[sx * sx, rho * sx * sy, sy * sy]])
    add_spots(image, np.array([[x, y]]), covariance, np.array([1000.0]), reach=6.0)
    assert image.sum() == pytest.approx(1000, rel=2e-3)
    rows, columns = np.mgrid[:40, :40] + 0.5
    p = image / image.sum()
    assert (p * columns).sum() == pytest.approx(x, abs=0.01)
    assert (p * rows).sum() == pytest.approx(y, abs=0.01)
    # the pixel adds its own variance of 1/12
    assert (p * (columns - x) ** 2).sum() == pytest.approx(sx * sx + 1 / 12, rel=0.02)
    assert (p * (rows - y) ** 2).sum() == pytest.approx(sy * sy + 1 / 12, rel=0.02)
    assert (p * (columns - x) * (rows - y)).sum() == pytest.approx(rho * sx * sy, abs=0.02 * sx * sy)


def test_narrow_spot_is_integrated_over_its_pixels():
    mean, covariance = [5.3, 4.8], [[0.25, 0.1], [0.1, 0.2]]
    image = np.zeros((10, 10), np.float32)
    add_spots(image, np.array([mean]), np.array([[0.25, 0.1, 0.2]]), np.array([1.0]), reach=8.0)
    fine = 40
    t = (np.arange(10 * fine) + 0.5) / fine
    density = stats.multivariate_normal(mean, covariance).pdf(np.stack(np.meshgrid(t, t), axis=-1)) / fine**2
    assert np.allclose(image, density.reshape(10, fine, 10, fine).sum(axis=(1, 3)), atol=2e-3)


def test_spots_over_the_edge_are_cut_not_wrapped():
    image = np.zeros((10, 20), np.float32)
    add_spots(
        image,
        np.array([[0.0, 5.0], [20.0, 0.0], [500.0, -300.0]]),
        np.array([[1.0, 0.0, 1.0]] * 3),
        np.array([100.0, 100.0, 100.0]),
    )
    assert image[:, :6].sum() == pytest.approx(50, rel=0.01)
    assert image.sum() == pytest.approx(75, rel=0.01)


@pytest.mark.parametrize("mean", [0.02, 0.7, 5.0, 15.9, 16.1, 300.0])
def test_counts_are_poisson(mean):
    counts = poisson_counts(np.full((500, 400), mean, np.float32), np.random.default_rng(4))
    low, high = (int(stats.poisson.ppf(f, mean)) for f in (1e-3, 1 - 1e-3))
    observed = np.bincount(np.clip(counts.ravel(), low, high) - low, minlength=high - low + 1)
    probability = stats.poisson.pmf(np.arange(low, high + 1), mean)
    probability[0], probability[-1] = stats.poisson.cdf(low, mean), stats.poisson.sf(high - 1, mean)
    assert stats.chisquare(observed, probability / probability.sum() * counts.size).pvalue > 1e-4


def test_counts_follow_the_seed_and_neighbours_do_not_follow_each_other():
    expected = np.full((300, 300), 4, np.float32)
    expected[::7] = 40
    first, again, other = (poisson_counts(expected, np.random.default_rng(s)) for s in (5, 5, 6))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    dim = first[1:7].ravel().astype(float)
    assert abs(np.corrcoef(dim[1:], dim[:-1])[0, 1]) < 5 / np.sqrt(dim.size)
