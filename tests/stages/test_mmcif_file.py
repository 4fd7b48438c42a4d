"""Merged data as mmCIF: what the MTZ file holds, under the names that the PDB reads."""

import iotbx.cif
import numpy as np
import pytest
from iotbx import mtz

from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.mmcif_file import write_merged_mmcif
from ssx_mpi.stages.intensities.reference import FreeFlags

CELL, GROUP = (79.1, 79.1, 38.2, 90, 90, 90), "P 43 21 2"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cif")
    unique = stage.unique_table(CELL, GROUP, 4.0)
    rng = np.random.default_rng(1)
    sums = np.zeros((3, len(unique), 2))
    sums[1], sums[2] = 0.5, 1.0
    sums[0] = 0.5 * rng.exponential(100.0, (len(unique), 2))
    sums[:, unique.centric, 1] = 0.0
    # a mate that was not seen
    sums[:, 0, 1] = 0.0
    flags = FreeFlags("FreeR_flag", unique.hkl[1:], (np.arange(len(unique)) % 20).astype(np.int32)[1:])
    merged = folder / "merged.mtz"
    stage.write_merged_mtz(str(merged), CELL, GROUP, 1.25, unique, sums, None, anomalous=True, free=flags)
    path = folder / "merged.cif"
    write_merged_mmcif(path, merged, 40, "_reflns.number_obs 12", "FreeR_flag", 0)
    return merged, path


def test_values_are_those_of_the_mtz_file(files):
    merged, path = files
    (block,) = iotbx.cif.reader(str(path)).model().values()
    content = mtz.object(str(merged))
    for label, item in (("IMEAN", "intensity_meas"), ("I(-)", "pdbx_I_minus"), ("SIGF(+)", "pdbx_F_plus_sigma")):
        column = content.get_column(label)
        known = column.selection_valid().as_numpy_array()
        theirs = np.array([np.nan if value == "?" else float(value) for value in block[f"_refln.{item}"]])
        assert np.array_equal(np.isfinite(theirs), known)
        assert known.all() == (label != "I(-)")
        np.testing.assert_allclose(theirs[known], column.extract_values().as_numpy_array()[known], rtol=1e-6)
    free = list(block["_refln.pdbx_r_free_flag"])
    assert free.count("?") == 1
    assert [status == "f" for status in block["_refln.status"]] == [flag == "0" for flag in free]
    assert block["_diffrn.pdbx_serial_crystal_experiment"] == "Y"
    assert block["_pdbx_serial_crystallography_data_reduction.lattices_merged"] == "40"
    assert block["_reflns.number_obs"] == "12"


def test_crystallographic_programs_find_the_arrays(files):
    arrays = iotbx.cif.reader(str(files[1])).as_miller_arrays()
    labels = ["".join(array.info().labels) for array in arrays]
    assert any("pdbx_I_plus" in label and "pdbx_I_minus" in label for label in labels)
    assert all(array.unit_cell().is_similar_to(stage.uctbx.unit_cell(CELL)) for array in arrays)


def test_gemmi_reads_it(files):
    gemmi = pytest.importorskip("gemmi")
    (block,) = gemmi.as_refln_blocks(gemmi.cif.read(str(files[1])))
    assert block.spacegroup.hm == GROUP
    assert block.wavelength == pytest.approx(1.25)
    assert len(block.make_miller_array()) == mtz.object(str(files[0])).n_reflections()


def test_indices_have_a_data_set_of_their_own(files):
    content = mtz.object(str(files[0]))
    base, merged = (dataset for crystal in content.crystals() for dataset in crystal.datasets())
    assert (base.name(), base.id(), merged.name(), merged.id()) == ("HKL_base", 0, "merged", 1)
    assert merged.wavelength() == pytest.approx(1.25)
    assert [column.label() for column in base.columns()] == ["H", "K", "L"]
    assert {"IMEAN", "I(-)", "DANO", "FreeR_flag"} <= {column.label() for column in merged.columns()}
