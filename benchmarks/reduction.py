"""Cost and quality of data reduction on synthetic reflection tables: CPU against crystals, memory against ranks, DIALS.

    python benchmarks/reduction.py scaling [--crystals 500 1000 2000 4000 8000] [--reflections 300]
    python benchmarks/reduction.py memory [--crystals 2000] [--ranks 1 2 4]
    python benchmarks/reduction.py dials [--crystals 500] [--lattice lysozyme|ambiguous]
    python benchmarks/reduction.py images [--crystals 1000] [--lattice ...] [--folder F] [--without-dials]
    python benchmarks/reduction.py resolution
    python benchmarks/reduction.py rounds

CPU seconds are those of the process (user and system); the arithmetic of the reduction is measured without reading and
writing files in `scaling`, and with them, as whole programs, in `dials`.

`images` begins with simulated images: it simulates, processes (true geometry given) and reduces them with
ssx_mpi.reduce and with dials.cosym, dials.scale and dials.merge, in F, where what is there already is taken as it is.
Both reductions get the same integrated files and take summed intensities with a partiality of 0.25 or more. The
correlation to the truth is over the reflections that both have merged, all of them, without cut of resolution or
I/sigma: as they are, and with the B fitted that merged data leave open. Deviations from the truth are over sigma, with
scale and B fitted. Where the lattice is ambiguous, the setting is taken that fits better. Which setting a crystal is in
is read from the orientation that it has in the files written by either program, against the one in truth.expt.

`resolution` estimates the resolution of 40 sets of merged data for each multiplicity; their CC1/2 falls to 0.3 at 2.00
angstrom. `rounds` scales nine crystals of a simulated chip that share few reflections, and all but one of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()
TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "reduction")]

import numpy as np  # noqa: E402
import synthetic  # noqa: E402
from half_sets import observe  # noqa: E402
from small_chips import SYMMETRY, small_chip  # noqa: E402

from ssx_mpi.kernels import ambiguity, merging  # noqa: E402
from ssx_mpi.kernels.ambiguity import relative_agreement  # noqa: E402
from ssx_mpi.kernels.scaling import Merged  # noqa: E402
from ssx_mpi.parallel.communicator import SerialCommunicator  # noqa: E402
from ssx_mpi.parameters.reduction_parameters import (  # noqa: E402
    AmbiguitySettings,
    MergingSettings,
    ReductionParameters,
    ScalingSettings,
)
from ssx_mpi.reduction import (  # noqa: E402
    loading,
    resolve,
    scaling_rounds,
)
from ssx_mpi.reduction.merge import merge  # noqa: E402
from ssx_mpi.simulation import truth as simulated  # noqa: E402
from ssx_mpi.simulation.simulation_parameters import HeaderParameters  # noqa: E402
from ssx_mpi.stages.intensities import reflection_data as stage  # noqa: E402
from ssx_mpi.stages.intensities.reflection_data import Selection  # noqa: E402

COMM = SerialCommunicator()
LATTICES = {"lysozyme": synthetic.LYSOZYME, "ambiguous": synthetic.AMBIGUOUS}


def cpu_against_crystals(numbers: list[int], per_crystal: int) -> None:
    """Print CPU seconds of each step for each number of crystals, and the power of the number that they follow."""
    print("P213, every crystal in one of two settings;", per_crystal, "reflections a crystal; CPU seconds")
    print(
        "crystals  located  radial  ambiguity  scaling  merging   total  ms/crystal  settings right  CC to truth  rms z"
    )
    totals = []
    for n in numbers:
        observations, truth = synthetic.simulate(synthetic.AMBIGUOUS, n, per_crystal=per_crystal, ambiguous=True)
        times, right, cc, rms = _reduce(observations, truth)
        totals.append(times.sum())
        steps = "".join(f"{t:9.2f}" for t in times)
        print(
            f"{n:8d}{steps}{times.sum():9.2f}{1e3 * times.sum() / n:11.2f}{right:14.4f}{cc:14.5f}{rms:9.3f}", flush=True
        )
    if len(numbers) > 1:
        power = np.polyfit(np.log(numbers), np.log(totals), 1)[0]
        print(f"total CPU grows with the number of crystals to the power {power:.2f}")


def _reduce(observations, truth) -> tuple[np.ndarray, float, float, float]:
    n, unique = observations.n_crystals, truth.unique
    everything, numbers = np.ones(n, dtype=bool), np.arange(n)
    shells = merging.resolution_shells(unique.d_star_sq, 20)
    clock = [time.process_time()]
    indexed = resolve.index_in_settings(observations, unique, truth.settings, np.zeros(n, dtype=np.int64))
    clock.append(time.process_time())
    start, expected = scaling_rounds.radial_means(COMM, indexed, unique, shells)
    clock.append(time.process_time())
    data = resolve.normalised(observations, everything, unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, unique.rotations)
    found = resolve.resolve(COMM, data, everything, numbers, n, len(unique), table, AmbiguitySettings())
    indexed = resolve.index_in_settings(observations, unique, truth.settings, found.setting).only(found.decided)
    clock.append(time.process_time())
    scaled = scaling_rounds.scale(COMM, indexed, unique, start, expected, ScalingSettings())
    clock.append(time.process_time())
    data = merge(COMM, indexed, numbers, scaled.scales, scaled.noise, scaled.merged, unique, MergingSettings())
    clock.append(time.process_time())
    alike = relative_agreement(found.setting, truth.setting, table)
    # found.setting follows truth.setting by the common reindexing that fits best; undo it in the truth
    common = truth.settings[int(np.argmax(alike))]
    row, _ = unique.locate(unique.hkl, np.linalg.inv(common))
    merged: Merged = data.merged
    seen = merged.weight > 0
    cc = float(np.corrcoef(merged.intensity[seen], truth.intensity[row[seen]])[0, 1])
    return np.diff(clock), alike.max() / n, cc, scaled.deviations.overall


def memory_against_ranks(n: int, per_crystal: int, ranks: list[int]) -> None:
    """Print the peak memory of the largest rank, and of one that holds no data, of the program on files."""
    with tempfile.TemporaryDirectory() as folder:
        files = _write(Path(folder), "lysozyme", n, per_crystal, per_file=250)
        print(f"lysozyme, {n} crystals of {per_crystal} reflections in {len(files)} files; peak resident memory, MB")
        print("ranks  largest rank    of it data (above one rank of 8 crystals)")
        few = _write(Path(folder) / "few", "lysozyme", 8, per_crystal, per_file=8)
        base = _peak(few, 1, Path(folder) / "out")
        for size in ranks:
            peak = _peak(files, size, Path(folder) / "out")
            print(f"{size:5d}{peak:14.0f}{peak - base:14.0f}", flush=True)


def _peak(files: list[Path], ranks: int, out: Path) -> float:
    program = (
        "import resource, sys; from ssx_mpi.command_line import reduce\n"
        "from ssx_mpi import dials_compat; dials_compat.prepare()\n"
        "from ssx_mpi.parallel.launching import guarded\n"
        "def main(comm):\n"
        "    status = reduce.main(comm, sys.argv[1:])\n"
        "    peaks = comm.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "    print('PEAK', max(peaks)) if peaks else None\n"
        "    return status\n"
        "guarded(main)\n"
    )
    command = ["mpiexec", "-n", str(ranks), sys.executable, "-c", program, *map(str, files), f"output.folder={out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900, env=_mpi_environment())
    found = re.search(r"PEAK (\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found.group(1)) / 1024


def against_dials(lattice: str, n: int, per_crystal: int) -> None:
    """Print CPU seconds and agreement with the truth of ssx_mpi.reduce and of the DIALS programs on the same files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = _write(folder, lattice, n, per_crystal, per_file=n)
        stem = str(files[0].with_suffix(""))
        inputs = [f"{stem}.expt", f"{stem}.refl"]
        print(f"{lattice}, {n} crystals of {per_crystal} reflections; CPU seconds of the whole programs")
        ours = cpu_of(
            [sys.executable, "-m", "ssx_mpi.command_line.reduce", inputs[0], f"output.folder={folder}"], folder
        )
        _report("ssx_mpi.reduce", ours, folder / "DataFiles" / "merged_full.mtz", lattice, n, per_crystal)
        theirs = 0.0
        if lattice == "ambiguous":
            settings = ["space_group=P213", "partiality_threshold=0.25", "unit_cell_clustering.threshold=None"]
            cosym = cpu_of(["dials.cosym", *inputs, *settings, "output.html=None", "output.json=None"], folder)
            print(f"  dials.cosym {cosym:9.1f} s")
            theirs += cosym
            inputs = [str(folder / "symmetrized.expt"), str(folder / "symmetrized.refl")]
        scaling = cpu_of(["dials.scale", *inputs, *_DIALS_SCALE], folder)
        print(f"  dials.scale {scaling:9.1f} s")
        merge_command = ["dials.merge", "scaled.expt", "scaled.refl", "partiality_threshold=0.25", "output.html=None"]
        merging_cpu = cpu_of(merge_command, folder)
        theirs += scaling + merging_cpu
        _report("DIALS", theirs, folder / "merged.mtz", lattice, n, per_crystal)
        print(f"ratio, all of DIALS to ssx_mpi.reduce: {theirs / ours:.1f}; dials.scale alone: {scaling / ours:.1f}")


