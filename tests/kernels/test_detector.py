"""The uncertainty of a refined detector is that with which repeated experiments scatter."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssx_mpi.kernels import detector as d

S0 = np.array([0.0, 0.0, -1.0])
ORIGIN, FAST, SLOW = np.array([-60.0, 55.0, -100.0]), np.array([1.0, 0, 0]), np.array([0, -1.0, 0])
CELL = np.array([79.1, 79.1, 38.2])


def rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


def stills(n: int, seed: int) -> tuple[d.Spots, np.ndarray, np.ndarray]:
    """Reflections near the Ewald sphere of `n` tetragonal crystals, on a flat detector; A and B of each."""
    rng = np.random.default_rng(seed)
    b = np.diag(1 / CELL)
    grid = np.stack(np.meshgrid(*[np.arange(-14, 15)] * 3), -1).reshape(-1, 3).astype(float)
    hkl, crystal, a_matrices = [], [], []
    for k in range(n):
        a = rotation(rng) @ b
        q = grid @ a.T
        length = np.linalg.norm(q, axis=1)
        near = (length > 0.05) & (length < 0.35) & (np.abs(np.linalg.norm(S0 + q, axis=1) - 1) < 1.2e-3)
        hkl.append(grid[near])
        crystal.append(np.full(near.sum(), k))
        a_matrices.append(a)
    indices = np.concatenate(hkl)
    panels = [np.broadcast_to(v, indices.shape).copy() for v in (ORIGIN, FAST, SLOW)]
    spots = d.Spots(indices, np.concatenate(crystal), *panels, np.zeros((len(indices), 3)))
    return spots, np.array(a_matrices), np.broadcast_to(b, (n, 3, 3)).copy()


def tetragonal() -> np.ndarray:
    """The point group 422 in Cartesian axes."""
    turns = [np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1))]
    flip = np.diag([1.0, -1.0, -1.0])
    return np.array([*turns, *(t @ flip for t in turns)])


def generated(*generators) -> np.ndarray:
    """The group of rotations that these make."""
    group = [np.eye(3)]
    for _ in range(6):
        for g in generators:
            for own in list(group):
                new = own @ g
                if not any(np.allclose(new, old) for old in group):
                    group.append(new)
    return np.array(group)


def about(axis: str, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return {
        "x": np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        "y": np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]),
        "z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    }[axis]


DIAGONAL = np.array([[0, 0, 1.0], [1, 0, 0], [0, 1, 0]])


@pytest.mark.parametrize(
    ("system", "generators", "free"),
    [
        ("triclinic", [], 6),
        ("monoclinic", [about("y", 180)], 4),
        ("orthorhombic", [about("x", 180), about("y", 180)], 3),
        ("tetragonal", [about("z", 90)], 2),
        ("trigonal", [about("z", 120)], 2),
        ("hexagonal", [about("z", 60), about("x", 180)], 2),
        ("cubic", [DIAGONAL, about("x", 180)], 1),
    ],
)
def test_each_crystal_system_has_its_number_of_strains(system, generators, free):
    group = generated(*generators)
    basis = d.strain_basis(group)
    assert len(basis) == free
    assert np.allclose(basis, basis.transpose(0, 2, 1))
    assert np.allclose(np.einsum("kij,lij->kl", basis, basis), np.eye(free))
    for operation in group:
        assert np.allclose(operation @ basis @ operation.T, basis)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_predictions_are_where_rays_meet_the_panel(seed):
    rng = np.random.default_rng(seed)
    turn = rotation(rng)
    fast, slow, normal = turn
    origin = 100 * normal + rng.normal(size=3)
    xy = rng.uniform(-50, 50, (7, 2))
    points = origin + xy[:, :1] * fast + xy[:, 1:] * slow
    s0 = turn.T @ [0, 0, 0.9]
    q = points / np.linalg.norm(points, axis=1)[:, None] * 0.9 - s0
    panels = [np.broadcast_to(v, q.shape) for v in (origin, fast, slow)]
    assert np.allclose(d.predict(q, s0, *panels), np.column_stack([xy, np.zeros(7)]), atol=1e-8)


def test_delta_psi_is_the_rotation_that_brings_a_reflection_onto_the_sphere():
    s0, q = np.array([0, 0, 1.0]), np.array([[0.3, 0.0, -0.05]])
    psi = d.predict(q, s0, *[np.array([v]) for v in ([0, 0, 100.0], [1.0, 0, 0], [0, 1.0, 0])])[0, 2]
    # about the axis s0 x q, by the angle predicted, to first order in the angle
    turned = about("y", -np.degrees(psi)) @ q[0]
    other = about("y", np.degrees(psi)) @ q[0]
    nearest = min(abs(np.linalg.norm(s0 + v) - 1) for v in (turned, other))
    assert nearest < 0.05 * abs(np.linalg.norm(s0 + q[0]) - 1)


def test_uncertainties_are_the_scatter_of_repeated_fits():
    """Noise on the same spots, many times; a linear least-squares fit of everything to each."""
    n, sigma_xy, sigma_psi = 6, 0.02, 1e-3
    spots, a, b = stills(n, seed=4)
    basis = d.strain_basis(tetragonal())
    rng = np.random.default_rng(5)
    noise = rng.normal(size=(400, *spots.residual.shape)) * [sigma_xy, sigma_xy, sigma_psi]
    one = d.Spots(spots.hkl, spots.crystal, spots.origin, spots.fast, spots.slow, noise[0])
    found = d.geometry_uncertainty(one, a, basis, b, S0)

    scale = 1 / np.array([sigma_xy, sigma_xy, sigma_psi])
    q = np.einsum("nij,nj->ni", a[spots.crystal], spots.hkl)
    shared = numerical_detector_derivatives(q)
    per_crystal = 3 + len(basis)
    design = np.zeros((*shared.shape[:2], 5 + n * per_crystal))
    design[:, :, :5] = shared
    own = numerical_crystal_derivatives(q, spots, a, b, basis)
    for k in range(n):
        mine = spots.crystal == k
        design[mine, :, 5 + k * per_crystal : 5 + (k + 1) * per_crystal] = own[mine]
    flat = (design * scale[:, None]).reshape(-1, design.shape[2])
    fits = np.linalg.lstsq(flat, (noise * scale).reshape(400, -1).T, rcond=None)[0].T
    strains = fits[:, 5:].reshape(400, n, per_crystal)[:, :, 3:]
    mean_length = -np.einsum("fks,s->f", strains, np.trace(basis, axis1=1, axis2=2)) / 3 / n
    # 400 repetitions know a scatter to 4%, the one set of residuals its noise to about 2%
    for i, name in enumerate(d.GLOBAL_NAMES):
        assert found.sigma[name] == pytest.approx(fits[:, i].std(), rel=0.15), name
        correlation = np.corrcoef(fits[:, i], mean_length)[0, 1]
        assert found.cell_correlation[name] == pytest.approx(correlation, abs=0.15), name
    assert found.relative_cell_sigma == pytest.approx(mean_length.std(), rel=0.15)
    # a longer distance makes a longer cell
    assert found.cell_correlation["distance"] > 0.5


def numerical_detector_derivatives(q: np.ndarray, h: float = 1e-4) -> np.ndarray:
    """(n, 3, 5), from the definition: distance along the normal, two shifts, two tilts."""

    def at(parameters: np.ndarray) -> np.ndarray:
        distance, shift_fast, shift_slow, tilt_fast, tilt_slow = parameters
        normal = np.array([0, 0, -1.0])
        turn = about("x", np.degrees(tilt_fast)) @ about("y", -np.degrees(tilt_slow))
        # all spots are on one panel: the mean of their origins, about which it tilts, is its own
        origin = ORIGIN + distance * normal + shift_fast * FAST + shift_slow * SLOW
        panels = [np.broadcast_to(v, q.shape) for v in (origin, turn @ FAST, turn @ SLOW)]
        return d.predict(q, S0, *panels)

    unit = np.eye(5) * h
    return np.stack([(at(u) - at(-u)) / (2 * h) for u in unit], axis=2)


def numerical_crystal_derivatives(q, spots, a, b, basis, h: float = 1e-6) -> np.ndarray:
    """(n, 3, 3 + k): turns about the axes of the laboratory, and strains of the crystal's own frame."""
    u = a @ np.linalg.inv(b)
    panels = (spots.origin, spots.fast, spots.slow)
    columns = []
    for axis in "xyz":
        turned = [q @ about(axis, sign * np.degrees(h)).T for sign in (1, -1)]
        columns.append((d.predict(turned[0], S0, *panels) - d.predict(turned[1], S0, *panels)) / (2 * h))
    for strain in basis:
        strained = []
        for sign in (1, -1):
            new = u @ (np.eye(3) + sign * h * strain) @ b
            strained.append(np.einsum("nij,nj->ni", new[spots.crystal], spots.hkl))
        columns.append((d.predict(strained[0], S0, *panels) - d.predict(strained[1], S0, *panels)) / (2 * h))
    return np.stack(columns, axis=2)


def test_more_crystals_and_less_noise_tell_more():
    basis = d.strain_basis(tetragonal())

    def uncertainty(n: int, noise: float) -> d.GeometryUncertainty:
        spots, a, b = stills(n, seed=n)
        rng = np.random.default_rng(1)
        residual = rng.normal(size=spots.residual.shape) * [noise, noise, 0.05 * noise]
        return d.geometry_uncertainty(d.Spots(**{**vars(spots), "residual": residual}), a, basis, b, S0)

    few, many, noisy = uncertainty(4, 0.02), uncertainty(16, 0.02), uncertainty(4, 0.06)
    for name in d.GLOBAL_NAMES:
        # four times the crystals halve it
        assert 0.3 < many.sigma[name] / few.sigma[name] < 0.75
        assert noisy.sigma[name] / few.sigma[name] == pytest.approx(3, rel=0.01)
