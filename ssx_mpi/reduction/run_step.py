"""A reduction and the summary that it leaves: of any files, or as the last step of a run, of its own crystals, once."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from ssx_mpi import __version__
from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator, SerialCommunicator
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.parameters.user_input import InputError, identity
from ssx_mpi.records import run_folder
from ssx_mpi.records.files import DamagedFileError, read_if_whole, read_state, storing, write_json
from ssx_mpi.reduction import groups, loading, output, procedure, references
from ssx_mpi.reduction.errors import NothingLeftError
from ssx_mpi.reduction.job import say
from ssx_mpi.reduction.loading import Source
from ssx_mpi.report.reduction_verdict import reduction_warnings
from ssx_mpi.stages.intensities import reflection_data as stage

# its presence says that the reduction is done
_SUMMARY = "LogFiles/ssx_mpi.reduce.json"
# to tell whether a reference fits, low resolution will do; angstrom
_D_MIN_OF_CHECK = 4.0
# what a reduction writes for each input file or for all; what it writes for each set that it merges has the set's name
_PRODUCTS = (
    *("DataFiles/scaled*", "DataFiles/crystals_*.stream", "LogFiles/dials.merge.json"),
    *("data_reduction/scales*", "data_reduction/merged.npz"),
)
_REPORT_OF_SET = "LogFiles/dials.merge.{}.json"
_PRODUCTS_OF_SET = (
    "DataFiles/{}.mtz",
    "DataFiles/{}_full.mtz",
    "DataFiles/{}.cif",
    "DataFiles/{}_bootstrap_*.mtz",
    _REPORT_OF_SET,
)


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
) -> dict[str, Any]:
    """Reduce the integrated crystals of the run in `directory`, unless that was done before. Collective.

    Parameters
    ----------
    run_identity
        What the crystals depend on.

    Returns
    -------
    numbers
        As of :func:`reduce_files`.

    Raises
    ------
    InputError
        On all ranks, when there are none or they cannot be reduced with these parameters.
    """

    def look() -> tuple[list[Source], dict[str, Any] | None]:
        if _nothing_integrated(directory):
            return [], {"state": "nothing_left", "reason": "no crystal was integrated"}
        sources = loading.find_sources((), [directory], scaled="scale" not in parameters.steps)
        return sources, _finished(directory, _asked(sources, parameters, directory, run_identity), parameters)

    sources, before = on_root(comm, look, InputError)
    if before is None:
        return reduce_files(comm, sources, parameters, directory, run_identity)
    if sources:
        say(comm, "The crystals were reduced before, with the same parameters")
    return before


def reduce_files(
    comm: Communicator,
    sources: list[Source],
    parameters: ReductionParameters,
    folder: Path,
    run_identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Reduce integrated crystals into `folder`, and say there what came of it. Collective.

    Returns
    -------
    numbers
        What the summary holds besides what was asked for: `state`, which is "done", or "nothing_left" with the reason,
        and then the numbers of :meth:`ssx_mpi.reduction.outcome.Summary.numbers`.

    Raises
    ------
    InputError
        On all ranks, when the files cannot be reduced with these parameters.
    """
    began = time.monotonic()
    if comm.rank == 0:
        with storing(folder / _SUMMARY):
            (folder / _SUMMARY).parent.mkdir(parents=True, exist_ok=True)
            # what was done before counts as done no more
            (folder / _SUMMARY).unlink(missing_ok=True)
    older = on_root(comm, lambda: _products(folder), InputError)
    try:
        summary = procedure.reduce(comm, sources, parameters, folder)
    except NothingLeftError as error:
        numbers: dict[str, Any] = {"state": "nothing_left", "reason": str(error)}
    else:
        numbers = {"state": "done", **summary.numbers()}
        if summary.scaling is None:
            numbers["merged"] = _merged_by_dials(folder)
        numbers["warnings"] = reduction_warnings(numbers)
    numbers["seconds"] = round(time.monotonic() - began, 3)
    if comm.rank == 0:
        if "scale" in parameters.steps:
            _remove_stale(older)
        asked = _asked(sources, parameters, folder, run_identity)
        write_json(folder / _SUMMARY, {"program": f"ssx_mpi {__version__}", **asked, **numbers})
    comm.barrier()
    return numbers


def _asked(
    sources: list[Source], parameters: ReductionParameters, folder: Path, run_identity: dict[str, Any] | None
) -> dict[str, Any]:
    """What is reduced and how: as long as this is the same, so is the outcome."""

    def name(path: Path) -> str:
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    files = [[name(Path(source.experiments)), name(Path(source.reflections))] for source in sources]
    asked = {"run": run_identity, "parameters": identity(parameters), "inputs": files}
    # builds of DIALS do not integrate to the same digits: what one of them reduced is not what the next one left
    builds = run_folder.dials_versions(folder)
    return asked if len(builds) < 2 else {**asked, "dials": builds}


def _nothing_integrated(directory: Path) -> bool:
    """Whether batches were integrated, and no crystal came out."""
    if any(directory.glob("batch_*/integrated*.expt")):
        return False
    for path in directory.glob("batch_*/batch.json"):
        # a damaged one says nothing
        with contextlib.suppress(DamagedFileError):
            if "integrate" in read_state(path, {"steps": list})["steps"]:
                return True
    return False


def _finished(directory: Path, asked: dict[str, Any], parameters: ReductionParameters) -> dict[str, Any] | None:
    """The numbers of an earlier reduction of the same crystals in the same way, None where there is none."""
    content = read_if_whole(directory / _SUMMARY)
    if any(content.pop(name, None) != value for name, value in asked.items()):
        return None
    content.pop("program", None)
    if not isinstance(content.get("state"), str):
        return None
    lost = content["state"] == "done" and "merge" in parameters.steps
    return None if lost and not (directory / "DataFiles" / "merged.mtz").is_file() else content


def _products(directory: Path) -> dict[Path, tuple[int, int]]:
    """Products of earlier reductions as they stand; other files may be somebody's."""
    before, after = Path(_REPORT_OF_SET).name.split("{}")
    reports = directory.glob(_REPORT_OF_SET.format("*"))
    names = ["merged", *(report.name[len(before) : -len(after)] for report in reports)]
    of_sets = (path for name in names for product in _PRODUCTS_OF_SET for path in directory.glob(product.format(name)))
    found = [*of_sets, *(path for pattern in _PRODUCTS for path in directory.glob(pattern))]
    return {path: _state(path) for path in found if path.is_file()}


def _remove_stale(older: dict[Path, tuple[int, int]]) -> None:
    """Remove products that this reduction has not replaced: they belong to other parameters."""
    for path, state in older.items():
        if path.exists() and _state(path) == state:
            path.unlink()


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def _merged_by_dials(directory: Path) -> dict[str, Any]:
    content = json.loads((directory / "LogFiles" / "dials.merge.json").read_text())
    of_wavelength = next(iter(content.values()))
    found = of_wavelength.get("merging_stats", {}).get("overall", {})
    return {"merged": {name: value for name, value in found.items() if value is not None}}
