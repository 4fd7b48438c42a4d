"""Rotation matrices against scipy's, and their generators against finite differences."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels.rotations import GENERATORS, rotation_matrices


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_matrices_are_those_of_scipy(vector):
    assert np.allclose(rotation_matrices(np.array(vector)), Rotation.from_rotvec(vector).as_matrix(), atol=1e-12)


def test_no_rotation_is_exactly_the_identity():
    assert (rotation_matrices(np.zeros((2, 3))) == np.eye(3)).all()


def test_generators_are_the_derivatives():
    step = 1e-6
    forward, backward = rotation_matrices(step * np.eye(3)), rotation_matrices(-step * np.eye(3))
    assert np.allclose((forward - backward) / (2 * step), GENERATORS, atol=1e-9)
