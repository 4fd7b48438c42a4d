"""The geometry of a run: given, refined before, or found with the first hits and crystals."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.images.experiment_maker import geometry_as_dict, geometry_from_dict, read_geometry
from ssx_mpi.kernels.beam_centre import best_shift
from ssx_mpi.parallel.collective import on_root, total
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.failures import advice, log_failures
from ssx_mpi.processing.first_crystals import FirstCrystals, SearchedImages, find_first_crystals, find_first_hits
from ssx_mpi.processing.importing import Run
from ssx_mpi.records.files import DamagedFileError, read_state, replacing, write_json
from ssx_mpi.report import text
from ssx_mpi.stages.fast import beam_search, joint_refinement
from ssx_mpi.stages.fast.panel_tree import panel_tree
from ssx_mpi.stages.packing import pack, unpack
from ssx_mpi.stages.still_results import StageError, identify

logger = logging.getLogger("ssx_mpi")

# geometry and indexing feed each other; on the sets tried so far little was gained after the third round
_MOST_ROUNDS = 6
# two dozen stills tell the beam centre to a hundredth of the spacing of spots
_HITS_FOR_BEAM_CENTRE = 24
# a shift is taken when it stands out from all others and explains more spots than the header by more than noise
_SIGNIFICANT = 6.0
_WORTH_MOVING = 0.05
# crystals that are written beside the refined models: enough to look at, and no more than one rank can hold
_MOST_CRYSTALS_WRITTEN = 5000
# numbers of the refinement, and in them the digest of the file with the refined models
_NUMBERS = "geometry_refinement.json"
_DIGEST = "refined.expt sha256"


def shared_geometry(comm: Communicator, geometry):
    """The (detector, beam) of rank 0, with the same numbers on every rank to the last digit. Collective.

    Parameters
    ----------
    geometry
        On rank 0; ignored elsewhere. None is None everywhere.
    """
    content = comm.bcast(geometry_as_dict(geometry) if comm.rank == 0 and geometry is not None else None)
    return None if content is None else geometry_from_dict(content)


def given_geometry(comm: Communicator, run: Run):
    """(detector, beam) of ``reference_geometry``, None when none is given. Collective."""
    path = run.parameters.reference_geometry
    if path is None:
        return None
    return shared_geometry(comm, on_root(comm, lambda: read_geometry(path), InputError))


def stored_geometry(comm: Communicator, run: Run):
    """(detector, beam) that was refined in this folder, None when there is none. Collective.

    Raises
    ------
    InputError
        On every rank, when the file is not the one that was written.
    """
    path = _refined_path(run)

    def read():
        if not path.exists():
            return None
        numbers = path.with_name(_NUMBERS)
        try:
            recorded = read_state(numbers, {}).get(_DIGEST) if numbers.exists() else None
        except DamagedFileError as error:
            # the models say themselves whether they are whole
            logger.warning("%s: whether %s is the file that this run wrote cannot be told", error, path)
            recorded = None
        if recorded not in (None, _digest(path.read_bytes())):
            raise InputError(
                f"{path} is not the file that this run wrote: put that one back, begin anew with restart=True, or give "
                "this one as reference_geometry= with another output.directory"
            )
        return read_geometry(path)

    return shared_geometry(comm, on_root(comm, read, InputError))


def geometry_refined_before(comm: Communicator, run: Run):
    """(detector, beam) that an earlier start in this folder refined, None when there is none. Collective."""
    found = stored_geometry(comm, run)
    if found is not None and comm.rank == 0:
        logger.info("Geometry as refined before, from %s", _refined_path(run))
    return found


def _refined_path(run: Run) -> Path:
    return run.directory / "geometry_refinement" / "refined.expt"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def search_beam_centre(comm: Communicator, run: Run) -> tuple[tuple[Any, Any] | None, SearchedImages | None, bool]:
    """Find out from the first hits whether the beam centre is where the header says. Collective.

    Returns
    -------
    geometry
        (detector, beam) with the detector moved, None when the header is right as far as can be told.
    searched
        Images whose spots are known now; None when there was no search.
    stopped
        Whether the job was stopped on request meanwhile.
    """
    parameters = run.parameters
    if not parameters.beam_search or parameters.unit_cell is None or parameters.space_group is None:
        return None, None, False
    job, end, stopped = find_first_hits(comm, run, _HITS_FOR_BEAM_CENTRE)
    if stopped:
        return None, None, True
    lattice = beam_search.primitive_lattice(parameters.unit_cell, parameters.space_group)
    start = run.maker.experiment(run.maker.first_readable())
    grid = beam_search.grid_for(start, lattice)
    own = [
        (image, beam_search.score_still(still.spots.experiment, still.spots.table, grid, lattice))
        for image, still in job.hits(end).items()
    ]
    searched = SearchedImages({image: still.without_experiment() for image, still in job.before(end).items()}, end)
    # averaged in the order of the images, so that not even the last digit depends on who found which hit
    scores = [score for _, score in sorted((each for part in comm.allgather(own) for each in part), key=lambda x: x[0])]
    if not scores:
        return None, searched, False
    found = best_shift(grid, np.mean(scores, axis=0))
    moved = worth_moving(found)
    if comm.rank == 0:
        logger.info(text.beam_centre_line(found, len(scores), moved))
    shifted = (beam_search.shifted(start.detector, found.shift), start.beam) if moved else None
    return shifted, searched, False


def check_level(run: Run) -> None:
    """Make sure that the detector has the level that is to be refined.

    Raises
    ------
    InputError
        On every rank, when it has none.
    """
    level = run.parameters.hierarchy_level
    if not level:
        return
    if run.parameters.engine == "dials" or run.parameters.refinement_phil is not None:
        raise InputError(
            f"geometry_refinement.hierarchy_level={level}: for the refinement by DIALS set detector.hierarchy_level in "
            "geometry_refinement.phil"
        )
    depth = panel_tree(run.maker.experiment(run.maker.first_readable()).detector, run.parameters.panel_priors).depth
    if level > depth:
        parts = f"its last level is {depth}" if depth else "it has no levels below the whole"
        raise InputError(f"geometry_refinement.hierarchy_level={level}: the detector has no such level, {parts}")


def worth_moving(found) -> bool:
    """Whether the best shift of the beam centre stands out, and explains more spots than the header's centre."""
    return found.significance > _SIGNIFICANT and found.explained > found.explained_before + _WORTH_MOVING


