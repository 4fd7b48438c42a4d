"""Reduction with DIALS and cctbx objects: symmetry tables, amplitudes, MTZ files."""

from __future__ import annotations

import contextlib
import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cctbx import crystal, miller, sgtbx, uctbx
from dials.array_family import flex
from dxtbx import flumpy
from libtbx.utils import Sorry

from ssx_mpi import dials_compat
from ssx_mpi.kernels import scaling
from ssx_mpi.kernels.ewald_width import EwaldWidth
from ssx_mpi.kernels.orientation import beam_axes
from ssx_mpi.kernels.reflections import Observations, UniqueReflections, unique_reflections
from ssx_mpi.kernels.scaling import Indexed, Merged, Noise, Scales, Trend
from ssx_mpi.stages.flex_arrays import from_miller_index, rows_of, to_miller_index
from ssx_mpi.stages.intensities import mtz_header
from ssx_mpi.stages.intensities.reference import FreeFlags

logger = logging.getLogger(__name__)

_MIN_FRENCH_WILSON = 200


class ReflectionFileError(ValueError):
    """A reflection file that cannot be used; the message names it."""


@dataclass(frozen=True)
class Selection:
    """Which observations of a file are used, and which partialities they have.

    Attributes
    ----------
    partiality_threshold
        Least partiality.
    d_min, d_max
        Limits of resolution in angstrom.
    width
        Gives the partialities; None takes those that integration wrote.
    margin
        Observations whose offset is further out than the threshold allows, by as many standard deviations of the
        reflection, are read as well, where a width is given: they tell of orientations.
    """

    partiality_threshold: float
    d_min: float | None = None
    d_max: float | None = None
    width: EwaldWidth | None = None
    margin: float = 0.0

    @property
    def limit(self) -> float:
        """Largest squared offset of what is used."""
        return -2.0 * float(np.log(max(self.partiality_threshold, 1e-6)))


def space_group_symbol(space_group: str) -> str:
    """Hermann-Mauguin symbol of a space group given by any symbol that cctbx reads."""
    return str(sgtbx.space_group_info(group=_group(space_group)))


def read_observations(
    path: str,
    identifiers: tuple[str, ...],
    positions: np.ndarray,
    selection: Selection,
    scaled: bool = False,
    beams: np.ndarray | None = None,
) -> tuple[Observations, np.ndarray]:
    """Integrated reflections of some crystals of a file, as full intensities.

    Summed intensities are corrected for Lorentz and polarisation factors and detector efficiency as DIALS does it
    (value * lp / qe), and divided by the partiality.

    Parameters
    ----------
    identifiers
        Experiment identifiers of the crystals wanted, in this order.
    positions
        (n_crystals,) of the experiments in their file, for reflection files that carry no identifiers.
    selection
        Which reflections are taken.
    scaled
        Take scaled intensities divided by their scale factors instead.
    beams
        (n_crystals, 3) direction of the beam of each crystal, in which it travels; without it nothing is known about
        rotations.

    Returns
    -------
    observations
        Of these crystals.
    background
        (2,) int64, reflections of these crystals, and those among them for which no background was found.

    Raises
    ------
    ReflectionFileError
        When the file is no reflection table, was not integrated, or knows nothing of a crystal.
    """
    table = _read_table(path)
    if scaled:
        # what was scaled was chosen before, whatever partiality integration gave it
        selection = replace(selection, partiality_threshold=0.0, width=None)
    rows, crystal, correction, offset_sq = _usable(table, path, identifiers, positions, selection)
    tilt = None if beams is None or selection.width is None else _tilts(table, rows, beams[crystal], selection.width)
    intensity, variance = "intensity.sum.value", "intensity.sum.variance"
    if scaled:
        intensity, variance = "intensity.scale.value", "intensity.scale.variance"
        if intensity not in table or "inverse_scale_factor" not in table:
            raise ReflectionFileError(f"{path} holds no scaled intensities")
        correction = 1.0 / flumpy.to_numpy(table["inverse_scale_factor"])[rows]
    sizes = np.bincount(crystal, minlength=len(identifiers))
    lost = _without_background(table)
    of_these = _of_crystals(table, path, identifiers, positions) >= 0
    background = np.array([np.count_nonzero(of_these), np.count_nonzero(of_these & lost)], dtype=np.int64)
    observations = Observations(
        start=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        hkl=from_miller_index(table["miller_index"])[rows],
        intensity=flumpy.to_numpy(table[intensity])[rows] * correction,
        variance=flumpy.to_numpy(table[variance])[rows] * correction**2,
        offset_sq=np.zeros(len(rows), dtype=np.float32) if scaled else offset_sq,
        tilt=tilt,
        limit=np.inf if selection.width is None else selection.limit,
    )
    return observations, background


