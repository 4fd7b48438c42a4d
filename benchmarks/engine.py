"""The fast engine beside DIALS, stage by stage, in one command.

    python benchmarks/engine.py                      all parts, then the table
    python benchmarks/engine.py indexing memory      these parts again; of the others the last numbers are kept
    python benchmarks/engine.py table                the table alone

Numbers are kept in ``benchmarks/engine.json`` and written as tables into ``docs/performance.md``, between two markers.
Times are CPU-seconds; what is compared runs in turn in one process, so that a busy machine hurts both alike. Both
engines get the same input: images, strong spots, geometry, cell, indexed crystals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "engine.json"
DATA = ROOT.parent / "shared" / "data"
THAUMATIN = ("space_group=P41212", "unit_cell=57.8,57.8,150.2,90,90,90")
MEMORY_IMAGES = 1000
MEMORY_STEP = 50


# ---- memory ---------------------------------------------------------------------------------------------------------


def memory(images: Path, work: Path) -> dict:
    """Resident memory of a rank over 1,000 images: the thaumatin stills over and over, under as many names.

    The whole program runs, with the refined geometry given; the memory is read when it reports a batch of 50.
    """
    stills = sorted(images.glob("*.cbf"))
    folder = work / "many"
    folder.mkdir()
    for number in range(MEMORY_IMAGES):
        (folder / f"still_{number + 1:05d}.cbf").symlink_to(stills[number % len(stills)])
    command = [
        sys.executable,
        "-c",
        "from ssx_mpi.command_line.process import run; run()",
        "nproc=1",
        f"template={folder}/still_#####.cbf:1:{MEMORY_IMAGES}",
        *THAUMATIN,
        "max_lattices=1",
        f"reference_geometry={work / 'geometry.expt'}",
        f"batch_size={MEMORY_STEP}",
        "keep_intermediate=False",
        f"output.directory={work / 'run'}",
    ]
    resident = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.startswith("Batch "):
                    resident.append(_status_mb(program.pid, "VmRSS"))
                    peak = _status_mb(program.pid, "VmHWM")
        finally:
            program.kill()
    summary = json.loads((work / "run" / "ssx_mpi.json").read_text())
    counts = summary["total"]["counts"]
    seconds = sum(summary["total"]["cpu_seconds"].values())
    return {
        "images": counts["images"],
        "hits": counts["hits"],
        "crystals": counts["crystals"],
        "resident_mb": resident,
        "peak_mb": peak,
        "cpu_seconds_per_image": seconds / counts["images"],
    }


def _status_mb(process: int, field: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return round(int(value) / 1024, 1)
