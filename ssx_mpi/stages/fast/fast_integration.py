"""Integration of the lattices of one still with the ellipsoid model, by the compiled kernels.

The same model, steps and limits as ``dials.ssx_integrate algorithm=ellipsoid`` of DIALS 3.30, whatever DIALS is
installed. For every lattice, a few times over: index the strong spots with the present crystal, drop those far from
where it predicts them, measure their shapes, refine the mosaicity, then orientation and cell. Then predict every
reflection near the Ewald sphere, and sum the pixels within its ellipse. As in DIALS, a pixel that two reflections
share counts for both.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from dials.algorithms.integration import Corrections, CorrectionsMulti
from dials.algorithms.shoebox import MaskCode
from dials.array_family import flex
from dxtbx import flumpy
from dxtbx.model import Experiment, ExperimentList

from ssx_mpi import dials_compat
from ssx_mpi.images.frames import Frame
from ssx_mpi.kernels import shoeboxes
from ssx_mpi.kernels.ellipsoid import (
    MODELS,
    MosaicityModel,
    OnEwaldSphere,
    on_ewald_sphere,
    partialities,
    squared_radius,
)
from ssx_mpi.kernels.ellipsoid_outliers import inliers
from ssx_mpi.kernels.ellipsoid_refinement import (
    EllipsoidError,
    Lattice,
    SpotShapes,
    metric_basis,
    refine_lattice,
    refine_mosaicity,
)
from ssx_mpi.kernels.prediction import Panels, find_panels, indices_near_ewald_sphere, pixels_to_lab, rays_to_pixels
from ssx_mpi.stages.flex_arrays import to_int6, to_miller_index
from ssx_mpi.stages.still_results import Crystals, IntegratedLattices

logger = logging.getLogger(__name__)

FULL_PROBABILITY = 0.9973
# Distance in index space at which a spot no longer belongs to the lattice, as in DIALS
_MAX_INDEX_ERROR = 0.3
# Radii in units of the spots' angular spread within which they are foreground, and seen at all, as in DIALS
_FOREGROUND_SPREADS, _BOX_SPREADS = 3, 6
# Pixels between two predictions of the same reflection
_MAX_MATCH_DISTANCE = 2
_ROBUST_POISSON, _MEAN = shoeboxes.Background("glm"), shoeboxes.Background("mean")


@dataclass(frozen=True)
class IntegrationSettings:
    """What a user can choose, with the defaults of DIALS 3.30.

    Attributes
    ----------
    model : str
        A name in :data:`ssx_mpi.kernels.ellipsoid.MODELS`.
    n_macro_cycles, n_cycles : int
        Rounds of indexing and refinement, and of refinements in each.
    max_separation : float
        Pixels between observed and predicted spot.
    outlier_probability : float
    min_n_reflections : int
        Strong spots without which nothing is refined.
    max_iter, LL_tolerance
        End of a refinement.
    mosaicity_max_limit : float
        1/Å.
    max_cell_volume_change_fraction : float
    fix_unit_cell, fix_orientation, fail_on_bad_index : bool
    d_min : float or None
        Å; None for the corners of the detector.
    probability : float
        Part of the distribution within which a reflection is predicted.
    shoebox_probability : float
        Part of the distribution in the plane within which a pixel is foreground.
    counting_background, other_background : Background
        How the background is estimated on detectors that count photons, and on others.
    """

    model: str = "simple6"
    n_macro_cycles: int = 3
    n_cycles: int = 1
    max_separation: float = 2.0
    outlier_probability: float = 0.975
    min_n_reflections: int = 10
    max_iter: int = 100
    LL_tolerance: float = 1e-3
    mosaicity_max_limit: float = 0.004
    max_cell_volume_change_fraction: float = 0.2
    fix_unit_cell: bool = False
    fix_orientation: bool = False
    fail_on_bad_index: bool = False
    d_min: float | None = None
    probability: float = FULL_PROBABILITY
    shoebox_probability: float = FULL_PROBABILITY
    counting_background: shoeboxes.Background = _ROBUST_POISSON
    other_background: shoeboxes.Background = _MEAN

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"unknown ellipsoid model {self.model}: one of {', '.join(MODELS)}")

    @classmethod
    def from_params(cls, params: Any, **chosen: Any) -> IntegrationSettings:
        """From the extracted ``dials.ssx_integrate`` scope of the installed DIALS.

        Parameters
        ----------
        params : scope_extract
        **chosen
            Take precedence. The model and the number of macro cycles are only taken from here, because their defaults
            in an older DIALS mean something else.
        """
        ellipsoid = params.profile.ellipsoid
        refinement = ellipsoid.refinement
        found = {name: getattr(refinement, name, getattr(cls, name)) for name in _REFINEMENT_NAMES}
        found |= {
            "fix_unit_cell": ellipsoid.unit_cell.fixed,
            "fix_orientation": ellipsoid.orientation.fixed,
            "fail_on_bad_index": ellipsoid.indexing.fail_on_bad_index,
            "d_min": params.prediction.d_min,
        }
        found |= _backgrounds_from(params.integration.background)
        found["probability"] = dials_compat.parameter(ellipsoid, "prediction.probability", cls.probability)
        return cls(**(found | chosen))


_REFINEMENT_NAMES = (
    "n_cycles",
    "max_separation",
    "outlier_probability",
    "min_n_reflections",
    "max_iter",
    "LL_tolerance",
    "mosaicity_max_limit",
    "max_cell_volume_change_fraction",
)


# On a single image the two-dimensional and the three-dimensional model are the same
_CONSTANT = ("constant2d", "constant3d")


# Values of parameters that are covered
_COVERED: dict[str, tuple] = {
    "algorithm": ("ellipsoid",),
    "profile.ellipsoid.wavelength_spread.model": ("delta",),
    "integration.background.algorithm": (None, "Auto", "glm", "simple"),
    "integration.background.glm.model.algorithm": _CONSTANT,
    "integration.background.simple.model.algorithm": _CONSTANT,
    "integration.background.simple.outlier.algorithm": (None, "null"),
    "debug.output.shoeboxes": (False,),
    "ellipsoid.integration.use_crude_shoebox_mask": (False,),
}


def _backgrounds_from(scope: Any) -> dict[str, shoeboxes.Background]:
    robust = shoeboxes.Background("glm", scope.glm.robust.tuning_constant, scope.glm.min_pixels)
    mean = shoeboxes.Background("mean", min_pixels=scope.simple.min_pixels)
    return {
        "counting_background": mean if scope.algorithm == "simple" else robust,
        "other_background": robust if scope.algorithm == "glm" else mean,
    }


class FastEllipsoidIntegrator:
    """Integrates the lattices of one image after another with the same settings.

    Parameters
    ----------
    params : scope_extract
        Of ``dials.ssx_integrate``.
    **chosen
        Settings that take precedence over it, see :class:`IntegrationSettings`.
    """

    def __init__(self, params: Any, **chosen: Any):
        self.settings = IntegrationSettings.from_params(params, **chosen)
        if not _dials_knows(self.settings.model):
            logger.warning(
                "this DIALS has no profile model %s: experiments are written with its static part alone, "
                "the reflections are those of the whole model",
                self.settings.model,
            )

    @staticmethod
    def supports(params: Any) -> tuple[bool, str]:
        """Whether these parameters of ``dials.ssx_integrate`` are covered here, and if not, which one is not."""
        left = dials_compat.uncovered(params, _COVERED)
        return not left, f"{left[0]} is left to DIALS" if left else ""

    def integrate(self, crystals: Crystals, frame: Frame) -> IntegratedLattices:
        """Refine and integrate every lattice of one image.

        Parameters
        ----------
        crystals
            Lattices on one detector and beam, and their indexed strong spots with shoeboxes, as ``dials.ssx_index``
            writes them.
        frame
            Corrected data and masks of the image.
        """
        pixels = shoeboxes.Frame(frame.data, frame.masks, frame.readout)
        done, tables, failures = ExperimentList(), flex.reflection_table(), []
        for number, experiment in enumerate(crystals.experiments):
            table = crystals.reflections.select(crystals.reflections["id"] == number)
            try:
                refined, integrated = _integrate_lattice(experiment, table, pixels, self.settings)
            except EllipsoidError as error:
                failures.append((experiment.identifier, str(error)))
                continue
            integrated["id"] = flex.int(len(integrated), len(done))
            integrated.experiment_identifiers()[len(done)] = experiment.identifier
            done.append(refined)
            tables.extend(integrated)
        return IntegratedLattices(done, tables, tuple(failures))


# One lattice ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Still:
    """What stays the same for every lattice of an image."""

    panels: Panels
    s0: np.ndarray
    frame: shoeboxes.Frame
    background: shoeboxes.Background
    settings: IntegrationSettings

    @property
    def model(self) -> MosaicityModel:
        return MODELS[self.settings.model]

    @property
    def radius(self) -> float:
        return float(np.linalg.norm(self.s0))


@dataclass(frozen=True)
class _StrongSpots:
    """Strong spots of one lattice: pixels (n, 2), panels, directions on the Ewald sphere, flags, pixels."""

    xy: np.ndarray
    panel: np.ndarray
    s1: np.ndarray
    indices: np.ndarray
    flags: np.ndarray
    pixels: shoeboxes.StrongPixels


@dataclass(frozen=True)
class _Fitted:
    """A refined crystal and the strong spots (rows and indices) that it was refined against."""

    lattice: Lattice
    parameters: np.ndarray
    rows: np.ndarray
    indices: np.ndarray


def _integrate_lattice(experiment: Experiment, table: Any, frame: shoeboxes.Frame, settings: IntegrationSettings):
    still = _Still(
        panels_of(experiment.detector),
        np.array(experiment.beam.get_s0()),
        frame,
        settings.counting_background if _counts_photons(experiment.detector) else settings.other_background,
        settings,
    )
    spots = _strong_spots(still, table)
    fitted = _refine(still, spots, _lattice_of(experiment.crystal, settings))
    reflections = _predict_and_integrate(still, experiment, fitted)
    _mark_references(still, reflections, fitted, spots)
    return _refined_experiment(experiment, fitted, settings.model), reflections


def panels_of(detector: Any) -> Panels:
    """The flat panels of a DIALS detector as arrays."""
    parallax = [panel.get_px_mm_strategy().name() == "ParallaxCorrectedPxMmStrategy" for panel in detector]
    return Panels(
        np.array([panel.get_origin() for panel in detector]),
        np.array([panel.get_fast_axis() for panel in detector]),
        np.array([panel.get_slow_axis() for panel in detector]),
        np.array([panel.get_pixel_size() for panel in detector]),
        np.array([panel.get_image_size() for panel in detector]),
        np.array([panel.get_mu() * shifted for panel, shifted in zip(detector, parallax)]),
        np.array([panel.get_thickness() * shifted for panel, shifted in zip(detector, parallax)]),
    )


def _counts_photons(detector: Any) -> bool:
    # pixels are corrected for the gain of their panel by now; without it DIALS goes by the same
    return all(panel.get_gain() > 0 and "PAD" in panel.get_type() for panel in detector)


def _lattice_of(crystal: Any, settings: IntegrationSettings) -> Lattice:
    operations = crystal.get_space_group().build_derived_acentric_group().all_ops()
    return Lattice(
        np.reshape(crystal.get_U(), (3, 3)),
        np.reshape(crystal.get_B(), (3, 3)),
        metric_basis(np.array([operation.r().as_double() for operation in operations]).reshape(-1, 3, 3)),
        settings.fix_orientation,
        settings.fix_unit_cell,
    )


def _strong_spots(still: _Still, table: Any) -> _StrongSpots:
    if "shoebox" not in table:
        raise EllipsoidError("the indexed spots have no shoeboxes")
    table = table.select(table.get_flags(table.flags.strong))
    if not len(table):
        raise EllipsoidError("no strong spots")
    panel = flumpy.to_numpy(table["panel"]).astype(np.int64)
    xy = np.ascontiguousarray(flumpy.to_numpy(table["xyzobs.px.value"])[:, :2])
    s1 = pixels_to_lab(still.panels, panel, xy)
    s1 *= still.radius / np.linalg.norm(s1, axis=1, keepdims=True)
    return _StrongSpots(
        xy,
        panel,
        s1,
        np.array(table["miller_index"]).reshape(-1, 3),
        flumpy.to_numpy(table["flags"]).copy(),
        _strong_pixels(table, panel),
    )


def _strong_pixels(table: Any, panel: np.ndarray) -> shoeboxes.StrongPixels:
    masks, boxes = [], []
    for shoebox in table["shoebox"]:
        boxes.append(shoebox.bbox[:4])
        masks.append(flumpy.to_numpy(shoebox.mask)[0].ravel())
    sizes = np.array([len(mask) for mask in masks])
    foreground = (np.concatenate(masks) & MaskCode.Foreground) != 0
    return shoeboxes.StrongPixels(
        panel, np.array(boxes, dtype=np.int32), np.cumsum(sizes) - sizes, foreground.view(np.uint8)
    )


def _refine(still: _Still, spots: _StrongSpots, lattice: Lattice) -> _Fitted:
    settings, model, parameters = still.settings, still.model, np.empty(0)
    for cycle in range(settings.n_macro_cycles):
        rows, indices = _index(still, spots, lattice.A)
        rows, indices = _without_outliers(still, spots, lattice.A, rows, indices)
        shapes, spread, rows, indices = _measure_shapes(still, spots, lattice.A, rows, indices)
        if cycle == 0:
            parameters = model.start(spread)
        for _ in range(settings.n_cycles):
            parameters = refine_mosaicity(
                shapes,
                still.s0,
                lattice.A,
                model,
                parameters,
                settings.mosaicity_max_limit,
                settings.max_iter,
                settings.LL_tolerance,
            )
            lattice = refine_lattice(
                shapes,
                still.s0,
                lattice,
                model,
                parameters,
                settings.max_cell_volume_change_fraction,
                settings.max_iter,
                settings.LL_tolerance,
            )
    return _Fitted(lattice, parameters, rows, indices)


def _index(still: _Still, spots: _StrongSpots, A: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the spots that the lattice explains, and their indices."""
    fractional = np.linalg.solve(A, (spots.s1 - still.s0).T).T
    indices = np.floor(fractional + 0.5)
    if still.settings.fail_on_bad_index and (indices != spots.indices).any():
        raise EllipsoidError("a spot changed its index")
    explained = indices.any(axis=1) & (np.linalg.norm(indices - fractional, axis=1) < _MAX_INDEX_ERROR)
    (rows,) = np.nonzero(explained)
    return rows, indices[rows]


