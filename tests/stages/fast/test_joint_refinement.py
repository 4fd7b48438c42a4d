"""Joint refinement of the detector finds it where it is, and says what it can tell."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from dxtbx import flumpy
from dxtbx.model import BeamFactory, Crystal, DetectorFactory, Experiment, ExperimentList

from ssx_mpi import dials_compat
from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters.dials_parameters import dials_parameters
from ssx_mpi.stages.fast import joint_refinement
from ssx_mpi.stages.still_results import StageError

CELL = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90", "image=x.cbf")


def detector(distance: float, centre: tuple[float, float]):
    return DetectorFactory.simple("PAD", distance, centre, "+x", "-y", (0.1, 0.1), (1200, 1200), (-1, 10000))


def stills(n: int, true, *beams, seed: int = 1):
    """Experiments of `n` crystals, in the `beams` in turn, with their reflections as seen on the `true` detector."""
    from dials.array_family import flex
    from scitbx.array_family import flex as sflex

    sflex.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(-20, 21)] * 3), -1).reshape(-1, 3)
    experiments, reflections = ExperimentList(), flex.reflection_table()
    for k in range(n):
        beam = beams[k % len(beams)]
        s0 = np.array(beam.get_s0())
        turn = np.reshape(sflex.random_double_r3_rotation_matrix(), (3, 3))
        a, b, c = (turn @ np.diag([79.1, 79.1, 38.2])).T.tolist()
        crystal = Crystal(a, b, c, space_group_symbol="P 43 21 2")
        q = grid @ np.reshape(crystal.get_A(), (3, 3)).T
        s1 = s0 + q
        length = np.linalg.norm(q, axis=1)
        near = (np.abs(np.linalg.norm(s1, axis=1) - np.linalg.norm(s0)) < 6e-4) & (length > 0.05) & (length < 0.4)
        panel = true[0]
        places, rows = [], []
        for row in np.flatnonzero(near):
            try:
                x, y = panel.get_ray_intersection(s1[row].tolist())
            except RuntimeError:
                continue
            if 0 < x < 120 and 0 < y < 120:
                places.append((x + rng.normal(0, 0.01), y + rng.normal(0, 0.01), 0.0))
                rows.append(row)
        own = flex.reflection_table()
        own["miller_index"] = flex.miller_index([tuple(map(int, grid[row])) for row in rows])
        own["xyzobs.mm.value"] = flex.vec3_double(places)
        own["xyzobs.mm.variance"] = flex.vec3_double([(1e-4, 1e-4, 1e-4)] * len(rows))
        own["xyzobs.px.value"] = flex.vec3_double([(x * 10, y * 10, 0.5) for x, y, _ in places])
        own["xyzobs.px.variance"] = flex.vec3_double([(0.01, 0.01, 0.01)] * len(rows))
        own["s1"] = flex.vec3_double([tuple(s1[row]) for row in rows])
        own["panel"] = flex.size_t(len(rows), 0)
        own["id"] = flex.int(len(rows), k)
        own["entering"] = flex.bool(len(rows), False)
        own["flags"] = flex.size_t(len(rows), 0)
        own.set_flags(flex.bool(len(rows), True), own.flags.indexed | own.flags.strong)
        own["delpsical.rad"] = flex.double(len(rows), 0.0)
        reflections.extend(own)
        experiments.append(Experiment(beam=beam, crystal=crystal, identifier=f"crystal-{k}"))
    for k, experiment in enumerate(experiments):
        reflections.experiment_identifiers()[k] = experiment.identifier
    return experiments, reflections


def seen_from(experiments, reflections, wrong):
    """The same stills with another detector, and the observations on it that pixels give."""
    moved = ExperimentList()
    for e in experiments:
        moved.append(Experiment(beam=e.beam, detector=wrong, crystal=copy.deepcopy(e.crystal), identifier=e.identifier))
    table = copy.deepcopy(reflections)
    return moved, table


@pytest.fixture(scope="module")
def scope():
    """Parameters of the refinement, with and without the cell restrained."""

    def make(*more: str):
        parameters = read_arguments([*CELL, *more])[0]
        return dials_parameters(parameters, {}).geometry_refinement

    return make


@pytest.fixture(scope="module")
def misplaced():
    """Ten stills whose header is 0.3 mm off in the beam centre."""
    beam = BeamFactory.simple(1.0)
    experiments, reflections = stills(10, detector(150, (60.0, 60.0)), beam)
    return seen_from(experiments, reflections, detector(150, (60.3, 59.8)))


@pytest.fixture(scope="module")
def refined(misplaced, scope):
    experiments, reflections = misplaced
    before = [e.crystal.get_A() for e in experiments], reflections.as_msgpack()
    result = joint_refinement.refine(experiments, reflections, scope())
    assert ([e.crystal.get_A() for e in experiments], reflections.as_msgpack()) == before, "the input is left alone"
    return result


def test_the_beam_centre_comes_back(refined):
    assert (refined.before.beam_x, refined.before.beam_y) == pytest.approx((60.3, 59.8))
    sigma = refined.uncertainty.sigma
    assert abs(refined.after.beam_x - 60.0) < max(5 * sigma["shift_fast"], 0.002)
    assert abs(refined.after.beam_y - 60.0) < max(5 * sigma["shift_slow"], 0.002)
    assert abs(refined.after.distance - 150.0) < 5 * sigma["distance"]
    assert sigma["shift_fast"] < 0.005


@pytest.mark.parametrize("engine", ["fast", "dials"])
def test_each_crystal_is_refined_with_the_wavelength_of_its_shot(engine, scope):
    wavelengths = (1.0, 1.004, 0.996)
    beams = [BeamFactory.simple(wavelength) for wavelength in wavelengths]
    seen = seen_from(*stills(9, detector(150, (60.0, 60.0)), *beams), detector(150, (60.3, 59.8)))
    refined = joint_refinement.refine(*seen, scope()) if engine == "dials" else joint_refinement.refine_fast(*seen)
    assert (refined.after.beam_x, refined.after.beam_y) == pytest.approx((60.0, 60.0), abs=0.005)
    assert [e.beam.get_wavelength() for e in refined.experiments] == 3 * list(wavelengths)
    # with one wavelength for all they would be 0.4% off, by 0.3 angstrom
    lengths = [c.get_unit_cell().parameters()[0] for c in refined.experiments.crystals()]
    assert np.ptp(lengths) < 0.06
    assert refined.cell_after[0] == pytest.approx(79.1, abs=0.1)


def test_the_steps_tell_of_the_improvement(refined):
    assert refined.n_crystals == 10
    assert refined.steps[0].rmsd_x > 0.2
    assert refined.rmsd < 0.02
    assert refined.engine in ("SparseLevMar", "LevMar")
    assert refined.cell_after[:3] == pytest.approx((79.1, 79.1, 38.2), rel=0.002)


def test_a_second_look_counts_from_the_first_place(refined):
    again = refined.since(refined)
    assert again.before == refined.before
    later = joint_refinement.RefinedGeometry(
        **{**vars(refined), "before": refined.after, "cell_before": refined.cell_after}
    )
    assert later.since(refined).before == refined.before
    assert later.since(refined).cell_before == refined.cell_before


def test_the_sparse_engine_works_where_it_is_said_to_be_there_and_nowhere_else(misplaced, scope):
    wanted = scope()
    wanted.refinement.refinery.engine = "SparseLevMar"
    if dials_compat.has_sparse_engine():
        assert joint_refinement.refine(*misplaced, wanted).engine == "SparseLevMar"
    else:
        with pytest.raises(StageError, match="Eigen"):
            joint_refinement.refine(*misplaced, wanted)


def test_a_restrained_cell_stays_and_the_distance_gives_way(scope):
    # the crystals are 1% smaller than the cell given, which the distance alone can explain nearly as well
    beam = BeamFactory.simple(1.0)
    experiments, reflections = stills(6, detector(150, (60.0, 60.0)), beam, seed=2)
    held = joint_refinement.refine(
        *seen_from(experiments, reflections, detector(151.5, (60, 60))), scope("geometry_refinement.restrain_cell=True")
    )
    assert held.cell_after[:3] == pytest.approx((79.1, 79.1, 38.2), rel=2e-4)
    assert held.after.distance == pytest.approx(150.0, abs=0.1)


def test_what_cannot_be_refined_is_a_reason(misplaced, scope):
    experiments, reflections = misplaced
    with pytest.raises(StageError) as refused:
        joint_refinement.refine(
            experiments[:1], reflections.select(flumpy.from_numpy(np.arange(len(reflections)) < 3)), scope()
        )
    assert "\n" not in str(refused.value)


def test_the_place_is_that_of_the_panel_that_the_beam_meets():
    beam = BeamFactory.simple(1.0)
    two = detector(100, (-10.0, 60.0))
    two.add_panel(detector(120, (60.0, 50.0))[0])
    place = joint_refinement.place(two, beam)
    assert (place.distance, place.beam_x, place.beam_y) == pytest.approx((120, 60, 50))


def test_a_beam_that_misses_all_panels_is_measured_on_the_first():
    missed = joint_refinement.place(detector(100, (-10.0, 60.0)), BeamFactory.simple(1.0))
    assert (missed.distance, missed.beam_x, missed.beam_y) == pytest.approx((100, -10, 60))


def test_symmetry_in_cartesian_axes_is_a_group_of_rotations():
    crystal = Crystal((79.1, 0, 0), (0, 79.1, 0), (0, 0, 38.2), space_group_symbol="P 43 21 2")
    rotations = joint_refinement._cartesian_rotations(crystal)
    assert len(rotations) == 8
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3))
    hexagonal = Crystal((60, 0, 0), (-30, 30 * np.sqrt(3), 0), (0, 0, 90), space_group_symbol="P 6 2 2")
    rotations = joint_refinement._cartesian_rotations(hexagonal)
    assert len(rotations) == 12
    assert np.allclose(rotations @ rotations.transpose(0, 2, 1), np.eye(3))
