"""Spots of one still, the same as those of ``dials.find_spots``, at a fraction of its cost."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import libtbx
import numpy as np
from dials.algorithms.shoebox import MaskCode
from dials.array_family import flex
from dials.model.data import PixelList, PixelListLabeller
from dials.util import masking
from dxtbx import flumpy
from dxtbx.model import Experiment, ExperimentList

from ssx_mpi import dials_compat
from ssx_mpi.images.frames import BadImage, Frame
from ssx_mpi.images.mask_files import load_mask_file
from ssx_mpi.kernels.spots import DispersionCriteria, StrongPixelFinder, groups_of_size

# since this version DIALS does not take masked pixels for background when it erodes the signal (dials #2790)
_NO_EROSION_BESIDE_MASKED = (3, 24)
# DIALS's smallest spot, by kind of detector
_MIN_SPOT_SIZE_PIXEL_ARRAY = 3
_MIN_SPOT_SIZE_OTHER = 6
# values of parameters that are covered; lists may be given several times, and hold None when they are not
_NONE_GIVEN: tuple = (None, [], [None])
_COVERED: dict[str, tuple] = {
    "spotfinder.threshold.algorithm": ("dispersion_extended", "dispersion"),
    "spotfinder.filter.background_gradient.filter": (False,),
    "spotfinder.filter.spot_density.filter": (False,),
    "spotfinder.compute_mean_background": (False,),
    "spotfinder.write_hot_mask": (False,),
    "spotfinder.scan_range": _NONE_GIVEN,
    "spotfinder.exclude_images": _NONE_GIVEN,
    "spotfinder.exclude_images_multiple": _NONE_GIVEN,
    "maximum_trusted_value": (None,),
    "output.shoeboxes": (True,),
}
_SIGNAL = MaskCode.Foreground | MaskCode.Valid


class FastSpotFinder:
    """Finds the spots of stills, one image at a time; made once per rank.

    What is the same for every image (masks by resolution and region, work space) is kept; it is made again when the
    detector or, where it matters, the beam changes. Strong pixels come from :mod:`ssx_mpi.kernels.spots`; shoeboxes and
    centroids are left to DIALS, which needs few milliseconds for the pixels of spots of an allowed size.

    The thresholds assume counts, whose variance is their mean. Calibrated pixels have the noise of the readout, of
    variance r, as well; with r added to each of them mean and variance are the same again (Huang et al. 2013, Nat.
    Methods 10, 653).

    Parameters
    ----------
    params
        Extracted scope of ``dials.command_line.find_spots.phil_scope``; it is not changed.
    erode_beside_masked
        Whether masked pixels count as background when the signal is eroded, as in DIALS before 3.24; the default does
        what the installed DIALS does.

    Raises
    ------
    ValueError
        When :meth:`supports` refuses the parameters, or when they make no sense.
    """

    def __init__(self, params, erode_beside_masked: bool | None = None):
        supported, reason = self.supports(params)
        if not supported:
            raise ValueError(reason)
        if erode_beside_masked is None:
            erode_beside_masked = dials_compat.dials_version() < _NO_EROSION_BESIDE_MASKED
        finder = params.spotfinder
        dispersion = finder.threshold.dispersion
        self._criteria = DispersionCriteria(
            extended=finder.threshold.algorithm == "dispersion_extended",
            kernel_size=tuple(dispersion.kernel_size),
            gain=1.0 if dispersion.gain is None else dispersion.gain,
            sigma_background=dispersion.sigma_background,
            sigma_strong=dispersion.sigma_strong,
            min_local=dispersion.min_local,
            global_threshold=dispersion.global_threshold,
            erode_beside_masked=erode_beside_masked,
        )
        # generating masks fills in defaults
        self._filter = copy.deepcopy(finder.filter)
        if None not in (self._filter.d_min, self._filter.d_max) and self._filter.d_min > self._filter.d_max:
            raise ValueError(f"d_min={self._filter.d_min} is above d_max={self._filter.d_max}: no pixel is left")
        self._region = finder.region_of_interest
        self._lookup_mask = _read_mask(finder.lookup.mask)
        self._masks: _RegionMasks | None = None
        # by shape: panels of a detector have one, or very few
        self._finders: dict[tuple[int, ...], StrongPixelFinder] = {}

    @staticmethod
    def supports(params) -> tuple[bool, str]:
        """Whether these parameters of ``dials.find_spots`` are covered, and if not, which ones are not.

        Parameters
        ----------
        params
            Extracted scope of ``dials.command_line.find_spots.phil_scope``.

        Returns
        -------
        supported, reason
            The reason is empty when supported.
        """
        left = [path.removeprefix("spotfinder.") for path in dials_compat.uncovered(params, _COVERED)]
        # estimated from the first image that comes along, which depends on the order
        if params.spotfinder.threshold.dispersion.global_threshold is libtbx.Auto:
            left.append("threshold.dispersion.global_threshold=Auto")
        return not left, "; ".join(f"the fast spot finder does not do {name}" for name in left)

    def find(self, experiment: Experiment, frame: Frame) -> flex.reflection_table:
        """Spots of one still.

        Parameters
        ----------
        experiment
            Beam, detector, image set and identifier of the image.
        frame
            The image.

        Returns
        -------
        The table that ``flex.reflection_table.from_observations`` gives for this image alone with ``is_stills=True``,
        and the column ``n_signal`` that ``dials.find_spots`` adds to it.

        Raises
        ------
        BadImage
            When there are more strong pixels than ``max_strong_pixel_fraction`` allows.
        """
        masks = self._region_masks(experiment.imageset)
        strong = [
            # photons with readout noise, moved by its variance, have the mean and the variance of counts
            self._strong_pixels(data + readout if readout else data, mask if region is None else mask & region)
            for data, readout, mask, region in zip(frame.data, frame.readout, frame.masks, masks)
        ]
        self._check_fraction(frame, sum(map(len, strong)))
        shoeboxes = self._shoeboxes(frame, strong, self._min_spot_size(experiment))
        return self._table(shoeboxes, experiment)

    def _strong_pixels(self, data: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Places of the strong pixels in the flattened panel."""
        if self._region is None:
            return self._finder(data.shape)(data, mask)
        x0, x1, y0, y1 = self._region
        height, width = data.shape
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"region_of_interest {x0},{x1},{y0},{y1} does not lie in {width} x {height} pixels")
        part = np.ascontiguousarray(data[y0:y1, x0:x1])
        strong = self._finder(part.shape)(part, np.ascontiguousarray(mask[y0:y1, x0:x1]))
        return (strong // (x1 - x0) + y0) * width + strong % (x1 - x0) + x0

    def _finder(self, shape: tuple[int, ...]) -> StrongPixelFinder:
        if shape not in self._finders:
            self._finders[shape] = StrongPixelFinder(shape, self._criteria)
        return self._finders[shape]

    def _check_fraction(self, frame: Frame, n_strong: int) -> None:
        limit = self._filter.max_strong_pixel_fraction
        if limit < 1 and n_strong > math.ceil(limit * frame.n_pixels):
            raise BadImage(frame.image, "too many strong pixels", f"{n_strong} of {frame.n_pixels}")

    def _min_spot_size(self, experiment: Experiment) -> int:
        if self._filter.min_spot_size is not libtbx.Auto:
            return self._filter.min_spot_size
        is_pixel_array = experiment.detector[0].get_type() == "SENSOR_PAD"
        return _MIN_SPOT_SIZE_PIXEL_ARRAY if is_pixel_array else _MIN_SPOT_SIZE_OTHER

    def _shoeboxes(self, frame: Frame, strong: list[np.ndarray], min_spot_size: int) -> flex.shoebox:
        """Connected strong pixels of an allowed number, panel by panel."""
        shoeboxes = flex.shoebox()
        for panel, (data, all_places) in enumerate(zip(frame.data, strong)):
            # DIALS would connect all pixels, and then drop most of them again for the size of their spot
            places = groups_of_size(all_places, data.shape[1], min_spot_size, self._filter.max_spot_size)
            if len(places) == 0:
                continue
            values = flumpy.from_numpy(data.ravel()[places].astype(np.float64))
            labeller = PixelListLabeller()
            labeller.add(PixelList(frame.array_index, data.shape, values, flex.size_t(places.astype(np.uint64))))
            twod, find_hot_pixels = True, False
            creator = flex.PixelListShoeboxCreator(
                labeller, panel, 0, twod, min_spot_size, self._filter.max_spot_size, find_hot_pixels
            )
            shoeboxes.extend(creator.result())
        return shoeboxes

    def _table(self, shoeboxes: flex.shoebox, experiment: Experiment) -> flex.reflection_table:
        observed = flex.observation(shoeboxes.panels(), shoeboxes.centroid_valid(), shoeboxes.summed_intensity())
        if self._filter.max_separation is not None:
            offsets = shoeboxes.peak_coordinates() - observed.centroids().px_position()
            keep = offsets.norms() <= self._filter.max_separation
            observed, shoeboxes = observed.select(keep), shoeboxes.select(keep)
        table = flex.reflection_table(observed, shoeboxes)
        table["id"] = flex.int(len(table), 0)
        if experiment.identifier:
            table.experiment_identifiers()[0] = experiment.identifier
        table["n_signal"] = table["shoebox"].count_mask_values(_SIGNAL)
        table.set_flags(flex.bool(len(table), True), table.flags.strong)
        table.is_overloaded(ExperimentList([experiment]))
        return table

    def _region_masks(self, imageset) -> tuple[np.ndarray | None, ...]:
        """Pixels that the parameters allow, per panel; None for a panel without any excluded."""
        if self._masks is None or not self._masks.fit(imageset, self._depends_on_geometry()):
            self._masks = _RegionMasks(imageset, self._filter, self._lookup_mask)
        return self._masks.panels

    def _depends_on_geometry(self) -> bool:
        f = self._filter
        return f.d_min is not None or f.d_max is not None or any(f.resolution_range or ()) or f.ice_rings.filter


class _RegionMasks:
    """Masks from the parameters, and the models that they were made for."""

    def __init__(self, imageset, filter_params, lookup_mask):
        # copies: a detector that is refined in place is another one
        self._beam = copy.deepcopy(imageset.get_beam())
        self._detector = copy.deepcopy(imageset.get_detector())
        masks = [flumpy.to_numpy(mask) for mask in masking.generate_mask(imageset, filter_params)]
        if lookup_mask is not None:
            if [m.shape for m in lookup_mask] != [m.shape for m in masks]:
                raise ValueError("the mask in spotfinder.lookup.mask does not have the shape of the detector")
            masks = [m & given for m, given in zip(masks, lookup_mask)]
        self.panels = tuple(None if mask.all() else mask for mask in masks)

    def fit(self, imageset, depends_on_geometry: bool) -> bool:
        beam, detector = imageset.get_beam(), imageset.get_detector()
        if depends_on_geometry:
            return self._beam == beam and self._detector == detector
        return [p.get_image_size() for p in self._detector] == [p.get_image_size() for p in detector]


def _read_mask(path: str | None) -> tuple[np.ndarray, ...] | None:
    """Masks of all panels from a file as ``dials.generate_mask`` writes it."""
    if not path:
        return None
    return tuple(flumpy.to_numpy(mask) for mask in load_mask_file(Path(path)))
