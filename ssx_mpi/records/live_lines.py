"""``live.jsonl``: a line of JSON for each image as it is finished, for programs that plot while the data come in.

A line has the keys that the plotter of Diamond's beamlines reads (``file``, ``file-number``, ``n_spots_total``;
``lattices`` with ``unit_cell``, ``space_group`` and ``n_indexed``; ``n_unindexed``) besides ours. Rank 0 writes it. An
image has one line, over any number of starts in a folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ssx_mpi.records.files import storing

NAME = "live.jsonl"


def line_of(numbers: dict[str, Any], space_group: str | None) -> str:
    """The line of an image, without its end.

    Parameters
    ----------
    numbers
        Of the image, as they stand in ``images.json``.
    space_group
        Symbol of that of the run.
    """
    file, _, frame = numbers["name"].rpartition(":")
    if not frame.isdigit():
        # a file for each image has its number in its name
        file, found = numbers["name"], re.search(r"(\d+)\D*$", numbers["name"].rpartition(".")[0])
        frame = found[1] if found else "1"
    lattices = [
        {
            "unit_cell": [round(p, 4) for p in lattice["cell"]],
            "space_group": space_group,
            "n_indexed": lattice["n_indexed"],
            "d_min": round(lattice["d_min"], 3),
            "rmsd": [round(lattice["rmsd_x"], 4), round(lattice["rmsd_y"], 4)],
        }
        for lattice in numbers["lattices"]
    ]
    crystals = [
        {
            "unit_cell": [round(p, 4) for p in crystal["cell"]],
            "n_reflections": crystal["n_reflections"],
            "i_over_sigma": round(crystal["i_over_sigma"], 3),
            "mosaicity": crystal["mosaicity"],
        }
        for crystal in numbers["crystals"]
    ]
    return json.dumps(
        {
            "file": file,
            "file-number": int(frame),
            "n_spots_total": numbers["n_spots"],
            "lattices": lattices,
            "n_unindexed": max(0, numbers["n_spots"] - sum(lattice["n_indexed"] for lattice in lattices)),
            "image": numbers["image"],
            "hit": numbers["hit"],
            "crystals": crystals,
            "failures": numbers["failures"],
            **{name: _short(value) for name, value in numbers.get("measured", {}).items()},
            "cpu_seconds": round(sum(numbers["seconds"].values()), 4),
        },
        separators=(",", ":"),
    )


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


class LiveLines:
    """The lines of a run in `directory` with `n_images` images, of which those on the disk are kept.

    Raises
    ------
    StorageError
        When it cannot be written.
    """

    def __init__(self, directory: Path, n_images: int) -> None:
        self.path = directory / NAME
        self._written = bytearray(n_images)
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
            self._file.seek(0)
            whole = 0
            for line in self._file:
                image = _image(line, n_images)
                if image is None:
                    break
                self._written[image] = 1
                whole += len(line)
            # a kill may have cut the last line short
            self._file.truncate(whole)

    def add(self, image: int, line: str) -> None:
        """Write the line of `image`, unless it has one."""
        if self._written[image]:
            return
        self._written[image] = 1
        with storing(self.path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def add_earlier(self, images: Iterable[dict[str, Any]], space_group: str | None) -> None:
        """Write the lines of images that were finished before lines were asked for, or whose line a kill prevented."""
        for numbers in images:
            if not self._written[numbers["image"]]:
                self.add(numbers["image"], line_of(numbers, space_group))

    def close(self) -> None:
        self._file.close()


def _image(line: bytes, n_images: int) -> int | None:
    """Number of the image of a whole line; None for a line that was cut short or is not ours."""
    if not line.endswith(b"\n"):
        return None
    try:
        image = json.loads(line)["image"]
    except (ValueError, KeyError, TypeError):
        return None
    return image if isinstance(image, int) and 0 <= image < n_images else None
