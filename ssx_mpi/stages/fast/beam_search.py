"""The beam centre from the strong spots of a few stills, found before anything is indexed."""

from __future__ import annotations

import copy

import numpy as np

from ssx_mpi.kernels.beam_centre import ShiftGrid, score_shifts, shift_grid
from ssx_mpi.kernels.lattices import KnownLattice

#: spots that a still should have to say something about the centre
MIN_SPOTS = 25


def primitive_lattice(unit_cell: tuple[float, ...], space_group: str) -> KnownLattice:
    """The primitive reduced lattice of a cell (angstrom, degrees) in a space group."""
    from cctbx import sgtbx, uctbx

    from ssx_mpi.stages.fast.target import Target

    return Target.from_cell(uctbx.unit_cell(unit_cell), sgtbx.space_group_info(space_group).group()).known


def grid_for(experiment, lattice: KnownLattice) -> ShiftGrid:
    """Shifts worth trying for the detector and beam of `experiment`."""
    return shift_grid(lattice, experiment.beam.get_wavelength(), experiment.detector[0].get_distance())


def score_still(experiment, strong, grid: ShiftGrid, lattice: KnownLattice) -> np.ndarray:
    """Share of the `strong` spots of one still that are explained, for every shift of `grid`, (m,) float64."""
    pixels = np.asarray(strong["xyzobs.px.value"]).reshape(-1, 3)[:, :2]
    panels = np.asarray(strong["panel"]).astype(int)
    detector = experiment.detector
    x_lab = np.array([detector[int(k)].get_pixel_lab_coord(tuple(xy)) for k, xy in zip(panels, pixels)])
    axes = np.array([detector[0].get_fast_axis(), detector[0].get_slow_axis()])
    return score_shifts(x_lab, grid.shifts, axes, np.array(experiment.beam.get_s0()), lattice)


def shifted(detector, shift: tuple[float, float]):
    """A copy of `detector` moved by `shift`, in mm along the fast and slow axes of its first panel."""
    moved = copy.deepcopy(detector)
    vector = shift[0] * np.array(detector[0].get_fast_axis()) + shift[1] * np.array(detector[0].get_slow_axis())
    root = moved.hierarchy()
    origin = np.array(root.get_local_origin()) + vector
    root.set_local_frame(root.get_local_fast_axis(), root.get_local_slow_axis(), tuple(origin))
    return moved
