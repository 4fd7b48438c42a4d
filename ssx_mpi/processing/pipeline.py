"""What the program does, from images to merged intensities, as a story; the same on every rank.

Import, then assess the crystals where their symmetry is unknown and stop; otherwise refine the geometry with the first
crystals unless it is given, process all images in batches, and reduce what was integrated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssx_mpi import __version__, dials_compat
from ssx_mpi.images.experiment_maker import (
    ExperimentMaker,
    check_compression,
    check_same_detector,
    read_geometry,
    read_import_overrides,
    read_mask,
)
from ssx_mpi.images.sources import ImageSources, check_no_image_twice, find_images
from ssx_mpi.kernels.beam_centre import best_shift
from ssx_mpi.parallel import dispatch
from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parallel.stopping import StoppableCommunicator, StopRequested
from ssx_mpi.parameters.dials_parameters import DialsParameters, dials_parameters, user_texts
from ssx_mpi.parameters.run_parameters import REDUCE, STEPS, CrystalSelection, Parameters
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.batches import (
    Batches,
    BatchKeeping,
    BatchNews,
    FailureShare,
    FirstCrystals,
    FirstHits,
    Survey,
    check_steps,
    survey,
)
from ssx_mpi.processing.watch import Watch
from ssx_mpi.records import run_folder
from ssx_mpi.records.batch_files import Batch, batches
from ssx_mpi.records.files import replacing, write_json
from ssx_mpi.report import assessment_report, text
from ssx_mpi.report.progress import Progress
from ssx_mpi.report.run_report import LiveReport, record_reduction
from ssx_mpi.report.statistics import Statistics
from ssx_mpi.stages import cell_assessment
from ssx_mpi.stages.engines import build_engine, left_to_dials
from ssx_mpi.stages.fast import beam_search, joint_refinement
from ssx_mpi.stages.packing import pack, unpack
from ssx_mpi.stages.still_results import StageError
from ssx_mpi.stages.stills import StillProcessor, StillResult
from ssx_mpi.stages.stored_steps import StoredSteps

# the reduction is loaded when it is due
if TYPE_CHECKING:
    from ssx_mpi.reduction.live_merge import LiveMerge

logger = logging.getLogger("ssx_mpi")

DONE, NOTHING_FOUND, TOO_MANY_FAILURES, STOPPED = 0, 3, 4, 75
# geometry and indexing feed each other; on the sets tried so far little was gained after the third round
_MOST_ROUNDS = 6
# two dozen stills tell the beam centre to a hundredth of the spacing of spots
_HITS_FOR_BEAM_CENTRE = 24
# images in import/imported.expt: each has to be opened
_MOST_IMPORTED = 20
# a shift is taken when it stands out from all others and explains more spots than the header by more than noise
_SIGNIFICANT = 6.0
_WORTH_MOVING = 0.05


@dataclass(frozen=True)
class Run:
    """What all ranks know after import."""

    parameters: Parameters
    scopes: DialsParameters
    images: ImageSources
    maker: ExperimentMaker
    identity: dict[str, Any]
    watch: Watch

    @property
    def directory(self) -> Path:
        return self.parameters.directory

    def processor(self, geometry_=None) -> StillProcessor:
        """For stills with the geometry of their headers, or with (detector, beam) given."""
        maker = self.maker.with_geometry(geometry_) if geometry_ else self.maker
        return StillProcessor(maker, build_engine(self.parameters, self.scopes), self.parameters.min_spots)


def process(comm: Communicator, parameters: Parameters, watch: Watch, claimed: Callable[[], None]) -> int:
    """Do all that `parameters` ask for; collective.

    Parameters
    ----------
    comm
        The ranks.
    parameters
        Of the run.
    watch
        Of this rank; tells when to stop.
    claimed
        Called on every rank when all input is found good and the output folder is ours.

    Returns
    -------
    int
        The exit code: 0 done, 3 done without a crystal, 4 stopped because too many images fail, 75 stopped with work
        left.

    Raises
    ------
    InputError
        On every rank, for input that cannot be processed; nothing was written over.
    """
    began = time.monotonic()
    run = import_images(comm, parameters, watch)
    claimed()
    if not parameters.symmetry_known:
        return assess_crystals(comm, run)
    if parameters.steps == (REDUCE,):
        return reduce_crystals(comm, run)
    if parameters.image_steps and parameters.image_steps[0] != STEPS[0]:
        # before the geometry is refined for nothing
        check_steps(comm, _batches(run), run.identity, parameters.image_steps)
    geometry_ = given_geometry(comm, run) or stored_geometry(comm, run)
    if geometry_ is None:
        geometry_, status = refine_geometry(comm, run)
        if geometry_ is None:
            return status
    if not parameters.steps:
        return DONE
    status = process_batches(comm, run, geometry_, began)
    if status != DONE or REDUCE not in parameters.steps:
        return status
    return reduce_crystals(comm, run)


def import_images(comm: Communicator, parameters: Parameters, watch: Watch) -> Run:
    """Find the images and check all input on rank 0, then tell every rank; the output folder is claimed last."""

    def check():
        scopes = dials_parameters(parameters, user_texts(parameters))
        images = find_images(parameters.sources)
        for selection in (parameters.assess, parameters.geometry):
            image_range(images, selection)
        check_geometry_files(parameters, images, scopes)
        check_no_image_twice(images)
        maker = _maker(parameters, images, scopes)
        reference = parameters.reference_geometry
        read = check_same_detector(images, maker.with_geometry(read_geometry(reference)) if reference else maker)
        # a geometry that is given is that of all images, whatever their headers; but it cannot tell what each shot had
        given = reference or parameters.starting_geometry
        headers = (None, maker.wavelength_of_each_shot()) if given else (maker.header(read[0]), True)
        check_compression(images, maker)
        read_mask_for(parameters, maker)
        if REDUCE in parameters.steps:
            from ssx_mpi.reduction import run_step as reduction_step

            reduction_step.check(parameters.reduction, parameters.unit_cell, parameters.space_group)
        identity = {**parameters.identity(), "images": images.summary()}
        continued = run_folder.claim(parameters.directory, identity, parameters.restart)
        found = run_folder.fingerprint(identity), continued, read[:_MOST_IMPORTED]
        return scopes, images, maker.formats, headers, *found

    scopes, images, formats, headers, identity, continued, read = on_root(comm, check, InputError)
    maker = read_mask_for(parameters, _maker(parameters, images, scopes, formats)).with_headers(*headers)
    run = Run(parameters, scopes, images, maker, identity, watch)
    if comm.rank == 0:
        for note in scopes.notes:
            logger.info(note)
        for stage, reason in left_to_dials(parameters, scopes).items():
            logger.info("The algorithm of DIALS does the %s: %s", stage, reason)
        logger.info("%d images from %d sources%s", len(images), len(images.sources), _going_on(continued))
        _write_import(run, read)
    return run


def _going_on(continued: bool) -> str:
    return "; going on with the run in this folder" if continued else ""


def check_geometry_files(parameters: Parameters, images: ImageSources, scopes: DialsParameters) -> None:
    """Make sure that the geometries given belong to the detector of the images.

    Raises
    ------
    InputError
        When one cannot be read, or has other panels.
    """
    given = [path for path in (parameters.starting_geometry, parameters.reference_geometry) if path]
    if given:
        maker = ExperimentMaker(images, overrides=_overrides(parameters, scopes))
        header = maker.experiment(maker.first_readable()).detector
        for path in given:
            read_geometry(path, like=header)


def _overrides(parameters: Parameters, scopes: DialsParameters):
    return read_import_overrides(scopes.dials_import) if parameters.import_phil else None


def _maker(parameters: Parameters, images: ImageSources, scopes: DialsParameters, formats=None) -> ExperimentMaker:
    overrides = _overrides(parameters, scopes)
    start = read_geometry(parameters.starting_geometry) if parameters.starting_geometry else None
    return ExperimentMaker(images, start, None, overrides, formats)


def read_mask_for(parameters: Parameters, maker: ExperimentMaker) -> ExperimentMaker:
    """`maker` with the user's mask, if one is given."""
    if parameters.mask is None:
        return maker
    return maker.with_mask(read_mask(parameters.mask, maker.experiment(maker.first_readable()).detector))


