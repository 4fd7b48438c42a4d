"""Joint refinement of the detector and the first crystals, and what became of distance and cell."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssx_mpi.images.experiment_maker import with_wavelength
from ssx_mpi.kernels.detector_refinement import (
    DetectorSpots,
    Geometry,
    GeometryUncertainty,
    geometry_uncertainty,
    refine_detector,
    start_geometry,
)
from ssx_mpi.kernels.lattice_refinement import invariant_strains
from ssx_mpi.stages.still_results import StageError, library_errors, short_reason


@dataclass(frozen=True)
class Step:
    """One step of refinement: rmsds in mm, and of delta-psi in degrees."""

    n_reflections: int
    rmsd_x: float
    rmsd_y: float
    rmsd_psi: float


@dataclass(frozen=True)
class Place:
    """Where a detector is: distance along its normal and beam centre on its panel, all in mm."""

    distance: float
    beam_x: float
    beam_y: float


@dataclass(frozen=True)
class RefinedGeometry:
    """Outcome of a joint refinement.

    Attributes
    ----------
    detector, beam
        dxtbx models to process all images with.
    experiments, reflections
        The refined crystals, and their reflections with new predictions.
    engine, outliers
        Which DIALS engine refined, and by which algorithm outliers were rejected.
    steps
        Its steps.
    before, after
        Place of the detector.
    cell_before, cell_after
        Median cells, angstrom and degrees.
    uncertainty
        Of the refined place; None where there were too few reflections to tell.
    """

    detector: Any
    beam: Any
    experiments: Any
    reflections: Any
    engine: str
    outliers: str
    steps: tuple[Step, ...]
    before: Place
    after: Place
    cell_before: tuple[float, ...]
    cell_after: tuple[float, ...]
    uncertainty: GeometryUncertainty | None

    @property
    def n_crystals(self) -> int:
        return len(self.experiments)

    @property
    def rmsd(self) -> float:
        """Distance between observed and predicted spots in mm, root mean square, after the last step."""
        return float(np.hypot(self.steps[-1].rmsd_x, self.steps[-1].rmsd_y))

    def since(self, earlier: RefinedGeometry) -> RefinedGeometry:
        """The same outcome, seen from where the refinement before it began."""
        return replace(self, before=earlier.before, cell_before=earlier.cell_before)


def place(detector, beam) -> Place:
    """Distance and beam centre of the panel that the beam meets (of the first where it passes between panels)."""
    s0 = beam.get_s0()
    panel = detector[0]
    for candidate in detector:
        try:
            x, y = candidate.get_ray_intersection(s0)
        except RuntimeError:
            continue
        width, height = candidate.get_image_size_mm()
        if 0 <= x <= width and 0 <= y <= height:
            panel = candidate
            break
    try:
        x, y = panel.get_ray_intersection(s0)
    except RuntimeError:
        x = y = float("nan")
    return Place(float(panel.get_distance()), float(x), float(y))


def median_cell(crystals) -> tuple[float, ...]:
    """Median of each cell parameter."""
    return tuple(np.median([c.get_unit_cell().parameters() for c in crystals], axis=0).tolist())


def refine(experiments, reflections, scope) -> RefinedGeometry:
    """Refine one detector and all crystals together.

    Parameters
    ----------
    experiments : dxtbx ExperimentList
        Crystals of many stills with equal detectors and beams.
    reflections : dials reflection_table
        Their indexed reflections.
    scope
        Extracted scope of dials.refine.

    Raises
    ------
    StageError
        When DIALS cannot refine them.
    """
    shared = _with_one_detector(experiments)
    before = place(shared[0].detector, shared[0].beam)
    cell_before = median_cell(shared.crystals())
    refined, predicted, history, outliers = _refine_by_dials(shared, reflections, scope)
    detector, beam = refined[0].detector, refined[0].beam
    return RefinedGeometry(
        detector=detector,
        beam=beam,
        experiments=refined,
        reflections=predicted,
        engine=scope.refinement.refinery.engine,
        outliers=outliers,
        steps=_steps(history),
        before=before,
        after=place(detector, beam),
        cell_before=cell_before,
        cell_after=median_cell(refined.crystals()),
        uncertainty=_uncertainty(refined, predicted),
    )


def _refine_by_dials(experiments, reflections, scope):
    """Refined experiments, their reflections, the history and the outlier algorithm that worked."""
    from dials.command_line.refine import run_dials_refine

    wanted = scope.refinement.reflections.outlier.algorithm
    # the line search in Sauter and Poon's estimate may fail where predictions are nearly perfect
    failure = StageError("no outlier algorithm")
    for algorithm in dict.fromkeys([wanted, "tukey"]):
        own = copy.deepcopy(scope)
        own.refinement.reflections.outlier.algorithm = algorithm
        try:
            refined, predicted, _, history = run_dials_refine(
                copy.deepcopy(experiments), copy.deepcopy(reflections), own
            )
        except library_errors() as error:
            failure = StageError(short_reason(error))
        except SystemExit as error:  # DIALS 3.12 leaves the program when its configuration is at odds with the data
            failure = StageError(short_reason(RuntimeError(str(error.code))))
        else:
            return refined, predicted, history, str(algorithm)
    raise failure


def _with_one_detector(experiments):
    from dxtbx.model import Experiment, ExperimentList

    detector, beam = copy.deepcopy(experiments[0].detector), copy.deepcopy(experiments[0].beam)
    shared = ExperimentList()
    for experiment in experiments:
        shared.append(
            Experiment(
                detector=detector,
                beam=with_wavelength(beam, experiment.beam.get_wavelength()),
                crystal=copy.deepcopy(experiment.crystal),
                imageset=experiment.imageset,
                identifier=experiment.identifier,
            )
        )
    return shared


def _steps(history) -> tuple[Step, ...]:
    rows = zip(history["num_reflections"], history["rmsd"])
    return tuple(Step(int(n), float(x), float(y), float(np.degrees(psi))) for n, (x, y, psi) in rows)


def refine_fast(experiments, reflections, hold_cell: tuple[float, ...] | None = None) -> RefinedGeometry:
    """Refine one detector and all crystals together with our own kernel; as :func:`refine`, in a hundredth of the time.

    Parameters
    ----------
    experiments, reflections
        As for :func:`refine`.
    hold_cell : (6,) floats, optional
        Give all crystals this cell and keep it.

    Raises
    ------
    StageError
        When there are too few spots to refine with.
    """
    shared = _with_one_detector(experiments)
    before = place(shared[0].detector, shared[0].beam)
    cell_before = median_cell(shared.crystals())
    if hold_cell is not None:
        _give_cell(shared, hold_cell)
    table = reflections.select(reflections["id"] >= 0)
    spots, start, strains = _arrays(shared, table)
    if len(spots.hkl) < _FEWEST_SPOTS:
        raise StageError(f"{len(spots.hkl)} spots are too few")
    if hold_cell is not None:
        strains = strains[:, :0]
    refined = refine_detector(spots, start, strains, np.array(shared[0].beam.get_s0()))
    _move_detector(shared[0].detector, refined.geometry)
    for experiment, a_matrix in zip(shared, refined.geometry.a_matrices / _relative_wavelengths(shared)):
        experiment.crystal.set_A(tuple(map(float, a_matrix.ravel())))
    return RefinedGeometry(
        detector=shared[0].detector,
        beam=shared[0].beam,
        experiments=shared,
        reflections=_predicted(table, refined.residual, refined.weight),
        engine="Gauss-Newton with the crystals eliminated",
        outliers="Tukey's weights",
        steps=tuple(Step(s.n_spots, *s.rmsd[:2], float(np.degrees(s.rmsd[2]))) for s in refined.steps),
        before=before,
        after=place(shared[0].detector, shared[0].beam),
        cell_before=cell_before,
        cell_after=median_cell(shared.crystals()),
        uncertainty=refined.uncertainty,
    )


# spots that a refinement of five parameters of the detector should have at the very least
_FEWEST_SPOTS = 50


def _uncertainty(experiments, reflections) -> GeometryUncertainty | None:
    used = reflections.select(reflections.get_flags(reflections.flags.used_in_refinement))
    if len(used) < _FEWEST_SPOTS:
        return None
    spots, geometry, strains = _arrays(experiments, used)
    return geometry_uncertainty(spots, geometry, strains, np.array(experiments[0].beam.get_s0()))


def _arrays(experiments, reflections) -> tuple[DetectorSpots, Geometry, np.ndarray]:
    """Spots, geometry, and the strains in the laboratory that each crystal's symmetry allows, (K, m, 3, 3)."""
    crystals = experiments.crystals()
    spots = DetectorSpots(
        hkl=np.asarray(reflections["miller_index"].as_vec3_double()).reshape(-1, 3),
        crystal=np.asarray(reflections["id"]).astype(np.int64),
        panel=np.asarray(reflections["panel"]).astype(np.int64),
        xy=np.asarray(reflections["xyzobs.mm.value"]).reshape(-1, 3)[:, :2],
    )
    panels = np.array(
        [np.stack([p.get_fast_axis(), p.get_slow_axis(), p.get_origin()], axis=1) for p in experiments[0].detector]
    )
    a_matrices = np.array([c.get_A() for c in crystals]).reshape(-1, 3, 3) * _relative_wavelengths(experiments)
    turns = np.array([c.get_U() for c in crystals]).reshape(-1, 3, 3)
    strains = invariant_strains(_cartesian_rotations(crystals[0]))
    in_laboratory = np.einsum("kij,mjl,knl->kmin", turns, strains, turns)
    return spots, start_geometry(panels, a_matrices), in_laboratory


