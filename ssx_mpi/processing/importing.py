"""Import: the images of a run and all of its input, checked on rank 0 and known to every rank."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssx_mpi import __version__, dials_compat
from ssx_mpi.images.experiment_maker import (
    ExperimentMaker,
    check_compression,
    check_same_detector,
    check_stills,
    read_geometry,
    read_import_overrides,
    read_mask,
)
from ssx_mpi.images.sources import ImageSources, check_no_image_twice, find_images
from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.dials_parameters import DialsParameters, dials_parameters, user_texts
from ssx_mpi.parameters.run_parameters import REDUCE, CrystalSelection, Parameters, default_identity
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.watch import Watch
from ssx_mpi.records import run_folder
from ssx_mpi.records.batch_files import Batch, batches
from ssx_mpi.records.files import write_json
from ssx_mpi.stages.engines import build_engine, left_to_dials
from ssx_mpi.stages.packing import pack
from ssx_mpi.stages.stills import StillProcessor

logger = logging.getLogger("ssx_mpi")

# images in import/imported.expt: each has to be opened
_MOST_IMPORTED = 20


@dataclass(frozen=True)
class Run:
    """What all ranks know after import.

    Attributes
    ----------
    parameters, scopes
        What the user asked for, and the DIALS parameters made of it.
    images
        All images of the run.
    maker
        Makes the experiment of an image.
    identity
        All that the results depend on, as it is kept with them.
    watch
        Of this rank.
    """

    parameters: Parameters
    scopes: DialsParameters
    images: ImageSources
    maker: ExperimentMaker
    identity: dict[str, Any]
    watch: Watch

    @property
    def directory(self) -> Path:
        """Output folder."""
        return self.parameters.directory

    @property
    def batches(self) -> list[Batch]:
        """All batches of the run, in order."""
        return batches(self.directory, len(self.images), self.parameters.batch_size)

    def processor(self, geometry=None) -> StillProcessor:
        """Processor of stills with the geometry of their headers, or with (detector, beam) given."""
        maker = self.maker.with_geometry(geometry) if geometry else self.maker
        return StillProcessor(maker, build_engine(self.parameters, self.scopes), self.scopes.indexing.min_spots)


@dataclass(frozen=True)
class _Checked:
    """What rank 0 found when it checked the input, for every rank."""

    scopes: DialsParameters
    images: ImageSources
    formats: Any
    headers: tuple[Any, Any]
    claimed: run_folder.Claimed
    read: list[int]


def import_images(comm: Communicator, parameters: Parameters, watch: Watch) -> Run:
    """Find the images and check all input on rank 0, then tell every rank; the output folder is claimed last."""
    checked = on_root(comm, lambda: _check(parameters), InputError)
    maker = _maker(parameters, checked.images, checked.scopes, checked.formats)
    maker = read_mask_for(parameters, maker).with_headers(*checked.headers)
    run = Run(parameters, checked.scopes, checked.images, maker, checked.claimed.identity, watch)
    if comm.rank == 0:
        for note in checked.scopes.notes:
            logger.info(note)
        for stage, reason in left_to_dials(parameters, checked.scopes).items():
            logger.info("The algorithm of DIALS does the %s: %s", stage, reason)
        going_on = "; going on with the run in this folder" if checked.claimed.continued else ""
        logger.info("%d images from %d sources%s", len(run.images), len(run.images.sources), going_on)
        for note in checked.claimed.notes:
            logger.warning(note)
        _write_import(run, checked.read)
    return run


def _check(parameters: Parameters) -> _Checked:
    scopes = dials_parameters(parameters, user_texts(parameters))
    images = find_images(parameters.sources)
    for selection in (parameters.assess, parameters.geometry):
        image_range(images, selection)
    check_geometry_files(parameters, images, scopes)
    check_no_image_twice(images)
    maker = _maker(parameters, images, scopes)
    reference = parameters.reference_geometry
    read = check_same_detector(images, maker.with_geometry(read_geometry(reference)) if reference else maker)
    if not parameters.stills:
        check_stills(images, maker, read)
    # a geometry that is given is that of all images, whatever their headers; but it cannot tell what each shot had
    given = reference or parameters.starting_geometry
    headers = (None, maker.wavelength_of_each_shot()) if given else (maker.header(read[0]), True)
    check_compression(images, maker)
    read_mask_for(parameters, maker)
    if REDUCE in parameters.steps:
        # loaded only where there is a reduction
        from ssx_mpi.reduction import run_step

        run_step.check(parameters.reduction, parameters.unit_cell, parameters.space_group)
    identity = {**parameters.identity(), "images": images.summary()}
    programs = run_folder.Programs(f"ssx_mpi {__version__}", dials_compat.dials_version())
    claimed = run_folder.claim(parameters.directory, identity, parameters.restart, programs, default_identity)
    return _Checked(scopes, images, maker.formats, headers, claimed, read[:_MOST_IMPORTED])


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
