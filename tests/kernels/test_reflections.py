"""Unique reflections against cctbx's asymmetric units."""

import numpy as np
import pytest
from cctbx import miller, sgtbx
from dials.array_family import flex

from ssx_mpi.kernels.reflections import Observations, unique_reflections
from ssx_mpi.stages.intensities import reflection_data as stage

CELLS = {
    "P 43 21 2": (79.1, 79.1, 38.2, 90, 90, 90),
    "P 21 3": (96.4, 96.4, 96.4, 90, 90, 90),
    "C 1 2 1": (60.0, 40.0, 50.0, 90, 105, 90),
    "R 3 :H": (80.0, 80.0, 120.0, 90, 90, 120),
    "P 1": (30.0, 35.0, 40.0, 80, 85, 95),
}


@pytest.mark.parametrize("symbol", CELLS)
def test_same_classes_as_cctbx(symbol):
    unique = stage.unique_table(CELLS[symbol], symbol, 5.0)
    rng = np.random.default_rng(3)
    hkl = rng.integers(-9, 10, (3000, 3)).astype(np.int32)
    row, minus = unique.locate(hkl)
    group = sgtbx.space_group_info(symbol).group()
    asu = flex.miller_index(list(map(tuple, hkl.tolist())))
    miller.map_to_asu(group.type(), True, asu)
    mapped = asu.as_vec3_double().as_numpy_array().reshape(-1, 3).astype(int)
    found = row >= 0
    # to cctbx's index itself where it is the reflection, to its negative where it is the Friedel mate
    sign = np.where(minus[found], -1, 1)[:, None]
    assert np.array_equal(mapped[found], sign * unique.hkl[row[found]])
    tabulated = {tuple(h) for h in unique.hkl.tolist()}
    assert not any(tuple(h) in tabulated or tuple(-h) in tabulated for h in mapped[~found])


@pytest.mark.parametrize("symbol", CELLS)
def test_epsilon_and_centric_are_those_of_cctbx(symbol):
    unique = stage.unique_table(CELLS[symbol], symbol, 4.0)
    group = sgtbx.space_group_info(symbol).group()
    factor = group.n_ltr()
    for hkl, epsilon, centric in zip(unique.hkl.tolist(), unique.epsilon, unique.centric):
        assert group.epsilon(hkl) == epsilon * factor / factor
        assert group.is_centric(hkl) == centric


def test_equivalent_indices_in_the_table_are_refused():
    rotations = stage.point_group_rotations("P 1 2 1")
    with pytest.raises(ValueError, match="equivalent"):
        unique_reflections([[1, 2, 3], [-1, 2, -3]], [0.1, 0.1], rotations)


def test_selecting_crystals_keeps_their_observations():
    observations = Observations(
        np.array([0, 2, 2, 5]), np.arange(15, dtype=np.int32).reshape(5, 3), np.arange(5.0), np.ones(5),
        np.arange(5, dtype=np.float32),
    )  # fmt: skip
    chosen = observations.select(np.array([False, True, True]))
    assert chosen.start.tolist() == [0, 0, 3]
    assert chosen.intensity.tolist() == chosen.offset_sq.tolist() == [2.0, 3.0, 4.0]
