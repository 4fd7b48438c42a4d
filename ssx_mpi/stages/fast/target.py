"""The cell that is looked for on a still, prepared for search and refinement, and a lattice that is found."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from cctbx import sgtbx, uctbx
from cctbx.crystal import symmetry

from ssx_mpi.kernels import lattice_refinement, lattices
from ssx_mpi.kernels.lattice_refinement import CellModel, Lattice
from ssx_mpi.kernels.mosaicity import Mosaicity


@dataclass(frozen=True)
class FoundLattice:
    """A refined lattice of a still.

    Attributes
    ----------
    lattice : Lattice
    spots : (n,) int64
        Numbers of its spots.
    h : (n, 3) int64
        Their Miller indices in the setting of the cell model.
    mosaic : Mosaicity
    rmsd_px : float
    """

    lattice: Lattice
    spots: np.ndarray
    h: np.ndarray
    mosaic: Mosaicity
    rmsd_px: float


@dataclass(frozen=True)
class Target:
    """The cell that is looked for, prepared for search and refinement.

    Attributes
    ----------
    model : CellModel
    known : lattices.KnownLattice
    to_reduced : (3, 3) float64
        ``h_reduced = to_reduced @ h``: the search works in the reduced basis.
    variants : list of (3, 3) float64
        Changes of the reduced basis that the search cannot tell from the identity (see :func:`_setting_variants`).
    operations : (n, 3, 3) float64
        Changes of the reduced basis by the rotations that all lattices of the symmetry have.
    """

    model: CellModel
    known: lattices.KnownLattice
    to_reduced: np.ndarray
    variants: list[np.ndarray]
    operations: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Of the axes of the primitive cell, (3,), in angstrom."""
        return np.linalg.norm(self.model.primitive @ self.model.basis, axis=1)

    def triclinic(self, direct: np.ndarray) -> Target:
        """The same target with all strains free, for the basis `direct` (rows, angstrom)."""
        strains = lattice_refinement.invariant_strains(np.eye(3)[None])
        return replace(self, model=CellModel(direct, strains, self.model.primitive))

    @classmethod
    def from_cell(cls, unit_cell: uctbx.unit_cell, space_group: sgtbx.space_group) -> Target:
        """The target of a cell and its space group."""
        model = cell_model(unit_cell, space_group)
        known = lattices.known_lattice(model.primitive @ model.basis)
        to_reduced = known.basis @ np.linalg.inv(model.basis)
        changes = np.rint(known.basis @ known.rotations.transpose(0, 2, 1) @ np.linalg.inv(known.basis))
        return cls(model, known, to_reduced, _setting_variants(known, changes), _operations(known, model, changes))


def cell_model(unit_cell: uctbx.unit_cell, space_group: sgtbx.space_group) -> CellModel:
    """The cell of a space group (which it is made to obey exactly) with its strains and its primitive basis.

    Raises
    ------
    ValueError
        When the cell is not one of the space group.
    """
    crystal = symmetry(unit_cell=unit_cell, space_group=space_group, assert_is_compatible_unit_cell=False)
    if not crystal.unit_cell().is_similar_to(unit_cell, relative_length_tolerance=0.02, absolute_angle_tolerance=2):
        raise ValueError(f"the unit cell {unit_cell} is not one of space group {space_group.info()}")
    basis = lattices.metric_basis(crystal.unit_cell().parameters())
    operations = space_group.build_derived_laue_group().all_ops()
    rotations = np.array([op.r().as_double() for op in operations]).reshape(-1, 3, 3)
    rotations = basis.T @ rotations[np.linalg.det(rotations) > 0] @ np.linalg.inv(basis.T)
    to_primitive = np.array(crystal.change_of_basis_op_to_primitive_setting().c().r().as_double()).reshape(3, 3)
    # fractional coordinates transform by C, indices by its inverse, transposed
    primitive = np.linalg.inv(to_primitive).T
    return CellModel(basis, lattice_refinement.invariant_strains(rotations), primitive)


def _setting_variants(known: lattices.KnownLattice, changes: np.ndarray) -> list[np.ndarray]:
    """Changes of the reduced basis that the search cannot tell from the identity, but the symmetry of the cell can.

    The search takes bases for equal that a rotation relates which keeps the metric within a tolerance, such as the
    exchange of a and b in an orthorhombic cell with nearly equal axes; all of these are refined.
    """
    exact: list[np.ndarray] = []
    variants: list[np.ndarray] = []
    for change in changes:
        moved = change @ known.basis @ known.basis.T @ change.T
        if np.allclose(moved, known.basis @ known.basis.T, rtol=1e-6, atol=1e-6 * np.trace(moved)):
            exact.append(change)
    for change in changes:
        if not any((np.rint(e @ change) == v).all() for e in exact for v in variants):
            variants.append(change)
    return variants


def _operations(known: lattices.KnownLattice, model: CellModel, changes: np.ndarray) -> np.ndarray:
    # the symmetry of a cell that the space group allows and that has no other by chance
    strain = np.eye(3) + np.einsum("p,pij->ij", 0.01 * np.sqrt(np.arange(2, 2 + len(model.strains))), model.strains)
    changed = known.basis @ strain.T
    metric = changed @ changed.T
    moved = changes @ metric @ changes.transpose(0, 2, 1)
    return changes[np.isclose(moved, metric, rtol=1e-6, atol=1e-6 * np.trace(metric)).all(axis=(1, 2))]