def _without_outliers(still: _Still, spots: _StrongSpots, A: np.ndarray, rows: np.ndarray, indices: np.ndarray):
    settings = still.settings
    predicted, _ = rays_to_pixels(still.panels, spots.panel[rows], still.s0 + indices @ A.T)
    residuals = spots.xy[rows] - predicted
    met = np.isfinite(residuals).all(axis=1)
    rows, indices = rows[met], indices[met]
    try:
        kept = inliers(residuals[met], settings.outlier_probability, settings.max_separation)
    except ValueError as error:
        raise EllipsoidError(str(error)) from None
    if kept.sum() < settings.min_n_reflections:
        raise EllipsoidError(
            f"{kept.sum()} strong spots are too few to refine, {settings.min_n_reflections} are needed"
        )
    return rows[kept], indices[kept]


def _measure_shapes(still: _Still, spots: _StrongSpots, A: np.ndarray, rows: np.ndarray, indices: np.ndarray):
    """Shapes of the spots, their angular spread, and the rows and indices of those that have a shape."""
    pixels = spots.pixels.selected(rows)
    try:
        spread = shoeboxes.angular_spread(still.panels, still.frame, pixels, still.s0 + indices @ A.T)
    except ValueError as error:
        raise EllipsoidError(str(error)) from None
    directions = spots.s1[rows] / still.radius
    boxes = shoeboxes.circle_boxes(still.panels, pixels.panel, still.s0, directions, _BOX_SPREADS * spread)
    _, directions, moments = shoeboxes.measure_strong_spots(
        still.panels,
        still.frame,
        pixels,
        boxes,
        still.s0,
        directions,
        _FOREGROUND_SPREADS * spread,
        still.background,
    )
    # a spot in a single row or column of pixels has no width (DIALS gives the crystal up)
    good = (moments[:, 0] > 0) & (moments[:, 3] > 0) & (moments[:, 5] > 0)
    if good.sum() < still.settings.min_n_reflections:
        raise EllipsoidError(f"{good.sum()} strong spots have a shape, {still.settings.min_n_reflections} needed")
    moments, rows, indices = moments[good], rows[good], indices[good]
    shapes = SpotShapes(indices, directions[good], _damped(moments[:, 0]), np.ascontiguousarray(moments[:, 1:]))
    return shapes, spread, rows, indices


