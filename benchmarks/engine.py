"""The fast engine beside DIALS, stage by stage, in one command.

    python benchmarks/engine.py                      all parts, then the tables (two hours of a core, most of it DIALS)
    python benchmarks/engine.py indexing memory      these parts again; of the others the last numbers are kept
    python benchmarks/engine.py tables               the tables alone

Numbers are kept in ``benchmarks/engine.json`` and written as tables into ``docs/performance.md``, between two markers.
Times are CPU-seconds; what is compared runs in turn in one process, so that a busy machine hurts both alike. Both
engines get the same input: images, strong spots, geometry, cell, indexed crystals.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssx_mpi import dials_compat

# before NumPy, which starts its threads when it is loaded
dials_compat.prepare()

import indexing  # noqa: E402
import integration  # noqa: E402
import numpy as np  # noqa: E402
import simulated  # noqa: E402
import spotfinding  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "engine.json"
DATA = ROOT.parent / "shared" / "data"
DOCUMENT = ROOT / "docs" / "performance.md"
MARKERS = "<!-- written by benchmarks/engine.py -->", "<!-- end of what benchmarks/engine.py writes -->"
CELL, OTHER_CELL = "57.8,57.8,150.2,90,90,90", "58,58,150,90,90,90"
MEMORY_IMAGES = 1000
MEMORY_STEP = 50
INTEGRATED_BY_DIALS = 1


@dataclass(frozen=True)
class Setup:
    """Folders of the real data and of the unpacked stills, a work folder, and how many simulated images to process."""

    data: Path
    images: Path
    work: Path
    n_simulated: int


# ---- the thaumatin stills -------------------------------------------------------------------------------------------


def thaumatin(images: Path, data: Path) -> tuple[Any, Any]:
    """Experiments of the stills with the refined geometry of DIALS 3.30, and their strong spots."""
    from dials.array_family import flex
    from dials.command_line.find_spots import phil_scope
    from dxtbx.format.Registry import get_format_class_for_file
    from dxtbx.model import Experiment, ExperimentList
    from libtbx import phil

    from ssx_mpi.images.frames import FrameReader
    from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder

    geometry = refined_geometry(data)
    finder = FastSpotFinder(phil_scope.fetch(phil.parse(spotfinding.PARAMETERS)).extract())
    read, experiments, strong = FrameReader(), ExperimentList(), flex.reflection_table()
    for number, path in enumerate(sorted(images.glob("*.cbf"))):
        experiment = spotfinding.load(str(path))
        table = finder.find(experiment, read(experiment.imageset))
        # a still with these models: DIALS takes them from the image set
        imageset = get_format_class_for_file(str(path)).get_imageset([str(path)], as_imageset=True)
        imageset.set_detector(geometry.detector, 0)
        imageset.set_beam(geometry.beam, 0)
        experiment = Experiment(imageset=imageset, detector=geometry.detector, beam=geometry.beam)
        experiments.append(experiment)
        for key in list(table.experiment_identifiers().keys()):
            del table.experiment_identifiers()[key]
        table["id"] = flex.int(len(table), number)
        strong.extend(table)
    return experiments, strong


def refined_geometry(data: Path) -> Any:
    """An experiment with the beam and the detector that DIALS 3.30 refined."""
    from dxtbx.model import Beam, Detector, Experiment

    models = json.loads((data / "thaumatin_dials_3_30" / "geometry.json").read_text())
    newer = ("__id__", "probe", "sample_to_source_distance")
    beam = Beam.from_dict({name: value for name, value in models["beam"].items() if name not in newer})
    return Experiment(beam=beam, detector=Detector.from_dict(models["detector"]))


def spots(setup: Setup) -> dict:
    """Spot finding from file to table by both."""
    from dials.command_line.find_spots import phil_scope
    from libtbx import phil

    from ssx_mpi.images.frames import FrameReader
    from ssx_mpi.stages.fast.fast_spotfinding import FastSpotFinder

    params = phil_scope.fetch(phil.parse(spotfinding.PARAMETERS)).extract()
    paths = [str(path) for path in sorted(setup.images.glob("*.cbf"))]
    reader, finder = FrameReader(), FastSpotFinder(params)
    experiment = spotfinding.load(paths[0])
    finder.find(experiment, reader(experiment.imageset))
    return {"images": [asdict(spotfinding.compare(path, 2, reader, finder, params)) for path in paths]}


# ---- indexing -------------------------------------------------------------------------------------------------------


def thaumatin_indexing(setup: Setup) -> dict:
    """Known cell, one lattice; beside it DIALS with a cell that is 0.3% larger, which is as good a guess."""
    experiments, strong = thaumatin(setup.images, setup.data)
    scope, control = (indexing.index_scope(cell, "P41212", 1) for cell in (CELL, OTHER_CELL))
    return {"images": [_index_row(row) for row in indexing.rows(experiments, strong, scope, control)]}


def nitrite_indexing(setup: Setup) -> dict:
    """Nitrite reductase, two lattices an image: cell and space group known, and both unknown."""
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    folder = setup.data / "cunir_serial_processed"
    experiments = ExperimentListFactory.from_json_file(str(folder / "imported_with_ref_5.expt"), check_format=False)
    strong = flex.reflection_table.from_file(str(folder / "strong_5.refl"))
    known = indexing.index_scope("96.4,96.4,96.4,90,90,90", "P213", 2)
    unknown = indexing.index_scope("None", "None", 2)
    return {
        "known": [_index_row(row) for row in indexing.rows(experiments, strong, known)],
        "unknown": [_index_row(row) for row in indexing.rows(experiments, strong, unknown)],
    }


def _index_row(row: indexing.Row) -> dict:
    def numbers(outcome: indexing.Outcome) -> dict:
        cells = [[round(x, 2) for x in c.get_unit_cell().parameters()] for c in outcome.crystals]
        return {"s": outcome.seconds, "spots": outcome.n_spots, "rmsd_px": outcome.rmsd_px, "cells": cells}

    result = {"image": row.image, "strong": row.n_strong, "dials": numbers(row.dials), "fast": numbers(row.fast)}
    result["angles"] = row.angles
    if row.control is not None:
        result |= {"control": numbers(row.control), "control_angles": row.control_angles, "likelihood": row.likelihood}
    return result


def noise(setup: Setup) -> dict:
    """The cost of spots that are no lattice's: those of the stills, each turned about the beam by a random angle."""
    from dials.array_family import flex

    from ssx_mpi.stages.fast.fast_indexing import FastIndexer

    experiments, strong = thaumatin(setup.images, setup.data)
    indexer = FastIndexer(indexing.index_scope(CELL, "P41212", 1).extract())
    rng = np.random.default_rng(3)
    images = []
    for number, experiment in enumerate(experiments):
        own = strong.select(strong["id"] == number)
        if len(own) < indexer.settings.min_spots:
            continue
        position = np.array(own["xyzobs.px.value"]).reshape(-1, 3)
        centre = experiment.detector[0].get_beam_centre_px(experiment.beam.get_s0())
        radius = np.linalg.norm(position[:, :2] - centre, axis=1)
        angle = rng.uniform(0, 2 * np.pi, len(own))
        position[:, :2] = centre + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        random = own.copy()
        random["xyzobs.px.value"] = flex.vec3_double(np.ascontiguousarray(position))
        real, none = (indexing.run_fast(indexer, experiment, table) for table in (own, random))
        images.append(
            {"image": number, "spots": len(own), "lattice_s": real.seconds, "noise_s": none.seconds}
            | {"lattices_in_noise": len(none.crystals)}
        )
    return {"images": images}