def _write_import(run: Run, read: list[int]) -> None:
    folder = run.directory / "import"
    if not (folder / "sources.json").exists():
        write_json(folder / "sources.json", run.images.as_json())
    if not (folder / "imported.expt").exists():
        write_json(folder / "imported.expt", pack([run.maker.experiment(image) for image in read]))


def given_geometry(comm: Communicator, run: Run):
    """(detector, beam) of ``reference_geometry``, None when none is given."""
    path = run.parameters.reference_geometry
    if path is None:
        return None
    return on_root(comm, lambda: read_geometry(path), InputError)


def stored_geometry(comm: Communicator, run: Run):
    """(detector, beam) that an earlier run in this folder refined, None when there is none."""
    path = _refined_path(run)

    def read():
        return read_geometry(path) if path.exists() else None

    found = on_root(comm, read, InputError)
    if found and comm.rank == 0:
        logger.info("Geometry as refined before, from %s", path)
    return found


def _refined_path(run: Run) -> Path:
    return run.directory / "geometry_refinement" / "refined.expt"


@dataclass(frozen=True)
class Searched:
    """Images whose spots were found in the search for the beam centre: those before `end`, on the ranks that did it."""

    results: dict[int, StillResult]
    end: int


def first_crystals(
    comm: Communicator,
    run: Run,
    selection: CrystalSelection,
    processor: StillProcessor,
    title: str,
    searched: Searched | None = None,
) -> tuple[FirstCrystals, int, bool]:
    """Index images in order until there are as many lattices as wanted; each rank keeps what it found.

    The spots of images that were `searched` are not found again.
    Returns the task with its results, one past the last image that counts, and whether it was stopped on request.
    """
    first, stop = image_range(run.images, selection)
    start = first if searched is None else searched.end
    progress = Progress(title, stop - start, comm.rank == 0)
    task = FirstCrystals(comm, processor, run.watch, progress.show)
    end, stopped, found = start, False, 0
    if searched is not None:
        task.results = dict(searched.results)
        _index_again(run, task)
        stopped = comm.bcast(run.watch.stopping())
        found, end = _shortest_prefix(comm, task, selection.n_crystals, end)
    if start < stop and not stopped and found < selection.n_crystals:
        wanted = selection.n_crystals - found
        end, stopped, _ = dispatch.run(comm, task, [(start, stop)], wanted=wanted, longest=4)
    # what follows is not done in the time of an image
    run.watch.waiting()
    progress.close()
    task.results = {image: result for image, result in task.results.items() if image < end}
    return task, end, stopped


