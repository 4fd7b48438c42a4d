"""Synthetic reflection tables of stills with a known truth, without images: for tests and benchmarks of reduction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cctbx import sgtbx, uctbx
from dials.array_family import flex
from dxtbx import flumpy
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels.reflections import Observations, UniqueReflections
from ssx_mpi.kernels.scaling import Scales, Trend
from ssx_mpi.stages.flex_arrays import to_miller_index
from ssx_mpi.stages.intensities import reflection_data as stage


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
    broadening: float = 0.0,
) -> tuple[Observations, Truth]:
    """Observations of random reflections on crystals of different scale and B.

    Sigmas are those of counting over a background; the real scatter is that of an error model with `a` and `b`, and of
    partialities between 0.25 and 1 that the intensities are divided by.

    Parameters
    ----------
    numbers
        Numbers of the crystals to make, by default all of `n_crystals`; each crystal depends on its number alone.
    broadening
        Growth along d* (angstrom) of the logarithm of the variance of reflections over the one that partialities were
        computed with; 0 for partialities that are right.
    """
    unique = stage.unique_table(lattice.cell, lattice.space_group, lattice.d_min)
    truth = wilson_intensities(unique, seed)
    settings = stage.reindexing_settings(lattice.cell, lattice.space_group, max_delta=0.5)
    rng = np.random.default_rng([seed, 2])
    log_k = rng.normal(0.0, scale_spread, n_crystals)
    b_factor = rng.normal(0.0, b_spread, n_crystals)
    setting = rng.integers(len(settings), size=n_crystals) if ambiguous else np.zeros(n_crystals, dtype=np.int64)
    numbers = np.arange(n_crystals) if numbers is None else numbers
    hkl, intensity, variance, offset_sq = [], [], [], []
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
        if broadening:
            # what is recorded follows the true width, what is made of it that of integration
            offset_sq.append(-2.0 * np.log(partiality))
            excess = broadening * (np.sqrt(unique.d_star_sq[rows]) - 0.5 * unique.d_star_sq.max() ** 0.5)
            full = full * np.exp(0.5 * (offset_sq[-1] * (1.0 - np.exp(-excess)) - excess))
        else:
            offset_sq.append(np.zeros(len(rows)))
        counting = (full * partiality + background) / partiality**2
        noise = a * np.sqrt(counting + (b * full) ** 2)
        intensity.append(full + noise * rng.standard_normal(len(rows)))
        variance.append(counting)
    start = np.concatenate([[0], np.cumsum([len(h) for h in hkl])]).astype(np.int64)
    observations = Observations(
        start,
        np.concatenate(hkl),
        np.concatenate(intensity),
        np.concatenate(variance),
        np.concatenate(offset_sq).astype(np.float32),
    )
    scales = Scales(log_k, b_factor, np.zeros(n_crystals), Trend.zero(unique.d_star_sq))
    return observations, Truth(unique, truth, scales, setting, settings)


def write_files(
    folder: Path,
    observations: Observations,
    lattice: Lattice,
    seed: int = 1,
    per_file: int = 500,
    stretched: tuple[int, ...] = (),
) -> list[Path]:
    """Observations as pairs of ``integrated_N.expt`` and ``.refl`` that DIALS reads; returns the ``.expt`` paths.

    Orientations are random and the images do not exist; cells scatter by 0.05%, those of the crystals named in
    `stretched` are 5% longer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    orthogonal = np.array(uctbx.unit_cell(lattice.cell).orthogonalization_matrix()).reshape(3, 3)
    paths = []
    for part, first in enumerate(range(0, observations.n_crystals, per_file)):
        numbers = range(first, min(first + per_file, observations.n_crystals))
        axes = []
        for number in numbers:
            rng = np.random.default_rng([seed, 4, number])
            rotation = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
            stretch = (1 + rng.normal(0, 5e-4)) * (1.05 if number in stretched else 1.0)
            axes.append(stretch * (rotation @ orthogonal).T)
        names = [f"shot-{number}" for number in numbers]
        images = [f"/nowhere/shot_{number + 1:06d}.cbf" for number in numbers]
        rows = slice(observations.start[first], observations.start[numbers[-1] + 1])
        columns = {
            "id": np.repeat(np.arange(len(names)), np.diff(observations.start[first : numbers[-1] + 2])),
            "intensity.sum.value": observations.intensity[rows],
            "intensity.sum.variance": observations.variance[rows],
            "partiality": np.ones(rows.stop - rows.start),
        }
        path = folder / f"integrated_{part + 1}.expt"
        write_experiments(path, axes, lattice.space_group, names, images, wavelength=1.0)
        write_reflections(path.with_suffix(".refl"), observations.hkl[rows], columns, names, lattice.cell)
        paths.append(path)
    return paths