# ---- integration ----------------------------------------------------------------------------------------------------


def thaumatin_integration(setup: Setup) -> dict:
    """Agreement with DIALS 3.30 on all crystals, and CPU-seconds beside the installed DIALS on the two weakest."""
    loader = integration.load_module(setup.data / "thaumatin_dials_3_30" / "load.py")
    stills = integration.indexed_stills(loader, setup.images)
    stored = integration.stored_rows(stills, loader.load_integrated(), loader.crystals()["integrated"])
    beside = [integration.side_by_side(*still) for still in stills[: -1 - INTEGRATED_BY_DIALS : -1]]
    return {"stored": list(stored), "beside": beside}


# ---- the program: a whole image, memory -----------------------------------------------------------------------------


def _run_stills(setup: Setup, name: str, n_images: int, batch_size: int) -> tuple[list[str], Path]:
    """The command that processes `n_images` stills, the same ones over and over under as many names; and its folder."""
    stills = sorted(setup.images.glob("*.cbf"))
    folder, output = setup.work / f"{name}_images", setup.work / name
    folder.mkdir()
    for number in range(n_images):
        (folder / f"still_{number + 1:05d}.cbf").symlink_to(stills[number % len(stills)].resolve())
    from dxtbx.model import ExperimentList

    geometry = setup.work / f"{name}.expt"
    ExperimentList([refined_geometry(setup.data)]).as_json(str(geometry))
    command = [
        sys.executable,
        "-c",
        "from ssx_mpi.command_line.process import run; run()",
        "nproc=1",
        f"template={folder}/still_#####.cbf:1:{n_images}",
        "space_group=P41212",
        f"unit_cell={CELL}",
        "max_lattices=1",
        f"reference_geometry={geometry}",
        f"batch_size={batch_size}",
        "keep_intermediate=False",
        f"output.directory={output}",
    ]
    return command, output


