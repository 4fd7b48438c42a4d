"""From images to merged intensities over physics and hardware, against the truth, with DIALS and plain averages beside.

    python benchmarks/truth_matrix.py FOLDER [CELL ...] [--no-dials] [--list]

Each cell of the matrix is a small simulated data set with one thing unlike lysozyme on an Eiger 1M: the shape of its
crystals, the beam, the detector, the header, the symmetry, the number of crystals. It is processed and reduced as a
user does it, with the true geometry unless the header is what the cell is about. Beside the reduction stand
``dials.scale`` and ``dials.merge`` (``engine=dials``) on the same integrated crystals, and plain averaging: the sum
of what was recorded over the sum of the shares that integration says were recorded, with a scale for each crystal.

Correlations with the truth are those of the reflections that two of them have in common, since a program that merges
less merges what is easy. A cell fails where the reduction is behind by more than 0.005 in CC, or by 3% in reflections
of which those that it lacks have a correlation of 0.5 or more.
What is done is kept in the folder, so that an interrupted matrix goes on; ``FOLDER/matrix.json`` and ``matrix.md``
have the outcome.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LYSOZYME = ("P43212", "79.1,79.1,38.2,90,90,90")
# a cell may be behind by so much of CC, and share of the reflections
_BEHIND_CC, _BEHIND_N = 0.005, 0.03
_FEWEST_COMMON = 50
# correlation with the truth of reflections that others alone have, from which on it is a loss not to have them
_WORTH = 0.5


@dataclass(frozen=True)
class Cell:
    """One data set: arguments of ssx_mpi.simulate, symmetry, and whether the header is to be believed."""

    name: str
    simulate: tuple[str, ...] = ()
    space_group: str = LYSOZYME[0]
    unit_cell: str = LYSOZYME[1]
    true_geometry: bool = True
    n_images: int = 60

    def arguments(self, path: Path) -> list[str]:
        """Of ssx_mpi.simulate."""
        return [
            f"n_images={self.n_images}",
            "hit_rate=0.8",
            "seed=11",
            f"space_group={self.space_group}",
            f"unit_cell={self.unit_cell}",
            *self.simulate,
            f"output.file={path}",
        ]


def _cells() -> list[Cell]:
    cells = [Cell("default")]
    for name, parameter, values in (
        ("mosaicity", "crystal.mosaicity", ("0.005", "0.01", "0.1", "0.2", "0.5")),
        ("domains", "crystal.domain_size", ("300", "500", "8000", "20000")),
        ("bandwidth", "beam.bandwidth", ("1e-5", "1e-3", "5e-3", "1e-2")),
        ("divergence", "beam.divergence", ("1e-3",)),
        ("cell spread", "crystal.cell_spread", ("0.0005", "0.005", "0.01")),
        ("point spread", "detector.point_spread", ("0.2", "1.0", "1.5")),
        ("background", "background.level", ("0.1", "30", "100")),
        ("brightness", "crystal.brightness", ("50", "5000", "50000")),
        ("distance", "detector.distance", ("40", "150", "300")),
        ("wavelength", "beam.wavelength", ("0.5", "1.4", "2.0")),
        ("B factor", "crystal.b_factor", ("50",)),
    ):
        cells += [Cell(f"{name} {value}", (f"{parameter}={value}",)) for value in values]
    near = ("detector.preset=pilatus200k", "detector.distance=45")
    cells += [
        Cell("pilatus200k", near),
        Cell("pilatus200k 400 images", near, n_images=400),
        Cell("shift of header", ("header.beam_offset=0.8,-0.6", "header.distance_offset=0.7"), true_geometry=False),
        Cell("header", (), true_geometry=False),
    ]
    cells += [Cell(f"{n} images", n_images=n) for n in (6, 12, 25, 150)]
    cells += [
        Cell("P1", (), "P1", "38,44,52,80,95,105", n_images=100),
        Cell("P21", (), "P1211", "41,52,67,90,93,90", n_images=100),
        Cell("C2", (), "C121", "91,45,62,90,110,90", n_images=100),
        Cell("P212121", (), "P212121", "51,62,74,90,90,90"),
        Cell("R3", (), "R3:H", "92,92,70,90,90,120"),
        Cell("P3", (), "P3", "68,68,60,90,90,120"),
        Cell("P6", (), "P6", "70,70,58,90,90,120"),
        Cell("P43", (), "P43", "62,62,75,90,90,90"),
        Cell("I23", (), "I23", "98,98,98,90,90,90"),
        Cell("F432", (), "F432", "120,120,120,90,90,90"),
        Cell("small cell", ("d_min=1.0",), "P212121", "25,27,31,90,90,90", n_images=150),
        Cell("large cell", ("d_min=2.6", "detector.preset=eiger4m", "detector.distance=250"), "P41212",
             "180,180,240,90,90,90", n_images=20),
    ]  # fmt: skip
    return cells


CELLS = {cell.name: cell for cell in _cells()}


def run_cell(cell: Cell, folder: Path, dials: bool = True) -> dict[str, Any]:
    """Simulate, process and reduce one cell, and compare with the truth; what was done before is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = folder / "outcome.json"
    if outcome.is_file():
        found = json.loads(outcome.read_text())
        if not dials or "dials" in found:
            return found
    images, run = folder / "images" / "set.nxs", folder / "run"
    if not (images.parent / "truth.json").is_file():
        _call(folder, "simulate", ["ssx_mpi.simulate", *cell.arguments(images)])
    geometry = [f"reference_geometry={images.parent / 'truth.expt'}"] if cell.true_geometry else []
    seconds = _call(
        folder,
        "run",
        ["ssx_mpi", f"image={images}", f"space_group={cell.space_group}", f"unit_cell={cell.unit_cell}",
         f"output.directory={run}", "nproc=1", *geometry],
    )  # fmt: skip
    if dials and any(run.glob("batch_*/integrated*.expt")):
        _call(
            folder,
            "dials",
            ["ssx_mpi.reduce", f"directory={run}", f"output.folder={folder / 'dials'}", "engine=dials", "nproc=1"],
        )
    numbers = measured(images.parent, run, folder / "dials" if dials else None) | {"cpu_s": seconds}
    outcome.write_text(json.dumps(numbers, indent=1) + "\n")
    return numbers


