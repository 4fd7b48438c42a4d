"""Two thousand small files, a hundred of them damaged in several ways, made of a few simulated ones."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from small_chips import SYMMETRY, small_chip

N_IMAGES = 2000
_N_SIMULATED, _EVERY_HIT, _EVERY_DAMAGED = 30, 40, 20


@dataclass(frozen=True)
class ManyStills:
    """Where the files are, and names of the damaged ones."""

    folder: Path
    damaged: frozenset[str]

    @classmethod
    def made(cls, folder: Path) -> ManyStills:
        """One image in 40 a hit, one in 20 damaged, the rest blanks; files of the same content are one file."""
        folder.mkdir()
        small_chip(folder.parent / "x.cbf", 100.0, n_images=_N_SIMULATED, hit_rate=0.3, seed=9)
        files = sorted(folder.parent.glob("x_*.cbf"))
        hits, blanks = _divide(folder.parent / "truth.json", files)
        damage = _Damage(blanks[0].read_bytes())
        damaged = set()
        for i in range(N_IMAGES):
            path = folder / f"y_{i + 1:05d}.cbf"
            if i % _EVERY_DAMAGED == 7:
                path.write_bytes(damage())
                damaged.add(path.name)
            else:
                source = hits[i // _EVERY_HIT % len(hits)] if i % _EVERY_HIT == 3 else blanks[i % len(blanks)]
                os.link(source, path)
        return cls(folder, frozenset(damaged))

    def arguments(self, directory: Path, *more: str) -> list[str]:
        return [
            f"template={self.folder}/y_#####.cbf",
            *SYMMETRY,
            f"reference_geometry={self.folder.parent}/truth.expt",
            "batch_size=250",
            "steps=find_spots+index+integrate",
            f"output.directory={directory}",
            *more,
        ]


def _divide(truth: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Simulated images with a crystal, and those without."""
    n_lattices = [image["lattices"] for image in json.loads(truth.read_text())["images"]]
    assert len(n_lattices) == len(files)
    hits = [f for f, n in zip(files, n_lattices) if n]
    return hits, [f for f, n in zip(files, n_lattices) if not n]


class _Damage:
    """Contents of a file that is cut short in its data or its header, is empty, or is something else."""

    def __init__(self, sound: bytes) -> None:
        self._sound = sound
        self._random = random.Random(3)
        self._kind = 0

    def __call__(self) -> bytes:
        self._kind += 1
        length = len(self._sound)
        kinds = (
            lambda: self._sound[: self._random.randrange(length // 2, length - 5000)],
            lambda: self._sound[: self._random.randrange(100, 600)],
            lambda: b"",
            lambda: self._random.randbytes(5000),
        )
        return kinds[self._kind % len(kinds)]()
