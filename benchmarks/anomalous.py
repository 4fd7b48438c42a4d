"""How many shots the differences of Friedel mates need: ssx_mpi.reduce against dials.scale and dials.merge.

    python benchmarks/anomalous.py [--crystals 100 200 400 800] [--folder F] [--seeds 1 2] [--without-dials]

Reflections are made up by the physics of the simulator, without images: a crystal has a true orientation and mosaicity,
and integration has it a little beside these (0.012 degrees about each axis, a fifth of the mosaicity). What was
recorded follows the truth, with the noise of counting over a background; where the reflections are, and their
partialities, follow what integration has. Both programs read the same files.

For each number of crystals stand the correlation of I(+) - I(-) with the true differences over the pairs that both
have, its value after local scaling of the pairs (each by the sums over the 50 pairs nearest in reciprocal space), and
CPU-seconds of the whole programs. The number of crystals for a correlation of 0.5 is interpolated in its logarithm.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "reduction")]

import numpy as np  # noqa: E402
import synthetic  # noqa: E402
from scipy.spatial import cKDTree  # noqa: E402
from scipy.spatial.transform import Rotation  # noqa: E402

from ssx_mpi.kernels import still_simulation as stills  # noqa: E402
from ssx_mpi.simulation import data_set  # noqa: E402
from ssx_mpi.simulation.crystal import orthogonalization_reciprocal, vary_cell  # noqa: E402
from ssx_mpi.simulation.simulation_parameters import (  # noqa: E402
    AnomalousParameters,
    CrystalParameters,
    DetectorParameters,
    OutputParameters,
    SimulationParameters,
)
from ssx_mpi.simulation.still_images import Simulator  # noqa: E402

# of a spot on the detector: pixels, and background in each
_AREA, _BACKGROUND = 25.0, 3.0
_ORIENTATION_ERROR_DEG, _MOSAICITY_ERROR = 0.012, 0.2
_NEIGHBOURS = 50
_SCALE = [
    "model=KB", "full_matrix=False", "reset_error_model=True", "outlier_rejection=simple", "outlier_zmax=4.0",
    "intensity_choice=sum", "reflection_selection.method=intensity_ranges", "Isigma_range=2.0,0.0",
    "min_partiality=0.25", "partiality_cutoff=0.25", "anomalous=True", "output.html=None",
]  # fmt: skip


def simulator(seed: int, element: str, n_sites: int, folder: Path) -> Simulator:
    return Simulator(
        SimulationParameters(
            seed=seed,
            crystal=CrystalParameters(d_min=2.5),
            detector=DetectorParameters("pilatus200k"),
            anomalous=AnomalousParameters(element, n_sites),
            output=OutputParameters(file=folder / "x.nxs"),
        )
    )


def integrated(made: Simulator, n_crystals: int, folder: Path) -> Path:
    """Write integrated crystals, and the truth beside them; returns the path of the experiments."""
    folder.mkdir(parents=True, exist_ok=True)
    crystal, space_group = made.parameters.crystal, str(made.structure.symmetry.space_group_info())
    s0 = np.array([0.0, 0.0, -1.0 / made.parameters.beam.wavelength])
    hkl, axes, parts = [], [], []
    for number in range(n_crystals):
        rng = np.random.default_rng([made.parameters.seed, 5, number])
        cell = vary_cell(made.structure.symmetry, crystal.cell_spread, rng)
        A = stills.random_rotation(rng) @ orthogonalization_reciprocal(cell)
        mosaicity, brightness = (
            median * np.exp(spread * rng.standard_normal())
            for median, spread in (
                (crystal.mosaicity_deg, crystal.mosaicity_spread),
                (crystal.brightness, crystal.brightness_spread),
            )
        )
        found = Rotation.from_rotvec(np.radians(_ORIENTATION_ERROR_DEG) * rng.standard_normal(3)).as_matrix() @ A
        predicted = made.spots(found, mosaicity * np.exp(_MOSAICITY_ERROR * rng.standard_normal()))
        index = made.structure.hkl[predicted.index]
        q = index @ A.T
        ray = (q + s0) / np.linalg.norm(q + s0, axis=1)[:, None]
        shape = stills.RlpShape(np.radians(mosaicity), 0.9 / crystal.domain_size / np.sqrt(8 * np.log(2)))
        width = np.sqrt(np.einsum("ni,nij,nj->n", ray, stills.rlp_covariance(q, shape), ray))
        offset = np.linalg.norm(s0) - np.linalg.norm(q + s0, axis=1)
        true = replace(predicted, offset=offset, width=width, s1=ray * np.linalg.norm(s0))
        counts = brightness * made.relative_counts(true)
        noisy = rng.poisson(counts + _AREA * _BACKGROUND) - rng.poisson(_AREA * _BACKGROUND)
        polarization = stills.polarization_factor(true.s1, s0, np.array([0.0, 1.0, 0.0]), 0.999)
        s2 = index @ found.T + s0
        hkl.append(index.astype(np.int32))
        axes.append(np.linalg.inv(found))
        parts.append(
            {
                "id": np.full(len(index), number),
                "intensity.sum.value": noisy.astype(float),
                "intensity.sum.variance": np.maximum(noisy, 0.0) + 2 * _AREA * _BACKGROUND,
                "partiality": np.exp(-0.5 * (predicted.offset / predicted.width) ** 2),
                "lp": 1.0 / polarization,
                "s2": s2,
                "s1": s2 / np.linalg.norm(s2, axis=1)[:, None] * np.linalg.norm(s0),
            }
        )
    names = [f"shot-{number}" for number in range(n_crystals)]
    images = [f"/nowhere/shot_{number + 1:06d}.cbf" for number in range(n_crystals)]
    path = folder / "integrated_1.expt"
    synthetic.write_experiments(path, axes, space_group, names, images, made.parameters.beam.wavelength)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    synthetic.write_reflections(path.with_suffix(".refl"), np.concatenate(hkl), columns, names, crystal.unit_cell)
    data_set.write_truth_mtz(made, folder / "truth.mtz")
    return path


def cpu_of(command: list[str], folder: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=3000, env=environment)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def mates(path: Path):
    """I(+) and I(-) of an MTZ file."""
    from iotbx import mtz

    return next(a for a in mtz.object(str(path)).as_miller_arrays() if a.info().labels[0] == "I(+)")


def locally_scaled(array):
    """The mates with I(-) scaled to I(+) in the neighbourhood of each pair."""
    plus, minus = array.map_to_asu().hemispheres_acentrics()
    hkl = plus.indices().as_vec3_double().as_double().as_numpy_array().reshape(-1, 3)
    q = hkl @ np.reshape(array.unit_cell().fractionalization_matrix(), (3, 3))
    _, near = cKDTree(q).query(q, k=min(_NEIGHBOURS, len(q)))
    ours, theirs = (values.data().as_numpy_array() for values in (plus, minus))
    factor = np.clip(ours[near].sum(axis=1) / theirs[near].sum(axis=1), 0.5, 2.0)
    return ours - factor * theirs, plus


def correlations(true_mates, found: dict[str, Path]) -> dict[str, tuple[float, float, int]]:
    """Of the differences in each file with the true ones, as they are and locally scaled, and on how many pairs."""
    true = true_mates.map_to_asu().anomalous_differences()
    arrays = {name: mates(path) for name, path in found.items()}
    common = true
    for array in arrays.values():
        common = common.common_set(array.map_to_asu().anomalous_differences())
    answer = {}
    for name, array in arrays.items():
        ours = array.map_to_asu().anomalous_differences().common_set(common)
        theirs = common.common_set(ours)
        plain = np.corrcoef(np.array(list(ours.data())), np.array(list(theirs.data())))[0, 1]
        differences, plus = locally_scaled(array)
        local = plus.customized_copy(data=synthetic.flex.double(differences.tolist()), sigmas=None)
        local, against = local.common_sets(common.as_non_anomalous_array())
        scaled = np.corrcoef(np.array(list(local.data())), np.array(list(against.data())))[0, 1]
        answer[name] = float(plain), float(scaled), theirs.size()
    return answer


def measure(folder: Path, n_crystals: int, made: Simulator, with_dials: bool) -> dict[str, float]:
    """Reduce so many crystals by both programs; print a line, return the correlations."""
    path = integrated(made, n_crystals, folder)
    files = [str(path), str(path.with_suffix(".refl"))]
    reduce = [
        sys.executable,
        "-m",
        "ssx_mpi.command_line.reduce",
        files[0],
        "anomalous=True",
        f"output.folder={folder}",
    ]
    cpu, found = {"ssx_mpi": cpu_of(reduce, folder)}, {"ssx_mpi": folder / "DataFiles" / "merged_full.mtz"}
    if with_dials:
        cpu["DIALS"] = cpu_of(["dials.scale", *files, *_SCALE], folder) + cpu_of(
            ["dials.merge", "scaled.expt", "scaled.refl", "partiality_threshold=0.25", "output.html=None"], folder
        )
        found["DIALS"] = folder / "merged.mtz"
    quality = correlations(mates(folder / "truth.mtz"), found)
    for name, (plain, local, n_pairs) in quality.items():
        print(f"{n_crystals:8d} {name:8s} {n_pairs:7d} {plain:9.3f} {local:14.3f} {cpu[name]:8.1f}", flush=True)
    return {name: values[0] for name, values in quality.items()}


def needed(numbers: list[int], values: list[float], wanted: float = 0.5) -> float:
    """Number of crystals at which a curve that rises with it first reaches a value; nan where it does not."""
    for k, value in enumerate(values):
        if value >= wanted:
            if k == 0:
                return float("nan")
            low, high = np.log(numbers[k - 1 : k + 1])
            share = (wanted - values[k - 1]) / (value - values[k - 1])
            return float(np.exp(low + share * (high - low)))
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crystals", type=int, nargs="+", default=[100, 200, 400, 800])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--element", default="Gd")
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--without-dials", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        for seed in arguments.seeds:
            made = simulator(seed, arguments.element, arguments.sites, folder)
            print(f"seed {seed}, {arguments.sites} {arguments.element} in lysozyme's cell")
            print("crystals program    pairs  CC of dI  locally scaled    CPU s")
            rows = [
                measure(folder / f"{seed}_{n}", n, made, not arguments.without_dials)
                for n in sorted(arguments.crystals)
            ]
            for name in rows[0]:
                crystals = needed(sorted(arguments.crystals), [row[name] for row in rows])
                print(f"{name}: 0.5 with {crystals:.0f} crystals")


if __name__ == "__main__":
    main()
