"""Joint refinement of the detector and the first crystals by DIALS, and what became of distance and cell."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ssx_mpi.kernels.detector import GeometryUncertainty, Spots, geometry_uncertainty, strain_basis
from ssx_mpi.stages.results import StageError, library_errors, short_reason


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
                beam=beam,
                crystal=copy.deepcopy(experiment.crystal),
                imageset=experiment.imageset,
                identifier=experiment.identifier,
            )
        )
    return shared


def _steps(history) -> tuple[Step, ...]:
    rows = zip(history["num_reflections"], history["rmsd"])
    return tuple(Step(int(n), float(x), float(y), float(np.degrees(psi))) for n, (x, y, psi) in rows)


def _uncertainty(experiments, reflections) -> GeometryUncertainty | None:
    used = reflections.select(reflections.get_flags(reflections.flags.used_in_refinement))
    hkl = np.asarray(used["miller_index"].as_vec3_double()).reshape(-1, 3)
    if len(hkl) < 50:
        return None
    detector = experiments[0].detector
    panels = np.asarray(used["panel"]).astype(int)
    origin, fast, slow = (
        np.array([getattr(p, f"get_{name}")() for p in detector])[panels]
        for name in ("origin", "fast_axis", "slow_axis")
    )
    observed = np.asarray(used["xyzobs.mm.value"]).reshape(-1, 3)
    calculated = np.asarray(used["xyzcal.mm"]).reshape(-1, 3)
    residual = np.column_stack([(observed - calculated)[:, :2], np.asarray(used["delpsical.rad"])])
    crystals = experiments.crystals()
    a_matrices = np.array([c.get_A() for c in crystals]).reshape(-1, 3, 3)
    b_matrices = np.array([c.get_B() for c in crystals]).reshape(-1, 3, 3)
    spots = Spots(hkl, np.asarray(used["id"]), origin, fast, slow, residual)
    basis = strain_basis(_cartesian_rotations(crystals[0]))
    return geometry_uncertainty(spots, a_matrices, basis, b_matrices, np.array(experiments[0].beam.get_s0()))


def _cartesian_rotations(crystal) -> np.ndarray:
    """Point group of `crystal` as rotations in its Cartesian frame."""
    b = np.reshape(crystal.get_B(), (3, 3))
    operations = crystal.get_space_group().build_derived_acentric_group().build_derived_point_group()
    rotations = [np.reshape(op.r().as_double(), (3, 3)) for op in operations]
    # h' = h R for indices as rows, so a reciprocal vector B h turns into B R^T h
    return np.array([b @ r.T @ np.linalg.inv(b) for r in rotations])


def quiet_dials() -> None:
    """Keep DIALS's own log of every image out of ours: what it says is in our tables."""
    logging.getLogger("dials").setLevel(logging.ERROR)
    logging.getLogger("dxtbx").setLevel(logging.ERROR)
