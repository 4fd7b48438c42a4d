"""Spots of a still as arrays, and indexed spots as the tables that ``dials.ssx_index`` writes."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from dials.array_family import flex
from dxtbx import flumpy
from dxtbx.imageset import ImageSequence, ImageSet
from dxtbx.model import Experiment, ExperimentList

from ssx_mpi.kernels import lattice_refinement
from ssx_mpi.kernels.lattice_refinement import Spots
from ssx_mpi.stages.fast.target import FoundLattice
from ssx_mpi.stages.still_results import identify

_SMALLEST_VARIANCE = 1e-6  # mm^2


def strong_spots(experiment: Experiment, strong: Any) -> Any:
    """A copy of the spots flagged strong (all, when none is) with positions in mm and in reciprocal space."""
    flagged = strong.get_flags(strong.flags.strong)
    # select() copies
    table = strong.select(flagged if flagged.count(True) else flex.bool(len(strong), True))
    if not flagged.count(True):
        table.set_flags(flex.bool(len(table), True), table.flags.strong)
    identify(table, [])
    table["id"] = flex.int(len(table), 0)
    table["imageset_id"] = flex.int(len(table), 0)
    # a scan or a goniometer in the header of a still would turn the spots
    still = Experiment(beam=experiment.beam, detector=experiment.detector)  # type: ignore[call-arg, misc]
    one = ExperimentList([still])
    table.centroid_px_to_mm(one)
    table.map_centroids_to_reciprocal_space(one)
    return table


def spot_arrays(experiment: Experiment, table: Any) -> Spots:
    """Spots of a table that has been mapped to reciprocal space, with their panels' geometry."""
    matrices = np.array([panel.get_d_matrix() for panel in experiment.detector]).reshape(-1, 3, 3)
    panel = flumpy.to_numpy(table["panel"]).astype(np.int64)
    variance = flumpy.to_numpy(table["xyzobs.mm.variance"])[:, :2]
    return Spots(
        q=np.array(flumpy.to_numpy(table["rlp"])),
        xy=np.array(flumpy.to_numpy(table["xyzobs.mm.value"])[:, :2]),
        # a centroid of no variance is one of a single pixel
        weight=1 / np.maximum(variance, _SMALLEST_VARIANCE),
        d_inverse=np.linalg.inv(matrices)[panel],
        s0=np.array(experiment.beam.get_s0()),
    )


def still_imageset(experiment: Experiment) -> Any:
    """The one image of the experiment, without scan and goniometer, as the stills indexer of DIALS hands it on."""
    imageset = experiment.imageset
    if not isinstance(imageset, ImageSequence):
        return imageset
    number = 0
    if experiment.scan is not None:
        number = experiment.scan.get_array_range()[0] - imageset.get_array_range()[0]
    still = ImageSet(imageset.data(), flex.size_t([imageset.indices()[number]]))  # type: ignore[call-arg, misc]
    still.set_scan(None)
    still.set_goniometer(None)
    return still


def lattice_identifier(experiment: Experiment, imageset: Any, number: int) -> str:
    """Identifier of a lattice that depends on the image and on nothing else."""
    source = experiment.identifier
    if imageset is not None:
        source += f"|{imageset.get_path(0)}|{imageset.indices()[0]}"
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{source}|{number}"))


def indexed_table(experiment: Experiment, experiments: ExperimentList, table: Any, found: list[FoundLattice]) -> Any:
    """The indexed spots in the order of the strong ones, with the columns that ``dials.ssx_index`` writes."""
    spots = np.concatenate([f.spots for f in found])
    number = np.concatenate([np.full(len(f.spots), k) for k, f in enumerate(found)])
    h = np.concatenate([f.h for f in found])
    arrays = spot_arrays(experiment, table)
    predictions = [lattice_refinement.predict(f.h, f.lattice, arrays.d_inverse[f.spots], arrays.s0) for f in found]
    xy = np.concatenate([p.xy for p in predictions])
    s1 = np.concatenate([p.s1 for p in predictions])
    delta_psi = np.concatenate([p.delta_psi for p in predictions])
    order = np.argsort(spots, kind="stable")
    spots, number, h, xy, s1, delta_psi = (x[order] for x in (spots, number, h, xy, s1, delta_psi))

    indexed = table.select(flex.size_t(spots.tolist()))
    zero = np.zeros((len(spots), 1))
    indexed["id"] = flumpy.from_numpy(number.astype(np.int32))
    indexed["miller_index"] = flex.miller_index([tuple(map(int, x)) for x in h])
    indexed["s1"] = flumpy.vec_from_numpy(np.ascontiguousarray(s1))
    indexed["delpsical.rad"] = flumpy.from_numpy(np.ascontiguousarray(delta_psi))
    indexed["xyzcal.mm"] = flumpy.vec_from_numpy(np.concatenate([xy, zero], axis=1))
    indexed["xyzcal.px"] = _in_pixels(experiment, indexed)
    indexed["entering"] = flex.bool(len(indexed), False)
    residual = xy - arrays.xy[spots]
    for axis, name in enumerate("xy"):
        indexed[f"{name}_resid"] = flumpy.from_numpy(np.ascontiguousarray(residual[:, axis]))
        indexed[f"{name}_resid2"] = flumpy.from_numpy(residual[:, axis] ** 2)
    indexed["delpsical2"] = flumpy.from_numpy(delta_psi**2)
    flags = indexed.flags
    every = flex.bool(len(indexed), True)
    for flag in (flags.predicted, flags.indexed, flags.used_in_refinement):
        indexed.set_flags(every, flag)
    for k, found_experiment in enumerate(experiments):
        indexed.experiment_identifiers()[k] = found_experiment.identifier
    return indexed


def _in_pixels(experiment: Experiment, table: Any) -> Any:
    x, y, z = table["xyzcal.mm"].parts()
    millimetres = flex.vec2_double(x, y)
    pixels = flex.vec3_double(len(table))
    for number in sorted(set(table["panel"])):
        on_panel = table["panel"] == number
        px, py = experiment.detector[number].millimeter_to_pixel(millimetres.select(on_panel)).parts()
        pixels.set_selected(on_panel, flex.vec3_double(px, py, z.select(on_panel)))
    return pixels
