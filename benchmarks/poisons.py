"""Crystals that do not belong, planted among made-up ones: which the filter by delta-CC1/2 finds, and what it costs.

    python benchmarks/poisons.py [--crystals 200] [--reflections 300] [--seeds 2]

Each kind of poison is planted in 1, 5 and 20% of the crystals, and mixtures of all kinds:

- *wrong cell*: each crystal in a cell of its own that is wrong: intensities of reflections other than those said
- *wrong setting*: the lattice has a rotation that the space group lacks, and they are indexed in the other setting
- *another protein*: the same cell, other intensities, the same ones in all such crystals
- *times 100*: a tenth of the reflections is a hundred times too strong
- *half dead*: nothing was recorded on half of the detector, here for half of the orientations of reciprocal space
- *scaled*: all intensities times 100, which is a scale and no poison

A line tells the poisons found, the good crystals lost, and the CC to the truth with poisons, after the filter, and of
the good crystals alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()
for folder in ("tests", "tests/reduction"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import numpy as np  # noqa: E402
import synthetic  # noqa: E402

from ssx_mpi.kernels import merging  # noqa: E402
from ssx_mpi.kernels.reflections import Observations  # noqa: E402
from ssx_mpi.kernels.scaling import Merged  # noqa: E402
from ssx_mpi.parallel.communicator import Communicator, SerialCommunicator  # noqa: E402
from ssx_mpi.parameters.reduction_parameters import (  # noqa: E402
    CrystalFilter,
    ReductionParameters,
    ScalingSettings,
)
from ssx_mpi.reduction import filters, resolve, scaling_rounds  # noqa: E402
from ssx_mpi.reduction.crystal_list import Fate  # noqa: E402

# P 43: as lysozyme, with a second setting
LATTICE = synthetic.Lattice((60.0, 60.0, 75.0, 90.0, 90.0, 90.0), "P 43", 2.4)


def wrong_cell(own: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Intensities of other reflections."""
    return rng.permutation(own)


