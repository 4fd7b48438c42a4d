"""Detectors with a tree of panels: their levels, and sensors that refinement puts in their places."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from dxtbx.model import Detector, ExperimentList
from fake_ranks import on_fake_ranks
from panel_stills import SIZE, detector, misplacements, stills

from ssx_mpi.kernels.lattice_refinement import prediction_gradients
from ssx_mpi.parameters.run_parameters import PanelPriors
from ssx_mpi.stages.fast import joint_refinement
from ssx_mpi.stages.fast.panel_tree import movement_px, panel_tree
from ssx_mpi.stages.still_results import StageError


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


def test_a_dozen_crystals_tell_that_sensors_are_misplaced():
    experiments, reflections = stills(detector(misplacements(9)), 12, seed=10)
    refined = joint_refinement.refine_fast(experiments, reflections, hierarchy_level=None, against_start=True)
    assert refined.hierarchy_level == 2 and not refined.note
    gain, error = refined.closer
    # from misplacements of 0.1 mm to centroids of 0.01 mm
    assert gain > 1 and gain > 5 * error
    rms, largest = movement_px(experiments[0].detector, refined.detector)
    assert 0.7 < rms < 3 and rms < largest < 10
    assert movement_px(refined.detector, refined.detector) == pytest.approx((0, 0), abs=1e-9)
    few, spots = stills(detector(misplacements(9)), 8, seed=10)
    alone = joint_refinement.refine_fast(few, spots, hierarchy_level=None)
    assert alone.hierarchy_level == 0 and alone.note.startswith("8 crystals are too few to tell")


def test_ranks_without_a_crystal_take_part():
    from dials.array_family import flex

    experiments, reflections = stills(detector(misplacements(11)), 3, seed=12)
    header, beam = experiments[0].detector, experiments[0].beam

    def on(comm):
        mine = comm.rank == 1
        own, table = (experiments, reflections) if mine else (ExperimentList(), flex.reflection_table())
        shared = joint_refinement.SharedCrystals(comm, header, beam, np.arange(3 if mine else 0), 3)
        refined = joint_refinement.refine_fast(own, table, hierarchy_level=1, shared=shared, against_start=True)
        return refined.detector.to_dict(), refined.closer

    assert len({str(part) for part in on_fake_ranks(3, on)}) == 1