def _shortest_prefix(comm: Communicator, task: FirstCrystals, wanted: int, end: int) -> tuple[int, int]:
    """Lattices of the first images that have `wanted` in all, and one past the last of these; `end` with fewer."""
    own = [(image, len(result.lattices)) for image, result in task.results.items()]
    found = 0
    for image, n_lattices in sorted(each for part in comm.allgather(own) for each in part):
        found += n_lattices
        if found >= wanted:
            return found, image + 1
    return found, end


def image_range(images: ImageSources, selection: CrystalSelection) -> tuple[int, int]:
    """The images that a selection allows, counted from zero, the end not included.

    Raises
    ------
    InputError
        For a range outside the data.
    """
    if selection.first is None or selection.last is None:
        return 0, len(images)
    if selection.first < 1 or selection.last > len(images):
        raise InputError(f"images_to_use={selection.first}:{selection.last}: images are numbered 1 to {len(images)}")
    return selection.first - 1, selection.last


def gather_crystals(comm: Communicator, task: FirstCrystals) -> list[tuple[int, dict[str, Any], bytes]] | None:
    """On rank 0 the lattices of all ranks in the order of their images, packed; None elsewhere."""
    own = [
        (image, pack(result.indexed.experiments), result.indexed.reflections.as_msgpack())
        for image, result in task.results.items()
        if result.indexed is not None
    ]
    everyone = comm.gather(own)
    return sorted((each for part in everyone for each in part), key=lambda x: x[0]) if everyone is not None else None


def assess_crystals(comm: Communicator, run: Run) -> int:
    """Cluster the cells of the first crystals, say what to run next, and stop."""
    task, end, stopped = first_crystals(comm, run, run.parameters.assess, run.processor(), "assessing crystals")
    statistics = _statistics(comm, task)
    packed = gather_crystals(comm, task)
    status = DONE
    if comm.rank == 0:
        assert packed is not None
        experiments, _ = unpack(packed)
        logger.info(
            "Assessed %d images: %s hits, %d lattices on %d images",
            end - image_range(run.images, run.parameters.assess)[0],
            statistics.counts["hits"],
            statistics.counts["lattices"],
            statistics.counts["indexed"],
        )
        _log_failures(statistics)
        if stopped:
            status = STOPPED
        elif len(experiments) == 0:
            logger.warning("No crystal could be indexed. %s", _advice(statistics))
            status = NOTHING_FOUND
        else:
            assessment = cell_assessment.assess(experiments)
            folder = run.directory / "assess_crystals"
            folder.mkdir(exist_ok=True)
            logger.info(assessment_report.table(assessment))
            command = assessment_report.next_command(assessment, run.parameters)
            write_json(folder / "assess_crystals.json", assessment_report.as_json(assessment, command))
            assessment_report.plot(assessment, folder / "unit_cells.png")
            logger.info("To process with the most populous cell, run:\n  %s", command)
    return comm.bcast(status)


