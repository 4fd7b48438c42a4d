"""Joint refinement of the detector and the first crystals, and what became of distance and cell."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from ssx_mpi.images.experiment_maker import with_wavelength
from ssx_mpi.kernels import drift
from ssx_mpi.kernels.detector_refinement import (
    BLOCK,
    DetectorSpots,
    GeometryUncertainty,
    JointGeometry,
    RefinedDetector,
    geometry_uncertainty,
    refine_crystals,
    refine_detector,
    start_geometry,
)
from ssx_mpi.kernels.drift import Drift
from ssx_mpi.kernels.exact_sums import exact_median, exact_sums
from ssx_mpi.kernels.lattice_refinement import invariant_strains
from ssx_mpi.parallel.collective import total
from ssx_mpi.parallel.communicator import Communicator, SerialCommunicator
from ssx_mpi.parallel.redistribution import Redistribution
from ssx_mpi.parameters.run_parameters import PanelPriors
from ssx_mpi.stages.fast.panel_tree import MovedNode, PanelTree, frame_of, panel_tree
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
class LevelTried:
    """How a level of the detector's tree fared on crystals that were left out.

    Attributes
    ----------
    level : int
    distance : float
        Median distance between their observed and predicted spots, mm.
    gain, error : float
        Mean over these crystals of log(distance with the level above / distance with this one), and its error.
    taken : bool
    """

    level: int
    distance: float
    gain: float
    error: float
    taken: bool


@dataclass(frozen=True)
class RefinedGeometry:
    """Outcome of a joint refinement.

    Attributes
    ----------
    detector, beam
        dxtbx models to process all images with.
    experiments, reflections
        The refined crystals, and their reflections with new predictions; of this rank where ranks refine together.
    n_crystals : int
        Of all ranks.
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
    converged
        Whether the last step was small; None where the engine does not say.
    hierarchy_level
        Level of the detector's tree down to which its nodes were refined.
    levels_tried
        How levels fared on crystals that were left out, where the level was found by the data.
    nodes
        The motion of each node below the whole, with uncertainties.
    number
        Numbers of `experiments` among the crystals of all ranks; None where one rank has all.
    closer
        Mean over the crystals of log(distance of spots from predictions before / after), and its error; None where
        that was not asked for.
    note
        What the user should know besides.
    """

    detector: Any
    beam: Any
    experiments: Any
    reflections: Any
    n_crystals: int
    engine: str
    outliers: str
    steps: tuple[Step, ...]
    before: Place
    after: Place
    cell_before: tuple[float, ...]
    cell_after: tuple[float, ...]
    uncertainty: GeometryUncertainty | None
    converged: bool | None = None
    hierarchy_level: int = 0
    levels_tried: tuple[LevelTried, ...] = ()
    nodes: tuple[MovedNode, ...] = ()
    number: np.ndarray | None = None
    closer: tuple[float, float] | None = None
    note: str = ""

    @property
    def rmsd(self) -> float:
        """Distance between observed and predicted spots in mm, root mean square, after the last step."""
        return float(np.hypot(self.steps[-1].rmsd_x, self.steps[-1].rmsd_y))

    def since(self, earlier: RefinedGeometry) -> RefinedGeometry:
        """The same outcome, seen from where the refinement before it began."""
        known = {(node.level, node.name): node for node in earlier.nodes}
        nodes = tuple(node.since(known.get((node.level, node.name))) for node in self.nodes)
        return replace(
            self,
            before=earlier.before,
            cell_before=earlier.cell_before,
            nodes=nodes,
            levels_tried=self.levels_tried or earlier.levels_tried,
        )


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
    shared = _with_one_detector(experiments, experiments[0].detector, experiments[0].beam)
    before = place(shared[0].detector, shared[0].beam)
    cell_before = median_cell(shared.crystals())
    refined, predicted, history, outliers = _refine_by_dials(shared, reflections, scope)
    detector, beam = refined[0].detector, refined[0].beam
    return RefinedGeometry(
        detector=detector,
        beam=beam,
        experiments=refined,
        reflections=predicted,
        n_crystals=len(refined),
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


def _with_one_detector(experiments, detector, beam):
    from dxtbx.model import Experiment, ExperimentList

    detector, beam = copy.deepcopy(detector), copy.deepcopy(beam)
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


def refine_fast(
    experiments,
    reflections,
    hold_cell: tuple[float, ...] | None = None,
    hierarchy_level: int | None = 0,
    priors: PanelPriors | None = None,
    shared: SharedCrystals | None = None,
    against_start: bool = False,
) -> RefinedGeometry:
    """Refine one detector and all crystals together with our own kernel; as :func:`refine`, in a hundredth of the time.

    Parameters
    ----------
    experiments, reflections
        As for :func:`refine`; with `shared` those of this rank, of which there may be none.
    hold_cell : (6,) floats, optional
        Give all crystals this cell and keep it.
    hierarchy_level : int or None
        Level of the detector's tree down to which its nodes are refined, each against the one above it; None takes the
        levels that bring crystals that were left out closer to their spots.
    priors : PanelPriors
        How far nodes are expected from where the header has them.
    shared : SharedCrystals, optional
        The crystals of other ranks, with which these are refined; collective then.
    against_start
        Find out too how much closer the spots are to their predictions than on the detector to start from, with the
        crystals alone refined there.

    Raises
    ------
    StageError
        On every rank, when there are too few spots to refine with, or the detector has no such level.
    """
    if shared is None:
        models = experiments[0].detector, experiments[0].beam
        shared = SharedCrystals(SerialCommunicator(), *models, np.arange(len(experiments)), len(experiments))
    comm = shared.comm
    # the caller's detector is left alone
    detector, beam = copy.deepcopy(shared.detector), shared.beam
    before = place(detector, beam)
    tree = panel_tree(detector, priors or PanelPriors())
    if hierarchy_level is not None and hierarchy_level > tree.depth:
        raise StageError(f"hierarchy level {hierarchy_level} of a detector whose last level is {tree.depth}")
    spread = _spread(experiments, reflections, shared, hold_cell)
    own, table, fit, of_crystals, of_spots = spread.own, spread.table, spread.fit, spread.of_crystals, spread.of_spots
    start, cell_before = fit.start, spread.cell_before
    tried: tuple[LevelTried, ...] = ()
    note = ""
    if hierarchy_level is None:
        hierarchy_level, tried = _levels_that_help(fit, tree, detector, shared.n_total)
        if tree.distinct and not tried:
            note = f"{shared.n_total} crystals are too few to tell whether parts of the detector are in their places"
    refined = fit.refine(tree.with_levels(start, detector, hierarchy_level))
    closer = None
    if against_start:
        distances = _Distances(fit)
        closer = distances.gain(distances.logs(fit.refine_crystals(start)), distances.logs(refined))
    nodes = tree.moved(detector, refined, hierarchy_level)
    tree.write(detector, refined.geometry, hierarchy_level)
    for experiment, a_matrix in zip(own, of_crystals.back(refined.geometry.a_matrices) / _relative(own, beam)):
        experiment.detector = detector
        experiment.crystal.set_A(tuple(map(float, a_matrix.ravel())))
    return RefinedGeometry(
        detector=detector,
        beam=beam,
        experiments=own,
        reflections=_predicted(table, of_spots.back(refined.residual), of_spots.back(refined.weight)),
        n_crystals=shared.n_total,
        engine="Gauss-Newton with the crystals eliminated",
        outliers="Tukey's weights",
        steps=tuple(Step(s.n_spots, *s.rmsd[:2], float(np.degrees(s.rmsd[2]))) for s in refined.steps),
        before=before,
        after=place(detector, beam),
        cell_before=cell_before,
        cell_after=_median_cell(comm, own.crystals()),
        uncertainty=refined.uncertainty,
        converged=refined.converged,
        hierarchy_level=hierarchy_level,
        levels_tried=tried,
        nodes=nodes,
        number=shared.number,
        closer=closer,
        note=note,
    )


def find_drift(experiments, reflections, position: np.ndarray, shared: SharedCrystals) -> Drift | None:
    """How the detector moved along the run, None where the data do not say that it did. Collective.

    Parameters
    ----------
    experiments, reflections, shared
        As for :func:`refine_fast`; the crystals are refined on the detector as it is.
    position : (K,) float64
        Of each crystal of this rank along the run, from 0 to 1.

    Raises
    ------
    StageError
        On every rank, when there are too few spots.
    """
    spread = _spread(experiments, reflections, shared, None)
    fit = spread.fit
    refined = fit.refine_crystals(fit.start)
    there = spread.of_crystals.there(position)
    return drift.find_drift(fit.spots, refined.geometry, fit.strains, fit.s0, there, shared.comm)


@dataclass(frozen=True)
class _Spread:
    """Crystals of this rank, and those that it does sums for: `fit`, with the ways there and back."""

    own: Any
    table: Any
    fit: JointFit
    of_crystals: Redistribution
    of_spots: Redistribution
    cell_before: tuple[float, ...]


def _spread(experiments, reflections, shared: SharedCrystals, hold_cell: tuple[float, ...] | None) -> _Spread:
    """Spread crystals and spots over the ranks in blocks. Collective.

    Raises
    ------
    StageError
        On every rank, when there are too few spots.
    """
    comm, detector, beam = shared.comm, shared.detector, shared.beam
    own = _with_one_detector(experiments, detector, beam)
    cell_before = _median_cell(comm, own.crystals())
    if hold_cell is not None:
        _give_cell(own, hold_cell)
    if not len(reflections):
        reflections = no_spots()
    table = _by_crystal(reflections.select(reflections["id"] >= 0))
    # the strains that symmetry allows are those of the first crystal of all, everywhere
    allowed = comm.allgather(_allowed_strains(own[0].crystal) if 0 in shared.number else None)
    spots, start, strains = _arrays(own, table, detector, beam, next(each for each in allowed if each is not None))
    if total(comm, len(spots.hkl)) < _FEWEST_SPOTS:
        raise StageError(f"{total(comm, len(spots.hkl))} spots are too few")
    if hold_cell is not None:
        strains = strains[:, :0]
    of_crystals = Redistribution(comm, shared.number, shared.n_total, BLOCK)
    of_spots = Redistribution(comm, shared.number[spots.crystal], shared.n_total, BLOCK)
    there = DetectorSpots(
        hkl=of_spots.there(spots.hkl),
        crystal=np.searchsorted(of_crystals.number, of_spots.number),
        panel=of_spots.there(spots.panel),
        xy=of_spots.there(spots.xy),
        number=of_crystals.number,
    )
    start = replace(start, a_matrices=of_crystals.there(start.a_matrices))
    fit = JointFit(there, start, of_crystals.there(strains), np.array(beam.get_s0()), comm)
    return _Spread(own, table, fit, of_crystals, of_spots, cell_before)


@dataclass(frozen=True)
class SharedCrystals:
    """Crystals that the ranks refine together.

    Attributes
    ----------
    comm
        Communicator.
    detector, beam
        The same on every rank: the detector to start from, and the beam in which the first crystal was seen.
    number : (K,) int64
        Numbers of the crystals of this rank among all, in the order of the images.
    n_total : int
        Crystals of all ranks.
    """

    comm: Communicator
    detector: Any
    beam: Any
    number: np.ndarray
    n_total: int


@dataclass(frozen=True)
class JointFit:
    """The spots and crystals whose sums this rank does."""

    spots: DetectorSpots
    start: JointGeometry
    strains: np.ndarray
    s0: np.ndarray
    comm: Communicator

    def refine(self, geometry: JointGeometry) -> RefinedDetector:
        """Fit detector and crystals from `geometry` on. Collective."""
        return refine_detector(self.spots, geometry, self.strains, self.s0, reducer=self.comm)

    def refine_crystals(self, geometry: JointGeometry) -> RefinedDetector:
        """Fit the crystals on the detector of `geometry`. Collective."""
        return refine_crystals(self.spots, geometry, self.strains, self.s0, reducer=self.comm)

    def of(self, chosen: np.ndarray) -> JointFit:
        """The same with the crystals of a mask alone."""
        assert self.spots.number is not None
        own, number = chosen[self.spots.crystal], np.cumsum(chosen) - 1
        spots = DetectorSpots(
            self.spots.hkl[own],
            number[self.spots.crystal[own]],
            self.spots.panel[own],
            self.spots.xy[own],
            self.spots.number[chosen],
        )
        start = replace(self.start, a_matrices=self.start.a_matrices[chosen])
        return replace(self, spots=spots, start=start, strains=self.strains[chosen])


def _levels_that_help(fit: JointFit, tree: PanelTree, detector, n_total: int) -> tuple[int, tuple[LevelTried, ...]]:
    """The level of the tree that brings crystals that were left out closest to their spots, and those tried."""
    assert fit.spots.number is not None
    if n_total < _FEWEST_FOR_LEVELS or not tree.distinct:
        return 0, ()
    apart = fit.spots.number % min(max(n_total // _FEWEST_TO_LEAVE_OUT, 2), _LEFT_OUT_OF) == 0
    others, left_out = fit.of(~apart), fit.of(apart)
    best, tried, last = 0, [], np.zeros(0)
    distances = _Distances(left_out)
    for level in (0, *tree.distinct):
        fitted = others.refine(tree.with_levels(others.start, detector, level))
        tested = left_out.refine_crystals(replace(left_out.start, panels=fitted.geometry.panels))
        logs = distances.logs(tested)
        mean, error = distances.gain(last if level else logs, logs)
        distance = np.hypot(*tested.residual[:, :2].T)
        helps = level == 0 or mean > 2 * error
        median = float(exact_median(fit.comm, distance[:, None])[0])
        tried.append(LevelTried(level, median, mean, error, helps))
        if helps:
            best, last = level, logs
    return best, tuple(tried)


@dataclass(frozen=True)
class _Distances:
    """How far spots are from their predictions, crystal by crystal."""

    fit: JointFit

    def logs(self, refined: RefinedDetector) -> np.ndarray:
        """Logarithm of the median distance of each crystal of this rank that has spots."""
        distance, crystal = np.hypot(*refined.residual[:, :2].T), self.fit.spots.crystal
        # spots are in the order of the crystals
        bounds = np.flatnonzero(np.diff(crystal, prepend=-1, append=crystal[-1:] + 1))
        return np.array([np.log(max(np.median(distance[a:b]), 1e-9)) for a, b in pairwise(bounds)])

    def gain(self, before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
        """Mean of before - after over the crystals of all ranks, and its error. Collective."""
        gain = before - after
        count, first, second = exact_sums(self.fit.comm, np.stack([np.ones(len(gain)), gain, gain**2], axis=1))
        mean = float(first / count)
        return mean, float(np.sqrt(max(second / count - mean**2, 0.0) / count))


def _median_cell(comm: Communicator, crystals) -> tuple[float, ...]:
    cells = np.array([crystal.get_unit_cell().parameters() for crystal in crystals]).reshape(-1, 6)
    return tuple(exact_median(comm, cells).tolist())


# crystals that at least are left out, and one of how many is, to tell whether a level of the tree helps
_FEWEST_TO_LEAVE_OUT = 5
_LEFT_OUT_OF = 10
# below this neither half tells anything
_FEWEST_FOR_LEVELS = 10
# spots that a refinement of five parameters of the detector should have at the very least
_FEWEST_SPOTS = 50


def _uncertainty(experiments, reflections) -> GeometryUncertainty | None:
    used = reflections.select(reflections.get_flags(reflections.flags.used_in_refinement))
    if len(used) < _FEWEST_SPOTS:
        return None
    used = _by_crystal(used)
    first = experiments[0]
    spots, geometry, strains = _arrays(experiments, used, first.detector, first.beam, _allowed_strains(first.crystal))
    return geometry_uncertainty(spots, geometry, strains, np.array(experiments[0].beam.get_s0()))


def _arrays(experiments, reflections, detector, beam, allowed) -> tuple[DetectorSpots, JointGeometry, np.ndarray]:
    """Spots, geometry, and the strains (m, 3, 3) that are `allowed` turned with each crystal, (K, m, 3, 3)."""
    crystals = experiments.crystals()
    middle = np.array([p.get_image_size_mm() for p in detector]) / 2
    spots = DetectorSpots(
        hkl=np.asarray(reflections["miller_index"].as_vec3_double()).reshape(-1, 3),
        crystal=np.asarray(reflections["id"]).astype(np.int64),
        panel=np.asarray(reflections["panel"]).astype(np.int64),
        xy=np.asarray(reflections["xyzobs.mm.value"]).reshape(-1, 3)[:, :2],
    )
    panels = np.array([frame_of(panel) for panel in detector])
    a_matrices = np.array([c.get_A() for c in crystals]).reshape(-1, 3, 3) * _relative(experiments, beam)
    turns = np.array([c.get_U() for c in crystals]).reshape(-1, 3, 3)
    # as products of matrices: the last digits of einsum may depend on the number of crystals
    in_laboratory = turns[:, None] @ allowed @ turns[:, None].transpose(0, 1, 3, 2)
    return spots, start_geometry(panels, a_matrices, middle), in_laboratory


#: columns of a reflection table that are refined against
COLUMNS = ("miller_index", "xyzobs.mm.value", "panel", "id", "flags")


def no_spots():
    """A reflection table without a row, with the columns that are refined against."""
    from dials.array_family import flex

    types = (flex.miller_index, flex.vec3_double, flex.size_t, flex.int, flex.size_t)
    table = flex.reflection_table()
    for name, kind in zip(COLUMNS, types):
        table[name] = kind()
    return table


def _by_crystal(table):
    """The reflections crystal by crystal, those of one crystal in the order that they have."""
    from dxtbx import flumpy

    order = flumpy.from_numpy(np.argsort(np.asarray(table["id"]), kind="stable").astype(np.uint64))
    return table.select(order)


def _relative(experiments, beam) -> np.ndarray:
    """Wavelengths, (K, 1, 1), in units of that of `beam`.

    A crystal and a beam that are scaled together, in reciprocal space, scatter in the same directions: with its A
    matrix in units of its own 1 / wavelength each crystal can be refined with one beam.
    """
    wavelengths = np.array([e.beam.get_wavelength() for e in experiments])
    return (wavelengths / beam.get_wavelength())[:, None, None]


def _allowed_strains(crystal) -> np.ndarray:
    return invariant_strains(_cartesian_rotations(crystal))


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
