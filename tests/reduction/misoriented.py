"""Stills of crystals that integration has a little beside where they are, as files, with their truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import synthetic
from cctbx import uctbx
from scipy.spatial.transform import Rotation

from ssx_mpi.kernels import still_simulation as stills
from ssx_mpi.kernels.reflections import UniqueReflections
from ssx_mpi.stages.intensities import reflection_data as stage

LATTICE = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 2.4)
_SHAPE = stills.RlpShape(mosaicity=np.radians(0.05), domain=3e-4)
_S0 = np.array([0.0, 0.0, -1.0])


@dataclass(frozen=True)
class Misoriented:
    """A pair of files and what is true: setting matrices (n, 3, 3) and intensities (n_unique,)."""

    path: Path
    A: np.ndarray
    unique: UniqueReflections
    intensity: np.ndarray


def write(folder: Path, n_crystals: int, error_deg: float = 0.015, seed: int = 1) -> Misoriented:
    """Crystals with orientations that are wrong by `error_deg`, the standard deviation about each axis."""
    folder.mkdir(parents=True, exist_ok=True)
    unique = stage.unique_table(LATTICE.cell, LATTICE.space_group, LATTICE.d_min)
    intensity = synthetic.wilson_intensities(unique, seed)
    everything = np.unique(
        np.rint(np.concatenate([sign * unique.hkl @ R for R in unique.rotations for sign in (-1, 1)])), axis=0
    )
    real = np.array(uctbx.unit_cell(LATTICE.cell).orthogonalization_matrix()).reshape(3, 3)
    columns: dict[str, list[np.ndarray]] = {}
    hkl, axes, true = [], [], []
    for number in range(n_crystals):
        rng = np.random.default_rng([seed, number])
        orientation = Rotation.random(random_state=rng.integers(2**31)).as_matrix()
        wrong = Rotation.from_rotvec(np.radians(error_deg) * rng.standard_normal(3)).as_matrix() @ orientation
        true.append(orientation @ np.linalg.inv(real).T)
        axes.append((wrong @ real).T)
        A = np.linalg.inv(axes[-1])
        seen = stills.still_spots(everything, A, _S0, _SHAPE, LATTICE.d_min, cutoff=5.0)
        index = everything[seen.index].astype(np.int32)
        q = index @ true[-1].T
        n = (q + _S0) / np.linalg.norm(q + _S0, axis=1)[:, None]
        width = np.sqrt(np.einsum("ni,nij,nj->n", n, stills.rlp_covariance(q, _SHAPE), n))
        share = stills.partiality(1.0 - np.linalg.norm(q + _S0, axis=1), width, 3e-4)
        row, _ = unique.locate(index)
        counts = np.exp(0.4 * rng.standard_normal()) * intensity[row] * share
        variance = np.maximum(counts, 0.0) + 100.0
        s2 = index @ A.T + _S0
        hkl.append(index)
        for name, values in {
            "id": np.full(len(index), number),
            "intensity.sum.value": counts + np.sqrt(variance) * rng.standard_normal(len(index)),
            "intensity.sum.variance": variance,
            "partiality": np.exp(-0.5 * (seen.offset / (2.0 * seen.width)) ** 2),
            "s2": s2,
            "s1": s2 / np.linalg.norm(s2, axis=1)[:, None],
        }.items():
            columns.setdefault(name, []).append(values)
    names = [f"shot-{number}" for number in range(n_crystals)]
    images = [f"/nowhere/shot_{number + 1:06d}.cbf" for number in range(n_crystals)]
    path = folder / "integrated_1.expt"
    synthetic.write_experiments(path, axes, LATTICE.space_group, names, images, wavelength=1.0)
    joined = {name: np.concatenate(values) for name, values in columns.items()}
    synthetic.write_reflections(path.with_suffix(".refl"), np.concatenate(hkl), joined, names, LATTICE.cell)
    return Misoriented(path, np.array(true), unique, intensity)