def _statistics(comm: Communicator, task: FirstCrystals) -> Statistics:
    """Of all first crystals, on rank 0; elsewhere of its own."""
    own = Statistics()
    for result in task.results.values():
        own.add_image(task.processor.describe(result))
    everyone = comm.gather(own)
    return sum(everyone, Statistics()) if everyone is not None else own


def _log_failures(statistics: Statistics) -> None:
    for reason, count in statistics.failures.most_common(8):
        logger.info("  %d x %s", count, reason)


def _advice(statistics: Statistics) -> str:
    if statistics.unread == statistics.counts["images"]:
        return "No image could be read: look at the reasons above."
    if not statistics.counts["hits"]:
        return "No image had enough spots: look at the images, at min_spots and at spotfinding.min_spot_size."
    return "There were hits: check the beam centre and distance (starting_geometry=), the wavelength and the cell."


def search_beam_centre(comm: Communicator, run: Run) -> tuple[tuple[Any, Any] | None, Searched | None, bool]:
    """Find out from the first hits whether the beam centre is where the header says.

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
    first, stop = image_range(run.images, parameters.geometry)
    progress = Progress("first hits", stop - first, comm.rank == 0)
    task = FirstHits(comm, run.processor(), run.watch, progress.show)
    end, stopped, _ = dispatch.run(comm, task, [(first, stop)], wanted=_HITS_FOR_BEAM_CENTRE, longest=4)
    progress.close()
    if stopped:
        return None, None, True
    lattice = beam_search.primitive_lattice(parameters.unit_cell, parameters.space_group)
    start = run.maker.experiment(run.maker.first_readable())
    grid = beam_search.grid_for(start, lattice)
    own = [
        (image, beam_search.score_still(result.experiment, result.strong, grid, lattice))
        for image, result in task.hits(end).items()
    ]
    for result in task.results.values():
        result.experiment = None
    searched = Searched({image: result for image, result in task.results.items() if image < end}, end)
    # averaged in the order of the images, so that not even the last digit depends on who found which hit
    scores = [score for _, score in sorted((each for part in comm.allgather(own) for each in part), key=lambda x: x[0])]
    if not scores:
        return None, searched, False
    found = best_shift(grid, np.mean(scores, axis=0))
    moved = found.significance > _SIGNIFICANT and found.explained > found.explained_before + _WORTH_MOVING
    if comm.rank == 0:
        logger.info(text.beam_centre_line(found, len(scores), moved))
    shifted = (beam_search.shifted(start.detector, found.shift), start.beam) if moved else None
    return shifted, searched, False


def refine_geometry(comm: Communicator, run: Run) -> tuple[tuple[Any, Any] | None, int]:
    """Index the first crystals and refine the detector with them, again and again while that gains.

    Returns
    -------
    geometry
        (detector, beam), None when there is none.
    status
        Exit code in that case.
    """
    start, searched, stopped = search_beam_centre(comm, run)
    if stopped:
        return None, STOPPED
    processor = run.processor(start)
    task, _, stopped = first_crystals(comm, run, run.parameters.geometry, processor, "first crystals", searched)
    if stopped:
        return None, STOPPED
    refined: Any = None
    for round_ in range(1, _MOST_ROUNDS + 1):
        better = _refine_once(comm, run, task, round_)
        take, again = comm.bcast(_verdict(refined, better) if comm.rank == 0 else None)
        if take:
            refined = better if refined is None or better is None else better.since(refined)
        if not again:
            break
        geometry_ = comm.bcast((refined.detector, refined.beam) if comm.rank == 0 else None)
        task.processor = run.processor(geometry_)
        _index_again(run, task)
        if comm.bcast(run.watch.stopping()):
            return None, STOPPED
    if comm.bcast(refined is None):
        return None, NOTHING_FOUND
    if comm.rank == 0:
        _conclude_refinement(run, refined)
    return comm.bcast((refined.detector, refined.beam) if comm.rank == 0 else None), DONE


def _refine_once(comm: Communicator, run: Run, task: FirstCrystals, round_: int):
    """Rank 0: refine the crystals of all ranks; None elsewhere, or when that is not possible."""
    statistics = _statistics(comm, task)
    packed = gather_crystals(comm, task)
    if packed is None:
        return None
    counts = statistics.counts
    logger.info(
        "Geometry, round %d: %d images, %d hits, %d of them indexed, %d lattices (%d wanted)",
        *(round_, counts["images"], counts["hits"], counts["indexed"], counts["lattices"]),
        run.parameters.geometry.n_crystals,
    )
    _log_failures(statistics)
    if not packed:
        logger.warning("No crystal to refine the geometry with. %s", _advice(statistics))
        return None
    try:
        experiments, reflections = unpack(packed)
        refined = _refine_geometry_of(run.parameters, experiments, reflections, run.scopes)
    except StageError as error:
        logger.warning(
            "The geometry could not be refined with %d crystals: %s. Try more images, a smaller d_min, "
            "geometry_refinement.restrain_cell=True, or give reference_geometry=",
            *(counts["lattices"], error),
        )
        return None
    logger.info(text.refinement_block(refined))
    return refined


def _refine_geometry_of(parameters: Parameters, experiments, reflections, scopes: DialsParameters):
    """With our own kernel, or with DIALS where the user asks for its engine or gives parameters for it."""
    if parameters.engine == "dials" or parameters.refinement_phil is not None:
        return joint_refinement.refine(experiments, reflections, scopes.geometry_refinement)
    return joint_refinement.refine_fast(
        experiments, reflections, parameters.unit_cell if parameters.restrain_cell else None
    )


def _verdict(before, after) -> tuple[bool, bool]:
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


def _index_again(run: Run, task: FirstCrystals) -> None:
    """Index the hits once more with the geometry of the task's processor, each rank its own."""
    for image in sorted(task.results):
        result = task.results[image]
        if result.hit and not run.watch.stopping():
            again = task.attempt(image, partial(task.processor.index_again, result))
            task.results[image] = result if again is None else again


