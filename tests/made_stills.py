"""Stills, and what processes them, made up: no image is read and nothing is searched for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from dials.array_family import flex
from dxtbx.model import BeamFactory, Crystal, DetectorFactory, Experiment, ExperimentList

from ssx_mpi.stages.packing import describe, encode
from ssx_mpi.stages.still_results import (
    CrystalNumbers,
    Crystals,
    Failure,
    Indexed,
    Integrated,
    LatticeNumbers,
    Spots,
    Still,
    identify,
)

EDGE = 79.0
BEAM = BeamFactory.simple(1.0)
DETECTOR = DetectorFactory.simple("PAD", 100, (5, 5), "+x", "-y", (0.1, 0.1), (100, 100), (0, 100))
COMMON = {"detector": DETECTOR.to_dict(), "beam": BEAM.to_dict()}


class QuietWatch:
    """A watch that never interrupts; what it is asked is kept."""

    def __init__(self, set_aside: dict[int, str] | None = None, suspects: set[int] | None = None) -> None:
        self.set_aside = set_aside or {}
        self.suspects = suspects or set()
        self.reason = ""
        self.breaths = self.waits = 0
        self.worked: list[int] = []

    def image(self, image: int, work: Callable[[], Any]) -> Any:
        self.worked.append(image)
        return work()

    def breathing(self, breathe: Callable[[], None]) -> None:
        self.breaths += 1
        breathe()

    def ask(self, reason: str) -> None:
        self.reason = self.reason or reason

    def stopping(self) -> bool:
        return bool(self.reason)

    def waiting(self) -> None:
        self.waits += 1

    def together(self, comm) -> None:
        self.waits += 1

    def whereabouts(self, rank: int) -> tuple[str, int | None, float | None]:
        return "node7", 5, 61.0


def spots_table(n: int, names: tuple[str, ...] = ("spots",)) -> flex.reflection_table:
    table = flex.reflection_table()
    table["id"] = flex.int([k % len(names) for k in range(n)])
    table["imageset_id"] = flex.int(n, 0)
    table["value"] = flex.double(range(n))
    identify(table, names)
    return table


def crystals(image: int, n_lattices: int, edge: float = EDGE) -> Crystals:
    made = ExperimentList()
    for lattice in range(n_lattices):
        a = edge + image / 10 + lattice / 100
        crystal = Crystal((a, 0, 0), (0, a, 0), (0, 0, a), space_group_symbol="P 1")
        made.append(Experiment(beam=BEAM, detector=DETECTOR, crystal=crystal, identifier=f"{image}-{lattice}"))
    names = tuple(e.identifier for e in made)
    return Crystals(made, spots_table(3 * n_lattices, names) if names else flex.reflection_table())


@dataclass
class MadeStills:
    """Takes the place of a processor of stills: image k has ``n_spots(k)`` spots and ``n_lattices(k)`` lattices."""

    n_spots: Callable[[int], int] = lambda image: 40
    n_lattices: Callable[[int], int] = lambda image: 1
    min_spots: int = 10
    edge: float = EDGE
    images: int = 1000
    fails: dict[str, set[int]] = field(default_factory=dict)
    done: list[tuple[str, int]] = field(default_factory=list)
    records: list[tuple[int, tuple[str, ...]]] = field(default_factory=list)

    @property
    def maker(self):
        return SimpleNamespace(images=SimpleNamespace(name=lambda image: f"x.nxs:{image + 1}"))

    def _fails(self, stage: str, image: int) -> bool:
        self.done.append((stage, image))
        return image in self.fails.get(stage, ())

    def find_spots(self, image: int) -> Still:
        if self._fails("find_spots", image):
            return Still(image, failures=(Failure("read", "damaged"),))
        n = self.n_spots(image)
        experiment = Experiment(beam=BEAM, detector=DETECTOR, identifier=f"image-{image}")
        return Still(image, Spots(n, n >= self.min_spots, spots_table(n), experiment)).took("find_spots", 0.25)

    def index(self, still: Still) -> Still:
        if not still.hit:
            return still
        n = self.n_lattices(still.image)
        if self._fails("index", still.image) or not n:
            return still.failed(Failure("index", "no lattice found"))
        numbers = tuple(LatticeNumbers(30, 0.1, 0.1, (self.edge,) * 3 + (90.0,) * 3, 2.0) for _ in range(n))
        return replace(still, indexed=Indexed(numbers, crystals(still.image, n, self.edge)))

    def index_again(self, still: Still) -> Still:
        self.done.append(("again", still.image))
        return self.index(Still(still.image, still.spots, seconds=still.seconds))

    def integrate(self, still: Still) -> Still:
        if still.crystals is None:
            return still
        if self._fails("integrate", still.image):
            return still.failed(Failure("integrate", "no counts"))
        numbers = tuple(CrystalNumbers(50, 4.0, v.cell, 0.05) for v in still.indexed.lattices)
        return replace(still, integrated=Integrated(numbers, still.crystals))

    def describe(self, still: Still) -> dict[str, Any]:
        return describe(still, self.maker.images.name(still.image))

    def record(self, still: Still, steps: tuple[str, ...], common: dict[str, Any]) -> bytes:
        self.records.append((still.image, steps))
        return encode(still, self.maker.images.name(still.image), steps, common)