def _report(name: str, cpu: float, path: Path, lattice: str, n: int, per_crystal: int) -> None:
    from iotbx import mtz

    _, truth = synthetic.simulate(LATTICES[lattice], n, per_crystal=1, ambiguous=lattice == "ambiguous")
    arrays = mtz.object(str(path)).as_miller_arrays()
    mean = next(array for array in arrays if array.info().labels[0] == "IMEAN")
    hkl = mean.indices().as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32)
    best = -1.0, 0.0
    for setting in truth.settings:
        row, _ = truth.unique.locate(hkl, setting)
        x, y, sigma = np.array(mean.data()), truth.intensity[row], np.array(mean.sigmas())
        factor = np.sum(x * y / sigma**2) / np.sum((y / sigma) ** 2)
        z = float(np.median(np.abs(x - factor * y) / sigma)) / 0.6745
        best = max(best, (float(np.corrcoef(x, y)[0, 1]), z))
    print(
        f"{name:15s}{cpu:9.1f} s  CC to truth {best[0]:.5f}  robust rms deviation over sigma {best[1]:.2f}", flush=True
    )


def _write(folder: Path, lattice: str, n: int, per_crystal: int, per_file: int) -> list[Path]:
    observations, _ = synthetic.simulate(
        LATTICES[lattice], n, per_crystal=per_crystal, ambiguous=lattice == "ambiguous"
    )
    return synthetic.write_files(folder, observations, LATTICES[lattice], per_file=per_file)


