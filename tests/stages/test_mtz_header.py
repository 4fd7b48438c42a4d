"""Headers of MTZ files: symbols and settings that other programs know, and what was drawn for a free set."""

import numpy as np
import pytest
from cctbx import sgtbx
from iotbx import mtz

from ssx_mpi.kernels import free_set
from ssx_mpi.stages.intensities import mtz_header
from ssx_mpi.stages.intensities import reflection_data as stage


@pytest.mark.parametrize(
    ("symbol", "written"),
    [
        ("P 43 21 2", "P 43 21 2"),
        ("C 1 2 1", "C 1 2 1"),
        ("P 21 1 1", "P 21 1 1"),
        ("R 3 :H", "H 3"),
        ("R 3 :R", "R 3"),
        ("I 1 2 1", "I 1 2 1"),
    ],
)
def test_symbols_have_their_blanks(symbol, written):
    group = sgtbx.space_group_info(symbol).group()
    assert mtz_header.symbol(group) == written
    assert mtz_header.change_to_named_setting(group) is None


def write(path, cell, symbol, **more):
    unique = stage.unique_table(cell, symbol, 5.0)
    intensity = np.random.default_rng(1).exponential(100.0, len(unique))
    sums = np.zeros((3, len(unique), 2))
    sums[0], sums[1], sums[2] = 0.5 * intensity[:, None], 0.5, 1.0
    # a centric reflection has no mate
    sums[:, unique.centric, 1] = 0.0
    stage.write_merged_mtz(str(path), cell, symbol, 1.25, unique, sums, (0.5 * sums, 0.5 * sums), **more)
    return unique, intensity


def test_a_setting_without_a_symbol_is_written_in_one_that_has_it(tmp_path):
    # C 2 with other axes: the same lattice, in a setting that is in no table
    standard = stage.uctbx.unit_cell((91, 45, 62, 90, 110, 90))
    op = sgtbx.change_of_basis_op("-z,x+y,2*x")
    group = sgtbx.space_group_info("C 1 2 1").group().change_basis(op)
    cell = standard.change_basis(op).parameters()
    path = tmp_path / "odd.mtz"
    unique, intensity = write(path, cell, str(group.info()))
    content = mtz.object(str(path))
    assert content.space_group_name() == "C 1 2 1"
    assert content.space_group_number() == 5
    assert content.title() == "ssx_mpi: merged serial stills"
    history = " ".join(content.history())
    assert "ssx_mpi" in history and "has no symbol" in history
    array = next(a for a in content.as_miller_arrays() if a.info().labels[0] == "IMEAN")
    assert array.unit_cell().is_similar_to(standard) or abs(array.unit_cell().volume() - standard.volume()) < 1
    assert array.size() == len(unique)
    # resolution and intensity stay together
    ours = sorted(zip(np.round(unique.d_star_sq**-0.5, 3).tolist(), np.round(intensity, 1).tolist()))
    theirs = sorted(zip(np.round(array.d_spacings().data(), 3).tolist(), np.round(array.data(), 1).tolist()))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=2e-3, atol=2e-3)
    # and so do the members of a pair, wherever they are
    pairs = next(a for a in content.as_miller_arrays() if a.info().labels[0] == "I(+)")
    assert pairs.is_unique_set_under_symmetry()


def test_new_free_flags_are_a_twentieth_and_alike_for_what_the_lattice_has_alike():
    cell, group = (98.0, 98.0, 98.0, 90.0, 90.0, 90.0), "I 2 3"
    unique = stage.unique_table(cell, group, 3.0)
    settings = stage.reindexing_settings(cell, group, 0.5)
    assert len(settings) == 2
    flags = free_set.new_flags(unique, settings)
    assert set(flags.tolist()) == set(range(20))
    assert np.mean(flags == 0) == pytest.approx(0.05, abs=0.004)
    for half in (unique.d_star_sq < np.median(unique.d_star_sq), unique.d_star_sq >= np.median(unique.d_star_sq)):
        assert np.mean(flags[half] == 0) == pytest.approx(0.05, abs=0.006)
    row, _ = unique.locate(unique.hkl, settings[1])
    np.testing.assert_array_equal(flags, flags[row])
    np.testing.assert_array_equal(flags, free_set.new_flags(unique, settings))