def times_100(own: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A tenth of the reflections is a hundred times too strong."""
    return np.where(rng.random(len(own)) < 0.1, 100.0 * np.abs(own), own)


def scaled(own: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A larger scale."""
    return 100.0 * own


def half_dead(own: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Nothing on half of the detector."""
    return np.where(rng.random(len(own)) < 0.5, own, rng.normal(0.0, 15.0, len(own)))


POISONS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray] | None] = {
    "wrong cell": wrong_cell,
    "wrong setting": None,
    "another protein": lambda own, others, rng: others,
    "times 100": times_100,
    "half dead": half_dead,
}


@dataclass(frozen=True)
class Poisoned:
    """Observations, the truth, and which crystals are poisons: (n_crystals,) bool."""

    observations: Observations
    truth: synthetic.Truth
    poison: np.ndarray


def planted(kinds: tuple[str, ...], share: float, n_crystals: int, per_crystal: int, seed: int) -> Poisoned:
    """Crystals of which a share are poisons of some kinds, in turn."""
    made: dict = {"per_crystal": per_crystal, "seed": seed, "background": 15.0, "scale_spread": 0.8}
    observations, truth = synthetic.simulate(LATTICE, n_crystals, **made)
    others = _of_another_protein(observations, truth, seed)
    rng = np.random.default_rng([seed, 7])
    chosen = rng.permutation(n_crystals)[: max(1, round(share * n_crystals))]
    hkl, intensity = observations.hkl.copy(), observations.intensity.copy()
    for number, crystal in enumerate(chosen):
        kind, rows = kinds[number % len(kinds)], slice(*observations.start[crystal : crystal + 2])
        if kind == "wrong setting":
            hkl[rows] = np.rint(hkl[rows] @ truth.settings[1]).astype(np.int32)
        else:
            make = POISONS.get(kind, scaled)
            assert make is not None
            intensity[rows] = make(intensity[rows], others[rows], rng)
    poison = np.zeros(n_crystals, dtype=bool)
    poison[chosen] = True
    observations = replace(observations, hkl=hkl, intensity=intensity)
    return Poisoned(_thinned(observations, rng), truth, poison)


def _of_another_protein(observations: Observations, truth: synthetic.Truth, seed: int) -> np.ndarray:
    # each observation as it would be of other intensities, with the noise that it has
    row, _ = truth.unique.locate(observations.hkl)
    crystal = observations.crystal()
    g = np.exp(truth.scales.log_k[crystal] - 0.5 * truth.scales.b_factor[crystal] * truth.unique.d_star_sq[row])
    other = synthetic.wilson_intensities(truth.unique, seed + 1000)
    return observations.intensity + g * (other - truth.intensity)[row]


def _thinned(observations: Observations, rng: np.random.Generator) -> Observations:
    # crystals have from a fifth to all of the reflections: no two are of the same size
    share = rng.uniform(0.2, 1.0, observations.n_crystals)
    keep = rng.random(len(observations.intensity)) < share[observations.crystal()]
    counts = np.bincount(observations.crystal()[keep], minlength=observations.n_crystals)
    return Observations(
        np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        observations.hkl[keep],
        observations.intensity[keep],
        observations.variance[keep],
        observations.offset_sq[keep],
    )


@dataclass(frozen=True)
class Found:
    """What the filter did: shares of poisons found and good crystals lost, and CC to the truth."""

    found: float
    lost: float
    cc_before: float
    cc_after: float
    cc_good: float


def cc_to_truth(merged: Merged, truth: synthetic.Truth) -> float:
    """Of all merged reflections."""
    seen = merged.weight > 0
    return float(np.corrcoef(merged.intensity[seen], truth.intensity[seen])[0, 1])


def filtered(comm: Communicator, data: Poisoned, method: CrystalFilter) -> Found:
    """Scale and filter, as a reduction does it."""
    unique, n = data.truth.unique, len(data.poison)
    shells = merging.resolution_shells(unique.d_star_sq, 20)
    indexed = resolve.index_in_settings(data.observations, unique, data.truth.settings, np.zeros(n, dtype=np.int64))
    parameters = ReductionParameters(filtering=method)

    def scale(include: np.ndarray) -> scaling_rounds.Scaled:
        chosen = indexed.only(include)
        start, expected = scaling_rounds.radial_means(comm, chosen, unique, shells)
        return scaling_rounds.scale(comm, chosen, unique, start, expected, ScalingSettings())

    before = scale(np.ones(n, dtype=bool))
    fate = np.full(n, Fate.KEPT, dtype=np.int64)
    fate, after = filters.filter_crystals(comm, indexed, fate, before, unique, shells, parameters)
    gone, cc = fate != Fate.KEPT, cc_to_truth(after.merged, data.truth)
    good = scale(~data.poison)
    return Found(
        float(gone[data.poison].mean()),
        float(gone[~data.poison].mean()),
        cc_to_truth(before.merged, data.truth),
        cc,
        cc_to_truth(good.merged, data.truth),
    )


def main() -> None:
    """A table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, default=200)
    parser.add_argument("--reflections", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kinds", nargs="*", default=None)
    options = parser.parse_args()
    sets: dict[str, tuple[str, ...]] = {name: (name,) for name in POISONS}
    sets |= {"all kinds": tuple(POISONS), "scaled (no poison)": ("scaled",)}
    print(
        "| poison | share | found | good lost | CC with poisons | filtered | good alone | CPU-s |\n" + "|---" * 8 + "|"
    )
    for name, kinds in sets.items():
        if options.kinds and name not in options.kinds:
            continue
        for share in (0.01, 0.05, 0.2):
            begin, found = time.process_time(), []
            for seed in range(options.seeds):
                data = planted(kinds, share, options.crystals, options.reflections, seed)
                found.append(filtered(SerialCommunicator(), data, CrystalFilter(delta_cc_half=True)))
            seconds = time.process_time() - begin
            mean = {key: np.mean([getattr(x, key) for x in found]) for key in vars(found[0])}
            print(
                f"| {name} | {100 * share:.0f}% | {100 * mean['found']:.0f}% | {100 * mean['lost']:.2f}% | "
                f"{mean['cc_before']:.4f} | {mean['cc_after']:.4f} | {mean['cc_good']:.4f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
