"""Cost and quality of data reduction on synthetic reflection tables: CPU against crystals, memory against ranks, DIALS.

    python benchmarks/reduction.py scaling [--crystals 500 1000 2000 4000 8000] [--reflections 300]
    python benchmarks/reduction.py memory [--crystals 2000] [--ranks 1 2 4]
    python benchmarks/reduction.py dials [--crystals 500] [--lattice lysozyme|ambiguous]

CPU seconds are those of the process (user and system); the arithmetic of the reduction is measured without reading and
writing files in `scaling`, and with them, as whole programs, in `dials`.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssx_mpi import dials_compat

dials_compat.prepare()
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "reduction"))

import numpy as np  # noqa: E402
import synthetic  # noqa: E402

from ssx_mpi.kernels import ambiguity, merging  # noqa: E402
from ssx_mpi.kernels.ambiguity import relative_agreement  # noqa: E402
from ssx_mpi.kernels.scaling import Merged  # noqa: E402
from ssx_mpi.parallel.communicator import SerialCommunicator  # noqa: E402
from ssx_mpi.reduction import resolve, scale  # noqa: E402
from ssx_mpi.reduction.merge import MergingSettings, merge  # noqa: E402
from ssx_mpi.reduction.resolve import AmbiguitySettings  # noqa: E402
from ssx_mpi.reduction.scale import ScalingSettings  # noqa: E402

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
    start, expected = scale.radial_means(COMM, observations, indexed, everything, unique, shells)
    clock.append(time.process_time())
    data = resolve.normalised(observations, everything, unique, truth.settings, start, expected)
    table = ambiguity.composition_table(truth.settings, unique.rotations)
    found = resolve.resolve(COMM, data, everything, numbers, n, len(unique), table, AmbiguitySettings())
    indexed = resolve.index_in_settings(observations, unique, truth.settings, found.setting)
    clock.append(time.process_time())
    scaled = scale.scale(COMM, observations, indexed, found.decided, unique, start, expected, ScalingSettings())
    clock.append(time.process_time())
    data = merge(
        COMM, observations, indexed, found.decided, numbers, scaled.scales, scaled.noise, scaled.merged, unique,
        MergingSettings(),
    )  # fmt: skip
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
        "from ssx_mpi.parallel.launch import guarded\n"
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
        ours = _cpu([sys.executable, "-m", "ssx_mpi.command_line.reduce", inputs[0], f"output.folder={folder}"], folder)
        _report("ssx_mpi.reduce", ours, folder / "DataFiles" / "merged_full.mtz", lattice, n, per_crystal)
        theirs = 0.0
        if lattice == "ambiguous":
            settings = ["space_group=P213", "partiality_threshold=0.25", "unit_cell_clustering.threshold=None"]
            cosym = _cpu(["dials.cosym", *inputs, *settings, "output.html=None", "output.json=None"], folder)
            print(f"  dials.cosym {cosym:9.1f} s")
            theirs += cosym
            inputs = [str(folder / "symmetrized.expt"), str(folder / "symmetrized.refl")]
        # the settings of xia2's pipeline for stills
        scaling = _cpu(["dials.scale", *inputs, "model=KB", "full_matrix=False", "cut_data.partiality_cutoff=0.25",
                        "intensity_choice=sum", "output.html=None"], folder)  # fmt: skip
        print(f"  dials.scale {scaling:9.1f} s")
        merge_command = ["dials.merge", "scaled.expt", "scaled.refl", "partiality_threshold=0.25", "output.html=None"]
        merging_cpu = _cpu(merge_command, folder)
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


def _cpu(command: list[str], folder: Path) -> float:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scaling", "memory", "dials"])
    parser.add_argument("--crystals", type=int, nargs="+")
    parser.add_argument("--reflections", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--lattice", choices=sorted(LATTICES), default="lysozyme")
    options = parser.parse_args()
    if options.what == "scaling":
        cpu_against_crystals(options.crystals or [500, 1000, 2000, 4000, 8000], options.reflections)
    elif options.what == "memory":
        memory_against_ranks((options.crystals or [2000])[0], options.reflections, options.ranks)
    else:
        against_dials(options.lattice, (options.crystals or [500])[0], options.reflections)


if __name__ == "__main__":
    main()