# the settings of xia2's pipeline for stills
_DIALS_SCALE = [
    "model=KB", "full_matrix=False", "reset_error_model=True", "outlier_rejection=simple", "outlier_zmax=4.0",
    "intensity_choice=sum", "reflection_selection.method=intensity_ranges", "Isigma_range=2.0,0.0",
    "min_partiality=0.25", "partiality_cutoff=0.25", "output.html=None",
]  # fmt: skip


@dataclass(frozen=True)
class _Images:
    """A data set made of images: parameters of ssx_mpi.simulate and what ssx_mpi is told."""

    crystal: tuple[str, ...]
    simulation: tuple[str, ...]
    processing: tuple[str, ...]


_IMAGES = {
    "lysozyme": _Images(("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90"), ("seed=11",), ()),
    "ambiguous": _Images(
        ("space_group=P213", "unit_cell=96.4,96.4,96.4,90,90,90"),
        ("seed=12", "d_min=2.2", "detector.distance=120"),
        ("d_min=2.2",),
    ),
}


def from_images(lattice: str, n: int, folder: Path, with_dials: bool) -> None:
    """Print what ssx_mpi.reduce and DIALS make of the same integrated crystals of simulated images."""
    of = _IMAGES[lattice]
    run, ours, theirs = folder / "run", folder / "reduced", folder / "dials"
    folder.mkdir(parents=True, exist_ok=True)
    # one and a sixth lattices on an image, on the average
    _once(folder / "truth.expt", "ssx_mpi.command_line.simulate", f"n_images={round(n / 1.17)}", "hit_rate=1",
          *of.crystal, *of.simulation, f"output.file={folder / 'images.nxs'}")  # fmt: skip
    _once(run / "DataFiles", "ssx_mpi", f"image={folder / 'images.nxs'}", *of.crystal, *of.processing, "nproc=1",
          f"reference_geometry={folder / 'truth.expt'}", f"output.directory={run}")  # fmt: skip
    files = [path for k in run.glob("batch_*/integrated_1.expt") for path in (k, k.with_suffix(".refl"))]
    files.sort(key=lambda path: (int(path.parent.name.split("_")[1]), path.suffix))
    reduce = [sys.executable, "-m", "ssx_mpi.command_line.reduce", f"input.directory={run}", f"output.folder={ours}"]
    rows = [("ssx_mpi.reduce", cpu_of(reduce, folder), sorted((ours / "DataFiles").glob("scaled_*.expt")))]
    merged = {"ssx_mpi.reduce": ours / "DataFiles" / "merged_full.mtz"}
    if with_dials:
        rows.append(("DIALS", run_dials(lattice, files, theirs), [theirs / "scaled.expt"]))
        merged["DIALS"] = theirs / "merged.mtz"
    quality = against_truth(folder / "truth.mtz", merged)
    print(f"{lattice}, {n} crystals simulated; CPU seconds of the whole programs, reading and writing included")
    print("program            CPU s  crystals  in the right setting   CC to truth  with B fitted  reflections  rms z")
    for name, cpu, experiments in rows:
        number, right = _settings_right(folder, experiments)
        cc, with_b, size, z = quality[name]
        share = f"{right:12d} {100 * right / number:7.2f}%"
        print(f"{name:15s}{cpu:9.1f}{number:10d}{share}{cc:14.5f}{with_b:15.5f}{size:13d}{z:7.2f}")
    log = (ours / "ssx_mpi.reduce.log").read_text()
    print(next(line for line in log.splitlines() if line.startswith("scaled in")))
    _against_multiplicity(folder, run, lattice)


