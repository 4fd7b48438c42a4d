"""One still from its image to integrated crystals: the stages in order, failures as values, times taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssx_mpi.images.experiment_maker import ExperimentMaker
from ssx_mpi.images.frames import BadImage, Frame
from ssx_mpi.stages.packing import describe, encode
from ssx_mpi.stages.still_results import (
    Crystals,
    Failure,
    IntegratedCrystal,
    Lattice,
    StageError,
    StillResult,
    by_lattice,
    library_errors,
    short_reason,
)


@dataclass(frozen=True)
class Engine:
    """The algorithms of a run, one callable a stage.

    Attributes
    ----------
    read
        Imageset of one image to its :class:`~ssx_mpi.images.frames.Frame`; raises BadImage.
    find_spots
        Experiment and frame to a reflection table of strong spots.
    index
        Experiment and strong spots to :class:`Crystals`; raises StageError.
    integrate
        Indexed crystals and frame to integrated ones, and why others were not.
    """

    read: Callable[[Any], Frame]
    find_spots: Callable[[Any, Frame], Any]
    index: Callable[[Any, Any], Crystals]
    integrate: Callable[[Crystals, Frame], tuple[Crystals | None, list[str]]]


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

    def find_spots(self, image: int) -> StillResult:
        """Strong spots of `image`; an image that cannot be read is a failure in the result."""
        result = StillResult(image)
        began = time.process_time()
        try:
            self.maker.check_data(image)
            result.experiment = self.maker.experiment(image)
            result.frame = self._engine.read(result.experiment.imageset)
            table = self._engine.find_spots(result.experiment, result.frame)
        except BadImage as error:
            result.failures.append(unread(error))
        except library_errors() as error:
            # formats raise whatever comes up below them when they make the models of a damaged file
            stage = "read" if result.frame is None else "find_spots"
            result.failures.append(Failure(stage, short_reason(error)))
        else:
            result.strong = self._labelled(table, image)
            result.n_spots = len(table)
            result.hit = len(table) >= self._min_spots
        result.seconds["find_spots"] = time.process_time() - began
        return result

    def index(self, result: StillResult) -> None:
        """Index the spots of `result`, when it is a hit that could be read."""
        if not result.hit or result.experiment is None:
            return
        began = time.process_time()
        try:
            crystals = self._engine.index(result.experiment, result.strong)
        except StageError as error:
            result.failures.append(Failure("index", str(error)))
        else:
            result.indexed = self._identified(crystals, result.image)
            result.lattices = [_describe_lattice(*each) for each in by_lattice(result.indexed)]
        result.seconds["index"] = time.process_time() - began

    def integrate(self, result: StillResult) -> None:
        """Integrate every lattice of `result`; one that cannot be is a failure, the others stay."""
        if result.indexed is None:
            return
        began = time.process_time()
        try:
            frame = result.frame or self._engine.read(result.experiment.imageset)
            # without strong spots it was not indexed just now, but read from a file
            crystals = result.indexed if result.strong is None else _as_read_back(result.indexed)
            result.integrated, reasons = self._engine.integrate(crystals, frame)
        except BadImage as error:
            result.failures.append(unread(error))
        else:
            result.failures.extend(Failure("integrate", reason) for reason in reasons)
            if result.integrated is not None:
                result.crystals = [_describe_crystal(*each) for each in by_lattice(result.integrated)]
        result.seconds["integrate"] = time.process_time() - began

    def index_again(self, result: StillResult) -> StillResult:
        """The hit `result` indexed anew, from the spots it had, with the geometry of this processor."""
        again = StillResult(result.image, result.n_spots, result.hit, seconds=dict(result.seconds))
        again.experiment, again.strong = self.maker.experiment(result.image), result.strong
        self.index(again)
        again.experiment = None
        return again

    def describe(self, result: StillResult) -> dict[str, Any]:
        """The numbers of `result` as plain data."""
        return describe(result, self.maker.images.name(result.image))

    def record(self, result: StillResult, steps: tuple[str, ...], common: dict[str, Any]) -> bytes:
        """The record of `result` for the journal, with the tables of `steps`."""
        return encode(result, self.maker.images.name(result.image), steps, common)

    def _labelled(self, table, image: int):
        """`table` with its identifier set, and 0 for the number of its experiment and imageset."""
        from dials.array_family import flex

        identifiers = table.experiment_identifiers()
        for key in list(identifiers.keys()):
            del identifiers[key]
        identifiers[0] = self.maker.images.identifier(image)
        table["id"] = flex.int(len(table), 0)
        table["imageset_id"] = flex.int(len(table), 0)
        return table

    def _identified(self, crystals: Crystals, image: int) -> Crystals:
        """`crystals` with identifiers that depend on the image and the number of the lattice alone."""
        identifiers = crystals.reflections.experiment_identifiers()
        for key in list(identifiers.keys()):
            del identifiers[key]
        for lattice, experiment in enumerate(crystals.experiments):
            experiment.identifier = self.maker.images.identifier(image, lattice)
            identifiers[lattice] = experiment.identifier
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
    """What is wrong with an image that cannot be read, in the words that like faults have in common."""
    details = f" ({short_reason(RuntimeError(error.details))})" if error.details else ""
    return Failure("read", error.reason + details)


def _describe_lattice(experiment, reflections) -> Lattice:
    observed = reflections["xyzobs.px.value"].parts()
    calculated = reflections["xyzcal.px"].parts()
    dx, dy = (np.asarray(c - o) for c, o in zip(calculated[:2], observed[:2]))
    d_star = np.asarray(reflections["rlp"].norms())
    return Lattice(
        n_indexed=len(reflections),
        rmsd_x=float(np.sqrt(np.mean(dx**2))),
        rmsd_y=float(np.sqrt(np.mean(dy**2))),
        cell=tuple(experiment.crystal.get_unit_cell().parameters()),
        # a few strays at high resolution say nothing about the crystal
        d_min=float(1 / np.percentile(d_star, 95)),
    )


def _describe_crystal(experiment, reflections) -> IntegratedCrystal:
    good = reflections.get_flags(reflections.flags.integrated_sum)
    intensity = np.asarray(reflections["intensity.sum.value"].select(good))
    variance = np.asarray(reflections["intensity.sum.variance"].select(good))
    measured = variance > 0
    ratio = intensity[measured] / np.sqrt(variance[measured])
    return IntegratedCrystal(
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