def write_experiments(
    path: Path, axes: list[np.ndarray], space_group: str, names: list[str], images: list[str], wavelength: float
) -> None:
    """Stills of crystals with the given direct axes (rows, angstrom) as an experiment list."""
    hall = sgtbx.space_group_info(space_group).type().hall_symbol()
    crystals = [
        {
            "__id__": "crystal",
            "real_space_a": a.tolist(),
            "real_space_b": b.tolist(),
            "real_space_c": c.tolist(),
            "space_group_hall_symbol": hall,
        }
        for a, b, c in axes
    ]
    experiments = [
        {"__id__": "Experiment", "identifier": name, "beam": 0, "detector": 0, "crystal": k, "imageset": k}
        for k, name in enumerate(names)
    ]
    beam = {
        "direction": [0.0, 0.0, 1.0], "wavelength": wavelength, "divergence": 0.0, "sigma_divergence": 0.0,
        "polarization_normal": [0.0, 1.0, 0.0], "polarization_fraction": 0.999, "flux": 0.0, "transmission": 1.0,
    }  # fmt: skip
    content = {
        "__id__": "ExperimentList",
        "experiment": experiments,
        "imageset": [{"__id__": "ImageSet", "images": [image], "params": {}} for image in images],
        "beam": [beam],
        "detector": [_DETECTOR],
        "goniometer": [],
        "scan": [],
        "crystal": crystals,
        "profile": [],
        "scaling_model": [],
    }
    path.write_text(json.dumps(content))


def write_reflections(
    path: Path, hkl: np.ndarray, columns: dict[str, np.ndarray], names: list[str], cell: tuple[float, ...]
) -> None:
    """Integrated reflections of stills as a reflection table."""
    n = len(hkl)
    table = flex.reflection_table()
    table["miller_index"] = to_miller_index(hkl)
    for name, values in columns.items():
        values = np.array(values, dtype=np.int32 if name == "id" else np.float64)
        table[name] = flumpy.vec_from_numpy(values) if values.ndim == 2 else flumpy.from_numpy(values)
    table["panel"] = flex.size_t(n, 0)
    table["d"] = uctbx.unit_cell(cell).d(table["miller_index"])
    table["xyzobs.px.value"] = flex.vec3_double(n, (1.0, 1.0, 0.5))
    table["xyzcal.px"] = flex.vec3_double(n, (1.0, 1.0, 0.5))
    table["xyzcal.mm"] = flex.vec3_double(n, (0.1, 0.1, 0.0))
    if "s1" not in columns:
        table["s1"] = flex.vec3_double(n, (0.0, 0.0, 1.0))
    table.set_flags(flex.bool(n, True), table.flags.integrated_sum)
    for number, name in enumerate(names):
        table.experiment_identifiers()[number] = name
    table.as_file(str(path))


_DETECTOR = {
    "panels": [
        {
            "name": "Panel", "type": "SENSOR_PAD", "fast_axis": [1.0, 0.0, 0.0], "slow_axis": [0.0, -1.0, 0.0],
            "origin": [-100.0, 100.0, -200.0], "raw_image_offset": [0, 0], "image_size": [2000, 2000],
            "pixel_size": [0.1, 0.1], "trusted_range": [-1.0, 1e6], "thickness": 0.0, "material": "", "mu": 0.0,
            "identifier": "", "mask": [], "gain": 1.0, "pedestal": 0.0,
            "px_mm_strategy": {"type": "SimplePxMmStrategy"},
        }
    ],
    "hierarchy": {
        "name": "", "type": "", "fast_axis": [1.0, 0.0, 0.0], "slow_axis": [0.0, 1.0, 0.0],
        "origin": [0.0, 0.0, 0.0], "raw_image_offset": [0, 0], "image_size": [0, 0], "pixel_size": [0.0, 0.0],
        "trusted_range": [0.0, 0.0], "thickness": 0.0, "material": "", "mu": 0.0, "identifier": "", "mask": [],
        "gain": 1.0, "pedestal": 0.0, "px_mm_strategy": {"type": "SimplePxMmStrategy"}, "children": [{"panel": 0}],
    },
}  # fmt: skip
