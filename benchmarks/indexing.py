"""CPU seconds and agreement of the fast indexing with ``dials.ssx_index``, image by image in one process.

    python benchmarks/indexing.py imported.expt strong.refl --unit-cell 96.4,96.4,96.4,90,90,90 --space-group P213 \
        --max-lattices 2

Both engines get the same spots and the same parameters, one after the other, so that what else the machine does hurts
both; the ratio is that of the CPU seconds. What is done once per process is left out for both. The table is printed,
nothing is stored.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ssx_mpi import dials_compat

# before NumPy, which starts its threads when it is loaded
dials_compat.prepare()

import numpy as np  # noqa: E402
from dials.algorithms.indexing import DialsIndexError  # noqa: E402
from dials.algorithms.indexing.max_cell import find_max_cell  # noqa: E402
from dials.algorithms.indexing.ssx.processing import index_one  # noqa: E402
from dials.array_family import flex  # noqa: E402
from dials.command_line.ssx_index import phil_scope  # noqa: E402
from dxtbx.model import Experiment, ExperimentList  # noqa: E402
from dxtbx.model.experiment_list import ExperimentListFactory  # noqa: E402
from libtbx import phil  # noqa: E402

from ssx_mpi.kernels import lattices  # noqa: E402
from ssx_mpi.stages.fast.fast_indexing import FastIndexer  # noqa: E402


@dataclass(frozen=True)
class Outcome:
    """CPU seconds, crystals, and per crystal the number of spots and the rmsd in pixels."""

    seconds: float
    crystals: list
    n_spots: list[int]
    rmsd_px: list[float]


def _outcome(seconds, experiments, table) -> Outcome:
    crystals, counts, rmsds = [], [], []
    for k in range(len(experiments) if experiments else 0):
        own = table.select(table["id"] == k)
        x, y, _ = (own["xyzcal.px"] - own["xyzobs.px.value"]).parts()
        crystals.append(experiments[k].crystal)
        counts.append(len(own))
        rmsds.append(float(np.sqrt(np.mean(np.array(x) ** 2 + np.array(y) ** 2))))
    return Outcome(seconds, crystals, counts, rmsds)


def run_dials(experiment, strong, params, longest: float | None = None) -> Outcome:
    """Index one image by DIALS; `longest` is the longest axis of an unknown cell, in angstrom."""
    methods = list(params.method)
    if longest is not None:
        # as dials.ssx_index does without a cell
        params.indexing.max_cell = longest
        methods = ["fft1d"]
    table = strong.copy()
    table["id"] = flex.int(len(table), 0)
    table["imageset_id"] = flex.int(len(table), 0)
    still = Experiment(beam=experiment.beam, detector=experiment.detector, imageset=experiment.imageset)
    gc.collect()
    start = time.process_time()
    with Path(os.devnull).open("w") as devnull, contextlib.redirect_stdout(devnull):
        experiments, indexed = index_one(still, table, params, methods, 0)[:2]
    return _outcome(time.process_time() - start, experiments, indexed)


def run_fast(indexer: FastIndexer, experiment, strong) -> Outcome:
    """Index one image by the fast engine."""
    gc.collect()
    start = time.process_time()
    experiments, indexed = indexer.index(experiment, strong)
    return _outcome(time.process_time() - start, experiments, indexed)


def misorientation(one, other) -> float:
    """Angle in degrees between two crystals of nearly the same cell, up to the rotations of the lattice."""
    bases = []
    for crystal in (one, other):
        to_primitive = crystal.get_space_group().info().change_of_basis_op_to_primitive_setting()
        primitive = crystal.change_basis(to_primitive)
        bases.append(np.linalg.inv(np.reshape(primitive.get_A(), (3, 3))))
    reduced = lattices.reduce_basis(bases[0])
    rotations = lattices.lattice_rotations(reduced)
    best = 180.0
    other_reduced = lattices.reduce_basis(bases[1])
    for rotation in rotations:
        u, _, vt = np.linalg.svd(np.linalg.inv(reduced @ rotation.T) @ other_reduced)
        cosine = 0.5 * (np.trace(u @ vt) - 1)
        best = min(best, float(np.degrees(np.arccos(np.clip(cosine, -1, 1)))))
    return best


@dataclass(frozen=True)
class Row:
    """One image: both outcomes, and for each lattice of DIALS the angle in degrees to the nearest of the fast engine.

    `control` is what DIALS makes of the same spots with other parameters, `control_angles` how far its lattices are;
    `likelihood` has the :func:`log_likelihood` of the first lattice of each.
    """

    image: int
    n_strong: int
    dials: Outcome
    fast: Outcome
    angles: list[float]
    control: Outcome | None = None
    control_angles: list[float] | None = None
    likelihood: dict[str, float] | None = None


def index_scope(unit_cell: str, space_group: str, max_lattices: int):
    """Parameters of ``dials.ssx_index``."""
    return phil_scope.fetch(
        phil.parse(
            f"indexing.known_symmetry.unit_cell={unit_cell}\n"
            f"indexing.known_symmetry.space_group={space_group}\n"
            f"indexing.multiple_lattice_search.max_lattices={max_lattices}"
        )
    )


def rows(experiments, strong, scope, control=None) -> Iterator[Row]:
    """Both engines on each image with enough spots, in turn."""
    indexer = FastIndexer(scope.extract())
    longest = longest_cell(experiments, strong) if scope.extract().indexing.known_symmetry.unit_cell is None else None
    warm = False
    for number in range(len(experiments)):
        own = strong.select(strong["id"] == number)
        if len(own) < indexer.settings.min_spots:
            continue
        if not warm:  # imports and tables that are made once
            run_dials(experiments[number], own, scope.extract(), longest)
            run_fast(indexer, experiments[number], own)
            warm = True
        theirs = run_dials(experiments[number], own, scope.extract(), longest)
        mine = run_fast(indexer, experiments[number], own)
        row = Row(number, len(own), theirs, mine, _angles(theirs, mine))
        if control is not None:
            other = run_dials(experiments[number], own, control.extract())
            q = np.array(mapped(experiments[number], own)["rlp"]).reshape(-1, 3)
            s0 = np.array(experiments[number].beam.get_s0())
            likelihood = {
                name: log_likelihood(q, s0, np.linalg.inv(np.reshape(outcome.crystals[0].get_A(), (3, 3))))
                for name, outcome in (("fast", mine), ("dials", theirs), ("control", other))
                if outcome.crystals
            }
            row = replace(row, control=other, control_angles=_angles(theirs, other), likelihood=likelihood)
        yield row


def mapped(experiment, strong):
    """A copy of the spots with positions in mm and in reciprocal space."""
    table = strong.copy()
    table["id"] = flex.int(len(table), 0)
    table["imageset_id"] = flex.int(len(table), 0)
    still = ExperimentList([Experiment(beam=experiment.beam, detector=experiment.detector)])
    table.centroid_px_to_mm(still)
    table.map_centroids_to_reciprocal_space(still)
    return table


def log_likelihood(q: np.ndarray, s0: np.ndarray, direct: np.ndarray, n_cycles: int = 300) -> float:
    """How much better a lattice explains all spots of a still than chance does, in units of e.

    Each spot belongs to the lattice with probability p, and then lies about the nearest lattice point with a normal
    distribution of width a along the Ewald sphere (both ways) and b across it, or it lies anywhere. p, a and b are the
    most likely ones (expectation maximization). No spot is assigned or rejected, so that lattices with different spots
    can be compared.

    Parameters
    ----------
    q : (n, 3) float64
        Scattering vectors, 1/angstrom.
    s0 : (3,) float64
    direct : (3, 3) float64
        Direct primitive basis, rows, angstrom.
    """
    fractional = q @ direct.T
    offset = (fractional - np.rint(fractional)) @ np.linalg.inv(direct).T
    ray = (q + s0) / np.linalg.norm(q + s0, axis=1, keepdims=True)
    across = np.einsum("ij,ij->i", offset, ray) ** 2
    along = np.einsum("ij,ij->i", offset, offset) - across
    volume = abs(np.linalg.det(direct))  # one over the density of points that lie anywhere
    share, a, b = 0.6, np.sqrt(np.percentile(along, 30)), np.sqrt(np.percentile(across, 50))
    for _ in range(n_cycles):
        density = np.exp(-0.5 * (along / a**2 + across / b**2)) / ((2 * np.pi) ** 1.5 * a**2 * b * volume)
        belongs = share * density / (share * density + 1 - share)
        share = belongs.mean()
        a, b = np.sqrt(0.5 * np.average(along, weights=belongs)), np.sqrt(np.average(across, weights=belongs))
    return float(np.log(share * density + 1 - share).sum())


def longest_cell(experiments, strong) -> float:
    """What ``dials.ssx_index`` takes for the longest axis of an unknown cell: the longest of all images."""
    found = []
    for number in range(len(experiments)):
        table = strong.select(strong["id"] == number)
        if len(table):
            with contextlib.suppress(DialsIndexError, AssertionError):
                found.append(find_max_cell(mapped(experiments[number], table)).max_cell)
    return max(found)


def _angles(reference: Outcome, other: Outcome) -> list[float]:
    nan = float("nan")
    return [min((misorientation(a, b) for b in other.crystals), default=nan) for a in reference.crystals]


def compare(arguments) -> None:
    """Print the table."""
    experiments = ExperimentListFactory.from_json_file(arguments.experiments, check_format=False)
    strong = flex.reflection_table.from_file(arguments.reflections)
    scope = index_scope(arguments.unit_cell, arguments.space_group, arguments.max_lattices)
    print(f"{'image':>5} {'spots':>5} | {'DIALS s':>8} {'fast s':>7} {'ratio':>6} | lattices: spots (rmsd px) | angle")
    totals = np.zeros(2)
    spots, lattices = np.zeros(2, dtype=int), np.zeros(2, dtype=int)
    matched = 0
    for row in rows(experiments, strong, scope):
        both = row.dials, row.fast
        totals += [o.seconds for o in both]
        spots += [sum(o.n_spots) for o in both]
        lattices += [len(o.crystals) for o in both]
        matched += sum(angle < 1 for angle in row.angles)
        print(
            f"{row.image:5d} {row.n_strong:5d} | {row.dials.seconds:8.2f} {row.fast.seconds:7.3f} "
            f"{row.dials.seconds / row.fast.seconds:6.0f} | "
            f"{describe(row.dials)} -> {describe(row.fast)} | {' '.join(f'{a:.3f}' for a in row.angles)}",
            flush=True,
        )
    print(
        f"CPU seconds {totals[0]:.1f} and {totals[1]:.2f}, ratio {totals[0] / totals[1]:.0f}; lattices {lattices[0]} "
        f"and {lattices[1]}, {matched} of DIALS's found; spots {spots[0]} and {spots[1]}"
    )


def describe(outcome: Outcome) -> str:
    """Number of spots and rmsd of each lattice."""
    return ", ".join(f"{n} ({r:.2f})" for n, r in zip(outcome.n_spots, outcome.rmsd_px)) or "none"


def main() -> None:
    """Read the arguments and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", help="imported stills (.expt)")
    parser.add_argument("reflections", help="their strong spots (.refl)")
    parser.add_argument("--unit-cell", default="None")
    parser.add_argument("--space-group", default="None")
    parser.add_argument("--max-lattices", type=int, default=1)
    logging.disable(logging.CRITICAL)
    compare(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
