"""Detectors with a tree of panels: their levels, and sensors that refinement puts in their places."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from dxtbx.model import BeamFactory, Crystal, Detector, Experiment, ExperimentList
from fake_ranks import on_fake_ranks

from ssx_mpi.kernels.lattice_refinement import prediction_gradients
from ssx_mpi.kernels.rotations import rotation_matrices
from ssx_mpi.parameters.run_parameters import PanelPriors
from ssx_mpi.stages.fast import joint_refinement
from ssx_mpi.stages.fast.panel_tree import panel_tree
from ssx_mpi.stages.still_results import StageError

SIZE = (30.0, 25.0)
DISTANCE = 100.0


def detector(motions: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None) -> Detector:
    """Two sides of three panels in an arm at the distance; each panel moved by a shift and a turn in its own frame."""
    made = Detector()
    root = made.hierarchy()
    root.set_name("arm")
    root.set_local_frame((1, 0, 0), (0, -1, 0), (0, 0, -DISTANCE))
    for side, x in enumerate((-62.0, 2.0)):
        group = root.add_group()
        group.set_name(f"side {side}")
        group.set_local_frame((1, 0, 0), (0, 1, 0), (x, -40.0, 0))
        for k in range(3):
            panel = group.add_panel()
            shift, turn = (motions or {}).get((side, k), (np.zeros(3), np.zeros(3)))
            rotation = rotation_matrices(turn)
            middle = np.array([SIZE[0] / 2, SIZE[1] / 2, 0])
            origin = np.array([0, 28.0 * k, 0]) + middle - rotation @ middle + shift
            panel.set_local_frame(tuple(rotation[:, 0]), tuple(rotation[:, 1]), tuple(origin))
            panel.set_name(f"panel {side}{k}")
            panel.set_pixel_size((0.1, 0.1))
            panel.set_image_size((300, 250))
            panel.set_trusted_range((0, 1e6))
    return made


def misplacements(seed: int, shift: float = 0.1, turn: float = 2e-3):
    rng = np.random.default_rng(seed)
    return {(s, k): (rng.normal(0, shift, 3), rng.normal(0, turn, 3)) for s in range(2) for k in range(3)}


def stills(true: Detector, n: int, seed: int, noise: float = 0.01):
    """Experiments on the detector of the header, with reflections seen on the `true` one."""
    from dials.array_family import flex

    rng = np.random.default_rng(seed)
    beam = BeamFactory.simple(1.0)
    s0 = np.array(beam.get_s0())
    grid = np.stack(np.meshgrid(*[np.arange(-30, 31)] * 3), -1).reshape(-1, 3)
    inverse = [np.linalg.inv(np.reshape(panel.get_d_matrix(), (3, 3))) for panel in true]
    experiments, header = ExperimentList(), detector()
    rows: dict[str, list] = {"hkl": [], "panel": [], "xy": [], "id": []}
    for number in range(n):
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        turn = q * np.sign(np.diag(r))
        turn = turn if np.linalg.det(turn) > 0 else -turn
        a, b, c = (turn @ np.diag([79.1, 79.1, 38.2])).T.tolist()
        crystal = Crystal(a, b, c, space_group_symbol="P 43 21 2")
        points = grid @ np.reshape(crystal.get_A(), (3, 3)).T
        length, off = np.linalg.norm(points, axis=1), np.linalg.norm(s0 + points, axis=1) - 1
        near = (length > 0.05) & (length < 0.55) & (np.abs(off) < 5e-4)
        for panel, own in enumerate(inverse):
            predicted = prediction_gradients(
                points[near], np.empty((0, near.sum(), 3)), np.repeat(own[None], near.sum(), 0), s0
            )[0]
            inside = np.all((predicted.xy > 0) & (predicted.xy < SIZE), axis=1)
            rows["hkl"].append(grid[near][inside])
            rows["panel"].append(np.full(inside.sum(), panel))
            rows["xy"].append(predicted.xy[inside] + rng.normal(0, noise, (inside.sum(), 2)))
            rows["id"].append(np.full(inside.sum(), number))
        experiments.append(Experiment(beam=beam, detector=header, crystal=crystal, identifier=f"crystal-{number}"))
    table = flex.reflection_table()
    hkl, xy = np.concatenate(rows["hkl"]), np.concatenate(rows["xy"])
    table["miller_index"] = flex.miller_index([tuple(map(int, h)) for h in hkl])
    table["xyzobs.mm.value"] = flex.vec3_double([(*map(float, p), 0.0) for p in xy])
    table["panel"] = flex.size_t(np.concatenate(rows["panel"]).tolist())
    table["id"] = flex.int(np.concatenate(rows["id"]).tolist())
    table["flags"] = flex.size_t(len(table), 0)
    for number in range(n):
        table.experiment_identifiers()[number] = f"crystal-{number}"
    return experiments, table


def middles(made: Detector) -> np.ndarray:
    """Middles of the panels in the laboratory, without the turn about the beam that no still shows, (n, 3) mm."""
    found = np.array([panel.get_lab_coord((SIZE[0] / 2, SIZE[1] / 2)) for panel in made])
    expected = np.array([panel.get_lab_coord((SIZE[0] / 2, SIZE[1] / 2)) for panel in detector()])
    a, b = found[:, :2] @ [1, 1j], expected[:, :2] @ [1, 1j]
    turn = np.exp(-1j * np.angle(np.sum(a * np.conj(b))))
    return np.stack([(a * turn).real, (a * turn).imag, found[:, 2]], axis=1)


def test_levels_of_a_tree():
    tree = panel_tree(detector(), PanelPriors())
    assert tree.depth == 2 and tree.distinct == (1, 2)
    assert [numbers.tolist() for numbers in tree.node] == [[0, 0, 0, 1, 1, 1], [0, 1, 2, 3, 4, 5]]
    one = Detector()
    one.add_panel()
    assert panel_tree(one, PanelPriors()).depth == 0


def test_sensors_are_put_in_their_places():
    true = detector(misplacements(1))
    experiments, reflections = stills(true, 50, seed=2)
    header = copy.deepcopy(experiments[0].detector)
    refined = joint_refinement.refine_fast(experiments, reflections, hierarchy_level=None)
    assert refined.hierarchy_level == 2
    assert refined.levels_tried[2].taken and refined.levels_tried[2].gain > 10 * refined.levels_tried[2].error
    wrong = middles(header) - middles(true)
    left = middles(refined.detector) - middles(true)
    assert np.abs(wrong[:, :2]).max() > 0.1
    assert np.abs(left[:, :2] - left[:, :2].mean(axis=0)).max() < 0.006
    assert refined.steps[-1].rmsd_x < 0.3 * refined.steps[0].rmsd_x
    # the parts know their names, their spots, and what they were moved by
    assert [node.name for node in refined.nodes] == [
        *("side 0", "side 1"),
        *(f"panel {side}{k}" for side in range(2) for k in range(3)),
    ]
    assert all(node.n_spots > 100 for node in refined.nodes)
    assert sum(node.n_spots for node in refined.nodes[2:]) == refined.steps[-1].n_reflections
    # the tree is as it was: only its nodes moved, and panels keep their names and sizes
    assert panel_tree(refined.detector, PanelPriors()).paths == panel_tree(header, PanelPriors()).paths
    assert [p.get_name() for p in refined.detector] == [p.get_name() for p in header]
    assert experiments[0].detector == header, "the input is left alone"


def test_what_is_written_to_the_tree_is_what_was_refined():
    experiments, reflections = stills(detector(misplacements(3)), 20, seed=4)
    refined = joint_refinement.refine_fast(experiments, reflections, hierarchy_level=2)
    observed = np.asarray(refined.reflections["xyzobs.mm.value"]).reshape(-1, 3)
    calculated = np.asarray(refined.reflections["xyzcal.mm"]).reshape(-1, 3)
    number, panel = np.asarray(refined.reflections["id"]), np.asarray(refined.reflections["panel"])
    for k in range(0, len(observed), 97):
        experiment = refined.experiments[int(number[k])]
        q = np.reshape(experiment.crystal.get_A(), (3, 3)) @ refined.reflections["miller_index"][k]
        own = np.linalg.inv(np.reshape(refined.detector[int(panel[k])].get_d_matrix(), (3, 3)))
        xy = prediction_gradients(q[None], np.empty((0, 1, 3)), own[None], np.array(refined.beam.get_s0()))[0].xy
        assert xy[0] == pytest.approx(calculated[k, :2], abs=1e-9)


def test_a_detector_in_its_place_stays_whole():
    experiments, reflections = stills(detector(), 50, seed=5)
    refined = joint_refinement.refine_fast(experiments, reflections, hierarchy_level=None)
    assert refined.hierarchy_level == 0 and not refined.nodes
    assert [level.level for level in refined.levels_tried] == [0, 1, 2]


def test_a_level_that_is_not_there_is_refused():
    experiments, reflections = stills(detector(), 5, seed=6)
    with pytest.raises(StageError, match="hierarchy level 3 of a detector whose last level is 2"):
        joint_refinement.refine_fast(experiments, reflections, hierarchy_level=3)


def test_ranks_refine_together_to_the_same_bits():
    from dials.array_family import flex

    experiments, reflections = stills(detector(misplacements(7)), 24, seed=8)
    header, beam = experiments[0].detector, experiments[0].beam

    def on(comm):
        # as images are dealt out: in turn
        number = np.arange(comm.rank, 24, comm.size)
        own, table = ExperimentList([experiments[int(k)] for k in number]), flex.reflection_table()
        for place, k in enumerate(number):
            part = reflections.select(reflections["id"] == int(k))
            part["id"] = flex.int(len(part), place)
            table.extend(part)
        shared = joint_refinement.SharedCrystals(comm, header, beam, number, 24)
        refined = joint_refinement.refine_fast(own, table, hierarchy_level=2, shared=shared)
        a = [experiment.crystal.get_A() for experiment in refined.experiments]
        return refined.detector.to_dict(), refined.steps, refined.nodes, refined.cell_after, dict(zip(number, a))

    (alone,) = on_fake_ranks(1, on)
    for size in (2, 5):
        parts = on_fake_ranks(size, on)
        for part in parts:
            assert part[:4] == alone[:4]
        assert {k: a for part in parts for k, a in part[4].items()} == alone[4]