def _conclude_refinement(run: Run, refined) -> None:
    given = run.parameters.unit_cell
    warning = text.cell_warning(refined, given) if given else None
    if warning:
        logger.warning(warning)
    logger.info("Detector and cell since import:\n%s", text.place_table(refined))
    folder = _refined_path(run).parent
    folder.mkdir(exist_ok=True)
    write_json(folder / "geometry_refinement.json", text.refinement_json(refined))
    # DIALS would write it itself, but not say why it cannot
    with replacing(folder / "refined.refl") as file:
        file.write(refined.reflections.as_msgpack())
    # last: its presence says that the refinement is done
    write_json(_refined_path(run), pack(refined.experiments))
    logger.info("Refined geometry: %s", _refined_path(run))


def _batches(run: Run) -> list[Batch]:
    return batches(run.directory, len(run.images), run.parameters.batch_size)


def process_batches(comm: Communicator, run: Run, geometry_, began: float) -> int:
    """All images that are not finished yet, in batches over the ranks."""
    parameters = run.parameters
    detector, beam = geometry_
    keeping = BatchKeeping(
        batches=_batches(run),
        batch_size=parameters.batch_size,
        identity=run.identity,
        common={"detector": detector.to_dict(), "beam": beam.to_dict()},
        keep_intermediate=parameters.keep_intermediate,
        size=comm.size,
    )
    found = survey(comm, keeping, parameters.image_steps)
    live = LiveReport(run.directory, len(run.images), comm.size, comm.rank == 0, _facts(run, keeping))
    merging = _live_merge(comm, run, geometry_)
    if merging is not None:
        earlier = sum((merging.of_batch(folder) for folder in _own_finished(comm, keeping, found)), merging.nothing())
        merging.add(comm.sum(earlier))
    if comm.rank == 0:
        for news in found.finished:
            live.add_finished(news.number, news.statistics, news.bad_images)
        live.start(len(run.images) - sum(stop - start for start, stop in found.pending))

    def hear(news: BatchNews) -> None:
        so_far = merging.add(news.merged) if merging is not None else None
        live.hear(news.number, news.statistics, news.bad_images, so_far)

    job = Batches(
        comm=comm,
        keeping=keeping,
        survey=found,
        processor=run.processor(geometry_),
        stored=StoredSteps(run.maker.with_geometry(geometry_), run.directory, parameters.batch_size),
        watch=run.watch,
        failures=FailureShare(parameters.max_failures),
        hear=hear,
        progress=live.show,
        merge=merging.of_batch if merging is not None else None,
    )
    _, stopped, traffic = dispatch.run(comm, job, job.pending)
    for left in found.records.values():
        left.close()
    traffics = comm.gather(traffic)
    status = DONE
    if traffics is not None:
        if stopped:
            status = TOO_MANY_FAILURES if job.failures.verdict else STOPPED
        elif not live.total.counts["crystals" if "integrate" in parameters.steps else "hits"]:
            status = NOTHING_FOUND
        state = {DONE: "done", STOPPED: "stopped", NOTHING_FOUND: "nothing_found"}.get(status, "too_many_failures")
        if status == DONE and REDUCE in parameters.steps:
            state = "reducing"
        if merging is not None:
            live.merged = merging.statistics()
        live.conclude(state, time.monotonic() - began, dispatch.summary(traffics))
        if status == NOTHING_FOUND:
            logger.warning("No crystal came out. %s", _advice(live.total))
        if stopped:
            _say_stopped(run)
    return comm.bcast(status)


