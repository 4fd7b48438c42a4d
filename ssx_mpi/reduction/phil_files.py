"""The user's parameters for dials.scale and dials.merge: those that the fast engine has are taken over.

A parameter that it does not have sends the whole reduction to DIALS, with a line in the log: half-covered parameters
would be silently wrong.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.reduction_parameters import Exports, ReductionParameters
from ssx_mpi.reduction.errors import InputError
from ssx_mpi.reduction.job import say
from ssx_mpi.stages.dials import dials_reduction

# parameters of DIALS and the field of ours that is the same
_SAME = {
    "scaling": {
        "anomalous": "anomalous",
        "cut_data.d_min": "d_min",
        "cut_data.d_max": "d_max",
        "cut_data.partiality_cutoff": "partiality_threshold",
        "reflection_selection.min_partiality": "partiality_threshold",
    },
    "merging": {
        "anomalous": "anomalous",
        "d_min": "d_min",
        "d_max": "d_max",
        "partiality_threshold": "partiality_threshold",
        "merging.n_bins": "merging.n_shells",
    },
}
# what the fast engine does anyway
_ANYWAY = {"scaling": {"model": "KB", "reflection_selection.intensity_choice": "sum"}, "merging": {}}
# how DIALS goes about it, and which files it writes
_ELSEWHERE = {
    "scaling": ("output.", "scaling_options.nproc", "scaling_options.full_matrix", "scaling_refinery."),
    "merging": ("output.", "french_wilson.implementation", "assess_space_group"),
}


def applied(comm: Communicator, parameters: ReductionParameters) -> ReductionParameters:
    """The parameters with what the user's files for DIALS say. Collective.

    Raises
    ------
    InputError
        On all ranks, for a file that cannot be used, or for parameters that DIALS has no part in.
    """
    given = {"scaling": parameters.scaling_phil, "merging": parameters.merging_phil}

    def read() -> dict[str, dict[str, Any]]:
        return {name: dials_reduction.user_values(name, path) for name, path in given.items() if path is not None}

    found = on_root(comm, read, dials_reduction.DialsReductionError, InputError)
    if parameters.engine == "fast":
        for name, values in found.items():
            for parameter, value in values.items():
                parameters = _with(comm, parameters, name, parameter, value)
    if parameters.engine == "dials":
        _refuse_what_dials_cannot(parameters)
    return parameters


def _with(comm: Communicator, parameters: ReductionParameters, name: str, path: str, value: Any):
    if path.startswith(_ELSEWHERE[name]):
        say(comm, "%s.phil: %s has no effect with engine=fast", name, path)
        return parameters
    if path in _ANYWAY[name] and str(value) == _ANYWAY[name][path]:
        return parameters
    field = _SAME[name].get(path)
    if field is None:
        if parameters.engine == "fast":
            say(comm, "%s.phil sets %s, which engine=fast does not have: DIALS scales and merges", name, path)
        return replace(parameters, engine="dials")
    ours, default = _get(parameters, field), _get(ReductionParameters(), field)
    if ours != default and ours != value:
        say(comm, "%s.phil sets %s = %s; the parameter of ssx_mpi wins: %s", name, path, value, ours)
        return parameters
    say(comm, "%s.phil: %s = %s", name, path, value)
    if field == "merging.n_shells":
        return replace(parameters, merging=replace(parameters.merging, n_shells=value))
    return replace(parameters, **{field: value})


def _get(parameters: ReductionParameters, field: str) -> Any:
    return parameters.merging.n_shells if field == "merging.n_shells" else getattr(parameters, field)


def _refuse_what_dials_cannot(parameters: ReductionParameters) -> None:
    given = {
        "dose_series_repeat": parameters.dose_series_repeat is not None,
        "grouping": parameters.grouping is not None,
        "append": parameters.append is not None,
        "filtering.method": parameters.filtering.delta_cc_half or parameters.filtering.i_over_sigma,
        "merging.bootstrap": parameters.merging.bootstrap > 0,
        "export": parameters.export != Exports(),
        "steps": set(parameters.steps) != {"scale", "merge"},
    }
    wrong = [name for name, is_given in given.items() if is_given]
    if wrong:
        raise InputError(f"{', '.join(wrong)}: not with engine=dials, which scales and merges all crystals as one")