def _tilts(table, rows: np.ndarray, beam: np.ndarray, width: EwaldWidth) -> np.ndarray:
    # offset of each row with its sign, and its derivatives by the two rotations across the beam: (n, 3) float32
    s2, s1 = (flumpy.to_numpy(table[name]).reshape(-1, 3)[rows] for name in ("s2", "s1"))
    length, k = np.sqrt(np.sum(s2**2, axis=1)), np.sqrt(np.sum(s1**2, axis=1))
    directions, of_row = np.unique(beam, axis=0, return_inverse=True)
    axes = np.array([beam_axes(direction) for direction in directions]).reshape(-1, 2, 3)[of_row.reshape(-1)]
    along = beam / np.sqrt(np.sum(beam**2, axis=1))[:, None]
    turn = np.cross(s2, along) * (k / length)[:, None]
    sigma = np.sqrt(width.at(_d_star_sq(table)[rows]))
    columns = [length - k, *(np.sum(turn * axes[:, axis], axis=1) for axis in (0, 1))]
    return (np.stack(columns, axis=1) / sigma[:, None]).astype(np.float32)


def _read_table(path: str):
    try:
        return flex.reflection_table.from_msgpack_file(path)
    except (RuntimeError, OSError, ValueError) as error:
        newer = dials_compat.newer_table(Path(path))
        raise ReflectionFileError(newer or f"{path} cannot be read as a reflection table: {error}") from None


