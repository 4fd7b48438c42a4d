"""One still from its image to integrated crystals: the stages in order, failures as values, times taken."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from ssx_mpi.images.experiment_maker import ExperimentMaker
from ssx_mpi.images.frames import BadImage
from ssx_mpi.stages.image_numbers import ImageMeasure
from ssx_mpi.stages.packing import describe, encode
from ssx_mpi.stages.protocols import Engine
from ssx_mpi.stages.still_results import (
    CrystalNumbers,
    Crystals,
    Failure,
    FailureRecorder,
    ImageNumbers,
    Indexed,
    Integrated,
    LatticeNumbers,
    Spots,
    Still,
    by_lattice,
    identify,
    library_errors,
    short_reason,
)


class StillProcessor:
    """Processes stills one at a time with one engine.

    Parameters
    ----------
    maker
        Makes the experiment of an image.
    engine
        The algorithms.
    min_spots
        Stills with fewer strong spots are no hits.
    """

    def __init__(self, maker: ExperimentMaker, engine: Engine, min_spots: int) -> None:
        self.maker = maker
        self._engine = engine
        self._min_spots = min_spots
        self._failures = FailureRecorder()
        self._measure = ImageMeasure()

    def find_spots(self, image: int) -> Still:
        """Find the strong spots of `image`; an image that cannot be read is a failure in the result."""
        began = time.process_time()
        return self._find_spots(image).took("find_spots", time.process_time() - began)

    def _find_spots(self, image: int) -> Still:
        frame, experiment, numbers = None, None, ImageNumbers()
        try:
            self.maker.check_data(image)
            experiment = self.maker.experiment(image)
            frame = self._engine.read(experiment.imageset)
            numbers = self._measure.pixels(experiment, frame)
            table = self._engine.spot_finder.find(experiment, frame)
            numbers = self._measure.spots(experiment, table, numbers)
        except BadImage as error:
            return Still(image, Spots(experiment=experiment, numbers=numbers), failures=(unread(error),))
        except library_errors() as error:
            # formats raise whatever comes up below them when they make the models of a damaged file
            stage = "read" if frame is None else "find_spots"
            spots = Spots(experiment=experiment, numbers=numbers)
            return Still(image, spots, failures=(self._failures.of(stage, error),))
        table = self._labelled(table, image)
        return Still(image, Spots(len(table), len(table) >= self._min_spots, table, experiment, frame, numbers))

    def index(self, still: Still) -> Still:
        """Index the spots of `still`, when it is a hit that could be read."""
        if not still.hit or still.spots.experiment is None:
            return still
        began = time.process_time()
        return self._index(still).took("index", time.process_time() - began)

    def _index(self, still: Still) -> Still:
        try:
            crystals = self._engine.indexer.index(still.spots.experiment, still.spots.table)
        except library_errors() as error:
            return still.failed(self._failures.of("index", error))
        if not len(crystals.experiments):
            return still.failed(Failure("index", "no lattice found"))
        crystals = self._identified(crystals, still.image)
        lattices = tuple(_describe_lattice(*each) for each in by_lattice(crystals))
        return replace(still, indexed=Indexed(lattices, crystals))

    def integrate(self, still: Still) -> Still:
        """Integrate every lattice of `still`; one that cannot be is a failure, the others stay."""
        if still.crystals is None:
            return still
        began = time.process_time()
        return self._integrate(still, still.crystals).took("integrate", time.process_time() - began)

    def _integrate(self, still: Still, crystals: Crystals) -> Still:
        try:
            frame = still.spots.frame or self._engine.read(still.spots.experiment.imageset)
            # without strong spots it was not indexed just now, but read from a file
            crystals = crystals if still.spots.table is None else _as_read_back(crystals)
            done = self._engine.integrator.integrate(crystals, frame)
        except BadImage as error:
            return still.failed(unread(error))
        except library_errors() as error:
            return still.failed(self._failures.of("integrate", error))
        still = still.failed(*(Failure("integrate", reason) for _, reason in done.failures))
        if not len(done.experiments):
            return still
        crystals = Crystals(done.experiments, done.reflections)
        numbers = tuple(_describe_crystal(*each) for each in by_lattice(crystals))
        return replace(still, integrated=Integrated(numbers, crystals))

    def index_again(self, still: Still) -> Still:
        """Index the hit `still` anew, from the spots it had, with the geometry of this processor."""
        spots = replace(still.spots, experiment=self.maker.experiment(still.image))
        return self.index(Still(still.image, spots, seconds=still.seconds)).without_experiment()

    def describe(self, still: Still) -> dict[str, Any]:
        """The numbers of `still` as plain data."""
        return describe(still, self.maker.images.name(still.image))

    def record(self, still: Still, steps: tuple[str, ...], common: dict[str, Any]) -> bytes:
        """The record of `still` for the journal, with the tables of `steps`."""
        return encode(still, self.maker.images.name(still.image), steps, common)

    def _labelled(self, table, image: int):
        """`table` with its identifier set, and 0 for the number of its experiment and imageset."""
        from dials.array_family import flex

        identify(table, [self.maker.images.identifier(image)])
        table["id"] = flex.int(len(table), 0)
        table["imageset_id"] = flex.int(len(table), 0)
        return table

    def _identified(self, crystals: Crystals, image: int) -> Crystals:
        """`crystals` with identifiers that depend on the image and the number of the lattice alone."""
        for lattice, experiment in enumerate(crystals.experiments):
            experiment.identifier = self.maker.images.identifier(image, lattice)
        identify(crystals.reflections, [experiment.identifier for experiment in crystals.experiments])
        return crystals


def _as_read_back(crystals: Crystals) -> Crystals:
    """`crystals` as they come out of their file, where a crystal is its cell vectors.

    Setting matrices made of these differ in the last digit, and integration ends elsewhere within its tolerance. With
    this the steps one by one give what they give in one run.
    """
    from dxtbx.model import CrystalFactory, Experiment, ExperimentList

    experiments = ExperimentList()
    for experiment in crystals.experiments:
        experiments.append(
            Experiment(
                imageset=experiment.imageset,
                beam=experiment.beam,
                detector=experiment.detector,
                crystal=CrystalFactory.from_dict(experiment.crystal.to_dict()),
                identifier=experiment.identifier,
            )
        )
    return Crystals(experiments, crystals.reflections)


def unread(error: BadImage) -> Failure:
    """The failure of an image that cannot be read."""
    details = f" ({short_reason(RuntimeError(error.details))})" if error.details else ""
    return Failure("read", error.reason + details)


def _describe_lattice(experiment, reflections) -> LatticeNumbers:
    observed = reflections["xyzobs.px.value"].parts()
    calculated = reflections["xyzcal.px"].parts()
    dx, dy = (np.asarray(c - o) for c, o in zip(calculated[:2], observed[:2]))
    d_star = np.asarray(reflections["rlp"].norms())
    return LatticeNumbers(
        n_indexed=len(reflections),
        rmsd_x=float(np.sqrt(np.mean(dx**2))),
        rmsd_y=float(np.sqrt(np.mean(dy**2))),
        cell=tuple(experiment.crystal.get_unit_cell().parameters()),
        # a few strays at high resolution say nothing about the crystal
        d_min=float(1 / np.percentile(d_star, 95)),
    )


def _describe_crystal(experiment, reflections) -> CrystalNumbers:
    good = reflections.get_flags(reflections.flags.integrated_sum)
    intensity = np.asarray(reflections["intensity.sum.value"].select(good))
    variance = np.asarray(reflections["intensity.sum.variance"].select(good))
    measured = variance > 0
    ratio = intensity[measured] / np.sqrt(variance[measured])
    return CrystalNumbers(
        n_reflections=int(np.count_nonzero(np.asarray(good))),
        i_over_sigma=float(np.mean(ratio)) if len(ratio) else 0.0,
        cell=tuple(experiment.crystal.get_unit_cell().parameters()),
        mosaicity=_mosaicity(experiment),
    )


def _mosaicity(experiment) -> float | None:
    """Mean over the axes of the mosaicity of the crystal's profile model, None where the model gives none."""
    profile = experiment.profile
    if profile is None or not hasattr(profile, "mosaicity"):
        return None
    return float(np.mean(list(profile.mosaicity().values())))