def run_dials(lattice: str, files: list[Path], folder: Path) -> float:
    folder.mkdir(exist_ok=True)
    note = folder / "cpu_seconds.json"
    if not note.is_file():
        seconds, inputs = {}, [str(path) for path in files]
        if lattice == "ambiguous":
            settings = ["space_group=P213", "partiality_threshold=0.25", "unit_cell_clustering.threshold=None"]
            quiet = ["output.html=None", "output.json=None"]
            seconds["dials.cosym"] = cpu_of(["dials.cosym", *inputs, *settings, *quiet], folder)
            inputs = ["symmetrized.expt", "symmetrized.refl"]
        seconds["dials.scale"] = cpu_of(["dials.scale", *inputs, *_DIALS_SCALE], folder)
        merge_command = ["dials.merge", "scaled.expt", "scaled.refl", "partiality_threshold=0.25", "output.html=None"]
        seconds["dials.merge"] = cpu_of(merge_command, folder)
        note.write_text(json.dumps(seconds))
    seconds = json.loads(note.read_text())
    print("  ".join(f"{program} {value:.1f} s" for program, value in seconds.items()))
    return sum(seconds.values())


def _once(made: Path, module: str, *arguments: str) -> None:
    if not made.exists():
        cpu = cpu_of([sys.executable, "-m", module, *arguments], made.parent if made.parent.is_dir() else None)
        print(f"{module}: {cpu:.1f} CPU s", flush=True)