def refine_geometry(comm: Communicator, run: Run) -> tuple[tuple[Any, Any] | None, ExitCode]:
    """Index the first crystals and refine the detector with them, again and again while that gains. Collective.

    Returns
    -------
    geometry
        (detector, beam), None when there is none.
    status
        Exit code in that case.
    """
    check_level(run)
    start, searched, stopped = search_beam_centre(comm, run)
    if stopped:
        return None, ExitCode.STOPPED
    selection, processor = run.parameters.geometry, run.processor(start)
    found = find_first_crystals(comm, run, selection, processor, "first crystals", searched)
    if found.stopped:
        return None, ExitCode.STOPPED
    crystals = found.crystals
    refined: Any = None
    level: int | None = None
    for round_ in range(1, _MOST_ROUNDS + 1):
        better = _refine_once(comm, run, crystals, round_, level)
        take, again = comm.bcast(verdict(refined, better) if comm.rank == 0 else None)
        if take and better is not None:
            refined = better if refined is None else better.since(refined)
        # a level that helped once is refined in all rounds that follow
        level = comm.bcast(refined.hierarchy_level if comm.rank == 0 and refined is not None else None) or None
        if not again:
            break
        geometry = shared_geometry(comm, (refined.detector, refined.beam) if comm.rank == 0 else None)
        crystals.index_again(run.processor(geometry))
        if comm.bcast(run.watch.stopping()):
            return None, ExitCode.STOPPED
    if comm.bcast(refined is None):
        return None, ExitCode.NOTHING_FOUND
    _conclude(comm, run, refined)
    # as a run that goes on will find it
    return stored_geometry(comm, run), ExitCode.DONE


def _refine_once(comm: Communicator, run: Run, crystals: FirstCrystals, round_: int, level: int | None):
    """Refine the crystals of all ranks; None on rank 0 when that is not possible. Collective."""
    statistics = crystals.statistics(comm)
    packed = crystals.own_lattices()
    n_crystals = total(comm, sum(len(content["crystal"]) for _, content, _ in packed))
    if comm.rank == 0:
        counts = statistics.counts
        logger.info(
            "Geometry, round %d: %d images, %d hits, %d of them indexed, %d lattices (%s wanted)",
            *(round_, counts["images"], counts["hits"], counts["indexed"], counts["lattices"]),
            run.parameters.geometry.wanted,
        )
        log_failures(statistics)
    if not n_crystals:
        if comm.rank == 0:
            logger.warning("No crystal to refine the geometry with. %s", advice(statistics))
        return None
    try:
        refined = _refine_by_engine(comm, run, packed, level)
    except StageError as error:
        if comm.rank == 0:
            logger.warning(
                "The geometry could not be refined with %d crystals: %s. Try more images, a smaller d_min, "
                "geometry_refinement.restrain_cell=True, or give reference_geometry=",
                *(n_crystals, error),
            )
        return None
    if comm.rank == 0:
        logger.info(text.refinement_block(refined))
    return refined