def _call(folder: Path, name: str, command: list[str]) -> float:
    """CPU-seconds of a program of ours; what it said is kept, and it may fail: the outcome says so."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run([str(program), *command[1:]], capture_output=True, text=True)
    (folder / f"{name}.txt").write_text(done.stdout + done.stderr + f"\nexit code {done.returncode}\n")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def measured(truth_folder: Path, run: Path, dials: Path | None) -> dict[str, Any]:
    """Numbers of a run: what was indexed, and how its merged intensities, DIALS's and plain averages fit the truth."""
    from ssx_mpi import dials_compat

    dials_compat.prepare()
    from ssx_mpi.simulation import truth as true

    truth = true.load_truth(truth_folder)
    try:
        comparison = true.compare_run(truth_folder, run)
    except FileNotFoundError:
        return {"hits": None}
    numbers: dict[str, Any] = {
        "hits": comparison.hits,
        "hits_indexed": comparison.hits_indexed,
        "lattices": comparison.lattices,
        "false_lattices": comparison.false_lattices,
        "orientation_error_deg": comparison.orientation_error_deg,
        "beam_centre_error_mm": comparison.beam_centre_error_mm,
        "distance_error_mm": comparison.distance_error_mm,
    }
    summary = run / "ssx_mpi.json"
    if summary.is_file():
        numbers["warnings"] = json.loads(summary.read_text()).get("warnings", [])
    merged = run / "DataFiles" / "merged_full.mtz"
    if not merged.is_file():
        return numbers
    reduced = true.compare_merged(truth, merged)
    numbers |= {"n": reduced.n_merged, "cc": reduced.cc_truth, "deviation": reduced.deviation}
    ours = _intensities(truth, merged)
    others = {"plain": _plain(truth, run)}
    if dials is not None and (dials / "DataFiles" / "merged.mtz").is_file():
        others["dials"] = _intensities(truth, dials / "DataFiles" / "merged.mtz")
    elif dials is not None:
        numbers["dials"] = None
    for name, theirs in others.items():
        numbers[name] = _beside(truth, ours, theirs)
    return numbers


def _intensities(truth: Any, path: Path) -> dict[int, float]:
    """Merged intensities by the row of the truth, in the setting that fits best."""
    from iotbx import mtz

    from ssx_mpi.simulation.truth import lattice_rotations, unique_rows

    arrays = {array.info().labels[0]: array for array in mtz.object(str(path)).as_miller_arrays()}
    array = arrays["IMEAN"]
    true = truth.intensities.map_to_asu()
    hkl = array.indices().as_vec3_double().as_double().as_numpy_array().reshape(-1, 3)
    values, best, found = array.data().as_numpy_array(), -np.inf, {}
    for rotation in lattice_rotations(true.unit_cell(), true.space_group()):
        rows = unique_rows(truth, np.rint(hkl @ rotation.T))
        known = rows >= 0
        cc = np.corrcoef(values[known], true.data().as_numpy_array()[rows[known]])[0, 1]
        if cc > best:
            best, found = cc, dict(zip(rows[known].tolist(), values[known].tolist()))
    return found


