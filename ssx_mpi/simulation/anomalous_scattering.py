r"""Intensities of Friedel mates in a crystal with atoms that scatter anomalously.

To the structure factor :math:`F_P` of a random structure is added that of the anomalous scatterers,

.. math:: F_\pm = F_P(\pm h) + k(s) \sum_j (f_0(s) + f' + i f'') e^{-B s^2 / 4} e^{\pm 2 \pi i h x_j},

over all sites :math:`x_j` of the cell. The intensities of the random structure are on an arbitrary scale; k puts those
of as many light atoms as a protein crystal of this cell has (half of it solvent) onto it. The ratio of anomalous to
mean intensities is then that of a real protein with these sites.

References
----------
Sasaki (1989), KEK Report 88-14: f' and f''. Waasmaier & Kirfel (1995), Acta Cryst. A51, 416: f0.
Matthews (1968), J. Mol. Biol. 33, 491: 2.4 cubic angstrom to a dalton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ssx_mpi.simulation.simulation_parameters import AnomalousParameters, SimulationError

# cubic angstrom of the cell to a dalton of protein, and daltons to an atom beside hydrogen (mean of proteins)
_MATTHEWS, _DALTONS_AN_ATOM = 2.4, 13.3
# kinds of atoms of a protein but hydrogen, and their shares
_PROTEIN = {"C": 0.63, "N": 0.17, "O": 0.20}
# sites are no nearer to each other than this, angstrom
_LEAST_DISTANCE = 3.5
_TRIES = 20
# share of the cell that spheres of half of that may fill: random places fill no more
_MOST_FILLED = 0.1


@dataclass(frozen=True)
class AnomalousScatterers:
    """Atoms of one element.

    Attributes
    ----------
    element
        Chemical symbol.
    sites : (n, 3) float64
        Fractional coordinates of the independent ones.
    f_prime, f_double_prime
        Electrons.
    """

    element: str
    sites: np.ndarray
    f_prime: float
    f_double_prime: float


def anomalous_scatterers(
    parameters: AnomalousParameters, symmetry: Any, wavelength: float, rng: np.random.Generator
) -> AnomalousScatterers | None:
    """The atoms that the parameters ask for; None where they ask for none.

    Raises
    ------
    SimulationError
        For an unknown element, or more sites than the cell has room for.
    """
    if not parameters.element:
        return None
    from cctbx.eltbx import sasaki, xray_scattering

    try:
        xray_scattering.wk1995(parameters.element, True)
        table = sasaki.table(parameters.element, True)
    except (RuntimeError, ValueError):
        raise SimulationError(f"anomalous.element={parameters.element}: not a chemical element") from None
    f_prime, f_double_prime = parameters.f_prime, parameters.f_double_prime
    if f_prime is None or f_double_prime is None:
        tabulated = table.at_angstrom(wavelength)
        if not tabulated.is_valid():
            raise SimulationError(
                f"anomalous.element={parameters.element}: the tables end before {wavelength:g} Å; give "
                "anomalous.f_prime and anomalous.f_double_prime"
            )
        f_prime = tabulated.fp() if f_prime is None else f_prime
        f_double_prime = tabulated.fdp() if f_double_prime is None else f_double_prime
    if parameters.sites:
        sites = np.reshape(parameters.sites, (-1, 3))
    else:
        sites = _random_sites(parameters.n_sites, symmetry, rng)
    return AnomalousScatterers(parameters.element, sites, float(f_prime), float(f_double_prime))


def _random_sites(n_sites: int, symmetry: Any, rng: np.random.Generator) -> np.ndarray:
    from cctbx import sgtbx

    cell, group = symmetry.unit_cell(), symmetry.space_group()
    # in general positions, and not beside each other
    special = symmetry.special_position_settings(min_distance_sym_equiv=_LEAST_DISTANCE)
    sites: list[tuple[float, float, float]] = []
    filled = n_sites * group.order_z() * np.pi / 6 * _LEAST_DISTANCE**3 / cell.volume()
    if filled > _MOST_FILLED:
        raise SimulationError(f"anomalous.n_sites={n_sites}: the cell has no room for so many")
    for _ in range(_TRIES * n_sites):
        if len(sites) == n_sites:
            return np.array(sites)
        site = tuple(rng.random(3).tolist())
        if not special.site_symmetry(site).is_point_group_1():
            continue
        equivalent = sgtbx.sym_equiv_sites(cell, group, site)
        if all(sgtbx.min_sym_equiv_distance_info(equivalent, other).dist() >= _LEAST_DISTANCE for other in sites):
            sites.append(site)
    raise SimulationError(f"anomalous.n_sites={n_sites}: the cell has no room for so many")


def friedel_mates(
    amplitudes: np.ndarray, unique: Any, scatterers: AnomalousScatterers, b_factor: float, mean_intensity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Intensities (n,) of the reflections and of their Friedel mates.

    Parameters
    ----------
    amplitudes : (n,) complex128
        Structure factors without the anomalous scatterers, those of centric reflections real: their phases are brought
        to those that the symmetry allows.
    unique
        cctbx Miller set of the reflections.
    b_factor
        Of all atoms, Å².
    mean_intensity
        Of the structure without them, at zero angle, over epsilon.
    """
    from cctbx.eltbx import xray_scattering

    from ssx_mpi.stages.flex_arrays import from_miller_index

    s_sq = unique.d_star_sq().data().as_numpy_array()
    stol_sq = 0.25 * s_sq

    def form_factor(element: str) -> np.ndarray:
        gaussian = xray_scattering.wk1995(element, True).fetch()
        return np.array([gaussian.at_stol_sq(float(x)) for x in stol_sq])

    symmetry = unique.crystal_symmetry()
    n_atoms = symmetry.unit_cell().volume() / _MATTHEWS / _DALTONS_AN_ATOM
    scattering = n_atoms * sum(share * form_factor(element) ** 2 for element, share in _PROTEIN.items())
    k = np.sqrt(mean_intensity / scattering) * np.exp(-0.25 * b_factor * s_sq)

    hkl = from_miller_index(unique.indices())
    geometric = np.zeros(len(hkl), dtype=complex)
    for operation in symmetry.space_group().all_ops():
        rotation = np.reshape(operation.r().as_double(), (3, 3))
        at = scatterers.sites @ rotation.T + np.array(operation.t().as_double())
        geometric += np.exp(2j * np.pi * (hkl @ at.T)).sum(axis=1)
    restricted = [symmetry.space_group().phase_restriction(index) for index in unique.indices()]
    allowed = np.array([phase.ht_angle() if phase.is_centric() else 0.0 for phase in restricted])
    plain = amplitudes * np.exp(1j * allowed)
    f = form_factor(scatterers.element) + scatterers.f_prime
    ordinary, anomalous = plain + k * f * geometric, k * scatterers.f_double_prime * geometric
    # F(-h) is the complex conjugate of the sum over the conjugates of the form factors
    return np.abs(ordinary + 1j * anomalous) ** 2, np.abs(ordinary - 1j * anomalous) ** 2