def _usable(
    table,
    path: str,
    identifiers: tuple[str, ...],
    positions: np.ndarray,
    selection: Selection,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    # rows of the wanted crystals in order of crystal, number of the crystal in `identifiers`, correction to full, and
    # squared offset from the Ewald sphere over the variance of the reflection
    if "intensity.sum.value" not in table:
        raise ReflectionFileError(f"{path} holds no integrated intensities")
    crystal = _of_crystals(table, path, identifiers, positions)
    recorded, correction = _recorded(table)
    use = (crystal >= 0) & recorded
    offset_sq = np.zeros(len(table))
    least = max(selection.partiality_threshold, 1e-6)
    if selection.width is not None:
        variance = selection.width.at(_d_star_sq(table))
        offset_sq = _excitation(table) ** 2 / variance
        use &= offset_sq <= (np.sqrt(selection.limit) + selection.margin) ** 2
        correction = correction * np.exp(0.5 * np.where(use, offset_sq, 0.0)) * selection.width.spread(variance)
    elif "partiality" in table:
        partiality = flumpy.to_numpy(table["partiality"])
        offset_sq = -2.0 * np.log(np.clip(partiality, 1e-6, 1.0))
        use &= partiality >= least
        correction = correction / np.where(use, partiality, 1.0)
    if "d" in table:
        d = flumpy.to_numpy(table["d"])
        use &= (d >= (selection.d_min or 0.0)) & (d <= (selection.d_max or np.inf))
    variance = flumpy.to_numpy(table["intensity.sum.variance"])
    intensity = flumpy.to_numpy(table["intensity.sum.value"])
    use &= (variance > 0) & np.isfinite(intensity) & np.isfinite(variance)
    rows = np.flatnonzero(use)
    rows = rows[np.argsort(crystal[rows], kind="stable")]
    return rows, crystal[rows], correction[rows], offset_sq[rows].astype(np.float32)


def _of_crystals(table, path: str, identifiers: tuple[str, ...], positions: np.ndarray) -> np.ndarray:
    # number in `identifiers` of the crystal of each row, -1 for others
    known = {identifier: int(number) for number, identifier in dict(table.experiment_identifiers()).items()}
    wanted = np.asarray(positions)
    if known:
        missing = [identifier for identifier in identifiers if identifier not in known]
        if missing:
            raise ReflectionFileError(f"{path} does not match its .expt file: no reflections of crystal {missing[0]}")
        wanted = np.array([known[identifier] for identifier in identifiers], dtype=np.int64)
    number = flumpy.to_numpy(table["id"]).astype(np.int64)
    crystal_of = np.full(max(number.max(initial=0), wanted.max(initial=0)) + 1, -1, dtype=np.int64)
    crystal_of[wanted] = np.arange(len(wanted))
    return np.where(number >= 0, crystal_of[number], -1)


def _recorded(table) -> tuple[np.ndarray, np.ndarray]:
    # rows that were integrated, and what recorded intensities are multiplied with, partiality apart; a sum from which
    # no background was taken is no intensity
    correction = np.ones(len(table))
    good = flumpy.to_numpy(table.get_flags(table.flags.integrated_sum)).astype(bool) & ~_without_background(table)
    efficiency_name = next((name for name in ("qe", "dqe") if name in table), None)
    if efficiency_name is not None:
        efficiency = flumpy.to_numpy(table[efficiency_name])
        good &= efficiency > 0
        correction = correction / np.where(efficiency > 0, efficiency, 1.0)
    if "lp" in table:
        correction = correction * flumpy.to_numpy(table["lp"])
    return good, correction


def _without_background(table) -> np.ndarray:
    return flumpy.to_numpy(table.get_flags(table.flags.failed_during_background_modelling)).astype(bool)


def _d_star_sq(table) -> np.ndarray:
    # 1/d^2 in 1/angstrom^2; nan where there is no resolution
    d = flumpy.to_numpy(table["d"])
    return np.where(d > 0, d, np.nan) ** -2.0


def _excitation(table) -> np.ndarray:
    # absolute excitation error in 1/angstrom
    lengths = [np.linalg.norm(flumpy.to_numpy(table[name]).reshape(-1, 3), axis=1) for name in ("s2", "s1")]
    return np.abs(lengths[0] - lengths[1])


def read_excitation(
    path: str, identifiers: tuple[str, ...], positions: np.ndarray, selection: Selection
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What :mod:`ssx_mpi.kernels.ewald_width` needs to know of the reflections of some crystals of a file.

    Returns
    -------
    d_star_sq, excitation, intensity : (n,) float64
        1/d^2 in 1/angstrom^2, absolute excitation error in 1/angstrom, recorded intensity corrected for all but the
        partiality. None for the whole where the file does not say where reciprocal lattice points are.

    Raises
    ------
    ReflectionFileError
        As :func:`read_observations`.
    """
    table = _read_table(path)
    if any(name not in table for name in ("s1", "s2", "d", "partiality")):
        return None
    everything = replace(selection, partiality_threshold=0.0, width=None)
    rows, *_ = _usable(table, path, identifiers, positions, everything)
    _, correction = _recorded(table)
    intensity = flumpy.to_numpy(table["intensity.sum.value"]) * correction
    found = _d_star_sq(table)[rows], _excitation(table)[rows], intensity[rows]
    known = np.isfinite(found).all(axis=0)
    return found[0][known], found[1][known], found[2][known]


@dataclass(frozen=True)
class ScaledCrystal:
    """What scaling found for one crystal of a file that is written again.

    Parameters
    ----------
    identifier, position
        Of its experiment in the file.
    setting
        (3, 3); indices become ``hkl @ setting``.
    log_k, b_factor, width
        Scale, B (square angstrom) and width, see :class:`ssx_mpi.kernels.scaling.Scales`.
    rotation
        (2,) radians about the axes of :func:`ssx_mpi.kernels.orientation.beam_axes`, from where integration had it.
    beam
        (3,) direction in which the beam travels.
    """

    identifier: str
    position: int
    setting: np.ndarray
    log_k: float
    b_factor: float
    width: float
    rotation: np.ndarray
    beam: np.ndarray


def write_selected_reflections(source: str, target: str, crystals: list[ScaledCrystal], selection: Selection) -> None:
    """Write the usable reflections of some crystals as they were integrated, in the common setting."""
    table, *_ = _selected(source, crystals, selection)
    table.as_file(target)


def write_scaled_reflections(
    source: str,
    target: str,
    crystals: list[ScaledCrystal],
    selection: Selection,
    unique: UniqueReflections,
    merged: Merged,
    noise: Noise,
    trend: Trend,
) -> None:
    """Write the reflections that were merged, with the columns that scaled data have in DIALS.

    ``intensity.scale.value`` is the full intensity before scaling, ``intensity.scale.variance`` its variance by the
    error model, ``inverse_scale_factor`` what both are to be divided by (once and squared).
    """
    table, hkl, crystal, correction, offset_sq = _selected(source, crystals, selection)
    row, _ = unique.locate(hkl)
    present = row >= 0
    table = rows_of(table, np.flatnonzero(present))
    _name_crystals(table, crystals)
    crystal, correction, row, offset_sq = crystal[present], correction[present], row[present], offset_sq[present]
    d_star_sq = unique.d_star_sq[row]
    scales = Scales(
        np.array([c.log_k for c in crystals]),
        np.array([c.b_factor for c in crystals]),
        np.array([c.width for c in crystals]),
        trend,
    )
    start = np.concatenate([[0], np.cumsum(np.bincount(crystal, minlength=len(crystals)))]).astype(np.int64)
    intensity = flumpy.to_numpy(table["intensity.sum.value"]) * correction
    variance = flumpy.to_numpy(table["intensity.sum.variance"]) * correction**2
    observations = Observations(start, hkl[present], intensity, variance, offset_sq)
    everything = np.ones(len(crystals), dtype=bool)
    data = Indexed(observations, unique.d_star_sq, row, np.zeros(len(row), dtype=np.uint8), everything)
    g = scaling.scale_factors(data, scales)
    table["intensity.scale.value"] = flumpy.from_numpy(intensity)
    table["intensity.scale.variance"] = flumpy.from_numpy(scaling.variances(data, scales, noise, merged))
    table["inverse_scale_factor"] = flumpy.from_numpy(g)
    # not propagated: the error model, estimated with the scales as they are, contains it
    table["inverse_scale_factor_variance"] = flex.double(len(table), 0.0)
    table["d"] = flumpy.from_numpy(d_star_sq**-0.5)
    table.set_flags(flex.bool(len(table), True), table.flags.scaled)
    table.as_file(target)


@dataclass(frozen=True)
class IntegratedSpots:
    """Reflections of one crystal as they were integrated, without any correction.

    Parameters
    ----------
    hkl
        (n, 3) int32, in the common setting.
    intensity, sigma
        (n,) counts.
    background
        (n,) mean counts per pixel; 0 where it was not recorded.
    position
        (n, 2) fast and slow coordinates in pixels.
    panel
        (n,) int64.
    """

    hkl: np.ndarray
    intensity: np.ndarray
    sigma: np.ndarray
    background: np.ndarray
    position: np.ndarray
    panel: np.ndarray


def read_integrated(source: str, crystals: list[ScaledCrystal]) -> list[IntegratedSpots]:
    """All integrated reflections of some crystals, however partial, in the common setting."""
    table, hkl, crystal, *_ = _selected(source, crystals, Selection(0.0))
    n = len(table)
    positions = "xyzobs.px.value" if "xyzobs.px.value" in table else "xyzcal.px"
    xyz = flumpy.to_numpy(table[positions]).reshape(-1, 3)
    panel = flumpy.to_numpy(table["panel"]).astype(np.int64) if "panel" in table else np.zeros(n, dtype=np.int64)
    background = flumpy.to_numpy(table["background.mean"]) if "background.mean" in table else np.zeros(n)
    intensity = flumpy.to_numpy(table["intensity.sum.value"])
    sigma = np.sqrt(flumpy.to_numpy(table["intensity.sum.variance"]))
    spots = []
    for number in range(len(crystals)):
        rows = crystal == number
        spots.append(
            IntegratedSpots(hkl[rows], intensity[rows], sigma[rows], background[rows], xyz[rows, :2], panel[rows])
        )
    return spots


def lattice_type(space_group: str) -> tuple[str, str, str]:
    """Crystal system as CrystFEL names it, lattice centring, and unique axis (``*`` where there is none)."""
    group = _group(space_group)
    system = group.crystal_system().lower()
    centring = group.conventional_centring_type_symbol()
    # CrystFEL has no trigonal lattices, and calls R in the hexagonal setting H
    name = "hexagonal" if system == "trigonal" else system
    if system == "trigonal" and centring == "R":
        centring = "H"
    return name, centring, {"tetragonal": "c", "hexagonal": "c", "monoclinic": "b"}.get(name, "*")


def _selected(source: str, crystals: list[ScaledCrystal], selection: Selection):
    # table of the usable reflections, reindexed, with its indices, crystals, corrections and offsets as arrays
    table = _read_table(source)
    rows, crystal, correction, offset_sq = _usable(
        table,
        source,
        tuple(c.identifier for c in crystals),
        np.array([c.position for c in crystals], dtype=np.int64),
        selection,
    )
    if selection.width is not None and any(np.any(c.rotation) for c in crystals):
        angles = np.array([c.rotation for c in crystals])[crystal]
        tilt = _tilts(table, rows, np.array([c.beam for c in crystals])[crystal], selection.width).astype(np.float64)
        moved_sq = (tilt[:, 0] + tilt[:, 1] * angles[:, 0] + tilt[:, 2] * angles[:, 1]) ** 2
        keep = moved_sq <= selection.limit
        correction = (correction * np.exp(0.5 * np.minimum(moved_sq - tilt[:, 0] ** 2, 100.0)))[keep]
        rows, crystal, offset_sq = rows[keep], crystal[keep], moved_sq[keep].astype(np.float32)
    elif selection.margin > 0:
        keep = offset_sq <= selection.limit
        rows, crystal, correction, offset_sq = rows[keep], crystal[keep], correction[keep], offset_sq[keep]
    settings = np.array([c.setting for c in crystals]).reshape(-1, 3, 3)
    hkl = np.rint(np.einsum("ni,nij->nj", from_miller_index(table["miller_index"])[rows], settings[crystal])).astype(
        np.int32
    )
    table = rows_of(table, rows)
    table["miller_index"] = to_miller_index(hkl)
    table["id"] = flumpy.from_numpy(crystal.astype(np.int32))
    _name_crystals(table, crystals)
    return table, hkl, crystal, correction, offset_sq


def _name_crystals(table, crystals: list[ScaledCrystal]) -> None:
    names = table.experiment_identifiers()
    for number in list(names.keys()):
        del names[number]
    for number, scaled in enumerate(crystals):
        names[number] = scaled.identifier


def point_group_rotations(space_group: str) -> np.ndarray:
    """Rotations of a space group (any symbol that cctbx reads), (m, 3, 3) float64, acting on indices from the right."""
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
    indices = miller.build_set(_symmetry(cell, space_group), anomalous_flag=False, d_min=d_min)
    hkl = from_miller_index(indices.indices())
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
        A matrix T per coset of the point group in the group of rotations of the lattice; ``hkl @ T`` is the index in
        the common setting. The first is the identity.
    """
    to_niggli = _symmetry(cell, space_group).change_of_basis_op_to_niggli_cell()
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


def largest_d_star_sq(cell: tuple[float, ...], hkl: np.ndarray) -> float:
    """Largest 1/d^2, in 1/angstrom^2, of some indices; 0 for none."""
    metric = np.array(uctbx.unit_cell(tuple(cell)).reciprocal().metrical_matrix())[[0, 3, 4, 3, 1, 5, 4, 5, 2]]
    h = hkl.astype(np.float64)
    return float(np.einsum("ni,ij,nj->n", h, metric.reshape(3, 3), h).max(initial=0.0))


def reindexing_symbol(setting: np.ndarray) -> str:
    """A setting as it is written for people: what h, k, l become, such as ``k,h,-l``."""
    parts = []
    for column in setting.T:
        text = ""
        for factor, letter in zip(column, "hkl"):
            if abs(factor) < 1e-6:
                continue
            size = "" if abs(abs(factor) - 1) < 1e-6 else f"{abs(factor):.3g}"
            text += ("-" if factor < 0 else "+" if text else "") + size + letter
        parts.append(text or "0")
    return ",".join(parts)


def same_symmetry(one: str, other: str) -> bool:
    """Whether intensities of two space groups are alike: point group and centring; screw axes may differ."""
    groups = [_group(symbol).build_derived_reflection_intensity_group(anomalous_flag=True) for symbol in (one, other)]
    return groups[0] == groups[1]


def same_centring(one: str, other: str) -> bool:
    """Whether lattices of two space groups have the same centring, in the settings of their symbols."""

    def translations(space_group: str) -> set[tuple[float, ...]]:
        return {tuple(op.t().mod_positive().as_double()) for op in _group(space_group).all_ops() if op.r().is_unit_mx()}

    return translations(one) == translations(other)


def allows_cell(space_group: str, cell: np.ndarray) -> bool:
    """Whether a measured cell is one that the space group allows, but for a hundredth and a degree."""
    return _group(space_group).is_compatible_unit_cell(
        uctbx.unit_cell(tuple(cell)), relative_length_tolerance=0.01, absolute_angle_tolerance=1.0
    )


def same_space_group(one: str, other: str) -> bool:
    """Whether two symbols stand for the same space group in the same setting."""
    return _group(one) == _group(other)


def hall_symbol(space_group: str) -> str:
    """Hall symbol, as experiment lists have it."""
    return str(_group(space_group).type().hall_symbol())


def symmetric_cell(cell: np.ndarray, space_group: str) -> tuple[float, ...]:
    """The cell nearest to a measured one that the space group allows."""
    return tuple(_group(space_group).average_unit_cell(uctbx.unit_cell(tuple(cell))).parameters())


def write_merged_mtz(
    path: str,
    cell: tuple[float, ...],
    space_group: str,
    wavelength: float,
    unique: UniqueReflections,
    sums: np.ndarray,
    half_sums: tuple[np.ndarray, np.ndarray] | None,
    d_min: float | None = None,
    anomalous: bool = False,
    free: FreeFlags | None = None,
    notes: tuple[str, ...] = (),
) -> None:
    """Merged intensities, amplitudes and half-sets as MTZ.

    Columns: IMEAN SIGIMEAN, I(+) SIGI(+) I(-) SIGI(-), F SIGF by the method of French & Wilson (1978), with
    `anomalous` also F(+) SIGF(+) F(-) SIGF(-) and DANO SIGDANO, N (observations), IHALF1 SIGIHALF1 IHALF2 SIGIHALF2,
    and the column of free flags that was handed in: as it is, empty for reflections that it does not know.

    Parameters
    ----------
    wavelength
        In angstrom.
    sums, half_sums
        (3, n_unique, 2) sums of all observations (numerator, weight, number first), and of two half-sets, if any.
    notes
        For the history.
    """
    symmetry = _symmetry(cell, space_group)
    inside = np.ones(len(unique), dtype=bool) if d_min is None else unique.d_star_sq <= d_min**-2 * (1 + 1e-9)
    to_named = mtz_header.change_to_named_setting(symmetry.space_group())

    def named(array):
        return array if to_named is None else array.change_basis(to_named).map_to_asu()

    mean = named(_intensities(symmetry, unique.hkl, Merged.from_sums(sums), inside))
    pairs = named(_anomalous_intensities(symmetry, unique, sums, inside))
    dataset = mtz_header.new_dataset(mean.crystal_symmetry(), wavelength)
    dataset.add_miller_array(mean, "IMEAN")
    dataset.add_miller_array(pairs, "I")
    if anomalous:
        amplitudes_pairs = french_wilson(pairs)
        amplitudes = amplitudes_pairs.as_non_anomalous_array().merge_equivalents(use_internal_variance=False).array()
        dataset.add_miller_array(amplitudes, "F")
        dataset.add_miller_array(amplitudes_pairs, "F")
        if amplitudes_pairs.n_bijvoet_pairs():
            dataset.add_miller_array(amplitudes_pairs.anomalous_differences(), "DANO", column_types="DQ")
    else:
        dataset.add_miller_array(french_wilson(mean), "F")
    number = sums[2].sum(axis=1)
    seen = inside & (number > 0)
    count = flumpy.from_numpy(np.ascontiguousarray(number[seen]).astype(np.int32))
    indices = miller.set(symmetry, to_miller_index(unique.hkl[seen]), anomalous_flag=False)
    dataset.add_miller_array(named(indices.array(data=count)), "N")
    if free is not None:
        row, _ = unique.locate(free.hkl)
        flagged = np.zeros(len(unique), dtype=np.int32)
        flagged[row[row >= 0]] = free.values[row >= 0]
        known = np.zeros(len(unique), dtype=bool)
        known[row[row >= 0]] = True
        known &= seen
        indices = miller.set(symmetry, to_miller_index(unique.hkl[known]), anomalous_flag=False)
        values = flumpy.from_numpy(flagged[known])
        flags = named(indices.array(data=values))
        dataset.add_miller_array(flags, free.label, column_types="I")
    for half, label in zip(half_sums or (), ("IHALF1", "IHALF2")):
        array = named(_intensities(symmetry, unique.hkl, Merged.from_sums(half), inside))
        if array.size():
            dataset.add_miller_array(array, label)
    if to_named is not None:
        notes = (
            *notes,
            f"the setting {space_group_symbol(space_group)} has no symbol: h,k,l became {to_named.as_hkl()}",
        )
    mtz_header.complete(dataset.mtz_object(), "ssx_mpi: merged serial stills", list(notes))
    dataset.mtz_object().write(path)


def named_setting(space_group: str) -> tuple[str, str] | None:
    """Symbol of the setting that files are written in, and what h, k, l become; None where the setting has a symbol."""
    to_named = mtz_header.change_to_named_setting(_group(space_group))
    if to_named is None:
        return None
    return str(_group(space_group).change_basis(to_named).info()), str(to_named.as_hkl())


def french_wilson(intensities):
    """Amplitudes by the method of French & Wilson; for fewer than 200 intensities with a flat, positive prior."""
    amplitudes = None
    if intensities.size() >= _MIN_FRENCH_WILSON:
        try:
            amplitudes = intensities.french_wilson(log=io.StringIO())
        except (Sorry, RuntimeError, AssertionError) as error:
            logger.warning("French-Wilson amplitudes failed (%s): a flat prior is used", error)
    return intensities.enforce_positive_amplitudes() if amplitudes is None else amplitudes


def wilson_b(
    cell: tuple[float, ...], space_group: str, unique: UniqueReflections, merged: Merged, d_min: float
) -> float | None:
    """Wilson B in square angstrom, for a protein of 200 residues as in DIALS; None where the data do not give one."""
    inside = unique.d_star_sq <= d_min**-2 * (1 + 1e-9)
    array = _intensities(_symmetry(cell, space_group), unique.hkl, merged, inside)
    if array.size() < _MIN_FRENCH_WILSON:
        return None
    from mmtbx.scaling import data_statistics

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return float(data_statistics.wilson_scaling(miller_array=array, n_residues=200).iso_b_wilson)
    except (AttributeError, IndexError, RuntimeError, AssertionError, Sorry, ZeroDivisionError) as error:
        logger.debug("no Wilson B: %s", error)
        return None


def _symmetry(cell: tuple[float, ...], space_group: str):
    return crystal.symmetry(
        unit_cell=tuple(cell), space_group=_group(space_group), assert_is_compatible_unit_cell=False
    )


def _intensities(symmetry, hkl: np.ndarray, merged: Merged, inside: np.ndarray):
    seen = inside & (merged.weight > 0)
    indices = miller.set(symmetry, to_miller_index(hkl[seen]), anomalous_flag=False)
    intensity = flumpy.from_numpy(np.ascontiguousarray(merged.intensity[seen]))
    sigma = flumpy.from_numpy(merged.weight[seen] ** -0.5)
    return indices.array(data=intensity, sigmas=sigma).set_observation_type_xray_intensity()


def _anomalous_intensities(symmetry, unique: UniqueReflections, sums: np.ndarray, inside: np.ndarray):
    weight = sums[1]
    hkl, intensity, sigma = [], [], []
    for mate, sign in ((0, 1), (1, -1)):
        seen = inside & (weight[:, mate] > 0)
        hkl.append(sign * unique.hkl[seen])
        intensity.append(sums[0, seen, mate] / weight[seen, mate])
        sigma.append(weight[seen, mate] ** -0.5)
    indices = miller.set(symmetry, to_miller_index(np.concatenate(hkl)), anomalous_flag=True)
    values, errors = flumpy.from_numpy(np.concatenate(intensity)), flumpy.from_numpy(np.concatenate(sigma))
    return indices.array(data=values, sigmas=errors).set_observation_type_xray_intensity()


def _group(space_group: str) -> sgtbx.space_group:
    return sgtbx.space_group_info(space_group).group()
