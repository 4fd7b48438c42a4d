"""Merged intensities as structure factors in mmCIF, as the PDB takes them, with what it asks about serial stills."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from iotbx import mtz

from ssx_mpi.stages.flex_arrays import from_miller_index

# column of the MTZ file, and items of the value and its sigma
_COLUMNS = (
    ("IMEAN", "intensity_meas", "intensity_sigma"),
    ("F", "F_meas_au", "F_meas_sigma_au"),
    ("I(+)", "pdbx_I_plus", "pdbx_I_plus_sigma"),
    ("I(-)", "pdbx_I_minus", "pdbx_I_minus_sigma"),
    ("F(+)", "pdbx_F_plus", "pdbx_F_plus_sigma"),
    ("F(-)", "pdbx_F_minus", "pdbx_F_minus_sigma"),
    ("DANO", "pdbx_anom_difference", "pdbx_anom_difference_sigma"),
)
_UNKNOWN = "?"


def write_merged_mmcif(
    path: Path, merged: Path, n_crystals: int, statistics: str, free_label: str | None, free_value: int | None
) -> None:
    """Write what a merged MTZ file holds as an mmCIF file of structure factors.

    Parameters
    ----------
    path
        Of the mmCIF file.
    merged
        The MTZ file, as :func:`ssx_mpi.stages.intensities.reflection_data.write_merged_mtz` writes it.
    n_crystals
        That were merged.
    statistics
        Items of the categories reflns and reflns_shell, one a line.
    free_label
        Column of free flags, if there is one.
    free_value
        Value of the reflections of the free set, where it is known.
    """
    content = mtz.object(str(merged))
    crystal = next(crystal for crystal in content.crystals() if crystal.name() != "HKL_base")
    info = content.space_group_info()
    cell = crystal.unit_cell().parameters()
    names = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
    items = {
        "_entry.id": "merged",
        "_cell.entry_id": "merged",
        **{f"_cell.{name}": f"{value:.4f}" for name, value in zip(names, cell)},
        "_symmetry.entry_id": "merged",
        "_symmetry.space_group_name_H-M": f"'{content.space_group_name()}'",
        "_symmetry.Int_Tables_number": f"{info.type().number()}",
        "_exptl_crystal.id": "1",
        "_diffrn.id": "1",
        "_diffrn.crystal_id": "1",
        "_diffrn.pdbx_serial_crystal_experiment": "Y",
        "_pdbx_serial_crystallography_data_reduction.diffrn_id": "1",
        "_pdbx_serial_crystallography_data_reduction.lattices_merged": f"{n_crystals}",
        "_diffrn_radiation_wavelength.id": "1",
        "_diffrn_radiation_wavelength.wavelength": f"{crystal.datasets()[0].wavelength():.5f}",
        "_software.pdbx_ordinal": "1",
        "_software.name": "ssx_mpi",
        "_software.classification": "'data reduction'",
        "_reflns.entry_id": "merged",
        "_reflns.pdbx_ordinal": "1",
        "_reflns.pdbx_diffrn_id": "1",
    }
    lines = ["data_merged", *(f"{name:<60s} {value}" for name, value in items.items()), statistics]
    lines += ["_reflns_shell.pdbx_ordinal 1", "_reflns_shell.pdbx_diffrn_id 1"]
    path.write_text("\n".join([*lines, *_reflections(content, free_label, free_value)]) + "\n")


def _reflections(content: mtz.object, free_label: str | None, free_value: int | None) -> list[str]:
    labels = list(content.column_labels())
    hkl = from_miller_index(content.extract_miller_indices())
    columns: dict[str, list[str]] = {
        "wavelength_id": ["1"] * len(hkl),
        "crystal_id": ["1"] * len(hkl),
        "scale_group_code": ["1"] * len(hkl),
        **{f"index_{name}": [f"{value}" for value in hkl[:, axis]] for axis, name in enumerate("hkl")},
    }
    free = None if free_label is None else _values(content, free_label)
    is_free = np.zeros(len(hkl), bool) if free is None or free_value is None else free == free_value
    columns["status"] = np.where(is_free, "f", "o").tolist()
    for label, item, item_of_sigma in _COLUMNS:
        if label not in labels:
            continue
        columns[item] = _text(_values(content, label))
        columns[item_of_sigma] = _text(_values(content, f"SIG{label}"))
    if free is not None:
        columns["pdbx_r_free_flag"] = [f"{int(x)}" if np.isfinite(x) else _UNKNOWN for x in free]
    return ["loop_", *(f"_refln.{name}" for name in columns), *(" ".join(row) for row in zip(*columns.values()))]


def _values(content: mtz.object, label: str) -> np.ndarray:
    # nan where the column has none
    column = content.get_column(label)
    values = column.extract_values().as_double().as_numpy_array()
    return np.where(column.selection_valid().as_numpy_array(), values, np.nan)


def _text(values: np.ndarray) -> list[str]:
    return [f"{value:.7g}" if np.isfinite(value) else _UNKNOWN for value in values]
