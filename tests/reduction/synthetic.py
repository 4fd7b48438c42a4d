"""Synthetic reflection tables of stills with a known truth, without images: for tests and benchmarks of reduction."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cctbx import sgtbx, uctbx

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
    observations = Observations(start, np.concatenate(hkl), np.concatenate(intensity), np.concatenate(variance))
    return observations, Truth(unique, truth, Scales(log_k, b_factor), setting, settings)


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
    from dials.array_family import flex
    from dxtbx import flumpy
    from scipy.spatial.transform import Rotation

    folder.mkdir(parents=True, exist_ok=True)
    orthogonal = np.array(uctbx.unit_cell(lattice.cell).orthogonalization_matrix()).reshape(3, 3)
    hall = sgtbx.space_group_info(lattice.space_group).type().hall_symbol()
    unit_cell = uctbx.unit_cell(lattice.cell)
    paths = []
    for part, first in enumerate(range(0, observations.n_crystals, per_file)):
        last = min(first + per_file, observations.n_crystals)
        crystals, experiments, images = [], [], []
        for number in range(first, last):
            rng = np.random.default_rng([seed, 4, number])
            axes = (Rotation.random(random_state=rng.integers(2**31)).as_matrix() @ orthogonal).T
            axes = axes * (1 + rng.normal(0, 5e-4)) * (1.05 if number in stretched else 1.0)
            crystals.append(
                {
                    "__id__": "crystal",
                    "real_space_a": axes[0].tolist(),
                    "real_space_b": axes[1].tolist(),
                    "real_space_c": axes[2].tolist(),
                    "space_group_hall_symbol": hall,
                }
            )
            images.append({"__id__": "ImageSet", "images": [f"/nowhere/shot_{number + 1:06d}.cbf"], "params": {}})
            k = number - first
            experiments.append(
                {
                    "__id__": "Experiment",
                    "identifier": f"shot-{number}",
                    "beam": 0,
                    "detector": 0,
                    "crystal": k,
                    "imageset": k,
                }
            )
        content = {
            "__id__": "ExperimentList",
            "experiment": experiments,
            "imageset": images,
            "beam": [{"direction": [0.0, 0.0, 1.0], "wavelength": 1.0, "divergence": 0.0, "sigma_divergence": 0.0,
                      "polarization_normal": [0.0, 1.0, 0.0], "polarization_fraction": 0.999, "flux": 0.0,
                      "transmission": 1.0}],
            "detector": [_DETECTOR],
            "goniometer": [], "scan": [], "crystal": crystals, "profile": [], "scaling_model": [],
        }  # fmt: skip
        rows = slice(observations.start[first], observations.start[last])
        n = int(rows.stop - rows.start)
        table = flex.reflection_table()
        hkl = [flumpy.from_numpy(np.ascontiguousarray(observations.hkl[rows, k])) for k in range(3)]
        table["miller_index"] = flex.miller_index(*hkl)
        counts = np.diff(observations.start[first : last + 1])
        table["id"] = flumpy.from_numpy(np.repeat(np.arange(last - first), counts).astype(np.int32))
        table["panel"] = flex.size_t(n, 0)
        table["intensity.sum.value"] = flumpy.from_numpy(observations.intensity[rows].copy())
        table["intensity.sum.variance"] = flumpy.from_numpy(observations.variance[rows].copy())
        table["partiality"] = flex.double(n, 1.0)
        table["d"] = unit_cell.d(table["miller_index"])
        table["xyzobs.px.value"] = flex.vec3_double(n, (1.0, 1.0, 0.5))
        table["xyzcal.px"] = flex.vec3_double(n, (1.0, 1.0, 0.5))
        table["s1"] = flex.vec3_double(n, (0.0, 0.0, 1.0))
        table.set_flags(flex.bool(n, True), table.flags.integrated_sum)
        for k in range(last - first):
            table.experiment_identifiers()[k] = f"shot-{first + k}"
        path = folder / f"integrated_{part + 1}.expt"
        path.write_text(json.dumps(content))
        table.as_file(str(path.with_suffix(".refl")))
        paths.append(path)
    return paths


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