def _plain(truth: Any, run: Path) -> dict[int, float]:
    """Plain averages of what was integrated, each crystal in the setting in which it fits the truth best."""
    from ssx_mpi.simulation import truth as true

    observations = true.read_observations(true.run_files(run)[1])
    if observations is None:
        return {}
    array = truth.intensities.map_to_asu()
    unique = true.unique_rows(truth, observations.hkl)
    observations, unique = observations.select(unique >= 0), unique[unique >= 0]
    scales = true.crystal_scales(unique, observations, array.d_star_sq().data().as_numpy_array())
    values, weight = true.merge(unique, observations, scales, array.size())
    rows = np.flatnonzero(weight > 0)
    return dict(zip(rows.tolist(), values[rows].tolist()))


def _beside(truth: Any, ours: dict[int, float], theirs: dict[int, float]) -> dict[str, float | int | None]:
    """Reflections of others, and correlations with the truth of both on the reflections in common."""
    rows = np.array(sorted(ours.keys() & theirs.keys()), dtype=np.int64)
    numbers: dict[str, float | int | None] = {"n": len(theirs), "n_common": len(rows), "ours": None, "theirs": None}
    if len(rows) >= _FEWEST_COMMON:
        intensity = truth.intensities.data().as_numpy_array()[rows]
        for name, values in (("ours", ours), ("theirs", theirs)):
            numbers[name] = float(np.corrcoef([values[row] for row in rows.tolist()], intensity)[0, 1])
    alone = np.array(sorted(theirs.keys() - ours.keys()), dtype=np.int64)
    if len(alone) >= _FEWEST_COMMON:
        intensity = truth.intensities.data().as_numpy_array()[alone]
        numbers["cc_alone"] = float(np.corrcoef([theirs[row] for row in alone.tolist()], intensity)[0, 1])
    return numbers


def behind(numbers: dict[str, Any]) -> list[str]:
    """In what a cell falls short, in words; empty where it does not."""
    if numbers.get("n") is None:
        return ["nothing merged"]
    found = []
    for name in ("plain", "dials"):
        other = numbers.get(name)
        if not other or other["theirs"] is None:
            continue
        if other["ours"] < other["theirs"] - _BEHIND_CC:
            found.append(f"CC behind {name} by {other['theirs'] - other['ours']:.3f}")
        # reflections that were predicted and never excited are no loss: what others alone have must be worth something
        worth = other.get("cc_alone", 1.0) > _WORTH
        if name == "dials" and worth and numbers["n"] < (1 - _BEHIND_N) * other["n"]:
            found.append(f"{100 * (1 - numbers['n'] / other['n']):.0f}% fewer reflections than {name}")
    return found


def table(outcomes: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| cell | hits indexed | lattices (false) | orientation | reflections, CC | plain averaging: ours, theirs | "
        "DIALS: reflections | ours, theirs | deviation | falls short |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def pair(other: dict[str, Any] | None) -> str:
        return "-" if not other or other["theirs"] is None else f"{other['ours']:.4f}, {other['theirs']:.4f}"

    for name, x in outcomes.items():
        if x.get("n") is None:
            lines.append(f"| {name} | {x.get('hits_indexed')} of {x.get('hits')} | | | nothing merged | | | | | yes |")
            continue
        dials = x.get("dials")
        lines.append(
            f"| {name} | {x['hits_indexed']} of {x['hits']} | {x['lattices']} ({x['false_lattices']}) | "
            f"{x['orientation_error_deg']:.4f} | {x['n']:,}, {x['cc']:.4f} | {pair(x['plain'])} | "
            f"{dials['n'] if dials else '-'} | {pair(dials)} | {x['deviation']:.2f} | {'; '.join(behind(x))} |"
        )
    return "\n".join(lines) + "\n"


def main(args: list[str] | None = None) -> None:
    """The matrix, or some cells of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cells", nargs="*", help="all by default")
    parser.add_argument("--no-dials", action="store_true", help="without dials.scale and dials.merge")
    parser.add_argument("--list", action="store_true", help="names of the cells")
    options = parser.parse_args(args)
    if options.list:
        print("\n".join(CELLS))
        return
    outcomes = {}
    for name in options.cells or CELLS:
        folder = options.folder.resolve() / name.replace(" ", "_")
        outcomes[name] = run_cell(CELLS[name], folder, not options.no_dials)
        print(name, "; ".join(behind(outcomes[name])) or "fine", flush=True)
        (options.folder / "matrix.json").write_text(json.dumps(outcomes, indent=1) + "\n")
        (options.folder / "matrix.md").write_text(table(outcomes))


if __name__ == "__main__":
    main()
