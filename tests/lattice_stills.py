"""Spots of still images made from known lattices, for the tests of indexing."""

import numpy as np

from ssx_mpi.kernels import lattice_refinement, lattices
from ssx_mpi.kernels.lattice_refinement import Lattice, Spots

CELLS = {
    "cubic": (96.4, 96.4, 96.4, 90, 90, 90),
    "tetragonal": (57.8, 57.8, 150.2, 90, 90, 90),
    "hexagonal": (93.0, 93.0, 40.0, 90, 90, 120),
    "orthorhombic": (40.0, 70.0, 90.0, 90, 90, 90),
    "monoclinic": (50.0, 60.0, 75.0, 90, 105, 90),
    "triclinic": (40.0, 50.0, 62.0, 80, 84, 97),
}
PIXEL = 0.172
S0 = np.array([0.0, 0.0, -1.0])
# panel matrix (fast, slow, origin): 420 mm square, 250 mm from the crystal
PANEL = np.array([[1.0, 0.0, -210.0], [0.0, -1.0, 210.0], [0.0, 0.0, -250.0]])
SIZE_MM = 420.0


def random_rotation(rng):
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def rays_to_spots(xy, panel=PANEL, sigma_px=0.3):
    """Spots at positions (n, 2) in mm on one panel."""
    lab = np.c_[xy, np.ones(len(xy))] @ panel.T
    s1 = lab / np.linalg.norm(lab, axis=1, keepdims=True) * np.linalg.norm(S0)
    weight = np.full((len(xy), 2), 1 / (sigma_px * PIXEL) ** 2)
    return Spots(s1 - S0, xy, weight, np.broadcast_to(np.linalg.inv(panel), (len(xy), 3, 3)), S0)


def noise_positions(rng, n, radius=150.0):
    """Positions (n, 2) in mm evenly over a disc about the beam."""
    r, phi = radius * np.sqrt(rng.uniform(size=n)), rng.uniform(0, 2 * np.pi, n)
    return np.stack([210 + r * np.cos(phi), 210 + r * np.sin(phi)], axis=1)


def still_positions(rng, basis, orientation, n, d_min=2.0, mosaic_deg=0.1, sigma_px=0.3, panel=PANEL):
    """Positions (n, 2) in mm and indices (n, 3) of spots chosen at random from those in reflecting position."""
    lattice = Lattice(orientation, basis)
    limit = np.ceil(np.linalg.norm(basis, axis=1) / d_min).astype(int)
    h = np.stack(np.meshgrid(*[np.arange(-m, m + 1) for m in limit], indexing="ij"), axis=-1).reshape(-1, 3)
    h = h[h.any(axis=1)]
    q = h @ lattice.setting.T
    # near the Ewald sphere first: prediction of all would be slow
    near = (np.linalg.norm(q, axis=1) < 1 / d_min) & (np.abs(np.linalg.norm(q + S0, axis=1) - 1) < 0.01)
    h = h[near]
    d_inverse = np.broadcast_to(np.linalg.inv(panel), (len(h), 3, 3))
    prediction = lattice_refinement.predict(h, lattice, d_inverse, S0)
    reflecting = np.abs(prediction.delta_psi) < np.radians(mosaic_deg)
    inside = ((prediction.xy > 0) & (prediction.xy < SIZE_MM)).all(axis=1) & (prediction.s1[:, 2] < 0)
    chosen = np.nonzero(reflecting & inside)[0]
    chosen = rng.choice(chosen, size=min(n, len(chosen)), replace=False)
    xy = prediction.xy[chosen] + rng.normal(scale=sigma_px * PIXEL, size=(len(chosen), 2))
    return xy, h[chosen]


def misorientation(direct, orientation, basis):
    """Angle in degrees between direct bases (rows) and an orientation of a lattice, up to the lattice's rotations."""
    reduced = lattices.reduce_basis(basis)
    rotations = lattices.lattice_rotations(reduced)
    u, _, vt = np.linalg.svd(np.linalg.inv(basis) @ direct)
    found = (u @ vt).T
    trace = np.einsum("ij,gjk,ki->g", found, rotations, orientation.T).max()
    return np.degrees(np.arccos(np.clip(0.5 * (trace - 1), -1, 1)))