def _read_merged(path: Path, unique, setting: np.ndarray, label: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    # intensities and sigmas in the rows of the table, nan where there is none
    from iotbx import mtz

    arrays = [a for a in mtz.object(str(path)).as_miller_arrays() if a.is_xray_intensity_array()]
    array = next(a for a in arrays if label in (None, a.info().labels[0]))
    row, _ = unique.locate(array.indices().as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32), setting)
    values, sigmas = np.full((2, len(unique)), np.nan)
    inside = row >= 0
    values[row[inside]] = np.array(array.data())[inside]
    if array.sigmas() is not None:
        sigmas[row[inside]] = np.array(array.sigmas())[inside]
    return values, sigmas


def against_truth(truth_path: Path, merged: dict[str, Path]) -> dict[str, tuple[float, float, int, float]]:
    # correlation over the reflections of all programs, their number, and the robust rms of deviations over sigma
    unique, settings = _table_of(truth_path)
    truth, _ = _read_merged(truth_path, unique, np.eye(3))
    found = {}
    for name, path in merged.items():
        candidates = [_read_merged(path, unique, setting, "IMEAN") for setting in settings]
        found[name] = max(candidates, key=lambda columns: _correlation(columns[0], truth, np.isfinite(columns[0])))
    common = np.isfinite(truth) & np.all([np.isfinite(values) for values, _ in found.values()], axis=0)
    quality = {}
    for name, (values, sigmas) in found.items():
        x, y, sigma = values[common], truth[common], sigmas[common]
        model = _on_scale_of(x, y, sigma, unique.d_star_sq[common])
        z = float(np.median(np.abs(x - model) / sigma)) / 0.6745
        with_b = float(np.corrcoef(x, model)[0, 1])
        quality[name] = _correlation(values, truth, common), with_b, int(common.sum()), z
    return quality


def _on_scale_of(x: np.ndarray, y: np.ndarray, sigma: np.ndarray, d_star_sq: np.ndarray) -> np.ndarray:
    # y with the scale and the B that merged data leave open, by least squares; robust, for the sake of both programs
    log_k, b = np.log(np.sum(x * y / sigma**2) / np.sum((y / sigma) ** 2)), 0.0
    for _ in range(20):
        model = y * np.exp(log_k - 0.5 * b * d_star_sq)
        weight = 1.0 / (sigma**2 + (0.05 * model) ** 2)
        design = np.column_stack([model, -0.5 * d_star_sq * model])
        step = np.linalg.solve(design.T @ (weight[:, None] * design), design.T @ (weight * (x - model)))
        log_k, b = log_k + step[0], b + step[1]
    return y * np.exp(log_k - 0.5 * b * d_star_sq)


def _correlation(x: np.ndarray, y: np.ndarray, use: np.ndarray) -> float:
    use = use & np.isfinite(y)
    return float(np.corrcoef(x[use], y[use])[0, 1])


def _table_of(truth_path: Path):
    from iotbx import mtz

    array = mtz.object(str(truth_path)).as_miller_arrays()[0]
    cell, group = tuple(array.unit_cell().parameters()), str(array.space_group_info())
    return stage.unique_table(cell, group, array.d_min() * 0.99), stage.reindexing_settings(cell, group, 0.5)


