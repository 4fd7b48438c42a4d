"""The crystals of a rank: where they come from, what their cells are, what became of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np


class Fate(IntEnum):
    """Why a crystal is in the merged data or not."""

    KEPT = 0
    NO_REFLECTIONS = 1
    CELL = 2
    AMBIGUOUS = 3
    NOT_SCALED = 4
    I_SIGMA = 5
    DELTA_CC_HALF = 6


FATE_TEXT = {
    Fate.KEPT: "merged",
    Fate.NO_REFLECTIONS: "without enough usable reflections",
    Fate.CELL: "unit cell outside the tolerance",
    Fate.AMBIGUOUS: "indexing ambiguity undecided",
    Fate.NOT_SCALED: "no scale found",
    Fate.I_SIGMA: "mean I/sigma too low",
    Fate.DELTA_CC_HALF: "lowering CC1/2",
}


@dataclass(frozen=True)
class Crystals:
    """The crystals of one rank, in their order in the files.

    Parameters
    ----------
    number
        (n,) int64, of each crystal in the whole data set.
    source, position
        (n,) int32, which file, and which experiment in it.
    identifier
        Experiment identifiers, n of them.
    cell
        (n, 6) float64, angstrom and degrees.
    wavelength
        (n,) float64 in angstrom.
    beam
        (n, 3) float64, direction in which the beam travels.
    image
        Paths or templates of the images, n of them.
    image_number
        (n,) int64: in a file of many images the 1-based number in it, else the number in the file's name.
    """

    number: np.ndarray
    source: np.ndarray
    position: np.ndarray
    identifier: tuple[str, ...]
    cell: np.ndarray
    wavelength: np.ndarray
    beam: np.ndarray
    image: tuple[str, ...]
    image_number: np.ndarray

    def __len__(self) -> int:
        return len(self.number)
