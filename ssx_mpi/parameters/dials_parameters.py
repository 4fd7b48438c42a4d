"""The parameters of the DIALS programs that one run needs, set in one place from ours and from the user's files.

A parameter of ours wins over the user's file for a DIALS program; every such case is reported as a line for the log.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from ssx_mpi import dials_compat
from ssx_mpi.parameters.run_parameters import Parameters
from ssx_mpi.parameters.user_input import InputError, check_numbers

# which program each of our phil parameters is for
_PROGRAMS = {
    "dials_import": "dials_import",
    "spotfinding": "find_spots",
    "indexing": "ssx_index",
    "geometry_refinement": "refine",
    "integration": "ssx_integrate",
}


@dataclass(frozen=True)
class DialsParameters:
    """Extracted PHIL scopes by the stage that they are for, and lines for the log about what was overruled."""

    dials_import: Any
    spotfinding: Any
    indexing: Any
    geometry_refinement: Any
    integration: Any
    notes: tuple[str, ...]


def user_texts(parameters: Parameters) -> dict[str, str]:
    """Contents of the user's PHIL files by stage, to be read once and broadcast.

    Raises
    ------
    InputError
        When a file cannot be read.
    """
    files: dict[str, Path | None] = {
        "dials_import": parameters.import_phil,
        "spotfinding": parameters.spotfinding.phil,
        "indexing": parameters.indexing_phil,
        "geometry_refinement": parameters.refinement_phil,
        "integration": parameters.integration.phil,
    }
    texts = {}
    for stage, path in files.items():
        if path is None:
            continue
        try:
            texts[stage] = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{stage}.phil={path}: cannot be read ({error})") from None
    return texts


def dials_parameters(parameters: Parameters, texts: dict[str, str]) -> DialsParameters:
    """The scopes of all stages.

    Parameters
    ----------
    parameters
        Those of the run.
    texts
        What :func:`user_texts` read.

    Raises
    ------
    InputError
        For a user's file that is no PHIL or names parameters that its program does not have.
    """
    notes: list[str] = []
    defaults = {"geometry_refinement": _refinement_defaults(parameters)}
    scopes = {stage: _extract(stage, defaults.get(stage), texts.get(stage)) for stage in _PROGRAMS}
    for stage, ours in _ours(parameters).items():
        default = _extract(stage, None, None) if stage in texts else None
        for path, value in ours.items():
            if default is not None:
                theirs = attrgetter(path)(scopes[stage])
                if theirs != attrgetter(path)(default) and theirs != value:
                    if _NAMES[path] not in parameters.typed:
                        # a value that somebody wrote wins over a default that nobody did
                        notes.append(f"{stage}.phil: {path} = {theirs}")
                        continue
                    notes.append(f"{stage}.phil sets {path} = {theirs}; what was typed wins: {_NAMES[path]}={value}")
            _set(scopes[stage], path, value)
    _quiet(scopes)
    return DialsParameters(**scopes, notes=tuple(notes))


# our name of what a parameter of DIALS stands for
_NAMES = {
    "spotfinder.filter.min_spot_size": "spotfinding.min_spot_size",
    "spotfinder.filter.max_spot_size": "spotfinding.max_spot_size",
    "spotfinder.filter.d_min": "d_min",
    "spotfinder.filter.d_max": "d_max",
    "prediction.d_min": "d_min",
    "algorithm": "integration.algorithm",
    "indexing.multiple_lattice_search.max_lattices": "max_lattices",
    "min_spots": "min_spots",
    "indexing.known_symmetry.space_group": "space_group",
    "indexing.known_symmetry.unit_cell": "unit_cell",
    "profile.ellipsoid.rlp_mosaicity.model": "integration.ellipsoid.rlp_mosaicity",
}


def _ours(p: Parameters) -> dict[str, dict[str, Any]]:
    """What our parameters mean in the scopes of DIALS; what the user did not ask for is not in it."""
    spots: dict[str, Any] = {
        "spotfinder.filter.min_spot_size": p.spotfinding.min_spot_size,
        "spotfinder.filter.max_spot_size": p.spotfinding.max_spot_size,
    }
    integration: dict[str, Any] = {"algorithm": p.integration.algorithm}
    if p.d_min is not None:
        spots["spotfinder.filter.d_min"] = p.d_min
        integration["prediction.d_min"] = p.d_min
    if p.d_max is not None:
        spots["spotfinder.filter.d_max"] = p.d_max
    indexing: dict[str, Any] = {
        "indexing.multiple_lattice_search.max_lattices": p.max_lattices,
        "min_spots": p.min_spots,
    }
    if p.space_group is not None:
        from cctbx import sgtbx

        indexing["indexing.known_symmetry.space_group"] = sgtbx.space_group_info(p.space_group)
    if p.unit_cell is not None:
        from cctbx import uctbx

        indexing["indexing.known_symmetry.unit_cell"] = uctbx.unit_cell(p.unit_cell)
    if p.integration.algorithm == "ellipsoid":
        try:
            model = dials_compat.rlp_mosaicity(p.integration.rlp_mosaicity)
        except dials_compat.DialsError as error:
            if p.engine == "dials":
                raise InputError(f"integration.ellipsoid.rlp_mosaicity: {error}") from None
        else:
            integration["profile.ellipsoid.rlp_mosaicity.model"] = model
    return {"spotfinding": spots, "indexing": indexing, "integration": integration}


def _extract(stage: str, defaults: str | None, user_text: str | None) -> Any:
    """The scope of a stage: the program's own defaults, then ours, then what the user's file says."""
    import libtbx.phil

    scope = dials_compat.program_phil(_PROGRAMS[stage])
    sources = [libtbx.phil.parse(defaults)] if defaults else []
    if user_text is None:
        return scope.fetch(sources=sources).extract()
    try:
        theirs = libtbx.phil.parse(user_text)
        check_numbers(theirs, scope, f"{stage}.phil: ")
        _, unused = scope.fetch(sources=[theirs], track_unused_definitions=True)
        extracted = scope.fetch(sources=[*sources, theirs]).extract()
    except InputError:
        raise
    except Exception as error:  # PHIL raises RuntimeError, Sorry and bare exceptions for malformed text
        raise InputError(f"{stage}.phil: not valid PHIL ({str(error).splitlines()[0]})") from None
    if unused:
        raise InputError(f"{stage}.phil: {_PROGRAMS[stage]} has no parameter {unused[0].path}")
    return extracted


def _refinement_defaults(p: Parameters) -> str:
    text = _REFINEMENT_DEFAULTS.format(engine=dials_compat.refinement_engine())
    if p.restrain_cell and p.unit_cell is not None:
        # tight enough to outweigh thousands of spots; angles that the symmetry fixes are not refined anyway
        sigmas = [1e-5 * length for length in p.unit_cell[:3]] + [1e-3] * 3
        text += _RESTRAINT.format(values=_numbers(p.unit_cell), sigmas=_numbers(sigmas))
    return text


def _numbers(values: Iterable[float]) -> str:
    return ",".join(f"{v:.10g}" for v in values)


# the beam and Tau1 (rotation of the detector about the beam) cannot be told from the crystals' orientations
_REFINEMENT_DEFAULTS = """
refinement {{
  parameterisation {{
    auto_reduction {{
      min_nref_per_parameter = 3
      action = fix
    }}
    beam.fix = all
    detector.fix_list = Tau1
    scan_varying = False
  }}
  refinery {{
    engine = {engine}
  }}
  reflections {{
    weighting_strategy.override = stills
    outlier.algorithm = sauter_poon
  }}
}}
"""

_RESTRAINT = """
refinement.parameterisation.crystal.unit_cell.restraints.tie_to_target {{
  values = {values}
  sigmas = {sigmas}
}}
"""


# one process, no files: DIALS computes, and we write; what a version does not have needs no quieting
_QUIET: dict[str, dict[str, Any]] = {
    "spotfinding": {"spotfinder.mp.nproc": 1, "spotfinder.mp.njobs": 1},
    "indexing": {
        "nproc": 1,
        "indexing.nproc": 1,
        "refinement.mp.nproc": 1,
        "refinement.reflections.outlier.nproc": 1,
        "retain_unindexed_experiments": False,
    },
    # dials.refine would look for outliers on all cores
    "geometry_refinement": {"refinement.mp.nproc": 1, "refinement.reflections.outlier.nproc": 1},
    "integration": {"nproc": 1, "integration.mp.nproc": 1},
}


def _quiet(scopes: dict[str, Any]) -> None:
    for stage, values in _QUIET.items():
        for path, value in values.items():
            dials_compat.set_if_known(scopes[stage], path, value)
    for stage in ("indexing", "integration"):
        dials_compat.set_if_known(scopes[stage], "individual_log_verbosity", 0)
        for name in ("nuggets", "html", "json"):
            dials_compat.set_if_known(scopes[stage], f"output.{name}", None)


def _set(scope: Any, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        scope = getattr(scope, parent)
    setattr(scope, name, value)
