"""Cells of crystals fall into clusters, with the symmetry that their metric allows."""

from __future__ import annotations

import numpy as np
import pytest
from dxtbx.model import Crystal, Experiment, ExperimentList

from ssx_mpi.stages.cell_assessment import assess


def experiments(cells, seed: int = 1) -> ExperimentList:
    """Crystals of these cells in space group P1, turned at random."""
    from cctbx import uctbx
    from scitbx.array_family import flex

    flex.set_random_seed(seed)
    made = ExperimentList()
    for cell in cells:
        orthogonal = np.reshape(uctbx.unit_cell(tuple(cell)).orthogonalization_matrix(), (3, 3))
        turn = np.reshape(flex.random_double_r3_rotation_matrix(), (3, 3))
        a, b, c = (turn @ orthogonal).T.tolist()
        made.append(Experiment(crystal=Crystal(a, b, c, space_group_symbol="P 1")))
    return made


def spread(cell, n: int, seed: int = 1, relative: float = 0.001) -> list:
    rng = np.random.default_rng(seed)
    return [np.array(cell) * np.r_[1 + rng.normal(0, relative, 3), 1 + rng.normal(0, 1e-4, 3)] for _ in range(n)]


@pytest.mark.parametrize(
    ("cell", "symmetry", "conventional"),
    [
        ((79.1, 79.1, 38.2, 90, 90, 90), "P 4 2 2", (79.1, 79.1, 38.2, 90, 90, 90)),
        ((96.4, 96.4, 96.4, 90, 90, 90), "P 4 3 2", (96.4, 96.4, 96.4, 90, 90, 90)),
        ((40, 55, 70, 90, 90, 90), "P 2 2 2", (40, 55, 70, 90, 90, 90)),
        ((60, 60, 90, 90, 90, 120), "P 6 2 2", (60, 60, 90, 90, 90, 120)),
        ((40, 55, 70, 90, 103, 90), "P 1 2 1", (40, 55, 70, 90, 103, 90)),
    ],
)
def test_the_metric_symmetry_of_a_set_of_crystals(cell, symmetry, conventional):
    assessment = assess(experiments(spread(cell, 12)))
    (cluster,) = assessment.clusters
    assert cluster.members == tuple(range(12))
    assert cluster.metric_symmetry == symmetry
    assert cluster.best_cell[:3] == pytest.approx(conventional[:3], rel=0.002)
    assert cluster.best_cell[3:] == pytest.approx(conventional[3:], abs=0.1)


def test_a_centred_lattice_is_recognised_from_its_primitive_cells():
    # body-centred cubic, edge 80: the primitive cell has edges of 69.28 and angles of 109.47 degrees
    edge, angle = 80 * np.sqrt(3) / 2, np.degrees(np.arccos(-1 / 3))
    (cluster,) = assess(experiments([(edge,) * 3 + (angle,) * 3] * 4)).clusters
    assert cluster.metric_symmetry == "I 4 3 2"
    assert cluster.best_cell[:3] == pytest.approx((80, 80, 80), rel=1e-3)


def test_the_most_populous_cluster_comes_first_and_strays_stay_apart():
    some = spread((60, 100, 130, 90, 90, 90), 4)
    many = spread((79.1, 79.1, 38.2, 90, 90, 90), 9)
    stray = [(120.0, 180, 240, 90, 90, 90)]
    assessment = assess(experiments([*some, *many, *stray]))
    assert [c.members for c in assessment.clusters] == [tuple(range(4, 13)), tuple(range(4)), (13,)]
    assert assessment.n_crystals == 14
    assert assessment.cells.shape == (14, 6)
    first = assessment.clusters[0]
    assert np.allclose(first.cell, np.median(assessment.cells[4:13], axis=0))
    assert np.allclose(first.spread, np.std(assessment.cells[4:13], axis=0))


def test_one_crystal_is_a_cluster():
    (cluster,) = assess(experiments([(79.1, 79.1, 38.2, 90, 90, 90)])).clusters
    assert cluster.members == (0,)
    assert cluster.metric_symmetry == "P 4 2 2"


def test_crystals_of_known_symmetry_are_compared_by_their_reduced_cells():
    made = experiments(spread((79.1, 79.1, 38.2, 90, 90, 90), 5))
    from cctbx import sgtbx

    for experiment in made[:2]:
        experiment.crystal.set_space_group(sgtbx.space_group_info("P 43 21 2").group())
    assert len(assess(made).clusters) == 1
