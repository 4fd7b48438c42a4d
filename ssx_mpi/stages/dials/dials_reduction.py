"""Scaling, merging, ambiguity and unmerged export by DIALS's own programs, called in-process.

The reference for the distributed reduction, and the way to formats that DIALS writes; all data have to fit one process.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from dials.array_family import flex
from dxtbx.model import ExperimentList
from iotbx import phil

from ssx_mpi import dials_compat

logger = logging.getLogger(__name__)


# what xia2 sets for stills; the user's file wins
_STILLS = {
    "model": "KB",
    "weighting.error_model.reset_error_model": "True",
    "scaling_options.outlier_rejection": "simple",
    "scaling_options.outlier_zmax": "4.0",
    "reflection_selection.method": "intensity_ranges",
    "reflection_selection.Isigma_range": "2.0,0.0",
}


class DialsReductionError(RuntimeError):
    """DIALS refused the data or the parameters; the message is its own."""


@dataclass(frozen=True)
class DialsData:
    """Experiments, and one reflection table for all of them."""

    experiments: ExperimentList
    reflections: flex.reflection_table


def user_values(name: str, path: Path) -> dict[str, Any]:
    """What a user's file sets for dials.scale (name "scaling") or dials.merge ("merging"), by path.

    Raises
    ------
    DialsReductionError
        When the file cannot be read, is no PHIL, or names a parameter that the program does not have.
    """
    from dials.command_line import merge as merge_program
    from dials.command_line import scale as scale_program

    program, scope = {
        "scaling": ("dials.scale", scale_program.phil_scope),
        "merging": ("dials.merge", merge_program.phil_scope),
    }[name]
    try:
        theirs = phil.parse(path.read_text())
        working, unused = scope.fetch(sources=[theirs], track_unused_definitions=True)
        named = {definition.path for definition in theirs.all_definitions()}
        values = {d.path: d.object.extract() for d in working.all_definitions() if d.path in named}
    except OSError as error:
        raise DialsReductionError(f"{name}.phil={path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # PHIL raises RuntimeError, Sorry and bare exceptions for malformed text
        raise DialsReductionError(f"{name}.phil={path}: not valid PHIL ({str(error).splitlines()[0]})") from None
    if unused:
        raise DialsReductionError(f"{name}.phil={path}: {program} has no parameter {unused[0].path}")
    return values


def read(stems: list[Path]) -> DialsData:
    """Read pairs of ``.expt`` and ``.refl``, joined into one data set."""
    experiments, tables = ExperimentList(), []
    for stem in stems:
        experiments.extend(ExperimentList.from_file(str(stem.with_suffix(".expt")), check_format=False))
        tables.append(flex.reflection_table.from_file(str(stem.with_suffix(".refl"))))
    return DialsData(experiments, flex.reflection_table.concat(tables))


def scale(
    data: DialsData,
    partiality_threshold: float,
    anomalous: bool,
    phil_file: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> DialsData:
    """Scale with dials.scale: scale and B per crystal, as xia2 sets it for stills.

    Parameters
    ----------
    phil_file
        Parameters of dials.scale; ours win over it.
    overrides
        Further assignments, such as ``full_matrix=True``, which win over all.
    """
    from dials.algorithms.scaling.scaling_utilities import BadDatasetForScalingException
    from dials.command_line.scale import phil_scope, run_scaling
    from dials.util.multi_dataset_handling import assign_unique_identifiers, parse_multiple_datasets

    params = _parameters(phil_scope, phil_file, overrides, _STILLS)
    # by default dials.scale fits its model to nearly full reflections, of which stills have few or none
    params.cut_data.partiality_cutoff = params.reflection_selection.min_partiality = partiality_threshold
    params.anomalous = anomalous
    params.reflection_selection.intensity_choice = "sum"
    params.output.html = None
    params.output.delete_integration_shoeboxes = "shoebox" in data.reflections
    # dials.scale looks for the full matrix of all crystals by default: its cost grows with the cube of their number
    if not any("full_matrix" in text for text in overrides):
        params.scaling_options.full_matrix = False
    tables = parse_multiple_datasets([data.reflections])
    try:
        experiments, tables = assign_unique_identifiers(data.experiments, tables)
        with warnings.catch_warnings():
            # pandas has opinions on the DIALS of Debian
            warnings.simplefilter("ignore", FutureWarning)
            scaled, joint = run_scaling(params, experiments, tables)
    except (ValueError, RuntimeError, BadDatasetForScalingException) as error:
        raise DialsReductionError(f"dials.scale: {' '.join(str(error).split())}") from error
    return DialsData(scaled, joint)


def merge(
    data: DialsData,
    path: str,
    partiality_threshold: float,
    anomalous: bool,
    d_min: float | None = None,
    phil_file: Path | None = None,
) -> dict:
    """Merge scaled data with dials.merge into an MTZ file; the content of dials.merge.json comes back."""
    from dials.command_line import merge as program

    params = _parameters(program.phil_scope, phil_file, (), {})
    params.partiality_threshold = partiality_threshold
    params.anomalous = anomalous
    params.assess_space_group = False
    params.d_min = d_min
    # a release that knows only one implementation has no such scope
    dials_compat.set_if_known(params, "french_wilson.implementation", "cctbx")
    try:
        mtz, json_data = program.merge_data_to_mtz_with_report_collection(params, data.experiments, [data.reflections])
    except (ValueError, RuntimeError) as error:
        raise DialsReductionError(f"dials.merge: {error}") from error
    dials_compat.write_mtz(mtz, path)
    return json_data


def cosym_settings(
    data: DialsData,
    space_group: str,
    max_delta: float,
    partiality_threshold: float,
    seed: int,
    phil_file: Path | None = None,
) -> dict[str, np.ndarray]:
    """Setting that dials.cosym gives each crystal: (3, 3) such that indices become ``hkl @ matrix``, by identifier."""
    from cctbx import sgtbx
    from dials.command_line.cosym import cosym, phil_scope
    from dials.util.multi_dataset_handling import assign_unique_identifiers, parse_multiple_datasets

    params = _parameters(phil_scope, phil_file, (), {})
    params.space_group = sgtbx.space_group_info(space_group)
    params.lattice_symmetry_max_delta = max_delta
    params.partiality_threshold = partiality_threshold
    params.unit_cell_clustering.threshold = None
    params.output.html = params.output.json = None
    params.seed = seed
    flex.set_random_seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (dials.cosym draws from the global generator)
    tables = parse_multiple_datasets([data.reflections])
    experiments, tables = assign_unique_identifiers(data.experiments, tables)
    before = {e.identifier: np.array(e.crystal.get_A()).reshape(3, 3) for e in experiments}
    try:
        analysis = cosym(experiments, tables, params)
        analysis.run()
    except (ValueError, RuntimeError) as error:
        raise DialsReductionError(f"dials.cosym: {error}") from error
    # rlp = A h stays: h' = inv(A') A h for column vectors
    return {
        e.identifier: np.rint(
            (np.linalg.inv(np.array(e.crystal.get_A()).reshape(3, 3)) @ before[e.identifier]).T * 12
        ) / 12
        for e in analysis.experiments
    }  # fmt: skip


def export_unmerged(data: DialsData, partiality_threshold: float, mtz: Path | None, mmcif: Path | None) -> None:
    """Scaled, unmerged intensities by dials.export."""
    from dials.command_line.export import export_mmcif, export_mtz, phil_scope

    for path, export, form in ((mtz, export_mtz, "mtz"), (mmcif, export_mmcif, "mmcif")):
        if path is None:
            continue
        params = phil_scope.extract()
        params.intensity = ["scale"]
        params.format = form
        params.mtz.hklout = params.mmcif.hklout = str(path)
        for scope in ("", "mtz.", "mmcif."):
            dials_compat.set_if_known(params, f"{scope}partiality_threshold", partiality_threshold)
        # the export edits its table in place
        table = data.reflections.select(flex.bool(len(data.reflections), True))
        # DIALS 3.12 takes into mmCIF only what has profile-fitted intensities, too; scaled ones are all it reads here
        table.set_flags(flex.bool(len(table), True), table.flags.integrated)
        try:
            export(params, data.experiments, [table])
        except (ValueError, RuntimeError, AssertionError, AttributeError) as error:
            # DIALS 3.12 writes mmCIF only for images that have a scan
            raise DialsReductionError(f"this version of DIALS cannot export these data to {form}: {error}") from error


def _parameters(scope, phil_file: Path | None, overrides: tuple[str, ...], ours: dict[str, str]):
    interpreter = scope.command_line_argument_interpreter()
    sources = [interpreter.process(f"{name}={value}") for name, value in ours.items()]
    if phil_file is not None:
        sources.append(phil.parse(file_name=str(phil_file)))
    sources.extend(interpreter.process(text) for text in overrides)
    return scope.fetch(sources=sources).extract()
