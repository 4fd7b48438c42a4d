"""One detector and many crystals refined together: truth is recovered, and repeated experiments scatter as said."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from ssx_mpi.kernels import detector_refinement as d
from ssx_mpi.kernels.lattice_refinement import invariant_strains, prediction_gradients

S0 = np.array([0.0, 0.0, -1.0])
CELL = np.array([79.1, 79.1, 38.2])
# two panels side by side, facing the crystal
PANELS = np.array([np.array([[1.0, 0, 0], [0, -1.0, 0], [x, 55.0, -100.0]]).T for x in (-60.0, 1.0)])


def rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q if np.linalg.det(q) > 0 else -q


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
    basis = invariant_strains(group)
    assert len(basis) == free
    assert np.allclose(basis, basis.transpose(0, 2, 1))
    assert np.allclose(np.einsum("kij,lij->kl", basis, basis), np.eye(free))
    for operation in group:
        assert np.allclose(operation @ basis @ operation.T, basis)


@dataclass(frozen=True)
class Experiment:
    """Simulated stills: spots without noise, the true geometry, and the strains of each crystal in the laboratory."""

    spots: d.DetectorSpots
    geometry: d.Geometry
    strains: np.ndarray
    s0: np.ndarray
    psi: np.ndarray

    def noisy(self, rng: np.random.Generator, sigma: float) -> d.DetectorSpots:
        return replace(self.spots, xy=self.spots.xy + sigma * rng.normal(size=self.spots.xy.shape))


def stills(n: int, seed: int, turn: np.ndarray | None = None) -> Experiment:
    """Reflections of `n` tetragonal crystals near the Ewald sphere, normally about it; the whole turned by `turn`."""
    rng = np.random.default_rng(seed)
    turn = np.eye(3) if turn is None else turn
    s0, panels = turn @ S0, turn @ PANELS
    b = np.diag(1 / CELL)
    grid = np.stack(np.meshgrid(*[np.arange(-14, 15)] * 3), -1).reshape(-1, 3).astype(float)
    basis = invariant_strains(tetragonal())
    hkl, crystal, panel, xy, psi, a_matrices, strains = [], [], [], [], [], [], []
    for k in range(n):
        u = turn @ rotation(rng)
        q = grid @ (u @ b).T
        length = np.linalg.norm(q, axis=1)
        off = np.linalg.norm(s0 + q, axis=1) - 1
        near = (length > 0.05) & (length < 0.35) & (rng.random(len(q)) < np.exp(-0.5 * (off / 4e-4) ** 2))
        on_panel = (q[near] @ (turn @ [1.0, 0, 0]) > 0).astype(int)
        predicted = prediction_gradients(q[near], np.empty((0, near.sum(), 3)), np.linalg.inv(panels)[on_panel], s0)[0]
        hkl.append(grid[near])
        crystal.append(np.full(near.sum(), k))
        panel.append(on_panel)
        xy.append(predicted.xy)
        psi.append(predicted.delta_psi)
        a_matrices.append(u @ b)
        strains.append(np.einsum("ij,mjl,nl->min", u, basis, u))
    spots = d.DetectorSpots(*map(np.concatenate, (hkl, crystal, panel, xy)))
    geometry = d.start_geometry(panels, np.array(a_matrices))
    return Experiment(spots, geometry, np.array(strains), s0, np.concatenate(psi))


def displaced(experiment: Experiment, step) -> d.Geometry:
    """The true geometry with the detector moved by the five parameters `step`: a wrong header to start from."""
    moved, _ = d._moved(experiment.geometry, experiment.strains, np.array(step), np.zeros((len(experiment.strains), 5)))
    return d.start_geometry(moved.panels, moved.a_matrices)


def test_a_wrong_detector_is_put_right():
    experiment = stills(12, seed=1)
    start = displaced(experiment, [0.4, -0.1, 0.15, 2e-3, -1e-3])
    spots = experiment.noisy(np.random.default_rng(2), 0.01)
    refined = d.refine_detector(spots, start, experiment.strains, experiment.s0)
    off = refined.geometry.panels[:, :, 2] - experiment.geometry.panels[:, :, 2]
    # the distance trades off with the cells, and the panels go with the tilts at their ends
    assert np.all(np.abs(off[:, :2]) < 5 * refined.uncertainty.sigma["shift_fast"] + 0.01)
    assert np.all(np.abs(off[:, 2]) < 5 * refined.uncertainty.sigma["distance"])
    rmsd = refined.steps[-1].rmsd
    assert rmsd[0] == pytest.approx(0.01, rel=0.1) and rmsd[1] == pytest.approx(0.01, rel=0.1)
    # the motion says what was done to the panels
    assert np.allclose(
        refined.geometry.rotation @ start.panels[:, :, 2:] + refined.geometry.translation[:, None],
        refined.geometry.panels[:, :, 2:],
    )


def test_uncertainties_are_the_scatter_of_repeated_experiments():
    rng = np.random.default_rng(5)
    found, cells, said = [], [], []
    for repetition in range(80):
        # other crystals every time: delta psi is part of the scatter, and fixed for given crystals
        experiment = stills(6, seed=100 + repetition)
        spots = experiment.noisy(rng, 0.02)
        refined = d.refine_detector(spots, experiment.geometry, experiment.strains, experiment.s0)
        found.append(refined.geometry.panels[:, 2, 2].mean() - experiment.geometry.panels[:, 2, 2].mean())
        volumes = np.linalg.det(np.linalg.inv(refined.geometry.a_matrices))
        cells.append(np.mean((np.abs(volumes) / np.prod(CELL)) ** (1 / 3)) - 1)
        said.append(
            [
                refined.uncertainty.sigma["distance"],
                refined.uncertainty.relative_cell_sigma,
                refined.uncertainty.cell_correlation["distance"],
            ]
        )
    sigma, cell_sigma, correlation = np.mean(said, axis=0)
    # 80 repetitions know a scatter to 8%
    assert sigma == pytest.approx(np.std(found), rel=0.25)
    assert cell_sigma == pytest.approx(np.std(cells), rel=0.25)
    assert correlation == pytest.approx(np.corrcoef(-np.array(found), cells)[0, 1], abs=0.15)
    assert correlation > 0.5


def test_the_whole_experiment_may_be_turned():
    turn = rotation(np.random.default_rng(8))
    one, other = stills(4, seed=3), stills(4, seed=3, turn=turn)
    results = []
    for experiment in (one, other):
        start = displaced(experiment, [0.2, 0.05, -0.05, 0, 0])
        spots = experiment.noisy(np.random.default_rng(1), 0.01)
        results.append(d.refine_detector(spots, start, experiment.strains, experiment.s0))
    first, second = results
    assert np.allclose(turn @ first.geometry.panels, second.geometry.panels, atol=1e-6)
    for name, sigma in first.uncertainty.sigma.items():
        assert second.uncertainty.sigma[name] == pytest.approx(sigma, rel=1e-4)


def test_outliers_do_no_harm():
    experiment = stills(8, seed=6)
    rng = np.random.default_rng(7)
    spots = experiment.noisy(rng, 0.01)
    bad = rng.random(len(spots.hkl)) < 0.05
    spots.xy[bad] += rng.normal(scale=1.0, size=(bad.sum(), 2))
    refined = d.refine_detector(spots, experiment.geometry, experiment.strains, experiment.s0)
    far = np.hypot(*refined.residual[:, :2].T) > 0.1
    assert np.all(refined.weight[far] == 0)
    assert refined.steps[-1].rmsd[0] < 0.013


def test_cells_without_strains_are_held():
    experiment = stills(5, seed=9)
    spots = experiment.noisy(np.random.default_rng(3), 0.01)
    refined = d.refine_detector(spots, experiment.geometry, experiment.strains[:, :0], experiment.s0)
    gram = refined.geometry.a_matrices.transpose(0, 2, 1) @ refined.geometry.a_matrices
    assert np.allclose(gram, np.diag(1 / CELL**2), rtol=1e-9, atol=1e-15)
    free = d.refine_detector(spots, experiment.geometry, experiment.strains, experiment.s0)
    # with the cells known, so is the distance
    assert refined.uncertainty.sigma["distance"] < 0.5 * free.uncertainty.sigma["distance"]


def test_more_crystals_and_less_noise_tell_more():
    def sigma(n: int, noise: float) -> float:
        experiment = stills(n, seed=n)
        spots = experiment.noisy(np.random.default_rng(1), noise)
        found = d.geometry_uncertainty(spots, experiment.geometry, experiment.strains, experiment.s0)
        return found.sigma["shift_fast"]

    # four times the crystals halve it
    assert 0.3 < sigma(16, 0.02) / sigma(4, 0.02) < 0.75
    assert sigma(4, 0.06) > 1.5 * sigma(4, 0.02)