def _damped(counts: np.ndarray) -> np.ndarray:
    """Counts limited to the third quartile and 1.5 interquartile ranges, so that no spot outweighs the others."""
    ordered = np.sort(counts)
    first, third = ordered[len(counts) // 4], ordered[3 * len(counts) // 4]
    return np.minimum(counts, third + 1.5 * (third - first))


# Prediction and summation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Predicted:
    """Reflections near the Ewald sphere, and where they are seen."""

    indices: np.ndarray
    s1: np.ndarray
    s2: np.ndarray
    panel: np.ndarray
    px: np.ndarray
    mm: np.ndarray
    seen: OnEwaldSphere

    def selected(self, which: np.ndarray) -> _Predicted:
        seen = OnEwaldSphere(**{name: value[which] for name, value in vars(self.seen).items()})
        parts = {name: value[which] for name, value in vars(self).items() if name != "seen"}
        return _Predicted(**parts, seen=seen)


def _predict(still: _Still, crystal: Any, fitted: _Fitted, d_min: float) -> _Predicted:
    A, model = fitted.lattice.A, still.model
    limit = squared_radius(still.settings.probability, 3)
    widest = np.linalg.eigvalsh(model.sigma(fitted.parameters))[2]
    widest += np.linalg.eigvalsh(model.sigma_angular(fitted.parameters))[2] / d_min**2
    indices = indices_near_ewald_sphere(A, still.s0, d_min, np.sqrt(limit * widest))
    absent = crystal.get_space_group().is_sys_absent(to_miller_index(indices))
    indices = indices[~flumpy.to_numpy(absent)]

    r = indices @ A.T
    s2 = still.s0 + r
    sigmas = model.sigmas(fitted.parameters, r, still.s0)
    direction = s2 / np.linalg.norm(s2, axis=1, keepdims=True)
    off = np.linalg.norm(s2, axis=1) - still.radius
    near = off**2 * np.einsum("ni,nij,nj->n", direction, np.linalg.inv(sigmas) + np.zeros((len(s2), 1, 1)), direction)
    close = near < limit
    s2, indices = s2[close], indices[close]
    seen = on_ewald_sphere(still.s0, s2, sigmas[close] if len(sigmas) > 1 else sigmas)
    height = np.full((len(s2), 1), still.radius)
    s1 = np.einsum("nk,nki->ni", np.hstack([seen.mean, height]), seen.frames)
    s1 *= still.radius / np.linalg.norm(s1, axis=1, keepdims=True)
    panel = find_panels(still.panels, s1)
    px, mm = rays_to_pixels(still.panels, panel, s1)
    return _Predicted(indices, s1, s2, panel, px, mm, seen).selected(panel >= 0)


def _predict_and_integrate(still: _Still, experiment: Experiment, fitted: _Fitted) -> Any:
    d_min = still.settings.d_min or experiment.detector.get_max_resolution(experiment.beam.get_s0())
    predicted = _predict(still, experiment.crystal, fitted, d_min)
    limit = squared_radius(still.settings.shoebox_probability, 2)
    boxes = shoeboxes.ellipse_boxes(still.panels, predicted.panel, still.s0, predicted.seen, limit)
    size = still.panels.image_size[predicted.panel]
    on_panel = (boxes[:, [1, 3]] > 0).all(axis=1) & (boxes[:, [0, 2]] < size).all(axis=1)
    predicted, boxes = predicted.selected(on_panel), boxes[on_panel]
    if not len(boxes):
        raise EllipsoidError("no reflection is predicted on the detector")
    measured = shoeboxes.integrate_ellipses(
        still.panels,
        still.frame,
        predicted.panel,
        boxes,
        predicted.seen,
        limit,
        still.radius,
        still.background,
        # the range is of values as read, the pixels are photons
        np.array([panel.get_trusted_range()[1] / panel.get_gain() for panel in experiment.detector]),
    )
    sigma = still.model.sigma(fitted.parameters)
    partiality, inverse_variance = partialities(predicted.seen, sigma, len(fitted.rows))
    table = _table(still, predicted, boxes, measured)
    table["d"] = flumpy.from_numpy(1 / np.linalg.norm(predicted.s2 - still.s0, axis=1))
    table["partiality"] = flumpy.from_numpy(partiality)
    table["partiality.inv.variance"] = flumpy.from_numpy(inverse_variance)
    _add_corrections(table, experiment)
    return table


def _vectors(xy: np.ndarray, z: float) -> Any:
    return flumpy.vec_from_numpy(np.column_stack([xy, np.full(len(xy), z)]))


def _table(still: _Still, predicted: _Predicted, boxes: np.ndarray, measured: shoeboxes.Measured) -> Any:
    table, n = flex.reflection_table(), len(boxes)
    table["miller_index"] = to_miller_index(predicted.indices)
    table["entering"] = flex.bool(n, False)
    table["panel"] = flumpy.from_numpy(predicted.panel.astype(np.uint64))
    table["s1"] = flumpy.vec_from_numpy(predicted.s1)
    table["s2"] = flumpy.vec_from_numpy(predicted.s2)
    table["xyzcal.px"] = _vectors(predicted.px, 0)
    table["xyzcal.mm"] = _vectors(predicted.mm, 0)
    limits = np.column_stack([boxes, np.zeros(n, np.int32), np.ones(n, np.int32)])
    table["bbox"] = to_int6(limits)
    for name, column in (
        ("intensity.sum.value", measured.intensity),
        ("intensity.sum.variance", measured.variance),
        ("background.sum.value", measured.background),
        ("background.sum.variance", measured.background_variance),
        ("background.mean", measured.level),
    ):
        table[name] = flumpy.from_numpy(np.ascontiguousarray(column))
    for name, column in (
        ("num_pixels.valid", measured.n_valid),
        ("num_pixels.foreground", measured.n_foreground),
        ("num_pixels.background", measured.n_background),
        ("num_pixels.background_used", measured.n_background_used),
    ):
        table[name] = flumpy.from_numpy(np.ascontiguousarray(column))
    _add_centroids(table, still.panels, predicted.panel, measured)
    table["flags"] = flumpy.from_numpy(_flags(measured))
    return table


def _add_centroids(table: Any, panels: Panels, panel: np.ndarray, measured: shoeboxes.Measured) -> None:
    lab = pixels_to_lab(panels, panel, measured.centroid)
    _, mm = rays_to_pixels(panels, panel, lab)
    found = (measured.failed & shoeboxes.FAILED_CENTROID) == 0
    depth_variance = np.where(found, 1 / 12, 0)[:, None]
    scale = panels.pixel_size[panel] ** 2
    table["xyzobs.px.value"] = _vectors(measured.centroid, 0.5)
    table["xyzobs.px.variance"] = flumpy.vec_from_numpy(np.hstack([measured.centroid_variance, depth_variance]))
    table["xyzobs.mm.value"] = _vectors(mm, 0)
    table["xyzobs.mm.variance"] = _vectors(measured.centroid_variance * scale, 0)


def _flags(measured: shoeboxes.Measured) -> np.ndarray:
    codes = flex.reflection_table.flags
    no_background = (measured.failed & shoeboxes.FAILED_BACKGROUND) != 0
    no_sum = (measured.failed & shoeboxes.FAILED_SUMMATION) != 0
    flags = np.where(no_sum, int(codes.failed_during_summation), int(codes.integrated_sum)).astype(np.uint64)
    flags[(measured.failed & shoeboxes.OVERLOADED) != 0] |= int(codes.overloaded)
    flags[no_background] |= int(codes.failed_during_background_modelling) | int(codes.dont_integrate)
    return flags


def _add_corrections(table: Any, experiment: Experiment) -> None:
    # a still has no rotation, whatever goniometer its file comes with
    corrections, lattice = CorrectionsMulti(), flex.int(len(table), 0)
    corrections.append(Corrections(experiment.beam, experiment.detector))
    table["lp"] = corrections.lp(lattice, table["s1"])
    if experiment.detector[0].get_mu() > 0:
        table["qe"] = corrections.qe(lattice, table["s1"], table["panel"])


def _mark_references(still: _Still, reflections: Any, fitted: _Fitted, spots: _StrongSpots) -> None:
    """Give predicted reflections that are strong spots of the refinement the flags of those."""
    codes, rows = reflections.flags, fitted.rows
    px, _ = rays_to_pixels(still.panels, spots.panel[rows], still.s0 + fitted.indices @ fitted.lattice.A.T)
    predicted = np.column_stack([np.array(reflections["miller_index"]), flumpy.to_numpy(reflections["panel"])])
    strong = np.column_stack([fitted.indices, spots.panel[rows]])
    # rows of both in one numbering of what is in either; NumPy 2.0 returns it as a column
    _, number = np.unique(np.vstack([predicted, strong]).astype(np.int64), axis=0, return_inverse=True)
    number = number.ravel()
    row_of = np.full(number.max() + 1, -1)
    row_of[number[: len(predicted)]] = np.arange(len(predicted))
    at = row_of[number[len(predicted) :]]
    found = at >= 0
    at, rows, px = at[found], rows[found], px[found]

    copied = np.uint64(int(codes.strong) | int(codes.indexed) | int(codes.used_in_refinement))
    flags = flumpy.to_numpy(reflections["flags"])
    flags[at] |= (spots.flags[rows].astype(np.uint64) | np.uint64(int(codes.indexed))) & copied
    near = np.linalg.norm(flumpy.to_numpy(reflections["xyzcal.px"])[at, :2] - px, axis=1) < _MAX_MATCH_DISTANCE
    flags[at[near]] |= np.uint64(int(codes.reference_spot))
    reflections["flags"] = flumpy.from_numpy(flags)


def _refined_experiment(experiment: Experiment, fitted: _Fitted, model: str) -> Experiment:
    refined = copy.copy(experiment)
    crystal = copy.deepcopy(experiment.crystal)
    crystal.set_U(tuple(fitted.lattice.U.ravel()))
    crystal.set_B(tuple(fitted.lattice.B.ravel()))
    refined.crystal = crystal
    refined.profile = profile_model_for_dials(model, fitted.parameters, len(fitted.rows))
    return refined


@cache
def _dials_knows(model: str) -> bool:
    from dials.algorithms.profile_model.ellipsoid.model import EllipsoidProfileModel

    start = MODELS[model].start(1e-4).tolist()
    try:
        EllipsoidProfileModel.from_dict({"parameterisation": model, "parameters": start})
    except RuntimeError:
        return False
    return True


def profile_model_for_dials(model: str, parameters: np.ndarray, n_observed: int) -> Any:
    """The ellipsoid as a profile model of the installed DIALS, which writes it into experiment files and reads it back.

    A DIALS before 3.16 knows no angular models of this kind: it is given the static part.

    Parameters
    ----------
    model : str
        A name in :data:`ssx_mpi.kernels.ellipsoid.MODELS`.
    parameters : (n_parameters,) float64
    n_observed : int
    """
    from dials.algorithms.profile_model.ellipsoid.model import EllipsoidProfileModel

    if not _dials_knows(model):
        static = MODELS[model].static
        model, parameters = f"simple{static}", parameters[:static]
    profile = EllipsoidProfileModel.from_dict({"parameterisation": model, "parameters": parameters.tolist()})
    profile.parameterisation.n_obs = n_observed
    return profile