def _settings_right(folder: Path, experiments: list[Path]) -> tuple[int, int]:
    # crystals, and how many of them are in the setting that most are in, by their orientations against the true ones
    truth = simulated.load_truth(folder)
    unique, settings = _table_of(folder / "truth.mtz")
    lattices = [lattice for path in experiments for lattice in simulated.read_experiments(path)[0]]
    matches = simulated.match(truth, lattices)
    found = np.full(len(lattices), -1)
    for number, (lattice, true) in enumerate(zip(lattices, matches.true)):
        if true >= 0:
            # an index h' = h T in rows is T' h in columns: A h' = B h for the same reflection of both
            angle = [
                min(_angle(truth.lattices[true].A @ (setting @ rotation).T @ np.linalg.inv(lattice.A))
                    for rotation in unique.rotations)
                for setting in settings
            ]  # fmt: skip
            found[number] = int(np.argmin(angle))
    counts = np.bincount(found[found >= 0], minlength=len(settings))
    return len(lattices), int(counts.max())


def _angle(matrix: np.ndarray) -> float:
    u, _, vt = np.linalg.svd(matrix)
    return float(np.arccos(np.clip((np.trace(u @ vt) - 1) / 2, -1, 1))) if np.linalg.det(u @ vt) > 0 else np.pi


def _against_multiplicity(folder: Path, run: Path, lattice: str) -> None:
    # the first so many crystals of the run, the ambiguity settled by all of them
    unique, settings = _table_of(folder / "truth.mtz")
    truth, _ = _read_merged(folder / "truth.mtz", unique, np.eye(3))
    parameters = ReductionParameters()
    sources = loading.find_sources([], [run])
    loaded = loading.load(COMM, sources, Selection(parameters.partiality_threshold))
    everything = loaded.observations
    shells = merging.resolution_shells(unique.d_star_sq, 20)
    include = np.ones(everything.n_crystals, dtype=bool)
    setting = np.zeros(everything.n_crystals, dtype=np.int64)
    if len(settings) > 1:
        indexed = resolve.index_in_settings(everything, unique, settings, setting)
        start, expected = scaling_rounds.radial_means(COMM, indexed, unique, shells)
        data = resolve.normalised(everything, include, unique, settings, start, expected)
        table = ambiguity.composition_table(settings, unique.rotations)
        setting = resolve.resolve(
            COMM, data, include, loaded.crystals.number, loaded.n_total, len(unique), table, AmbiguitySettings()
        ).setting
    print("crystals  multiplicity  completeness  CC to truth, partialities refined  as integrated  rounds")
    for number in (30, 64, 125, 250, 500, 1000):
        if number > everything.n_crystals + 20:
            break
        observations = everything.select(np.arange(everything.n_crystals) < number)
        indexed = resolve.index_in_settings(observations, unique, settings, setting[:number])
        results = []
        for widths in (True, False):
            start, expected = scaling_rounds.radial_means(COMM, indexed, unique, shells, widths)
            scaled = scaling_rounds.scale(COMM, indexed, unique, start, expected, ScalingSettings(widths=widths))
            seen = scaled.merged.weight > 0
            cc = max(
                _correlation(scaled.merged.intensity, truth[unique.locate(unique.hkl, s)[0]], seen) for s in settings
            )
            results.append((cc, scaled.rounds, scaled.sums[2].sum() / seen.sum(), seen.mean()))
        (cc, rounds, multiplicity, complete), (without, *_) = results
        print(
            f"{observations.n_crystals:8d}{multiplicity:14.2f}{complete:14.3f}{cc:35.4f}{without:15.4f}{rounds:8d}",
            flush=True,
        )


def cpu_of(command: list[str], folder: Path | None) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=3600, env=_mpi_environment())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _mpi_environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }


