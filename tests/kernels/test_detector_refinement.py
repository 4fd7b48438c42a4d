"""One detector and many crystals refined together: truth is recovered, and repeated experiments scatter as said."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from fake_ranks import on_fake_ranks

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
    geometry: d.JointGeometry
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


def displaced(experiment: Experiment, step) -> d.JointGeometry:
    """The true geometry with the detector moved by the five parameters `step`: a wrong header to start from."""
    moved, _ = d._moved(
        experiment.geometry,
        experiment.strains,
        [np.array([[step[1], step[2], step[0], *step[3:], 0.0]])],
        np.zeros((len(experiment.strains), 5)),
    )
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
    # the motion says what was done to the panels, which stay one body
    motion = refined.geometry.motions[0][0]
    assert motion[:3] == pytest.approx([0.1, -0.15, -0.4], abs=0.1)
    sides = np.diff(refined.geometry.panels[:, :, 2], axis=0)
    assert np.allclose(np.linalg.norm(sides), np.linalg.norm(np.diff(start.panels[:, :, 2], axis=0)), rtol=1e-12)


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


SIZE = (30.0, 25.0)


def sensors(motions: np.ndarray | None = None) -> d.JointGeometry:
    """Six panels, three to a side, without crystals: whole, sides, panels; moved by (6, 6) `motions`."""
    corners = [(x, y) for x in (-62.0, 2.0) for y in (40.0, 12.0, -16.0)]
    panels = np.array([np.array([[1.0, 0, 0], [0, -1.0, 0], [x, y, -100.0]]).T for x, y in corners])
    free, learned = np.repeat([0.1, 2e-3], 3), np.ones(6, bool)
    side, panel = np.repeat([0, 1], 3), np.arange(6)
    start = d.start_geometry(
        panels,
        np.zeros((0, 3, 3)),
        np.tile(np.divide(SIZE, 2), (6, 1)),
        [(d.PanelLevel(side, free, learned), panels[[0, 3]]), (d.PanelLevel(panel, free, learned), panels)],
    )
    return start if motions is None else d.move_nodes(start, [np.zeros((1, 6)), np.zeros((2, 6)), motions])


def stills_on(true: d.JointGeometry, n: int, seed: int, noise: float, without: tuple[int, ...] = ()) -> Experiment:
    """Reflections of `n` crystals on the panels of `true` but those `without`, and where the header has the panels."""
    rng = np.random.default_rng(seed)
    b = np.diag(1 / CELL)
    grid = np.stack(np.meshgrid(*[np.arange(-30, 31)] * 3), -1).reshape(-1, 3).astype(float)
    basis, inverse = invariant_strains(tetragonal()), np.linalg.inv(true.panels)
    hkl, crystal, panel, xy, a_matrices, strains = [], [], [], [], [], []
    for k in range(n):
        u = rotation(rng)
        q = grid @ (u @ b).T
        length = np.linalg.norm(q, axis=1)
        off = np.linalg.norm(S0 + q, axis=1) - 1
        near = (length > 0.05) & (length < 0.55) & (rng.random(len(q)) < np.exp(-0.5 * (off / 4e-4) ** 2))
        q, h = q[near], grid[near]
        for number in set(range(len(true.panels))) - set(without):
            on = np.repeat(inverse[number : number + 1], len(q), axis=0)
            predicted = prediction_gradients(q, np.empty((0, len(q), 3)), on, S0)[0]
            inside = np.all((predicted.xy > 0) & (predicted.xy < SIZE), axis=1)
            hkl.append(h[inside])
            crystal.append(np.full(inside.sum(), k))
            panel.append(np.full(inside.sum(), number))
            xy.append(predicted.xy[inside] + rng.normal(0, noise, (inside.sum(), 2)))
        a_matrices.append(u @ b)
        strains.append(np.einsum("ij,mjl,nl->min", u, basis, u))
    spots = d.DetectorSpots(*map(np.concatenate, (hkl, crystal, panel, xy)))
    geometry = replace(sensors(), a_matrices=np.array(a_matrices))
    return Experiment(spots, geometry, np.array(strains), S0, np.zeros(0))


def misplacements(seed: int, shift: float = 0.1, tilt: float = 2e-3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, shift, (6, 3)), rng.normal(0, tilt, (6, 3))], axis=1)


def apart(one: d.JointGeometry, other: d.JointGeometry) -> np.ndarray:
    """Middles of the panels of two detectors, one against the other, (n, 3) mm, but for a turn about the beam."""
    a, b = (g.panels[:, :, 2] + np.einsum("pij,pj->pi", g.panels[:, :, :2], g.middle) for g in (one, other))
    angle = np.arctan2(np.sum(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]), np.sum(a[:, :2] * b[:, :2]))
    c, s = np.cos(angle), np.sin(angle)
    return a @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]]).T - b


def test_derivatives_by_the_nodes_are_those_of_differences():
    experiment = stills_on(sensors(misplacements(3)), 2, seed=4, noise=0.0)
    fit = d._JointFit(experiment.spots, experiment.strains, S0, d.Alone(), True)
    geometry = experiment.geometry
    _, columns, _ = fit.derivatives(geometry, experiment.strains)
    place = fit.place(geometry)
    for level, n_nodes in enumerate((1, 2, 6)):
        for node in range(n_nodes):
            on = place[:, level] == place[:, level].min() + 6 * node
            for k in range(6):
                step = 1e-4 if k < 3 else 1e-6
                residuals = []
                for sign in (1, -1):
                    motion = [np.zeros((1, 6)), np.zeros((2, 6)), np.zeros((6, 6))]
                    motion[level][node, k] = sign * step
                    residuals.append(fit.derivatives(d.move_nodes(geometry, motion), experiment.strains)[0][:, :2])
                # residuals are observed less calculated
                expected = (residuals[1] - residuals[0]) / (2 * step)
                assert np.allclose(
                    columns[on, :, 6 * level + k], expected[on], atol=2e-5 * max(1, np.abs(expected).max())
                )
                assert np.allclose(expected[~on], 0)


def test_misplaced_sensors_are_put_in_their_places_as_far_as_is_said():
    motions = misplacements(5)
    true = sensors(motions)
    experiment = stills_on(true, 60, seed=6, noise=0.015)
    refined = d.refine_detector(experiment.spots, experiment.geometry, experiment.strains, S0)
    assert refined.converged
    before, after = apart(experiment.geometry, true), apart(refined.geometry, true)
    assert np.abs(before[:, :2]).max() > 0.1
    assert np.abs(after[:, :2]).max() < 0.006 and np.median(np.abs(after[:, :2])) < 0.003
    sigma = refined.uncertainty.nodes[2][:, :3]
    # panels against the side that they belong to
    own = after - np.repeat([after[:3].mean(axis=0), after[3:].mean(axis=0)], 3, axis=0)
    assert np.all(np.abs(own) < 5 * sigma + 0.002)
    assert sigma[:, :2].max() < 0.005
    # the widths are those that the sensors were misplaced by
    widths = refined.geometry.levels[2].widths
    assert 0.03 < widths[0] < 0.3 and 5e-4 < widths[3] < 6e-3
    assert refined.spots_by_panel.sum() == refined.steps[-1].n_spots


def test_a_sensor_without_spots_stays_with_its_side():
    motions = misplacements(7)
    motions[:3, 0] += 0.3  # one side as a whole
    experiment = stills_on(sensors(motions), 40, seed=8, noise=0.015, without=(1,))
    refined = d.refine_detector(experiment.spots, experiment.geometry, experiment.strains, S0)
    assert refined.spots_by_panel[1] == 0
    assert np.abs(refined.geometry.motions[2][1]).max() < 1e-9, "nothing speaks for a motion of its own"
    # it went with the side that it is on: as far as the mean of its neighbours, whatever the whole did
    moved = refined.geometry.panels[:, :, 2] - experiment.geometry.panels[:, :, 2]
    own = refined.geometry.motions[2][[0, 2], 0]
    assert moved[1, 0] == pytest.approx(np.mean(moved[[0, 2], 0] - own), abs=0.02)
    assert np.mean(moved[:3, 0]) - np.mean(moved[3:, 0]) == pytest.approx(0.3, abs=0.15)


def test_a_detector_in_its_place_is_left_there():
    experiment = stills_on(sensors(), 40, seed=9, noise=0.02)
    refined = d.refine_detector(experiment.spots, experiment.geometry, experiment.strains, S0)
    assert np.abs(apart(refined.geometry, sensors())[:, :2]).max() < 0.003
    assert refined.geometry.levels[2].widths[0] < 0.01


def test_any_number_of_parties_gives_the_same_bits():
    experiment = stills_on(sensors(misplacements(5)), 24, seed=10, noise=0.015)
    spots, geometry = experiment.spots, experiment.geometry
    # blocks of four crystals, so that there are some for each party
    alone = replace(spots, number=np.arange(24) * (d.BLOCK // 4))
    whole = d.refine_detector(alone, geometry, experiment.strains, S0, max_steps=6)
    for n_parties in (2, 3, 8):
        owner = (np.arange(24) // 4) * n_parties // 6

        def party(comm, owner=owner):
            own = owner == comm.rank
            mine = own[spots.crystal]
            number = np.cumsum(own) - 1
            part = d.DetectorSpots(
                spots.hkl[mine], number[spots.crystal[mine]], spots.panel[mine], spots.xy[mine], alone.number[own]
            )
            start = replace(geometry, a_matrices=geometry.a_matrices[own])
            return d.refine_detector(part, start, experiment.strains[own], S0, max_steps=6, reducer=comm)

        parts = on_fake_ranks(n_parties, party)
        for part in parts:
            assert np.array_equal(part.geometry.panels, whole.geometry.panels)
            assert part.steps == whole.steps
            assert part.uncertainty.sigma == whole.uncertainty.sigma
        assert np.array_equal(np.concatenate([part.geometry.a_matrices for part in parts]), whole.geometry.a_matrices)


def test_a_part_whose_frame_lies_at_the_crystal_is_refined_like_others():
    # as groups of dxtbx that have no frame of their own: which way its normal points is not told by its origin
    experiment = stills_on(sensors(misplacements(11)), 30, seed=12, noise=0.015)
    start = experiment.geometry
    frames = list(start.frames)
    at_crystal = np.array([[1.0, 0, 0], [0, -1.0, 0], [0, 0, 0]]).T
    frames[1] = np.repeat(at_crystal[None], 2, axis=0)
    moved = replace(start, frames=tuple(frames))
    refined = [d.refine_detector(experiment.spots, geometry, experiment.strains, S0) for geometry in (start, moved)]
    assert all(each.converged for each in refined)
    assert np.allclose(refined[0].geometry.panels, refined[1].geometry.panels, atol=1e-6)
    assert len(refined[1].steps) <= len(refined[0].steps) + 1
