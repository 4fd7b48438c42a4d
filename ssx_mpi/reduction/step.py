"""Reduction as the last step of a run: of its own integrated crystals, once, into its own folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator, SerialCommunicator
from ssx_mpi.records.files import write_json
from ssx_mpi.reduction import groups, loading, output, pipeline, references
from ssx_mpi.reduction.errors import NothingLeftError
from ssx_mpi.reduction.job import say
from ssx_mpi.reduction.loading import Source
from ssx_mpi.reduction.parameters import ReductionParameters
from ssx_mpi.reduction.results import Summary
from ssx_mpi.report import merging as report
from ssx_mpi.stages import reduction as stage
from ssx_mpi.user_input import InputError, identity

# its presence says that the reduction is done
_OUTCOME = "data_reduction/reduction.json"
# to tell whether a reference fits, low resolution will do; angstrom
_D_MIN_OF_CHECK = 4.0
# what a reduction writes for each of the sets that it merges, or for each input file
_PRODUCTS = (
    *("DataFiles/*.mtz", "DataFiles/scaled*", "DataFiles/*.stream", "LogFiles/dials.merge*.json"),
    *("data_reduction/scales*", "data_reduction/merged.npz"),
)


@dataclass(frozen=True)
class Outcome:
    """What a reduction came to.

    Attributes
    ----------
    merged
        Whether there are merged intensities, or at least scaled ones where no others were asked for.
    numbers
        For ``ssx_mpi.json``.
    """

    merged: bool
    numbers: dict[str, Any]


def check(parameters: ReductionParameters, cell: tuple[float, ...] | None, space_group: str | None) -> None:
    """Look at the files that `parameters` name, before hours are spent on images; one rank.

    Raises
    ------
    InputError
        For a file that will be of no use.
    """
    if parameters.append is not None:
        output.read_previous(parameters.append)
    if parameters.grouping is not None:
        groups.read_grouping(parameters.grouping)
    if parameters.reference is not None and cell is not None and space_group is not None:
        unique = stage.unique_table(cell, space_group, _D_MIN_OF_CHECK)
        references.load(SerialCommunicator(), parameters, cell, space_group, unique)


def reduce_run(
    comm: Communicator, directory: Path, parameters: ReductionParameters, run_identity: dict[str, Any]
) -> Outcome:
    """Reduce the integrated crystals of the run in `directory`, unless that was done before. Collective.

    Parameters
    ----------
    run_identity
        What the crystals depend on.

    Raises
    ------
    InputError
        On all ranks, when there are none or they cannot be reduced with these parameters.
    """
    began = time.monotonic()

    def look() -> tuple[list[Source], dict[str, Any], dict[str, Any] | None]:
        if _nothing_integrated(directory):
            return [], {}, {"state": "nothing_left", "reason": "no crystal was integrated"}
        sources = loading.find_sources((), [directory], scaled="scale" not in parameters.steps)
        files = [str(source.reflections.relative_to(directory)) for source in sources]
        asked = {**run_identity, "parameters": identity(parameters), "files": files}
        return sources, asked, _finished(directory, asked, parameters)

    sources, asked, before = on_root(comm, look, InputError)
    if before is not None:
        if sources:
            say(comm, "The crystals were reduced before, with the same parameters")
        return Outcome(before["state"] == "done", before)
    older = on_root(comm, lambda: _begin(directory), InputError)
    try:
        summary = pipeline.reduce(comm, sources, parameters, directory)
    except NothingLeftError as error:
        numbers: dict[str, Any] = {"state": "nothing_left", "reason": str(error)}
    else:
        numbers = {"state": "done", **_numbers(summary)}
        if parameters.engine == "dials":
            numbers["merged"] = _merged_by_dials(directory)
    numbers["seconds"] = round(time.monotonic() - began, 3)
    if comm.rank == 0:
        if "scale" in parameters.steps:
            _remove_stale(older)
        write_json(directory / _OUTCOME, {"identity": asked, "outcome": numbers})
    comm.barrier()
    return Outcome(numbers["state"] == "done", numbers)


def _nothing_integrated(directory: Path) -> bool:
    """Whether batches were integrated, and no crystal came out."""
    if any(directory.glob("batch_*/integrated*.expt")):
        return False
    summaries = (json.loads(path.read_text()) for path in directory.glob("batch_*/batch.json"))
    return any("integrate" in summary["steps"] for summary in summaries)


def _finished(directory: Path, asked: dict[str, Any], parameters: ReductionParameters) -> dict[str, Any] | None:
    """The outcome of an earlier reduction of the same crystals in the same way, None where there is none."""
    try:
        content = json.loads((directory / _OUTCOME).read_text())
    except (OSError, ValueError):
        return None
    if content["identity"] != asked:
        return None
    outcome = content["outcome"]
    lost = outcome["state"] == "done" and "merge" in parameters.steps
    return None if lost and not (directory / "DataFiles" / "merged.mtz").is_file() else outcome


def _begin(directory: Path) -> dict[Path, tuple[int, int]]:
    """Products of earlier reductions as they stand; what was done before counts as done no more."""
    (directory / _OUTCOME).unlink(missing_ok=True)
    return {path: _state(path) for pattern in _PRODUCTS for path in directory.glob(pattern)}


def _remove_stale(older: dict[Path, tuple[int, int]]) -> None:
    """Remove products that this reduction has not replaced: they belong to other parameters."""
    for path, state in older.items():
        if path.exists() and _state(path) == state:
            path.unlink()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _numbers(summary: Summary) -> dict[str, Any]:
    merged = {
        name: {
            "n_crystals": data.n_crystals,
            "d_min": round(data.d_min, 4),
            "d_min_estimated": data.d_min_estimated,
            **report.overall(data.cut),
        }
        for name, data in summary.merged.items()
    }
    return {
        "crystals": summary.fates,
        "cell": [round(x, 4) for x in summary.cell],
        "space_group": summary.space_group,
        "wavelength": summary.wavelength,
        # where DIALS merged, the error model is its own
        **({"error_model": {"a": summary.noise.a, "b": summary.noise.b}} if merged else {}),
        "merged": merged,
    }


def _merged_by_dials(directory: Path) -> dict[str, Any]:
    content = json.loads((directory / "LogFiles" / "dials.merge.json").read_text())
    of_wavelength = next(iter(content.values()))
    found = of_wavelength.get("merging_stats", {}).get("overall", {})
    return {"merged": {name: value for name, value in found.items() if value is not None}}
