"""Small rotations: their generators, and the rotation matrix of a rotation vector."""

from __future__ import annotations

import numpy as np

# derivatives of a rotation matrix by the angles about x, y and z, at no rotation: G_k v = e_k x v
GENERATORS = np.array(
    [[[0, 0, 0], [0, 0, -1], [0, 1, 0]], [[0, 0, 1], [0, 0, 0], [-1, 0, 0]], [[0, -1, 0], [1, 0, 0], [0, 0, 0]]], float
)


def rotation_matrices(vectors: np.ndarray) -> np.ndarray:
    """Rotations by the lengths (radian) of vectors about their directions, by Rodrigues's formula.

    Parameters
    ----------
    vectors : (..., 3) float64

    Returns
    -------
    (..., 3, 3) float64
    """
    angle = np.linalg.norm(vectors, axis=-1)[..., None, None]
    k = np.einsum("...i,ijk->...jk", vectors, GENERATORS) / np.maximum(angle, 1e-300)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)
