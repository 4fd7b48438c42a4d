"""One still in memory: read and decompressed once, with its mask, for spot finding and integration alike."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from dxtbx import flumpy
from dxtbx.imageset import ImageSequence
from dxtbx.model import Detector, DetectorFactory, Panel

from ssx_mpi.kernels.cbf_decompression import decode_byte_offset
from ssx_mpi.kernels.spots import trusted_pixels

logger = logging.getLogger(__name__)

# the four bytes between the header and the data of a CBF binary section
_CBF_DATA_FOLLOW = bytes.fromhex("0c1a04d5")
# headers seen have 1 to 3 kB; those of detectors with long descriptions some more
_CBF_LONGEST_HEADER = 1 << 16
# every so many rows and columns of counts are looked at for negative ones
_SAMPLED = 8
# fewer negative pixels than this, and this share of all, are faults of pixels
_FEWEST_NEGATIVE, _LEAST_NEGATIVE = 50, 1e-3


class BadImage(Exception):
    """An image that cannot be used: `reason` says why, in few words, the same for images with the same fault."""

    def __init__(self, image: str, reason: str, details: str = ""):
        super().__init__(f"{image}: {reason}" + (f" ({details})" if details else ""))
        self.image = image
        self.reason = reason
        self.details = details


@dataclass(frozen=True)
class Frame:
    """One still, panel by panel; panels as ``(slow, fast)`` arrays.

    Attributes
    ----------
    image
        Where it was read from, to be named in messages.
    array_index
        Number of the image in its scan or image set, from 0: the z of its spots less one half.
    raw
        Values as read, int32 or float64.
    data
        Counts corrected for pedestal and gain as dxtbx's ``get_corrected_data`` does it: `raw` itself where there is
        neither, otherwise float64.
    masks
        Pixels that dxtbx calls valid in this image (``get_mask``), bool: not masked by the format, the panel or a mask
        file, and in the trusted range.
    n_saturated
        Pixels above the trusted range that no mask leaves out; None where the format tells its masks image by image.
    """

    image: str
    array_index: int
    raw: tuple[np.ndarray, ...]
    data: tuple[np.ndarray, ...]
    masks: tuple[np.ndarray, ...]
    n_saturated: int | None = None

    @property
    def n_pixels(self) -> int:
        """Number of pixels of all panels."""
        return sum(panel.size for panel in self.raw)

    @cached_property
    def readout(self) -> tuple[float, ...]:
        """Variance of the readout noise of each panel, 0 where pixels are counts."""
        return tuple(readout_variance(data, mask) for data, mask in zip(self.data, self.masks))


def readout_variance(data: np.ndarray, mask: np.ndarray) -> float:
    """Variance of the readout noise of a calibrated panel, in squared photons; 0 where its pixels are counts.

    Nothing but noise makes a pixel negative. Those without a photon are distributed about zero, so that the median of
    the absolute values of the negative ones is that of a half-normal distribution, 0.6745 standard deviations.

    Parameters
    ----------
    data, mask
        (slow, fast), and which pixels can be trusted.
    """
    # of counts a sample tells: where a detector has negative counts, many pixels have them
    every = 1 if data.dtype.kind == "f" else _SAMPLED
    sample, good = data[::every, ::every], mask[::every, ::every]
    negative = sample[(sample < 0) & good]
    if len(negative) < max(_FEWEST_NEGATIVE, _LEAST_NEGATIVE * sample.size):
        return 0.0
    return float((np.median(-negative) / 0.6745) ** 2)


class FrameReader:
    """Reads stills; made once per rank, it keeps what is the same for every image.

    Kept is the mask of pixels that are never valid, for the last detector and mask file seen; per image only the test
    of the trusted range is done. The kept mask is compared with dxtbx's own the first time, and where they differ (a
    format with a rule of its own) every mask comes from dxtbx.

    Parameters
    ----------
    share_with_dxtbx
        Read through the image set, so that dxtbx keeps the decompressed image and later calls of DIALS on the same
        image set object find it there (they do, for as long as no other image of that image set is read). Otherwise
        mini-CBF files are decompressed here, in a fifth of the time, and dxtbx would have to read them again.
    """

    def __init__(self, share_with_dxtbx: bool = False):
        self.share_with_dxtbx = share_with_dxtbx
        self._valid: _ValidPixels | None = None

    def __call__(self, imageset, index: int = 0) -> Frame:
        """Read image `index` of a dxtbx image set.

        Raises
        ------
        BadImage
            When the file is missing, damaged, truncated, or does not fit the detector, or the image was marked for
            rejection.
        """
        image = _image_name(imageset, index)
        if imageset.is_marked_for_rejection(index):
            raise BadImage(image, "marked for rejection")
        detector = _detector(imageset, index)
        try:
            raw = self._read(imageset, index)
        except (BadImage, MemoryError):
            raise
        # formats raise whatever comes up in the libraries below them
        except Exception as error:
            raise BadImage(image, "cannot be read", f"{type(error).__name__}: {error}") from error
        _check_shapes(image, raw, detector)
        masks, n_saturated = self._masks(image, imageset, index, detector, raw)
        return Frame(
            image=image,
            array_index=_array_index(imageset, index),
            raw=raw,
            data=_corrected(raw, imageset.get_gain(index), imageset.get_pedestal(index)),
            masks=masks,
            n_saturated=n_saturated,
        )

    def _read(self, imageset, index: int) -> tuple[np.ndarray, ...]:
        if not self.share_with_dxtbx and _is_plain_mini_cbf(imageset):
            pixels = _read_byte_offset_cbf(imageset.get_path(index))
            if pixels is not None:
                return (pixels,)
        panels = imageset.get_raw_data(index)
        return tuple(
            _int32_or_float64(flumpy.to_numpy(p)) for p in (panels if isinstance(panels, tuple) else (panels,))
        )

    def _masks(
        self, image: str, imageset, index: int, detector: Detector, raw: Sequence[np.ndarray]
    ) -> tuple[tuple[np.ndarray, ...], int | None]:
        if imageset.has_dynamic_mask():
            return _dxtbx_masks(imageset, index), None
        key = _mask_key(imageset, detector)
        if self._valid is None or self._valid.key != key:
            self._valid = _valid_pixels(key, imageset, detector)
            if not _agrees_with_dxtbx(self._valid, imageset, index, detector, raw):
                logger.warning("the masks of %s and of images like it are taken from dxtbx, which is slower", image)
                self._valid = _ValidPixels(key, None)
        if self._valid.panels is None:
            return _dxtbx_masks(imageset, index), None
        return _within_trusted_range(self._valid.panels, detector, raw)


@dataclass(frozen=True)
class _ValidPixels:
    """Pixels that may be valid in any image, per panel; None where only dxtbx can tell."""

    key: tuple
    panels: tuple[np.ndarray, ...] | None


def _mask_key(imageset, detector: Detector) -> tuple:
    lookup = imageset.external_lookup.mask
    panels = tuple((p.get_image_size(), tuple(map(tuple, p.get_mask()))) for p in detector)
    if lookup.data.empty():
        return panels, None
    # a mask without a file comes from the image file itself, as in NeXus: its content has to tell
    return panels, lookup.filename or tuple(flumpy.to_numpy(t.data()).tobytes() for t in lookup.data)


def _valid_pixels(key: tuple, imageset, detector: Detector) -> _ValidPixels:
    panels = []
    lookup = imageset.external_lookup.mask.data
    for i, panel in enumerate(detector):
        width, height = panel.get_image_size()
        valid = np.ones((height, width), bool)
        for x0, y0, x1, y1 in panel.get_mask():
            valid[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = False
        if not lookup.empty():
            given = flumpy.to_numpy(lookup.tile(i).data())
            if given.shape != valid.shape:
                raise BadImage(
                    _image_name(imageset, 0), "its mask does not fit the detector", f"{given.shape} for {valid.shape}"
                )
            valid &= given
        panels.append(valid)
    return _ValidPixels(key, tuple(panels))


def _within_trusted_range(
    valid: Sequence[np.ndarray], detector: Detector, raw: Sequence[np.ndarray]
) -> tuple[tuple[np.ndarray, ...], int]:
    """Masks of the panels, and the number of valid pixels above the trusted range."""
    found = [trusted_pixels(r, v, *_trusted_range(panel)) for r, v, panel in zip(raw, valid, detector)]
    return tuple(mask for mask, _ in found), sum(above for _, above in found)


def _trusted_range(panel: Panel) -> tuple[float, float]:
    """Lowest and highest valid value of a panel, both themselves valid."""
    lowest, highest = panel.get_trusted_range()
    if _trusted_range_is_inclusive():
        return lowest, highest
    return np.nextafter(lowest, np.inf), np.nextafter(highest, -np.inf)


@functools.cache
def _trusted_range_is_inclusive() -> bool:
    """Whether this dxtbx counts the ends of the trusted range as valid: it did not before dxtbx #536 (DIALS 3.13)."""
    panel = DetectorFactory.simple("PAD", 1.0, (0.0, 0.0), "+x", "-y", (1.0, 1.0), (1, 1), (0.0, 1.0))[0]
    pixel = flumpy.from_numpy(np.zeros((1, 1)))
    return panel.get_trusted_range_mask(pixel)[0]


