"""Reference intensities by cctbx: read from reflection files, or computed from a model with bulk solvent."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from dials.array_family import flex  # noqa: F401  (registers the converters that cctbx arrays need)
from libtbx.utils import Sorry

from ssx_mpi import dials_compat
from ssx_mpi.stages.flex_arrays import from_miller_index


class ReferenceError(ValueError):
    """A reference that cannot be used; the message names the file."""


@dataclass(frozen=True)
class Reference:
    """Intensities to agree with.

    Parameters
    ----------
    hkl
        (n, 3) int32, one of each set of equivalents.
    intensity
        (n,) float64.
    cell
        Angstrom and degrees.
    space_group
        Hermann-Mauguin symbol.
    """

    hkl: np.ndarray
    intensity: np.ndarray
    cell: tuple[float, ...]
    space_group: str


def read_reference(path: str, d_min: float, k_sol: float, b_sol: float) -> Reference:
    """Intensities from an MTZ or CIF file, or computed from a PDB or mmCIF model.

    Parameters
    ----------
    d_min
        Resolution in angstrom to which intensities are computed from a model.
    k_sol, b_sol
        Bulk solvent: density in electrons per cubic angstrom, and B in square angstrom.

    Raises
    ------
    ReferenceError
        When there are neither intensities nor amplitudes nor a model in the file.
    """
    if path.endswith((".pdb", ".ent")):
        array = _from_model(path, d_min, k_sol, b_sol)
    elif path.endswith((".cif", ".mmcif")):
        array = _from_data(path) or _from_model(path, d_min, k_sol, b_sol)
    elif path.endswith(".mtz"):
        array = _from_data(path)
    else:
        raise ReferenceError(f"reference {path}: neither .mtz nor .cif nor .pdb")
    if array is None or not array.size():
        raise ReferenceError(f"reference {path} holds neither intensities nor amplitudes")
    if array.unit_cell() is None or array.space_group() is None:
        raise ReferenceError(f"reference {path} does not say its cell and space group")
    mean = array.as_non_anomalous_array().merge_equivalents().array()
    return Reference(
        mean.indices().as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32),
        np.array(mean.data()),
        tuple(mean.unit_cell().parameters()),
        str(mean.space_group_info()),
    )


@dataclass(frozen=True)
class FreeFlags:
    """Flags of a free set: name of the column, indices (n, 3) int32, and integers (n,), whatever they stand for."""

    label: str
    hkl: np.ndarray
    values: np.ndarray


def read_free_flags(path: str) -> FreeFlags | None:
    """The free flags of an MTZ file: its first integer column with "free" in the name; None without one."""
    from iotbx import mtz

    if not path.endswith(".mtz"):
        return None
    content = mtz.object(path)
    for column in content.columns():
        if column.type() == "I" and "free" in column.label().lower():
            known = np.array(column.selection_valid())
            hkl = from_miller_index(content.extract_miller_indices())
            values = np.array(column.extract_values(not_a_number_substitute=0))
            return FreeFlags(column.label(), hkl[known], values[known].astype(np.int32))
    return None


def _from_data(path: str):
    from iotbx import reflection_file_reader

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            arrays = reflection_file_reader.any_reflection_file(path).as_miller_arrays()
    except (Sorry, RuntimeError, AssertionError, OSError, ValueError) as error:
        raise ReferenceError(f"reference {path} cannot be read: {error}") from None
    for array in arrays or []:
        if array.is_xray_intensity_array():
            return array
    for array in arrays or []:
        if array.is_xray_amplitude_array():
            return array.as_intensity_array()
    for array in arrays or []:
        if array.is_complex_array():
            return array.as_intensity_array()
    return None


def _from_model(path: str, d_min: float, k_sol: float, b_sol: float):
    import iotbx.pdb
    from mmtbx.utils import fmodel_from_xray_structure

    try:
        structure = iotbx.pdb.input(path).xray_structure_simple()
    except (Sorry, RuntimeError, AssertionError, OSError, ValueError) as error:
        raise ReferenceError(f"reference {path} cannot be read as a model: {error}") from None
    if structure.unit_cell() is None:
        raise ReferenceError(f"reference {path} does not say its cell and space group")
    try:
        params = dials_compat.structure_factor_parameters()
    except dials_compat.DialsError as error:
        raise ReferenceError(f"reference {path}: {error}") from None
    params.high_resolution = d_min
    params.fmodel.k_sol = k_sol
    params.fmodel.b_sol = b_sol
    with contextlib.redirect_stdout(io.StringIO()):
        return fmodel_from_xray_structure(structure, params=params).f_model.as_intensity_array()
