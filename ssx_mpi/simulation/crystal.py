"""Simulated crystals: intensities that obey symmetry and Wilson's statistics, cells that differ within the symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssx_mpi.simulation.anomalous_scattering import AnomalousScatterers, friedel_mates
from ssx_mpi.simulation.simulation_parameters import CrystalParameters, SimulationError

# mean intensity at zero angle, on the arbitrary scale of truth.mtz
MEAN_INTENSITY = 1000.0


@dataclass(frozen=True)
class Structure:
    """True intensities of a crystal form.

    Attributes
    ----------
    symmetry
        cctbx crystal symmetry.
    asu_hkl : (m, 3) int32
        Unique reflections in cctbx's asymmetric unit, absences left out, sorted.
    asu_intensity : (m,) float64
        Means of Friedel mates.
    asu_difference : (m,) float64
        I(h) - I(-h).
    hkl : (n, 3) float64
        All reflections of the full sphere.
    unique : (n,) int64
        Row of each in `asu_hkl`.
    minus : (n,) bool
        Which are equivalent to the Friedel mate of that alone.
    """

    symmetry: Any
    asu_hkl: np.ndarray
    asu_intensity: np.ndarray
    asu_difference: np.ndarray
    hkl: np.ndarray
    unique: np.ndarray
    minus: np.ndarray

    @property
    def intensity(self) -> np.ndarray:
        """Intensity (n,) of every row of :attr:`hkl`."""
        half = 0.5 * self.asu_difference[self.unique]
        return self.asu_intensity[self.unique] + np.where(self.minus, -half, half)


def crystal_symmetry(parameters: CrystalParameters):
    """The cctbx crystal symmetry of the parameters.

    Raises
    ------
    SimulationError
        For an unknown symbol, an impossible cell or a cell that the space group forbids.
    """
    from cctbx import crystal, sgtbx, uctbx

    symbol, cell = parameters.space_group, ",".join(f"{v:g}" for v in parameters.unit_cell)
    try:
        group = sgtbx.space_group_info(symbol)
    except RuntimeError:
        raise SimulationError(f"space_group={symbol}: not a space group") from None
    if not group.group().is_chiral():
        raise SimulationError(f"space_group={symbol}: has mirrors or inversion, which no protein crystal has")
    try:
        unit_cell = uctbx.unit_cell(tuple(parameters.unit_cell))
    except (RuntimeError, ValueError):
        raise SimulationError(f"unit_cell={cell}: not a unit cell") from None
    if not group.group().is_compatible_unit_cell(unit_cell):
        raise SimulationError(f"unit_cell={cell}: does not agree with space group {group}")
    return crystal.symmetry(unit_cell=unit_cell, space_group_info=group)


def wilson_amplitudes(
    centric: np.ndarray, epsilon: np.ndarray, d_star_sq: np.ndarray, b_factor: float, rng: np.random.Generator
) -> np.ndarray:
    """Structure factors (n,) complex128 of a random structure; those of centric reflections are real.

    |F|² = ε Σ(d*) z, with z exponential for acentric reflections (two Gaussian parts of the structure factor) and χ²
    with one degree of freedom for centric ones, and Σ falling as exp(-B d*² / 2).

    Parameters
    ----------
    centric : (n,) bool
    epsilon : (n,) float64
        Statistical weight of the reflections.
    d_star_sq : (n,) float64
        1/d², Å⁻².
    b_factor
        Å².

    References
    ----------
    Wilson (1949), Acta Cryst. 2, 318-321.
    """
    real, imaginary = rng.standard_normal((2, len(epsilon)))
    parts = np.where(centric, real, np.sqrt(0.5) * (real + 1j * imaginary))
    return np.sqrt(MEAN_INTENSITY * epsilon * np.exp(-0.5 * b_factor * d_star_sq)) * parts


def make_structure(
    parameters: CrystalParameters,
    rng: np.random.Generator,
    scatterers: AnomalousScatterers | None = None,
) -> Structure:
    """Draw the intensities of a crystal form to its resolution limit, with anomalous scatterers or without."""
    from cctbx import miller
    from cctbx.array_family import flex

    from ssx_mpi.stages.flex_arrays import from_miller_index

    symmetry = crystal_symmetry(parameters)
    # a crystal with a smaller cell reaches a little further
    reach = parameters.d_min * (1 - 4 * parameters.cell_spread)
    unique = miller.build_set(symmetry, anomalous_flag=False, d_min=reach)
    hkl = from_miller_index(unique.indices())
    # the order of cctbx's generator is not promised; intensities are to depend on the seed alone
    order = np.lexsort(hkl.T[::-1])
    hkl, unique = hkl[order], unique.select(flex.size_t(order.tolist()))
    amplitudes = wilson_amplitudes(
        unique.centric_flags().data().as_numpy_array(),
        unique.epsilons().data().as_double().as_numpy_array(),
        unique.d_star_sq().data().as_numpy_array(),
        parameters.b_factor,
        rng,
    )
    mates = np.abs(amplitudes) ** 2, np.abs(amplitudes) ** 2
    if scatterers is not None:
        mates = friedel_mates(amplitudes, unique, scatterers, parameters.b_factor, MEAN_INTENSITY)
    mean, difference = 0.5 * (mates[0] + mates[1]), mates[0] - mates[1]
    return Structure(symmetry, hkl, mean, difference, *_full_sphere(hkl, symmetry))


def _full_sphere(asu_hkl: np.ndarray, symmetry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # all reflections equivalent to `asu_hkl`, each once, the row of each there, and whether it takes an inversion
    rotations = np.array([op.r().as_double() for op in symmetry.space_group().build_derived_point_group().all_ops()])
    rotations = rotations.reshape(-1, 3, 3)
    # proper rotations first: a centric reflection has both, and counts as equivalent to the reflection itself
    rotations = np.concatenate([rotations, -rotations])
    images = np.einsum("ni,rij->rnj", asu_hkl, rotations).round().astype(np.int64)
    rows = np.tile(np.arange(len(asu_hkl)), len(rotations))
    minus = np.repeat(np.arange(len(rotations)) >= len(rotations) // 2, len(asu_hkl))
    flat = images.reshape(-1, 3)
    span = 2 * int(np.abs(flat).max()) + 1
    shifted = flat + span // 2
    key = (shifted[:, 0] * span + shifted[:, 1]) * span + shifted[:, 2]
    _, first = np.unique(key, return_index=True)
    return flat[first].astype(float), rows[first], minus[first]


def vary_cell(symmetry, spread: float, rng: np.random.Generator) -> tuple[float, ...]:
    """Cell parameters that differ from those of `symmetry` by a relative `spread`, with the same symmetry.

    Parameters that the symmetry ties together change together, each group by one normal deviate; those that it fixes
    stay.
    """
    from cctbx import uctbx

    group = symmetry.space_group()
    cell = np.array(symmetry.unit_cell().parameters())
    deviates = rng.standard_normal(6)
    probe = 1e-4
    for i in range(1, 6):
        changed = cell.copy()
        changed[i] *= 1 + probe
        response = np.array(group.average_unit_cell(uctbx.unit_cell(tuple(changed))).parameters()) / cell - 1
        if abs(response[i]) < 0.01 * probe:
            deviates[i] = 0.0
            continue
        first = 0 if i < 3 else 3
        tied = [j for j in range(first, i) if abs(response[j]) > 0.1 * probe]
        if tied:
            deviates[i] = deviates[tied[0]]
    varied = uctbx.unit_cell(tuple(cell * (1 + spread * deviates)))
    return tuple(group.average_unit_cell(varied).parameters())


def orthogonalization_reciprocal(unit_cell: tuple[float, ...]) -> np.ndarray:
    """Matrix B (3, 3) with q = U B h for a crystal of this cell, in the convention of cctbx and DIALS."""
    from cctbx import uctbx

    return np.array(uctbx.unit_cell(tuple(unit_cell)).fractionalization_matrix()).reshape(3, 3).T
