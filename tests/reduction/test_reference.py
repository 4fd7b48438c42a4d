"""References: intensities from files and from a model, and those that do not fit."""

import numpy as np
import pytest
from cctbx import crystal, miller
from dials.array_family import flex

from ssx_mpi.kernels.scaling import Merged
from ssx_mpi.parallel.communicator import SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.reduction import references
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.stages.intensities import reflection_data as stage
from ssx_mpi.stages.intensities.reference import read_reference

CELL, GROUP = (79.1, 79.1, 38.2, 90.0, 90.0, 90.0), "P 43 21 2"


@pytest.fixture
def model(tmp_path):
    rng = np.random.default_rng(6)
    lines = ["CRYST1   79.100   79.100   38.200  90.00  90.00  90.00 P 43 21 2"]
    for n, (x, y, z) in enumerate(rng.uniform(0, [35, 35, 38], (60, 3)), start=1):
        lines.append(f"ATOM  {n:5d}  CA  ALA A{n:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 20.00           C")
    path = tmp_path / "model.pdb"
    path.write_text("\n".join([*lines, "END", ""]))
    return path


def test_model_with_bulk_solvent(model):
    bare, solvent = (read_reference(str(model), 2.1, k_sol, 46.0) for k_sol in (0.0, 0.35))
    assert np.array_equal(bare.hkl, solvent.hkl)
    from iotbx import pdb

    calculated = pdb.input(str(model)).xray_structure_simple().structure_factors(d_min=2.1).f_calc()
    table = dict(zip(calculated.indices(), np.abs(np.array(calculated.data())) ** 2))
    direct = np.array([table[tuple(h)] for h in bare.hkl.tolist()])
    assert np.corrcoef(direct, bare.intensity)[0, 1] > 0.999
    # solvent changes low resolution and hardly the high: exp(-B / 4 d^2) is 0.7 at 6 and 0.06 at 2 angstrom
    d = np.array([calculated.unit_cell().d(tuple(h)) for h in bare.hkl.tolist()])
    change = np.abs(solvent.intensity - bare.intensity)
    low, high = (change[rows].sum() / bare.intensity[rows].sum() for rows in (d > 6, d < 2.3))
    assert low > 0.1 and low > 5 * high


def test_reflection_file_finds_its_rows(tmp_path):
    unique = stage.unique_table(CELL, GROUP, 4.0)
    intensity = np.random.default_rng(2).exponential(100.0, len(unique))
    symmetry = crystal.symmetry(CELL, GROUP)
    # another asymmetric unit than ours: cctbx maps them, and so must we
    indices = flex.miller_index([(int(k), int(h), -int(l)) for h, k, l in unique.hkl])
    array = miller.set(symmetry, indices, False).array(flex.double(intensity), flex.double(len(unique), 1.0))
    array.set_observation_type_xray_intensity()
    path = tmp_path / "reference.mtz"
    array.map_to_asu().as_mtz_dataset("I").mtz_object().write(str(path))
    found = references.load(SerialCommunicator(), ReductionParameters(reference=path), CELL, GROUP, unique)
    np.testing.assert_allclose(found.intensity, intensity, rtol=1e-5)
    assert np.all(found.weight == 1)


def test_normalised_has_mean_one_in_every_shell():
    unique = stage.unique_table(CELL, GROUP, 3.0)
    from ssx_mpi.kernels.merging import resolution_shells

    shells = resolution_shells(unique.d_star_sq, 10)
    rng = np.random.default_rng(2)
    intensity = rng.exponential(1.0, len(unique)) * np.exp(-30 * unique.d_star_sq) * unique.epsilon
    normal = references.normalised(Merged(intensity, np.ones(len(unique))), unique, shells)
    means = shells.sum(normal.intensity) / shells.sum(np.ones(len(unique)))
    np.testing.assert_allclose(means, 1.0)


@pytest.mark.parametrize(
    ("cell", "group", "message"),
    [
        (CELL, "P 41 21 2", None),
        ((85.0, 85.0, 38.2, 90.0, 90.0, 90.0), GROUP, "another cell"),
        (CELL, "P 43", "space group"),
    ],
)
def test_what_does_not_fit_is_refused(model, cell, group, message):
    unique = stage.unique_table(cell, group, 5.0)
    parameters = ReductionParameters(reference=model)
    if message is None:
        # an enantiomorph has the same intensities
        assert references.load(SerialCommunicator(), parameters, cell, group, unique) is not None
        return
    with pytest.raises(InputError, match=message):
        references.load(SerialCommunicator(), parameters, cell, group, unique)


def test_a_file_of_something_else(tmp_path):
    unique = stage.unique_table(CELL, GROUP, 5.0)
    for name in ("missing.mtz", "text.mtz", "text.pdb", "text.xyz"):
        path = tmp_path / name
        if not name.startswith("missing"):
            path.write_text("hello\n")
        with pytest.raises(InputError, match=name):
            references.load(SerialCommunicator(), ReductionParameters(reference=path), CELL, GROUP, unique)
