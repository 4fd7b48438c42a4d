"""Synthetic reflection tables of stills with a known truth, without images: for tests and benchmarks of reduction."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Scales
from ssx_mpi.stages import reduction as stage


@dataclass(frozen=True)
class Lattice:
    """Cell, space group and resolution of a synthetic data set."""

    cell: tuple[float, ...]
    space_group: str
    d_min: float


LYSOZYME = Lattice((79.1, 79.1, 38.2, 90.0, 90.0, 90.0), "P 43 21 2", 2.0)
AMBIGUOUS = Lattice((96.4, 96.4, 96.4, 90.0, 90.0, 90.0), "P 21 3", 2.8)


@dataclass(frozen=True)
class Truth:
    """What the observations were made from."""

    unique: UniqueReflections
    intensity: np.ndarray
    scales: Scales
    setting: np.ndarray
    settings: np.ndarray


def wilson_intensities(unique: UniqueReflections, seed: int, b_factor: float = 20.0) -> np.ndarray:
    """Intensities with Wilson's statistics, acentric and centric, (n_unique,), mean 1000 at low resolution."""
    rng = np.random.default_rng([seed, 1])
    acentric, centric = rng.exponential(1.0, len(unique)), rng.chisquare(1, len(unique))
    mean = 1000.0 * np.exp(-0.5 * b_factor * unique.d_star_sq) * unique.epsilon
    return np.where(unique.centric, centric, acentric) * mean


def simulate(
    lattice: Lattice,
    n_crystals: int,
    seed: int = 1,
    per_crystal: int = 400,
    a: float = 1.3,
    b: float = 0.1,
    ambiguous: bool = False,
    background: float = 60.0,
    scale_spread: float = 0.5,
    b_spread: float = 4.0,
    numbers: np.ndarray | None = None,
) -> tuple[Observations, Truth]:
    """Observations of random reflections on crystals of different scale and B.

    Sigmas are those of counting over a background; the real scatter is that of an error model with `a` and `b`, and of
    partialities between 0.25 and 1 that the intensities are divided by.

    Parameters
    ----------
    numbers
        Numbers of the crystals to make, by default all of `n_crystals`; each crystal depends on its number alone.
    """
    unique = stage.unique_table(lattice.cell, lattice.space_group, lattice.d_min)
    truth = wilson_intensities(unique, seed)
    settings = stage.reindexing_settings(lattice.cell, lattice.space_group, max_delta=0.5)
    rng = np.random.default_rng([seed, 2])
    log_k = rng.normal(0.0, scale_spread, n_crystals)
    b_factor = rng.normal(0.0, b_spread, n_crystals)
    setting = rng.integers(len(settings), size=n_crystals) if ambiguous else np.zeros(n_crystals, dtype=np.int64)
    numbers = np.arange(n_crystals) if numbers is None else numbers
    hkl, intensity, variance = [], [], []
    # what reindexing by settings[s] brings into the common setting was indexed with the inverse of it
    inverses = np.linalg.inv(settings)
    for number in numbers:
        rng = np.random.default_rng([seed, 3, int(number)])
        rows = rng.choice(len(unique), min(per_crystal, len(unique)), replace=False)
        rotation = unique.rotations[rng.integers(len(unique.rotations), size=len(rows))]
        sign = rng.choice([-1, 1], len(rows))[:, None]
        index = sign * np.einsum("ni,nij->nj", unique.hkl[rows], rotation)
        hkl.append(np.rint(index @ inverses[setting[number]]).astype(np.int32))
        partiality = rng.uniform(0.25, 1.0, len(rows))
        g = np.exp(log_k[number] - 0.5 * b_factor[number] * unique.d_star_sq[rows])
        full = g * truth[rows]
        counting = (full * partiality + background) / partiality**2
        noise = a * np.sqrt(counting + (b * full) ** 2)
        intensity.append(full + noise * rng.standard_normal(len(rows)))
        variance.append(counting)
    start = np.concatenate([[0], np.cumsum([len(h) for h in hkl])]).astype(np.int64)
    observations = Observations(
        start, np.concatenate(hkl), np.concatenate(intensity), np.concatenate(variance)
    )
    return observations, Truth(unique, truth, Scales(log_k, b_factor), setting, settings)
