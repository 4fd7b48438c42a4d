"""Numbers about any set of images, as a monoid: two of them add up, in any order, to those of both sets.

Counts add. Medians and spreads come from histograms with fine fixed bins, of which only the occupied ones are kept, so
that a batch of a million images costs no more than one of a hundred.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

CELL_NAMES = ("a", "b", "c", "alpha", "beta", "gamma")
# relative widths of bins: a ten-thousandth where medians are compared, a hundredth elsewhere
_FINE, _COARSE = 1e-4, 1e-2


@dataclass
class Histogram:
    """Positive values in bins of constant relative width `step`; only occupied bins are stored."""

    step: float = _COARSE
    bins: Counter = field(default_factory=Counter)

    def add(self, value: float) -> None:
        if value > 0 and math.isfinite(value):
            self.bins[math.floor(math.log(value) / self.step)] += 1

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.step, self.bins + other.bins)

    @property
    def n(self) -> int:
        return sum(self.bins.values())

    def quantile(self, q: float) -> float | None:
        """The value below which a share `q` of the values lies, interpolated in its bin; None without values."""
        wanted, seen = q * self.n, 0
        for place in sorted(self.bins):
            count = self.bins[place]
            if seen + count >= wanted:
                return math.exp((place + (wanted - seen) / count) * self.step)
            seen += count
        return None

    @property
    def median(self) -> float | None:
        return self.quantile(0.5)

    @property
    def spread(self) -> float | None:
        """Standard deviation of a normal distribution with the same interquartile range."""
        low, high = self.quantile(0.25), self.quantile(0.75)
        return None if low is None or high is None else (high - low) / 1.349

    def as_json(self) -> dict[str, Any]:
        return {"step": self.step, "bins": {str(k): v for k, v in sorted(self.bins.items())}}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Histogram:
        return cls(content["step"], Counter({int(k): v for k, v in content["bins"].items()}))


def _histograms() -> dict[str, Histogram]:
    cells = {name: Histogram(_FINE) for name in CELL_NAMES}
    return {**cells, **{name: Histogram() for name in ("rmsd", "d_min", "mosaicity", "i_over_sigma")}}


_COUNTS = ("images", "hits", "indexed", "lattices", "integrated_images", "crystals", "reflections")


@dataclass
class Statistics:
    """Counts and distributions over a set of images.

    Attributes
    ----------
    counts
        images, hits, indexed (images), lattices, integrated_images, crystals, reflections.
    failures
        How many images or lattices were left out, by "stage: reason".
    seconds
        CPU-seconds by stage.
    values
        Histograms: cell lengths (angstrom) and angles (degrees) of integrated crystals, or of lattices where nothing
        was integrated; rmsd (pixels), d_min (angstrom), mosaicity (degrees), i_over_sigma.
    slowest
        CPU-seconds and name of the slowest image.
    """

    counts: Counter = field(default_factory=Counter)
    failures: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)
    values: dict[str, Histogram] = field(default_factory=_histograms)
    slowest: tuple[float, str] = (0.0, "")

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.counts + other.counts,
            self.failures + other.failures,
            self.seconds + other.seconds,
            {name: self.values[name] + other.values[name] for name in self.values},
            max(self.slowest, other.slowest),
        )

    def add_image(self, image: dict[str, Any]) -> None:
        """Count one image, described as :func:`ssx_mpi.stages.packing.describe` does."""
        lattices, crystals = image["lattices"], image["crystals"]
        self.counts.update(
            images=1,
            hits=int(image["hit"]),
            indexed=int(bool(lattices)),
            lattices=len(lattices),
            integrated_images=int(bool(crystals)),
            crystals=len(crystals),
            reflections=sum(c["n_reflections"] for c in crystals),
        )
        self.failures.update(f"{stage}: {reason}" for stage, reason in image["failures"])
        self.seconds.update(image["seconds"])
        for lattice in lattices:
            self.values["rmsd"].add(math.hypot(lattice["rmsd_x"], lattice["rmsd_y"]))
            self.values["d_min"].add(lattice["d_min"])
        for crystal in crystals:
            self.values["mosaicity"].add(crystal["mosaicity"] or 0.0)
            self.values["i_over_sigma"].add(crystal["i_over_sigma"])
        for each in crystals or lattices:
            for name, value in zip(CELL_NAMES, each["cell"]):
                self.values[name].add(value)
        self.slowest = max(self.slowest, (sum(image["seconds"].values()), image["name"]))

    @property
    def unread(self) -> int:
        """Images that could not be read."""
        return sum(n for reason, n in self.failures.items() if reason.startswith("read: "))

    @property
    def median_cell(self) -> tuple[float, ...] | None:
        medians = [self.values[name].median for name in CELL_NAMES]
        return None if None in medians else tuple(m for m in medians if m is not None)

    def as_json(self) -> dict[str, Any]:
        return {
            "counts": {name: self.counts[name] for name in _COUNTS},
            "failures": dict(self.failures.most_common()),
            "cpu_seconds": {k: round(v, 3) for k, v in self.seconds.items()},
            "median": {name: _rounded(h.median) for name, h in self.values.items()},
            "spread": {name: _rounded(h.spread) for name, h in self.values.items()},
            "slowest_image": {"cpu_seconds": round(self.slowest[0], 3), "image": self.slowest[1]},
            "histograms": {name: h.as_json() for name, h in self.values.items()},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Statistics:
        return cls(
            Counter(content["counts"]),
            Counter(content["failures"]),
            Counter(content["cpu_seconds"]),
            {name: Histogram.from_json(h) for name, h in content["histograms"].items()},
            (content["slowest_image"]["cpu_seconds"], content["slowest_image"]["image"]),
        )


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