def _agrees_with_dxtbx(
    valid: _ValidPixels, imageset, index: int, detector: Detector, raw: Sequence[np.ndarray]
) -> bool:
    ours, _ = _within_trusted_range(valid.panels or (), detector, raw)
    theirs = _dxtbx_masks(imageset, index)
    return len(ours) == len(theirs) and all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def _dxtbx_masks(imageset, index: int) -> tuple[np.ndarray, ...]:
    return tuple(flumpy.to_numpy(mask) for mask in imageset.get_mask(index))


def _image_name(imageset, index: int) -> str:
    name = imageset.get_path(index)
    return f"{name}:{imageset.indices()[index]}" if imageset.data().has_single_file_reader() else name


def _detector(imageset, index: int) -> Detector:
    return imageset.get_detector() if isinstance(imageset, ImageSequence) else imageset.get_detector(index)


def _array_index(imageset, index: int) -> int:
    if isinstance(imageset, ImageSequence):
        return imageset.get_array_range()[0] + index
    return imageset.indices()[index]


def _int32_or_float64(panel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(panel, np.int32 if panel.dtype == np.int32 else np.float64)


def _check_shapes(image: str, raw: Sequence[np.ndarray], detector: Detector) -> None:
    found = [panel.shape for panel in raw]
    expected = [panel.get_image_size()[::-1] for panel in detector]
    if found != expected:
        raise BadImage(image, "does not fit the detector", f"{found} instead of {expected} pixels")


def _corrected(raw: tuple[np.ndarray, ...], gain, pedestal) -> tuple[np.ndarray, ...]:
    """(raw - pedestal) / gain, in double precision, where dxtbx gives either of the two."""
    if len(gain) == 0 and len(pedestal) == 0:
        return raw
    data = tuple(panel.astype(np.float64) for panel in raw)
    for panel, dark in zip(data, pedestal):
        panel -= flumpy.to_numpy(dark)
    for panel, counts_per_unit in zip(data, gain):
        panel /= flumpy.to_numpy(counts_per_unit)
    return data


def _is_plain_mini_cbf(imageset) -> bool:
    """Whether the pixels of this format are nothing but the one binary section of a mini-CBF file."""
    from dxtbx.format.FormatCBFMini import FormatCBFMini
    from dxtbx.format.FormatCBFMiniPilatus import FormatCBFMiniPilatus

    format_class = imageset.get_format_class()
    return (
        format_class is not None
        and issubclass(format_class, FormatCBFMini)
        and format_class._read_cbf_image is FormatCBFMini._read_cbf_image
        and format_class.get_raw_data in (FormatCBFMini.get_raw_data, FormatCBFMiniPilatus.get_raw_data)
        and not imageset.params().get("multi_panel", False)
    )


def _read_byte_offset_cbf(path: str) -> np.ndarray | None:
    """Pixels of a CBF file compressed by byte offsets, ``(slow, fast) int32``; None when it is stored otherwise.

    Raises
    ------
    BadImage
        When the file is truncated or its header makes no sense.
    OSError
        When it cannot be read.
    """
    content = np.fromfile(Path(path), np.uint8)
    start = content[:_CBF_LONGEST_HEADER].tobytes()
    if not start.startswith(b"###CBF"):
        # perhaps compressed as a whole
        return None
    header, found, _ = start.partition(_CBF_DATA_FOLLOW)
    if not found:
        raise BadImage(path, "truncated", "no binary section")
    if b"x-CBF_BYTE_OFFSET" not in header or b"signed 32-bit integer" not in header:
        return None
    sizes = [re.search(rb"X-Binary-Size-%s-Dimension: *(\d+)" % name, header) for name in (b"Second", b"Fastest")]
    if not all(sizes):
        raise BadImage(path, "damaged", "no image size in the header")
    slow, fast = (int(size[1]) for size in sizes if size)
    data_start = len(header) + len(_CBF_DATA_FOLLOW)
    # a pixel takes at least one byte: nothing is allocated for a size that cannot be
    if slow * fast > len(content) - data_start:
        raise BadImage(path, "truncated", f"{len(content)} bytes for {slow} x {fast} pixels")
    try:
        return decode_byte_offset(content[data_start:], slow * fast).reshape(slow, fast)
    except ValueError as error:
        raise BadImage(path, "truncated", str(error)) from error
