"""Rays on panels, against DIALS, and indices near the Ewald sphere, against all indices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels.prediction import find_panels, indices_near_ewald_sphere, pixels_to_lab, rays_to_pixels


def detector_of_two(parallax=True):
    from dxtbx.model import Detector, ParallaxCorrectedPxMmStrategy

    detector = Detector()
    for k, x in enumerate((-90.0, 2.0)):
        panel = detector.add_panel()
        fast = Rotation.from_rotvec([0, 0.1 * (k - 0.3), 0.02]).as_matrix()
        panel.set_frame(tuple(fast[:, 0]), tuple(-fast[:, 1]), (x, 60.0, -200.0))
        panel.set_pixel_size((0.172, 0.150))
        panel.set_image_size((500, 700))
        panel.set_trusted_range((-1, 1e6))
        if parallax:
            panel.set_mu(3.9)
            panel.set_thickness(0.45)
            panel.set_px_mm_strategy(ParallaxCorrectedPxMmStrategy(3.9, 0.45))
    return detector


@pytest.mark.parametrize("parallax", [False, True])
def test_pixels_and_rays_are_where_dials_has_them(parallax):
    from ssx_mpi.stages.fast.fast_integration import panels_of

    detector = detector_of_two(parallax)
    panels = panels_of(detector)
    rng = np.random.default_rng(1)
    panel, xy = rng.integers(0, 2, 50), rng.uniform(-10, 600, (50, 2))
    lab = pixels_to_lab(panels, panel, xy)
    expected = [detector[int(p)].get_pixel_lab_coord(tuple(point)) for p, point in zip(panel, xy)]
    np.testing.assert_allclose(lab, expected, atol=1e-9)

    px, mm = rays_to_pixels(panels, panel, lab)
    for k, ray in enumerate(lab):
        np.testing.assert_allclose(mm[k], detector[int(panel[k])].get_ray_intersection(tuple(ray)), atol=1e-9)
        np.testing.assert_allclose(px[k], detector[int(panel[k])].get_ray_intersection_px(tuple(ray)), atol=1e-9)


def test_each_ray_is_given_the_panel_that_it_meets():
    from ssx_mpi.stages.fast.fast_integration import panels_of

    detector = detector_of_two()
    rays = np.random.default_rng(2).normal(size=(300, 3)) * [0.4, 0.4, 1]
    found = find_panels(panels_of(detector), rays)
    for ray, panel in zip(rays, found):
        try:
            expected = detector.get_ray_intersection(tuple(ray))[0]
        except RuntimeError:
            expected = -1
        assert panel == expected
    assert {-1, 0, 1} == set(found)


def test_rays_away_from_a_panel_meet_it_nowhere():
    from ssx_mpi.stages.fast.fast_integration import panels_of

    px, mm = rays_to_pixels(panels_of(detector_of_two()), np.zeros(1, int), np.array([[0.0, 0.0, 1.0]]))
    assert np.isnan(px).all() and np.isnan(mm).all()


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(*[st.floats(8, 40)] * 3),
    st.floats(1.5, 6),
    st.floats(1e-5, 0.05),
    st.floats(0.4, 3),
)
def test_all_indices_near_the_sphere_are_found(seed, cell, d_min, width, wavelength):
    turn = Rotation.random(random_state=seed % 2**31).as_matrix()
    A = turn @ np.array([[1, 0.1, -0.2], [0, 1, 0.3], [0, 0, 1]]) @ np.diag(1 / np.array(cell))
    s0 = np.array([0, 0.1, -1]) / np.linalg.norm([0, 0.1, -1]) / wavelength
    limit = np.floor(np.linalg.norm(np.linalg.inv(A), axis=1) / d_min).astype(int) + 1
    everything = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in limit), indexing="ij"), axis=-1).reshape(-1, 3)
    r = everything @ A.T
    length, off = np.linalg.norm(r, axis=1), np.abs(np.linalg.norm(s0 + r, axis=1) - 1 / wavelength)
    expected = everything[(length > 0) & (length <= 1 / d_min) & (off <= width)]
    np.testing.assert_array_equal(indices_near_ewald_sphere(A, s0, d_min, width), expected)
