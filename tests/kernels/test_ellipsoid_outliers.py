"""The robust location and scatter of residuals, against DIALS and samples of known distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.kernels import ellipsoid_outliers
from ssx_mpi.kernels.ellipsoid_outliers import inliers, robust_location_and_scatter


def contaminated(n, seed, share=0.2):
    rng = np.random.default_rng(seed)
    points = rng.multivariate_normal([0.1, -0.2], [[0.04, 0.01], [0.01, 0.09]], n)
    far = rng.random(n) < share
    points[far] += rng.normal(scale=3, size=(far.sum(), 2)) + 4
    return points, far


@pytest.mark.parametrize("n", [30, 313, 800])
def test_scatter_is_at_least_as_small_as_that_of_dials(n):
    from dials.algorithms.statistics.fast_mcd import FastMCD
    from dials.array_family import flex

    points, _ = contaminated(n, n)
    location, scatter = robust_location_and_scatter(points)
    theirs = FastMCD([flex.double(column) for column in points.T.copy()])
    their_location, their_scatter = theirs.get_corrected_T_and_S()
    their_scatter = np.array(their_scatter).reshape(2, 2)
    assert np.linalg.det(scatter) <= np.linalg.det(their_scatter) * (1 + 1e-9)
    np.testing.assert_allclose(location, np.array(their_location), atol=0.05)
    np.testing.assert_allclose(scatter, their_scatter, atol=0.02)


def test_scatter_of_a_normal_sample_is_its_covariance():
    rng = np.random.default_rng(0)
    covariance = np.array([[2.0, 0.5], [0.5, 1.0]])
    _, scatter = robust_location_and_scatter(rng.multivariate_normal([3, 4], covariance, 5000))
    np.testing.assert_allclose(scatter, covariance, rtol=0.12, atol=0.1)


def test_outliers_are_told_from_the_rest():
    points, far = contaminated(500, 5)
    kept = inliers(points, 0.999, 5.0)
    assert kept[~far].mean() > 0.98
    assert kept[far].mean() < 0.1
    assert (np.linalg.norm(points[inliers(points, 0.999, 0.3)], axis=1) < 0.3).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(5, 200))
def test_order_of_the_points_does_not_matter(seed, n):
    points, _ = contaminated(n, seed)
    order = np.random.default_rng(seed).permutation(n)
    np.testing.assert_array_equal(inliers(points, 0.975, 9)[order], inliers(points[order], 0.975, 9))


def test_too_few_points_or_points_on_a_line_are_refused():
    with pytest.raises(ValueError, match="too few"):
        inliers(np.zeros((4, 2)), 0.975, 2)
    with pytest.raises(ValueError, match="on one line"):
        inliers(np.column_stack([np.arange(20.0), np.zeros(20)]), 0.975, 2)


@pytest.mark.parametrize("n", [5, 12, 13, 40, 401])
@pytest.mark.parametrize("levels", [2, 7, None])
def test_a_concentration_takes_the_nearest_half_the_first_ones_of_equals(n, levels):
    rng = np.random.default_rng(n)
    points = rng.normal(size=(2, n)) if levels is None else rng.integers(0, levels, (2, n)).astype(float)
    half = (n + 3) // 2
    # powers of two, so that equal distances are equal to the last digit
    location, scatter = np.array([[0.5, 0.25]]), np.array([[1.0, 0.25, 2.0]])
    xx, xy, yy = scatter[0]
    x, y = points - location[0][:, None]
    nearest = np.argsort(yy * x * x - 2 * xy * x * y + xx * y * y, kind="stable")[:half]
    expected = np.cov(points[:, nearest])

    determinant = ellipsoid_outliers._concentrate(np.ascontiguousarray(points), half, location, scatter)

    np.testing.assert_allclose(location[0], points[:, nearest].mean(axis=1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(scatter[0], [expected[0, 0], expected[0, 1], expected[1, 1]], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(determinant[0], np.linalg.det(expected), rtol=1e-9, atol=1e-12)