def _relative_wavelengths(experiments) -> np.ndarray:
    """Wavelengths, (K, 1, 1), in units of the first.

    A crystal and a beam that are scaled together, in reciprocal space, scatter in the same directions: with its A
    matrix in units of its own 1 / wavelength each crystal can be refined with the beam of the first.
    """
    wavelengths = np.array([e.beam.get_wavelength() for e in experiments])
    return (wavelengths / wavelengths[0])[:, None, None]


def _cartesian_rotations(crystal) -> np.ndarray:
    """Point group of `crystal` as rotations in its Cartesian frame."""
    b = np.reshape(crystal.get_B(), (3, 3))
    operations = crystal.get_space_group().build_derived_acentric_group().build_derived_point_group()
    rotations = [np.reshape(op.r().as_double(), (3, 3)) for op in operations]
    # h' = h R for indices as rows, so a reciprocal vector B h turns into B R^T h
    return np.array([b @ r.T @ np.linalg.inv(b) for r in rotations])


def _give_cell(experiments, cell: tuple[float, ...]) -> None:
    from cctbx import uctbx

    b = np.reshape(uctbx.unit_cell(cell).fractionalization_matrix(), (3, 3)).T
    for experiment in experiments:
        experiment.crystal.set_B(tuple(b.ravel()))


