"""Simulated images as mini-CBF, one file per still, with the header that pixel detectors write."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import numpy as np

from ssx_mpi.simulation.detector import FlatDetector, saturation

_START_OF_DATA = b"\x0c\x1a\x04\xd5"


def cbf_path(file: Path, index: int) -> Path:
    """File of image `index` (0-based; names count from 1).

    A run of ``#`` in the name of `file` becomes the number; otherwise it goes before the suffix, with five digits.
    """
    stem = file.stem
    hashes = stem[stem.find("#") : stem.rfind("#") + 1] if "#" in stem else ""
    number = f"{index + 1:0{len(hashes) or 5}d}"
    return file.with_name((stem.replace(hashes, number) if hashes else f"{stem}_{number}") + ".cbf")


def write_cbf(path: Path, counts: np.ndarray, header: FlatDetector) -> None:
    """Write one still, beside its final name and then renamed.

    Parameters
    ----------
    counts : (ny, nx) int32
        -1 in the gaps, -2 in bad pixels.
    header
        Geometry that the header is to say.
    """
    from dxtbx import flumpy
    from dxtbx.ext import compress

    pixels = flumpy.from_numpy(np.ascontiguousarray(counts, np.int32))
    packed = compress(pixels)
    packed = packed if isinstance(packed, bytes) else bytes(packed, "latin-1")
    ny, nx = counts.shape
    digest = base64.b64encode(hashlib.md5(packed, usedforsecurity=False).digest()).decode()
    text = f"""###CBF: VERSION 1.5, ssx_mpi simulation

data_{path.stem}

_array_data.header_convention "PILATUS_1.2"
_array_data.header_contents
;
{_header_contents(header)}
;

_array_data.data
;
--CIF-BINARY-FORMAT-SECTION--
Content-Type: application/octet-stream;
     conversions="x-CBF_BYTE_OFFSET"
Content-Transfer-Encoding: BINARY
X-Binary-Size: {len(packed)}
X-Binary-ID: 1
X-Binary-Element-Type: "signed 32-bit integer"
X-Binary-Element-Byte-Order: LITTLE_ENDIAN
Content-MD5: {digest}
X-Binary-Number-of-Elements: {nx * ny}
X-Binary-Size-Fastest-Dimension: {nx}
X-Binary-Size-Second-Dimension: {ny}
X-Binary-Size-Padding: 4095

"""
    tail = "\r\n--CIF-BINARY-FORMAT-SECTION----\r\n;\r\n\r\n"
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(
        text.replace("\n", "\r\n").encode("ascii") + _START_OF_DATA + packed + bytes(4095) + tail.encode("ascii")
    )
    unfinished.replace(path)


def _header_contents(header: FlatDetector) -> str:
    preset, (bx, by) = header.preset, header.beam_centre_mm
    # dxtbx knows the gaps of a detector from this name and the size of the image
    maker, model = ("PILATUS3", "pilatus") if preset.name.startswith("pilatus") else ("Dectris EIGER2", "eiger")
    name = f"{maker} {preset.name.removeprefix(model)}".upper()
    size = f"{preset.pixel_mm * 1e-3:.3e}"
    return f"""# Detector: {name}, S/N simulated
# 2000-01-01T00:00:00.000
# Pixel_size {size} m x {size} m
# Silicon sensor, thickness {preset.thickness_mm * 1e-3:.6f} m
# Exposure_time 0.0100000 s
# Exposure_period 0.0100000 s
# Count_cutoff {saturation(preset)} counts
# Wavelength {header.wavelength:.6f} A
# Detector_distance {header.distance_mm * 1e-3:.7f} m
# Beam_xy ({bx / preset.pixel_mm:.4f}, {by / preset.pixel_mm:.4f}) pixels
# Start_angle 0.0000 deg.
# Angle_increment 0.0000 deg.
# Detector_2theta 0.0000 deg."""
