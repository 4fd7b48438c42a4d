"""Numbers about each image that do not ask for crystals: background, ice, saturated pixels, resolution of its spots."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from ssx_mpi.images.frames import Frame
from ssx_mpi.kernels.background import background_numbers, share_on_ice_rings
from ssx_mpi.stages.still_results import ImageNumbers

# pixels of an image that are looked at, about
_SAMPLE = 30_000
# spots from which a resolution is said; a few strays at high resolution say nothing about the crystal
_FEWEST_SPOTS, _PERCENTILE = 5, 95


class ImageMeasure:
    """Takes the numbers of images; where the sampled pixels are is kept from one image to the next."""

    def __init__(self) -> None:
        self._detector: Any = None
        self._key: tuple[Any, ...] = ()
        self._step = 1
        self._ray_sq = np.empty(0, np.float32)
        self._to_lab = np.empty((0, 3, 3))

    def pixels(self, experiment: Any, frame: Frame) -> ImageNumbers:
        """What the pixels of an image say."""
        self._place(experiment)
        every = slice(self._step // 2, None, self._step)
        values = np.concatenate([panel[every, every].ravel() for panel in frame.data]).astype(np.float64, copy=False)
        valid = np.concatenate([mask[every, every].ravel() for mask in frame.masks])
        wavelength = experiment.beam.get_wavelength()
        found = background_numbers(values, valid, self._ray_sq, wavelength, max(frame.readout))
        return ImageNumbers(background=found.mean, ice=found.ice, n_saturated=frame.n_saturated, wavelength=wavelength)

    def spots(self, experiment: Any, table: Any, numbers: ImageNumbers) -> ImageNumbers:
        """`numbers` with what the strong spots of the image say."""
        if len(table) < _FEWEST_SPOTS:
            return numbers
        self._place(experiment)
        x, y, _ = (np.asarray(part) for part in table["xyzobs.px.value"].parts())
        ray = np.einsum("nij,nj->ni", self._to_lab[np.asarray(table["panel"])], np.stack([x, y, np.ones_like(x)], 1))
        d_star_sq = _ray_sq(ray, experiment.beam) / experiment.beam.get_wavelength() ** 2
        return replace(
            numbers,
            spots_d_min=float(1 / math.sqrt(np.percentile(d_star_sq, _PERCENTILE))),
            ice_spots=share_on_ice_rings(d_star_sq),
        )

    def _place(self, experiment: Any) -> None:
        """Make what is kept that of the geometry of `experiment`."""
        detector, beam = experiment.detector, experiment.beam
        if detector is self._detector and self._key[0] == beam.get_unit_s0():
            return
        key = (beam.get_unit_s0(), *((p.get_d_matrix(), p.get_image_size(), p.get_pixel_size()) for p in detector))
        self._detector = detector
        if key == self._key:
            return
        self._key = key
        to_lab, sizes = [], []
        for panel in detector:
            matrix = np.array(panel.get_d_matrix()).reshape(3, 3)
            # of pixels: what the thickness of the sensor shifts is less than a ring is wide
            to_lab.append(matrix * np.array([*panel.get_pixel_size(), 1.0]))
            sizes.append(panel.get_image_size())
        self._to_lab = np.array(to_lab)
        self._step = max(1, math.isqrt(sum(width * height for width, height in sizes) // _SAMPLE))
        sampled = []
        for matrix, (width, height) in zip(to_lab, sizes):
            y, x = np.mgrid[self._step // 2 : height : self._step, self._step // 2 : width : self._step] + 0.5
            sampled.append(_ray_sq(np.stack([x.ravel(), y.ravel(), np.ones(x.size)], 1) @ matrix.T, beam))
        self._ray_sq = np.concatenate(sampled).astype(np.float32)


def _ray_sq(ray: np.ndarray, beam: Any) -> np.ndarray:
    """4 sin^2(theta) of rays ``(n, 3)`` of any length, ``(n,)``."""
    unit = ray / np.linalg.norm(ray, axis=1, keepdims=True)
    # |u - s|^2 of two unit vectors
    return np.sum((unit - np.array(beam.get_unit_s0())) ** 2, axis=1)