def _move_detector(detector, geometry: Geometry) -> None:
    """Move `detector` as one body, by the motion that `geometry` has made since the start."""
    root = detector.hierarchy()
    turn, shift = geometry.rotation, geometry.translation
    fast, slow, origin = (
        np.array(getattr(root, f"get_local_{name}")()) for name in ("fast_axis", "slow_axis", "origin")
    )
    root.set_local_frame(tuple(turn @ fast), tuple(turn @ slow), tuple(turn @ origin + shift))


def _predicted(reflections, residual: np.ndarray, weight: np.ndarray):
    """`reflections` with predictions from the residuals, and marked as used or as outliers."""
    from dials.array_family import flex
    from dxtbx import flumpy

    table = copy.deepcopy(reflections)
    observed = np.asarray(table["xyzobs.mm.value"]).reshape(-1, 3)
    calculated = observed.copy()
    calculated[:, :2] -= residual[:, :2]
    table["xyzcal.mm"] = flumpy.vec_from_numpy(calculated)
    table["delpsical.rad"] = flumpy.from_numpy(-residual[:, 2])
    used = flumpy.from_numpy(weight > 0)
    table.unset_flags(flex.bool(len(table), True), table.flags.used_in_refinement)
    table.set_flags(used, table.flags.used_in_refinement)
    table.set_flags(~used, table.flags.centroid_outlier)
    return table


def quiet_dials() -> None:
    """Keep DIALS's own log of every image out of ours: what it says is in our tables."""
    logging.getLogger("dials").setLevel(logging.ERROR)
    logging.getLogger("dxtbx").setLevel(logging.ERROR)