def _say_stopped(run: Run) -> None:
    logger.info("Stopped %s: the same command goes on from here", run.watch.reason or "on request")


def _live_merge(comm: Communicator, run: Run, geometry_) -> LiveMerge | None:
    """What merges crystals as batches finish, where that is asked for."""
    parameters = run.parameters
    cell, space_group = parameters.unit_cell, parameters.space_group
    if not parameters.live_merge or "integrate" not in parameters.steps or cell is None or space_group is None:
        return None
    from ssx_mpi.reduction.live_merge import LiveMerge, detector_resolution

    detector, beam = geometry_
    limits = (parameters.reduction.d_min, parameters.d_min, detector_resolution(detector, beam.get_s0()))
    merging = LiveMerge(cell, space_group, next(d for d in limits if d is not None), parameters.reduction)
    if comm.rank == 0 and merging.n_settings > 1:
        logger.info(
            "Crystals fit %d settings alike: until the reduction puts them into one, CC1/2 is that of the average",
            merging.n_settings,
        )
    return merging


def _own_finished(comm: Communicator, keeping: BatchKeeping, found: Survey) -> list[Path]:
    """Folders of the batches that were finished before and that this rank keeps."""
    numbers = [news.number for news in found.finished if keeping.keeper(news.number) == comm.rank]
    return [keeping.batches[number - 1].folder for number in numbers]


def reduce_crystals(comm: Communicator, run: Run) -> int:
    """Merge the integrated crystals of this run; too few of them to merge are no failure of the run."""
    from ssx_mpi.reduction import run_step as reduction_step

    parameters, watch = run.parameters, run.watch
    alone = parameters.steps == (REDUCE,)
    watch.together(comm)
    if comm.rank == 0:
        logger.info("\nReduction of the integrated crystals")
    try:
        numbers = reduction_step.reduce_run(
            StoppableCommunicator(comm, watch.stopping), run.directory, parameters.reduction, run.identity
        )
    except StopRequested:
        if comm.rank == 0:
            _say_stopped(run)
            record_reduction(run.directory, "stopped", None)
        return STOPPED
    except InputError as error:
        if comm.rank == 0 and not alone:
            logger.warning("The crystals are integrated, but not reduced: %s", error)
            record_reduction(run.directory, "not_reduced", {"state": "refused", "reason": str(error)})
        raise
    if comm.rank == 0:
        record_reduction(run.directory, "done", numbers)
        _conclude_reduction(run, numbers)
    return DONE if numbers["state"] == "done" or not alone else NOTHING_FOUND


def _conclude_reduction(run: Run, numbers: dict[str, Any]) -> None:
    if numbers["state"] != "done":
        logger.warning("No merged intensities: %s. The integrated crystals are kept", numbers["reason"])
        return
    logger.info("\n%s", text.reduction_block(numbers))
    if "merge" in run.parameters.reduction.steps:
        logger.info("Merged intensities: %s", run.directory / "DataFiles" / "merged.mtz")


def _facts(run: Run, keeping: BatchKeeping) -> dict[str, Any]:
    return {
        "program": f"ssx_mpi {__version__}",
        "dials": ".".join(map(str, dials_compat.dials_version())),
        "parameters": run.parameters.identity(),
        "n_batches": len(keeping.batches),
    }