def _refine_by_engine(comm: Communicator, run: Run, packed: list[tuple[int, dict[str, Any], bytes]], level: int | None):
    """Refine with our own kernel, or with DIALS where the user asks for its engine or gives parameters for it.

    Parameters
    ----------
    packed
        Lattices of the images of this rank.
    level
        Level of the detector's tree that helped in an earlier round.

    Raises
    ------
    StageError
        On every rank, when there is no outcome.
    """
    parameters = run.parameters
    if parameters.engine == "dials" or parameters.refinement_phil is not None:
        parts = comm.gather(packed)
        # the outcome stays on rank 0, where the files are written
        refined: list[Any] = []

        def refine() -> None:
            everyone = sorted((each for part in parts or () for each in part), key=lambda x: x[0])
            experiments, reflections = unpack(everyone)
            refined.append(joint_refinement.refine(experiments, reflections, run.scopes.geometry_refinement))

        on_root(comm, refine, StageError)
        return refined[0] if refined else None
    packed = sorted(packed, key=lambda x: x[0])
    lattices = sorted(
        (image, n) for part in comm.allgather([(i, len(c["crystal"])) for i, c, _ in packed]) for image, n in part
    )
    first = dict(zip([image for image, _ in lattices], np.cumsum([0, *(n for _, n in lattices)]).tolist()))
    number = [first[image] + k for image, content, _ in packed for k in range(len(content["crystal"]))]
    experiments, reflections = unpack(packed)
    n_total = sum(n for _, n in lattices)
    # every rank starts from the models of the first crystal, made once of the same data
    own = comm.allgather(geometry_as_dict((experiments[0].detector, experiments[0].beam)) if 0 in number else None)
    detector, beam = geometry_from_dict(next(content for content in own if content is not None))
    shared = joint_refinement.SharedCrystals(comm, detector, beam, np.array(number, dtype=np.int64), n_total)
    return joint_refinement.refine_fast(
        experiments,
        reflections,
        parameters.unit_cell if parameters.restrain_cell else None,
        level if parameters.hierarchy_level is None else parameters.hierarchy_level,
        parameters.panel_priors,
        shared,
    )


def verdict(before, after) -> tuple[bool, bool]:
    """Whether to take the geometry `after` a round of indexing and refinement, and whether another round may gain.

    It gains as long as it brings crystals, brings observed and predicted spots clearly together (a little less scatter
    comes from rejecting more outliers alone), or moves the detector by more than is uncertain.
    """
    if after is None:
        return False, False
    if before is None:
        return True, True
    if after.n_crystals < before.n_crystals:
        return False, False
    more = after.n_crystals > before.n_crystals
    closer = after.rmsd < 0.95 * before.rmsd
    sigma = after.uncertainty.sigma["distance"] if after.uncertainty else 0.0
    moved = abs(after.after.distance - before.after.distance) > sigma > 0
    return more or moved or after.rmsd <= before.rmsd, more or closer or moved


def _conclude(comm: Communicator, run: Run, refined) -> None:
    """Write what was refined, on rank 0. Collective."""
    kept = first_crystals_of(comm, refined)
    if kept is None:
        return
    experiments, reflections = kept
    given = run.parameters.unit_cell
    warning = text.cell_warning(refined, given) if given else None
    if warning:
        logger.warning(warning)
    warn_if_not_converged(refined)
    logger.info("Detector and cell since import:\n%s", text.place_table(refined))
    log_parts(refined)
    folder = _refined_path(run).parent
    folder.mkdir(exist_ok=True)
    content = json.dumps(pack(experiments), indent=1).encode()
    write_json(folder / _NUMBERS, {**text.refinement_json(refined), _DIGEST: _digest(content)})
    # DIALS would write it itself, but not say why it cannot
    with replacing(folder / "refined.refl") as file:
        file.write(reflections.as_msgpack())
    # last: its presence says that the refinement is done
    with replacing(_refined_path(run)) as file:
        file.write(content)
    logger.info("Refined geometry: %s", _refined_path(run))


def warn_if_not_converged(refined) -> None:
    """Say so where the engine tells, and it did not."""
    if refined.converged is False:
        logger.warning("The geometry refinement did not converge in %d steps", len(refined.steps) - 1)


def log_parts(refined) -> None:
    """How the parts of the detector moved, where they were refined."""
    if refined.nodes:
        logger.info("Parts of the detector:\n%s", text.node_table(refined))


def first_crystals_of(comm: Communicator, refined):
    """Experiments and reflections of the first crystals that were refined, on rank 0; None elsewhere. Collective."""
    if comm.bcast(refined.number is None if comm.rank == 0 else None):
        # refined on rank 0 alone
        return (refined.experiments, refined.reflections) if comm.rank == 0 else None
    own = []
    # reflections stand crystal by crystal
    bounds = np.searchsorted(np.asarray(refined.reflections["id"]), np.arange(len(refined.number) + 1)).tolist()
    for k, (number, experiment) in enumerate(zip(refined.number.tolist(), refined.experiments)):
        if number < _MOST_CRYSTALS_WRITTEN:
            table = refined.reflections[bounds[k] : bounds[k + 1]]
            identify(table, [])
            table["id"] -= k
            own.append((number, pack([experiment]), table.as_msgpack()))
    parts = comm.gather(own)
    if parts is None:
        return None
    experiments, reflections = unpack(sorted((each for part in parts for each in part), key=lambda x: x[0]))
    if refined.n_crystals > len(experiments):
        logger.info("The files of the refined geometry hold the first %d of its crystals", len(experiments))
    return experiments, reflections
