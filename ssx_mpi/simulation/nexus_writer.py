"""Simulated images as NeXus NXmx: data files of a fixed number of images, and a master that joins them.

The master holds the geometry and one virtual dataset over all data files, which it names relative to itself, so that a
folder can be moved. Without a rotation axis dxtbx opens it as single stills; with one that never turns (as some
beamlines write) as one sequence of stills. Data files of the same images are the same to the byte; the master bears the
time of its making.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from ssx_mpi import __version__
from ssx_mpi.simulation.detector import FlatDetector, ModularDetector, part_name, saturation
from ssx_mpi.simulation.simulation_parameters import DetectorPreset

_LOWEST_CALIBRATED = -1000
_DATA = "/entry/data/data"
_DETECTOR = "/entry/instrument/detector"
# registered HDF5 filters and their options: bitshuffle with lz4 inside, lz4; gzip at its fastest with byte shuffle
_FILTERS: dict[str, dict] = {
    "bslz4": {"compression": 32008, "compression_opts": (0, 2)},
    "lz4": {"compression": 32004, "compression_opts": (0,)},
    "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
    "none": {},
}


@dataclass(frozen=True)
class Layout:
    """Which image stands in which data file.

    Parameters
    ----------
    master
        The ``.nxs`` file.
    n_images
        In all.
    images_per_file
        In each data file but the last.
    """

    master: Path
    n_images: int
    images_per_file: int

    @property
    def n_files(self) -> int:
        return -(-self.n_images // self.images_per_file)

    def data_file(self, number: int) -> Path:
        """Data file `number`, counted from 0 (its name counts from 1)."""
        return self.master.with_name(f"{self.master.stem}_{number + 1:06d}.h5")

    def images(self, number: int) -> range:
        """Indices of the images in data file `number`."""
        first = number * self.images_per_file
        return range(first, min(first + self.images_per_file, self.n_images))


def pixel_type(bit_depth: int, calibrated: bool = False) -> np.dtype:
    """Type of the pixels: unsigned, the highest value meaning gap and the one below it bad pixel; or float32."""
    if calibrated:
        return np.dtype(np.float32)
    return np.dtype({16: np.uint16, 32: np.uint32}[bit_depth])


def has_filter(compression: str) -> bool:
    """Whether this HDF5 can write with `compression`; registers the filters of hdf5plugin."""
    import hdf5plugin  # noqa: F401

    number = _FILTERS[compression].get("compression")
    return not isinstance(number, int) or bool(h5py.h5z.filter_avail(number))


def write_data_file(
    layout: Layout, number: int, images: Iterable[np.ndarray], shape: tuple[int, int], dtype: np.dtype, compression: str
) -> None:
    """Write one data file, beside its final name and then renamed.

    Parameters
    ----------
    images
        int32 arrays of `shape` (ny, nx), -1 and -2 in dead pixels: in two's complement these become the two highest
        values of the unsigned type; or float32.
    dtype
        Of the pixels, from :func:`pixel_type`.
    """
    if not has_filter(compression):
        raise ValueError(f"this HDF5 has no filter for {compression}")
    path = layout.data_file(number)
    unfinished = path.with_suffix(".part")
    count = len(layout.images(number))
    with h5py.File(unfinished, "w") as file:
        data = file.create_dataset(
            _DATA,
            (count, *shape),
            dtype,
            chunks=(1, *shape),
            **_FILTERS[compression],
        )
        for i, image in enumerate(images):
            data[i] = image.astype(data.dtype)
    unfinished.replace(path)


def write_master(
    layout: Layout,
    header: FlatDetector,
    gaps: np.ndarray,
    bad: np.ndarray,
    rotation_axis: bool,
    calibrated: bool = False,
    wavelengths: np.ndarray | None = None,
) -> None:
    """Write the master: geometry as in `header`, pixel mask, and the virtual dataset over the data files.

    Parameters
    ----------
    gaps, bad : (ny, nx) bool
        Pixels without sensor and without use.
    rotation_axis
        Say that the images were taken about an axis that did not turn.
    calibrated
        Whether pixels are floats, some below zero.
    wavelengths : (n_images,) float64, optional
        Of each shot, Å; by default that of `header` for all.
    """
    unfinished = layout.master.with_suffix(".part")
    with h5py.File(unfinished, "w") as file:
        entry = _group(file, "/entry", "NXentry")
        entry["definition"] = "NXmx"
        file.attrs["default"] = "entry"
        file.attrs["creator"] = f"ssx_mpi.simulate {__version__}"
        data = _group(file, "/entry/data", "NXdata")
        data.attrs["signal"] = "data"
        data.create_virtual_dataset("data", _virtual_layout(layout, header.preset, calibrated), fillvalue=0)
        source = _group(file, "/entry/source", "NXsource")
        source["name"] = "simulation"
        instrument = _group(file, "/entry/instrument", "NXinstrument")
        instrument["name"] = "simulation"
        beam = _group(file, "/entry/instrument/beam", "NXbeam")
        _quantity(beam, "incident_wavelength", header.wavelength if wavelengths is None else wavelengths, "angstrom")
        _write_sample(file, layout.n_images if rotation_axis else 0)
        _write_detector(file, header, gaps, bad, calibrated)
        file["/entry/sample/beam"] = beam
    unfinished.replace(layout.master)


def _virtual_layout(layout: Layout, preset: DetectorPreset, calibrated: bool) -> h5py.VirtualLayout:
    shape = preset.shape
    virtual = h5py.VirtualLayout((layout.n_images, *shape), pixel_type(preset.bit_depth, calibrated))
    for number in range(layout.n_files):
        images = layout.images(number)
        source = h5py.VirtualSource(layout.data_file(number).name, _DATA, (len(images), *shape))
        virtual[images.start : images.stop] = source
    return virtual


def _write_sample(file: h5py.File, n_angles: int) -> None:
    sample = _group(file, "/entry/sample", "NXsample")
    sample["name"] = "simulation"
    if not n_angles:
        sample["depends_on"] = "."
        return
    axes = _group(file, "/entry/sample/transformations", "NXtransformations")
    _axis(axes, "omega", np.zeros(n_angles), "deg", "rotation", (-1, 0, 0), ".")
    sample["depends_on"] = "/entry/sample/transformations/omega"


def _write_detector(file: h5py.File, header: FlatDetector, gaps: np.ndarray, bad: np.ndarray, calibrated: bool) -> None:
    """The detector in McStas coordinates, x and z of which point against those of dxtbx."""
    preset, (bx, by) = header.preset, header.beam_centre_mm
    detector = _group(file, _DETECTOR, "NXdetector")
    detector["description"] = f"simulated {preset.name}"
    detector["type"] = "Pixel"
    detector["sensor_material"] = "Si"
    _quantity(detector, "sensor_thickness", preset.thickness_mm * 1e-3, "m")
    _quantity(detector, "x_pixel_size", preset.pixel_mm * 1e-3, "m")
    _quantity(detector, "y_pixel_size", preset.pixel_mm * 1e-3, "m")
    _quantity(detector, "beam_center_x", bx / preset.pixel_mm, "pixel")
    _quantity(detector, "beam_center_y", by / preset.pixel_mm, "pixel")
    _quantity(detector, "distance", header.distance_mm * 1e-3, "m")
    _quantity(detector, "count_time", 0.01, "s")
    _quantity(detector, "frame_time", 0.01, "s")
    if not calibrated:
        detector["bit_depth_readout"] = preset.bit_depth
    detector["saturation_value"] = saturation(preset)
    # noise may take a pixel without a photon far below zero
    detector["underload_value"] = _LOWEST_CALIBRATED if calibrated else 0
    # NXmx: bit 0 gap, bit 1 dead
    mask = gaps.astype(np.uint32) | (bad.astype(np.uint32) << 1)
    detector.create_dataset("pixel_mask", data=mask, chunks=mask.shape, compression="gzip", compression_opts=1)

    axes = _group(file, f"{_DETECTOR}/transformations", "NXtransformations")
    _axis(axes, "det_z", [header.distance_mm], "mm", "translation", (0, 0, 1), ".")
    detector["depends_on"] = f"{_DETECTOR}/transformations/det_z"
    if isinstance(header, ModularDetector):
        _write_modules(file, header)
        return
    place = (bx, by, 0.0)
    _write_module(
        file, f"{_DETECTOR}/module", (0, 0), gaps.shape, preset.pixel_mm, place, f"{_DETECTOR}/transformations/det_z"
    )


def _write_module(
    file: h5py.File,
    name: str,
    origin: tuple[int, ...],
    shape: tuple[int, ...],
    pixel_mm: float,
    offset_mm: tuple[float, float, float],
    depends_on: str,
) -> None:
    """A module whose first pixel is `origin` (slow, fast) of the image, at `offset_mm` from what it depends on."""
    module = _group(file, name, "NXdetector_module")
    module["data_origin"] = np.array(origin)
    module["data_size"] = np.array(shape)
    offset = _axis(module, "module_offset", [0.0], "mm", "translation", (1, 0, 0), depends_on)
    offset.attrs["offset"] = np.array(offset_mm)
    offset.attrs["offset_units"] = "mm"
    along = f"{name}/module_offset"
    _axis(module, "fast_pixel_direction", pixel_mm, "mm", "translation", (-1, 0, 0), along)
    _axis(module, "slow_pixel_direction", pixel_mm, "mm", "translation", (0, -1, 0), along)


def _write_modules(file: h5py.File, header: ModularDetector) -> None:
    """Modules in their places, each with the chain of the parts that it belongs to: dxtbx makes a tree of them."""
    preset, (bx, by) = header.preset, header.beam_centre_mm
    axes = file[f"{_DETECTOR}/transformations"]
    for module in range(preset.n_modules):
        x, y = np.array(preset.place(module)) * preset.pixel_mm
        path, above = preset.path(module), f"{_DETECTOR}/transformations/det_z"
        # all but the last two: a part of one module is the module itself
        for depth in range(1, len(path) - 1):
            name = part_name(path[:depth]).rsplit("/", 1)[1]
            if name not in axes:
                _axis(axes, name, [0.0], "mm", "translation", (1, 0, 0), above)
            above = f"{_DETECTOR}/transformations/{name}"
        origin = preset.corner(module)[::-1]
        # McStas: x and z point against those of dxtbx
        _write_module(file, part_name(path), origin, preset.module[::-1], preset.pixel_mm, (bx - x, by - y, 0.0), above)


def _group(file: h5py.File, path: str, nx_class: str) -> h5py.Group:
    group = file.require_group(path)
    group.attrs["NX_class"] = nx_class
    return group


def _quantity(group: h5py.Group, name: str, value, unit: str) -> h5py.Dataset:
    dataset = group.create_dataset(name, data=value)
    dataset.attrs["units"] = unit
    return dataset


def _axis(group: h5py.Group, name: str, value, unit: str, kind: str, vector, depends_on: str) -> h5py.Dataset:
    dataset = _quantity(group, name, value, unit)
    dataset.attrs["transformation_type"] = kind
    dataset.attrs["vector"] = np.array(vector, float)
    dataset.attrs["depends_on"] = depends_on
    return dataset
