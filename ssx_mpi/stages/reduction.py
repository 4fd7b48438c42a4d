"""Reduction with DIALS and cctbx objects: symmetry tables, amplitudes, MTZ files."""

from __future__ import annotations

import numpy as np
from cctbx import crystal, miller, sgtbx, uctbx
from cctbx.array_family import flex

from ssx_mpi.kernels.reflections import UniqueReflections, unique_reflections


def point_group_rotations(space_group: str) -> np.ndarray:
    """Rotations of a space group (symbol of any kind cctbx reads), (m, 3, 3) float64, acting on indices from the right."""
    group = _group(space_group)
    parts = {tuple(group(i).r().as_double()) for i in range(group.order_z())}
    return np.array(sorted(parts, reverse=True)).reshape(-1, 3, 3)


def unique_table(cell: tuple[float, ...], space_group: str, d_min: float) -> UniqueReflections:
    """All unique reflections to a resolution, without the systematically absent ones.

    Parameters
    ----------
    cell
        Lengths in angstrom and angles in degrees.
    d_min
        In angstrom.
    """
    symmetry = crystal.symmetry(
        unit_cell=tuple(cell), space_group=_group(space_group), assert_is_compatible_unit_cell=False
    )
    indices = miller.build_set(symmetry, anomalous_flag=False, d_min=d_min)
    hkl = indices.indices().as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32)
    d_star_sq = indices.d_star_sq().data().as_numpy_array()
    return unique_reflections(hkl, d_star_sq, point_group_rotations(space_group))


def reindexing_settings(cell: tuple[float, ...], space_group: str, max_delta: float) -> np.ndarray:
    """Settings in which a crystal of this cell and space group can have been indexed.

    Parameters
    ----------
    max_delta
        Degrees by which the lattice may miss a symmetry (Le Page's delta), so that accidental ones count, too.

    Returns
    -------
    settings : (n_settings, 3, 3) float64
        A matrix T per coset of the point group in the group of rotations of the lattice; ``hkl @ T`` is the index in the
        common setting. The first is the identity.
    """
    group = _group(space_group)
    symmetry = crystal.symmetry(unit_cell=tuple(cell), space_group=group, assert_is_compatible_unit_cell=False)
    to_niggli = symmetry.change_of_basis_op_to_niggli_cell()
    niggli = uctbx.unit_cell(tuple(cell)).change_basis(to_niggli)
    lattice = sgtbx.lattice_symmetry_group(niggli, max_delta).change_basis(to_niggli.inverse())
    rotations = point_group_rotations(space_group)
    settings = [np.eye(3)]
    taken = list(rotations)
    candidates = {tuple(lattice(i).r().as_double()) for i in range(lattice.order_z())}
    # those that move an index least come first, so that the simplest representative of each coset stands for it
    for matrix in sorted(candidates, key=lambda m: (sum(abs(x) for x in m), [-x for x in m])):
        candidate = np.array(matrix).reshape(3, 3)
        if np.linalg.det(candidate) < 0 or any(np.allclose(candidate, known, atol=1e-6) for known in taken):
            continue
        settings.append(candidate)
        taken.extend(candidate @ rotations)
    return np.array(settings)


def _group(space_group: str) -> sgtbx.space_group:
    return sgtbx.space_group_info(space_group).group()