def resolution_of_sparse_data(n_sets: int = 40) -> None:
    """Print how far estimates of the resolution scatter about the truth, from sparse data to good ones."""
    print("unique  multiplicity  seen twice  estimates, angstrom: 5%     16%     50%     84%     95%   none")
    for n_unique, multiplicity in ((12000, 0.12), (3000, 0.3), (12000, 0.5), (12000, 1.5), (12000, 10.0)):
        sets = [observe(n_unique, multiplicity, seed) for seed in range(n_sets)]
        found = [merging.resolution_estimate(*one) for one in sets]
        known = [d_min for d_min in found if d_min is not None]
        number = np.array([sums[2].sum(axis=1) for sums, *_ in sets])
        quantiles = "".join(f"{d:8.3f}" for d in np.percentile(known, [5, 16, 50, 84, 95]))
        seen, twice = np.count_nonzero(number), np.count_nonzero(number > 1) / n_sets
        print(f"{n_unique:6d}{number.sum() / seen:14.2f}{twice:12.0f}{'':17}{quantiles}{n_sets - len(known):7d}")


def rounds_of_few_crystals() -> None:
    """Print the rounds of scaling of nine crystals that share few reflections, and without each of them."""
    with tempfile.TemporaryDirectory() as name:
        image, run = Path(name) / "lyso.nxs", Path(name) / "run"
        header = HeaderParameters((0.1, -0.05), 0.0)
        small_chip(image, n_images=24, seed=5, hit_rate=0.6, header=header)
        command = [f"image={image}", *SYMMETRY, f"output.directory={run}", "batch_size=10", "nproc=1"]
        command = [sys.executable, "-m", "ssx_mpi", *command, "steps=find_spots+index+integrate"]
        subprocess.run(command, check=True, capture_output=True, timeout=600, env=_mpi_environment())
        loaded = loading.load(
            COMM, loading.find_sources([], [run]), Selection(ReductionParameters().partiality_threshold)
        )
        observations = loaded.observations
        cell, space_group = SYMMETRY[1].split("=")[1], "P 43 21 2"
        highest = stage.largest_d_star_sq(tuple(map(float, cell.split(","))), observations.hkl)
        unique = stage.unique_table(tuple(map(float, cell.split(","))), space_group, highest**-0.5 * (1 - 1e-6))
    n = observations.n_crystals
    data = resolve.index_in_settings(observations, unique, np.eye(3)[None], np.zeros(n, dtype=np.int64))
    shells = merging.resolution_shells(unique.d_star_sq, 20)
    print("left out  rounds  converged")
    for left_out in (None, *range(n)):
        some = data.only(np.arange(n) != left_out)
        start, expected = scaling_rounds.radial_means(COMM, some, unique, shells)
        scaled = scaling_rounds.scale(COMM, some, unique, start, expected, ScalingSettings(max_rounds=300))
        print(f"{'none' if left_out is None else left_out:>8}{scaled.rounds:8d}  {scaled.converged}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scaling", "memory", "dials", "images", "resolution", "rounds"])
    parser.add_argument("--crystals", type=int, nargs="+")
    parser.add_argument("--reflections", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lattice", choices=sorted(LATTICES), default="lysozyme")
    parser.add_argument("--folder", type=Path, help="of `images`: kept, and taken up again; by default a temporary one")
    parser.add_argument("--without-dials", action="store_true")
    options = parser.parse_args()
    if options.what == "scaling":
        cpu_against_crystals(options.crystals or [500, 1000, 2000, 4000, 8000], options.reflections)
    elif options.what == "memory":
        memory_against_ranks((options.crystals or [2000])[0], options.reflections, options.ranks)
    elif options.what == "images":
        n = (options.crystals or [{"lysozyme": 1000, "ambiguous": 500}[options.lattice]])[0]
        with tempfile.TemporaryDirectory() as name:
            from_images(options.lattice, n, (options.folder or Path(name)).absolute(), not options.without_dials)
    elif options.what == "resolution":
        resolution_of_sparse_data()
    elif options.what == "rounds":
        rounds_of_few_crystals()
    else:
        against_dials(options.lattice, (options.crystals or [500])[0], options.reflections)


if __name__ == "__main__":
    main()
