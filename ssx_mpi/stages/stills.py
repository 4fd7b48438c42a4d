"""One still from its image to integrated crystals: the stages in order, failures as values, times taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssx_mpi.stages.importing import ExperimentMaker
from ssx_mpi.stages.results import BadImage, Crystals, Failure, StageError, library_errors, short_reason


@dataclass(frozen=True)
class Engine:
    """The algorithms of a run, one callable a stage, as in :mod:`ssx_mpi.stages.dials_engine`."""

    find_spots: Callable[[Any], Any]
    index: Callable[[Any, Any], Crystals]
    integrate: Callable[[Any, Any], Crystals]


@dataclass(frozen=True)
class Lattice:
    """Numbers about one indexed lattice: rmsds in pixels, cell in angstrom and degrees, d_min in angstrom."""

    n_indexed: int
    rmsd_x: float
    rmsd_y: float
    cell: tuple[float, ...]
    d_min: float


@dataclass(frozen=True)
class IntegratedCrystal:
    """Numbers about one integrated crystal: mosaicity in degrees, None where its model has none."""

    n_reflections: int
    i_over_sigma: float
    cell: tuple[float, ...]
    mosaicity: float | None


@dataclass
class StillResult:
    """What became of one still; the tables of the steps that were done."""

    image: int
    n_spots: int = 0
    hit: bool = False
    lattices: list[Lattice] = field(default_factory=list)
    crystals: list[IntegratedCrystal] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    experiment: Any = None
    strong: Any = None
    indexed: Crystals | None = None
    integrated: Crystals | None = None


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
            result.experiment = self.maker.experiment(image)
            _check_readable(result.experiment)
            table = self._engine.find_spots(result.experiment)
        except BadImage as error:
            result.failures.append(Failure("read", str(error)))
        except library_errors() as error:
            result.failures.append(Failure("find_spots", short_reason(error)))
        else:
            result.strong = self._labelled(table, image)
            result.n_spots = len(table)
            result.hit = len(table) >= self._min_spots
        result.seconds["find_spots"] = time.process_time() - began
        return result

    def index(self, result: StillResult) -> None:
        """Index the spots of `result`, when it is a hit."""
        if not result.hit:
            return
        began = time.process_time()
        try:
            crystals = self._engine.index(result.experiment, result.strong)
        except StageError as error:
            result.failures.append(Failure("index", str(error)))
        else:
            result.indexed = self._identified(crystals, result.image)
            result.lattices = [_describe_lattice(*each) for each in _by_lattice(result.indexed)]
        result.seconds["index"] = time.process_time() - began

    def integrate(self, result: StillResult) -> None:
        """Integrate every lattice of `result`; one that cannot be is a failure, the others stay."""
        if result.indexed is None:
            return
        began = time.process_time()
        done = []
        for experiment, reflections in _by_lattice(result.indexed):
            try:
                done.append(self._engine.integrate(experiment, reflections))
            except StageError as error:
                result.failures.append(Failure("integrate", str(error)))
        if done:
            result.integrated = _joined(done)
            result.crystals = [_describe_crystal(*each) for each in _by_lattice(result.integrated)]
        result.seconds["integrate"] = time.process_time() - began

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


def _check_readable(experiment) -> None:
    """Decompress the image, once: its imageset keeps it for the stages that follow.

    Raises
    ------
    BadImage
        When the file is damaged or its image does not have the shape of the detector.
    """
    try:
        panels = experiment.imageset.get_raw_data(0)
    except Exception as error:  # formats raise whatever their reader does
        raise BadImage(f"unreadable: {short_reason(error)}") from error
    shapes = [tuple(panel.focus()) for panel in panels]
    expected = [tuple(reversed(panel.get_image_size())) for panel in experiment.detector]
    if shapes != expected:
        raise BadImage(f"misshapen: {_shape(shapes)} pixels where the detector has {_shape(expected)}")


def _shape(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, reversed(s))) for s in shapes[:1]) + (" …" if len(shapes) > 1 else "")


def _by_lattice(crystals: Crystals):
    """Each experiment of `crystals` with its reflections alone, their ``id`` 0."""
    from dials.array_family import flex

    for lattice, experiment in enumerate(crystals.experiments):
        own = crystals.reflections.select(crystals.reflections["id"] == lattice)
        identifiers = own.experiment_identifiers()
        for key in list(identifiers.keys()):
            del identifiers[key]
        own["id"] = flex.int(len(own), 0)
        identifiers[0] = experiment.identifier
        yield experiment, own


def _joined(parts: list[Crystals]) -> Crystals:
    from dials.array_family import flex
    from dxtbx.model import ExperimentList

    experiments, reflections = ExperimentList(), flex.reflection_table()
    identifiers = {}
    for lattice, part in enumerate(parts):
        experiments.extend(part.experiments)
        table = part.reflections
        identifiers[lattice] = part.experiments[0].identifier
        for key in list(table.experiment_identifiers().keys()):
            del table.experiment_identifiers()[key]
        table["id"] = flex.int(len(table), lattice)
        reflections.extend(table)
    for lattice, identifier in identifiers.items():
        reflections.experiment_identifiers()[lattice] = identifier
    return Crystals(experiments, reflections)


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