def whole(setup: Setup) -> dict:
    """CPU-seconds of each still from its file to integrated reflections, by stage, as the program takes them."""
    n_images = len(list(setup.images.glob("*.cbf")))
    # the first round warms the program up
    command, output = _run_stills(setup, "whole", 2 * n_images, n_images)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    images = json.loads((output / "batch_2" / "images.json").read_text())
    return {"images": [{"hit": i["hit"], "crystals": len(i["crystals"]), "s": i["seconds"]} for i in images]}


def memory(setup: Setup) -> dict:
    """Resident memory of a rank over 1,000 images of 6 Mpx, with the geometry given, read at the end of each batch."""
    command, output = _run_stills(setup, "memory", MEMORY_IMAGES, MEMORY_STEP)
    resident, peak = [], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.startswith("Batch "):
                    resident.append(_status_mb(program.pid, "VmRSS"))
                    peak = _status_mb(program.pid, "VmHWM")
        finally:
            program.kill()
    counts = json.loads((output / "ssx_mpi.json").read_text())["total"]["counts"]
    return {name: counts[name] for name in ("images", "hits", "crystals")} | {"resident_mb": resident, "peak_mb": peak}


def _status_mb(process: int, field: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return round(int(value) / 1024, 1)


# ---- tables ---------------------------------------------------------------------------------------------------------


def tables(results: dict) -> str:
    """What is measured so far, as Markdown."""
    written = [TABLES[name](results[name]) for name in TABLES if name in results]
    return "\n\n".join(written)


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spots_table(r: dict) -> str:
    images = r["images"]
    fast = np.array([i["read_s"] + i["find_s"] for i in images])
    dials = np.array([i["dials_s"] for i in images])
    found = np.array([[i["n_fast"], i["n_dials"], i["n_common"]] for i in images])
    blank = found[:, 1].argmin()
    theirs, same = found[:, 1].sum(), found[:, 2].sum()
    rows = [
        ["mean", f"{fast.mean():.3f}", f"{dials.mean():.3f}", f"{dials.sum() / fast.sum():.1f}"],
        ["slowest", f"{fast.max():.3f}", f"{dials[fast.argmax()]:.3f}", f"{dials[fast.argmax()] / fast.max():.1f}"],
        ["blank", f"{fast[blank]:.3f}", f"{dials[blank]:.3f}", f"{dials[blank] / fast[blank]:.1f}"],
    ]
    worst = max(i["worst_px"] for i in images)
    return (
        f"**Spots**, {len(images)} images of 6 Mpx, from file to table; CPU-seconds an image. {same} of the {theirs} "
        f"spots of DIALS are found, {found[:, 0].sum()} in all; centroids differ by at most {worst:.2g} px.\n\n"
    ) + _table(["image", "fast", "DIALS", "ratio"], rows)


def _lattice_text(outcome: dict) -> str:
    return ", ".join(f"{n} ({r:.2f})" for n, r in zip(outcome["spots"], outcome["rmsd_px"])) or "none"


def _angle_text(angles: list[float]) -> str:
    return ", ".join("-" if math.isnan(a) else f"{a:.3f}" for a in angles)


def _agreement(images: list[dict], other: str, angles: str) -> dict[str, Any]:
    """How many lattices of DIALS `other` meets: in orientation, number of spots and rmsd, and in all three."""
    met = np.array(
        [
            [
                i[angles][0] < 0.05,
                i[other]["spots"][0] >= 0.98 * i["dials"]["spots"][0],
                i[other]["rmsd_px"][0] <= 1.02 * i["dials"]["rmsd_px"][0],
            ]
            for i in images
        ]
    )
    found = [i[angles][0] for i in images]
    gain = [i["likelihood"][other] - i["likelihood"]["dials"] for i in images]
    return {
        "met": met.sum(axis=0),
        "all": met.all(axis=1).sum(),
        "median": np.median(found),
        "largest": max(found),
        "gain": gain,
    }


def _cost_text(images: list[dict]) -> str:
    fast, dials = (np.array([i[engine]["s"] for i in images]) for engine in ("fast", "dials"))
    return (
        f"{fast.sum():.2f} and {dials.sum():.1f} CPU-seconds, ratio {dials.sum() / fast.sum():.0f} "
        f"(image by image {np.min(dials / fast):.0f} to {np.max(dials / fast):.0f}), slowest image {fast.max():.2f} s"
    )


def _thaumatin_table(r: dict) -> str:
    images = r["images"]
    rows = [
        [
            f"{i['image'] + 1}",
            f"{i['strong']}",
            f"{i['fast']['s']:.2f}",
            f"{i['dials']['s']:.1f}",
            _lattice_text(i["fast"]),
            _lattice_text(i["dials"]),
            _angle_text(i["angles"]),
            _lattice_text(i["control"]),
            _angle_text(i["control_angles"]),
            *(f"{i['likelihood'][name] - i['likelihood']['dials']:+.1f}" for name in ("fast", "control")),
        ]
        for i in images
    ]
    both = {"fast": _agreement(images, "fast", "angles"), "DIALS": _agreement(images, "control", "control_angles")}
    summary = [
        [
            name,
            *(f"{n} of {len(images)}" for n in (*a["met"], a["all"])),
            f"{a['median']:.3f}, {a['largest']:.3f}",
            f"{sum(d >= -0.5 for d in a['gain'])} of {len(images)}, {sum(a['gain']):+.0f}",
        ]
        for name, a in both.items()
    ]
    summary[1][0] = "DIALS, other cell"
    n_fast, n_dials = (sum(sum(i[e]["spots"]) for i in images) for e in ("fast", "dials"))
    return (
        f"**Indexing, thaumatin**, cell {CELL} given, refined geometry, one lattice: {_cost_text(images)}; "
        f"{n_fast} and {n_dials} spots. The table has spots (rmsd in px), angles to DIALS's lattice in degrees, and by "
        f"how much all spots of the image are more likely with the lattice than with DIALS's (logarithm). The other "
        f"cell, given to DIALS once more, is {OTHER_CELL}.\n\n"
        + _table(
            [
                "image",
                "strong",
                "fast s",
                "DIALS s",
                "fast",
                "DIALS",
                "angle",
                "DIALS, other cell",
                "angle",
                "likelihood, fast",
                "other cell",
            ],
            rows,
        )
        + "\n\n"
        + _table(
            [
                "against DIALS",
                "within 0.05 degrees",
                "98% of the spots",
                "rmsd within 2%",
                "all three",
                "median, largest angle",
                "not less likely, sum",
            ],
            summary,
        )
    )


def _nitrite_table(r: dict) -> str:
    parts = []
    for name, title in (("known", "cell and space group given"), ("unknown", "both unknown")):
        rows = []
        for i in r[name]:
            row = [f"{i['image'] + 1}", f"{i['strong']}", f"{i['fast']['s']:.2f}", f"{i['dials']['s']:.1f}"]
            for engine in ("fast", "dials"):
                row.append(_lattice_text(i[engine]))
                if name == "unknown":
                    row.append("; ".join(" ".join(f"{x:.1f}" for x in cell) for cell in i[engine]["cells"]) or "-")
            rows.append([*row, _angle_text(i["angles"])])
        cells = ["cell"] if name == "unknown" else []
        parts.append(
            f"**Indexing, nitrite reductase**, {title}, two lattices at most: {_cost_text(r[name])}.\n\n"
            + _table(["image", "strong", "fast s", "DIALS s", "fast", *cells, "DIALS", *cells, "angle"], rows)
        )
    return "\n\n".join(parts)


def _noise_table(r: dict) -> str:
    real, none = (np.array([i[name] for i in r["images"]]) for name in ("lattice_s", "noise_s"))
    return (
        f"**Images that cannot be indexed.** The spots of {len(real)} thaumatin stills, each turned about the beam by "
        f"a random angle: {none.mean():.2f} CPU-seconds an image (slowest {none.max():.2f}) against {real.mean():.2f} "
        f"({real.max():.2f}) as they are; lattices found in them: {sum(i['lattices_in_noise'] for i in r['images'])}."
    )


def _integration_table(r: dict) -> str:
    done = [x for x in r["stored"] if "reason" not in x]
    times = [x["cpu"] for x in done]
    figures = {name: [x["figures"][name] for x in done] for name in done[0]["figures"]}
    rows = [
        ["crystals integrated", f"{len(done)} of {len(r['stored'])}"],
        ["common reflections", f"{100 * min(figures['common']):.1f}% or more"],
        ["correlation of intensities", f"{min(figures['cc']):.5f} or more"],
        ["correlation of sigmas", f"{min(figures['cc_sigma']):.4f} or more"],
        ["ratio of the sums of intensities", f"{min(figures['ratio']):.4f} to {max(figures['ratio']):.4f}"],
        ["median difference of partialities", f"{max(figures['partiality']):.4f} or less"],
        ["relative difference of cells", f"{max(x['cell'] for x in done):.1e} or less"],
        [
            "relative difference of the eigenvalues of the mosaicity",
            f"{100 * max(np.abs(x['eigenvalues']).max() for x in done):.1f}% or less",
        ],
    ]
    beside = "; ".join(
        f"{x['cpu']:.2f} against {x['defaults']:.1f} (ratio {x['defaults'] / x['cpu']:.0f}) and {x['same']:.1f} "
        f"({x['same'] / x['cpu']:.0f})"
        for x in r["beside"]
    )
    return (
        f"**Integration, thaumatin**: {np.mean(times):.2f} CPU-seconds a crystal ({min(times):.2f} to "
        f"{max(times):.2f}). The {len(r['beside'])} weakest beside the installed DIALS, with its defaults and with the "
        f"same model and macro cycles: {beside}. Against DIALS 3.30 on the same indexed crystals, worst crystal:\n\n"
    ) + _table(["quantity", "value"], rows)


def _simulated_table(r: dict) -> str:
    rows = [
        ["hits with 15 visible spots, indexed", "hits_indexed", "hits"],
        ["true lattices of that strength, found", "found_lattices", "true_lattices"],
    ]
    engines = [r["fast"], r["dials"]]
    written = [[title, *(f"{e[a]} of {e[b]}" for e in engines)] for title, a, b in rows]
    for title, name, digits in (
        ("lattices in all", "lattices", 0),
        ("false lattices", "false_lattices", 0),
        ("found twice", "duplicate_lattices", 0),
        ("median orientation error, degrees", "orientation_error_deg", 4),
        ("mean orientation error, degrees", "mean_error_deg", 4),
        ("lattices closer to the truth than by the other", "closer", 0),
        ("CPU-seconds to index an image", "index_s", 2),
        ("CPU-seconds to integrate a crystal", "integrate_s", 2),
        ("crystals integrated", "integrated", 0),
        ("observations merged", "n_observations", 0),
        ("unique reflections", "n_merged", 0),
        ("CC to the truth, sums over the partiality", "cc_truth", 4),
        ("the same, one scale a crystal", "cc_truth_scaled", 4),
        ("unique reflections that both have", "n_same_unique", 0),
        ("CC of these, all observations of them, one scale a crystal", "cc_same_unique", 4),
        ("observations of both", "n_common", 0),
        ("CC of these, one scale a crystal", "cc_common", 4),
    ):
        written.append([title, *(f"{e[name]:.{digits}f}" for e in engines)])
    return (
        f"**Simulated truth**: {r['images']} images of lysozyme, 1 Mpx, one or two lattices, true geometry; the same "
        "strong spots, two lattices at most. Integrated are the crystals that the fast engine indexed; DIALS with its "
        "defaults; both merged by the same code.\n\n"
    ) + _table(["quantity", "fast", "DIALS"], written)


def _chip_table(r: dict) -> str:
    integrations = [r[name] for name in simulated.INTEGRATIONS]
    rows = [
        ["crystals", *(f"{i['lattices']}" for i in integrations)],
        ["CPU-seconds a crystal", *(f"{i['integrate_s'] / i['lattices']:.2f}" for i in integrations)],
        ["lattices closer to the truth than by DIALS", *(str(i["closer"] or "-") for i in integrations)],
    ]
    for title, name, digits in (
        ("median orientation error, degrees", "orientation_error_deg", 4),
        ("observations", "n_observations", 0),
        ("unique reflections", "n_merged", 0),
        ("CC, one scale a crystal, sums over the partiality", "cc_truth_scaled", 4),
        ("CC of the unique reflections that DIALS has, all observations", "cc_same_unique", 4),
        ("observations that DIALS has too", "n_common", 0),
        ("CC of these", "cc_common", 4),
        ("CC of these with the numbers of DIALS", "cc_common_dials", 4),
    ):
        rows.append([title, *(f"{i[name]:.{digits}f}" for i in integrations)])
    for program, title in (("ssx_mpi", "`ssx_mpi.reduce`"), ("dials", "`dials.scale` and `dials.merge`")):
        reduced = [i[program] for i in integrations]
        rows.append([f"CC of {title}, all reflections", *(f"{x['cc']:.4f}" for x in reduced)])
        title = f"CC of these, the {reduced[0]['n_common']} reflections of all four"
        rows.append([title, *(f"{x['cc_common']:.4f}" for x in reduced)])
    for number, (low, high) in enumerate(pairwise(simulated.SHARES)):
        title = f"measured over expected, partiality {low:g} to {high:g}"
        rows.append([title, *(f"{i['ratios'][number]:.2f}" for i in integrations)])
    return (
        "**Integration against the truth**: 200 images of lysozyme with a wrong header, the set of "
        "`benchmarks/main_job.py truth`. The fast engine refines the geometry and indexes (median orientation error "
        f"{r['indexed_error_deg']:.4f} degrees); these crystals are integrated by it, with `simple6` (the default) and "
        "with an angular model, and by `dials.ssx_integrate`, with its default model and with `simple6`; merged by the "
        "same code, and reduced by both programs. The last rows are medians of strong intensities over what truth and "
        f"partiality let expect, at d above {simulated.LOW_RESOLUTION:g} angstrom.\n\n"
    ) + _table(["quantity", *(i["title"] for i in integrations)], rows)


def _whole_table(r: dict) -> str:
    hits = [sum(i["s"].values()) for i in r["images"] if i["hit"]]
    blanks = [sum(i["s"].values()) for i in r["images"] if not i["hit"]]
    stages = {name: sum(i["s"].get(name, 0.0) for i in r["images"]) for name in ("find_spots", "index", "integrate")}
    return (
        f"**From file to integrated reflections**, {len(r['images'])} thaumatin stills: {np.mean(hits):.2f} "
        f"CPU-seconds a hit (slowest {max(hits):.2f}), {max(blanks):.3f} a blank; spots "
        f"{stages['find_spots']:.1f}, indexing {stages['index']:.1f}, integration {stages['integrate']:.1f} in all."
    )


def _memory_table(r: dict) -> str:
    resident = r["resident_mb"]
    return (
        f"**Memory of a rank** over {r['images']} images of 6 Mpx ({r['hits']} hits, {r['crystals']} crystals): "
        f"resident {resident[0]:.0f} MB after {MEMORY_STEP} images, {resident[len(resident) // 2]:.0f} half-way, "
        f"{resident[-1]:.0f} at the end, {max(resident):.0f} at most between batches; peak {r['peak_mb']:.0f} MB."
    )


PARTS = {
    "spots": spots,
    "indexing": thaumatin_indexing,
    "nitrite": nitrite_indexing,
    "noise": noise,
    "integration": thaumatin_integration,
    "simulated": lambda setup: simulated.stills(setup.work / "simulated", setup.n_simulated),
    "chip": lambda setup: simulated.chip(setup.work / "chip"),
    "whole": whole,
    "memory": memory,
}
TABLES = {
    "whole": _whole_table,
    "memory": _memory_table,
    "spots": _spots_table,
    "indexing": _thaumatin_table,
    "nitrite": _nitrite_table,
    "noise": _noise_table,
    "integration": _integration_table,
    "simulated": _simulated_table,
    "chip": _chip_table,
}


def write_tables(results: dict) -> None:
    """Put the tables between the markers of the document."""
    text = DOCUMENT.read_text()
    before, rest = text.split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    DOCUMENT.write_text(f"{before}{MARKERS[0]}\n\n{tables(results)}\n\n{MARKERS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "tables", []], help="all of them by default")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the real data")
    parser.add_argument("--images", type=Path, help="folder with the unpacked stills")
    parser.add_argument("--work", type=Path, help="folder for simulated images and runs; it is kept, and found again")
    parser.add_argument("--simulated-images", type=int, default=simulated.N_STILLS)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(exist_ok=True)
        images = arguments.images or integration.unpacked_images(arguments.data, Path(scratch))
        setup = Setup(arguments.data, images, work.resolve(), arguments.simulated_images)
        for name in arguments.parts or PARTS:
            if name != "tables":
                results[name] = PARTS[name](setup)
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(TABLES[name](results[name]), end="\n\n", flush=True)
    write_tables(results)


if __name__ == "__main__":
    main()
