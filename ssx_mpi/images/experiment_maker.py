"""The experiment of any one image when it is wanted, and whether those of a run belong together.

No experiment list of the whole data set exists anywhere: :class:`ExperimentMaker` makes the DIALS experiment of one
image on the rank that processes it.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssx_mpi import dials_compat
from ssx_mpi.images.frames import BadImage, FrameReader
from ssx_mpi.images.mask_files import load_mask_file
from ssx_mpi.images.sources import HDF5_SUFFIXES, ImageSources, StackSource, first_line, format_class, unreadable
from ssx_mpi.parameters.user_input import InputError

logger = logging.getLogger(__name__)

# to what headers of one detector agree: share of the wavelength, and of dials.import for vectors and origins (mm)
WAVELENGTH_TOLERANCE = 0.01
# a smaller share is what a monochromator reads back, not what a shot had
_SHOT_TO_SHOT = 1e-4
_DETECTOR_TOLERANCES = {"fast_axis_tolerance": 1e-4, "slow_axis_tolerance": 1e-4, "origin_tolerance": 0.05}
# nearer than any detector; where a header has no distance it is zero
_LEAST_DISTANCE_MM = 1e-3
# degrees an image; motors that stand still read back less
_LEAST_ROTATION = 1e-3
# how many images of a source are looked at for one whose header can be read
_MOST_TRIED = 1000


def check_same_detector(images: ImageSources, maker: ExperimentMaker) -> list[int]:
    """Make sure that all sources come from the same detector at the same place, with the same wavelength.

    Returns
    -------
    list of int
        The images whose headers were read for that: of each source the first that can be read, but of HDF5 files with
        equal detectors that of the first file alone.

    Raises
    ------
    InputError
        Naming the two sources that differ, one without a distance, or one of which no image can be read.
    """
    reference = None
    seen: set[str] = set()
    read: list[int] = []
    for source, among in zip(images.sources, images.ranges()):
        fingerprint = source.detector if isinstance(source, StackSource) else None
        if fingerprint in seen:
            continue
        image = maker.first_readable(among)
        read.append(image)
        models = maker.header(image)
        if not all(abs(panel.get_distance()) > _LEAST_DISTANCE_MM for panel in models[0]):
            raise InputError(
                f"the header of {images.locate(image)[0]} has no distance of the detector: give starting_geometry=, "
                "reference_geometry= or geometry.detector.distance in dials_import.phil="
            )
        if reference is None:
            reference = models
        elif not _alike(models, reference):
            raise InputError(
                f"detector or wavelength of {images.locate(image)[0]} differs from that of "
                f"{images.locate(read[0])[0]}: process them separately, or give one geometry for both as "
                "starting_geometry= or reference_geometry="
            )
        if fingerprint is not None:
            seen.add(fingerprint)
    return read


def check_stills(images: ImageSources, maker: ExperimentMaker, read: list[int]) -> None:
    """Make sure that the crystal does not turn while the images are taken.

    Parameters
    ----------
    read
        The images whose headers are looked at.

    Raises
    ------
    InputError
        Naming the first file of a rotation scan.
    """
    for image in read:
        width = maker.rotation(image)
        if abs(width) > _LEAST_ROTATION:
            raise InputError(
                f"{images.locate(image)[0]} is one of a rotation scan: by its header the crystal turns by {width:g} "
                "degrees an image. If these are stills all the same, stills=True takes them as such"
            )


def with_wavelength(beam, wavelength: float):
    """`beam` itself where it has this `wavelength` (angstrom) but for rounding, else a copy that has."""
    if abs(wavelength / beam.get_wavelength() - 1) < 1e-12:
        return beam
    other = copy.deepcopy(beam)
    other.set_wavelength(wavelength)
    return other


def _alike(one, other) -> bool:
    """Whether two (detector, beam) are the same as far as headers tell."""
    wavelength, expected = one[1].get_wavelength(), other[1].get_wavelength()
    return abs(wavelength - expected) <= WAVELENGTH_TOLERANCE * expected and one[0].is_similar_to(
        other[0], ignore_trusted_range=True, **_DETECTOR_TOLERANCES
    )


def check_compression(images: ImageSources, maker: ExperimentMaker) -> None:
    """Make sure that the compression of HDF5 files can be undone, by reading the first image of the first one.

    An image that cannot be read for another reason is left to the run, which counts it.

    Raises
    ------
    InputError
        When HDF5 lacks the plugin.
    """
    for source, among in zip(images.sources, images.ranges()):
        if not isinstance(source, StackSource) or not source.path.lower().endswith(HDF5_SUFFIXES):
            continue
        image, path = among[0], source.path
        try:
            FrameReader()(maker.experiment(image).imageset)
        except BadImage as error:
            if re.search(r"filter|plugin", error.details, re.IGNORECASE):
                raise InputError(
                    f"image={path}: HDF5 lacks the plugin for its compression ({error.details}): "
                    "pip install --ignore-installed --no-deps hdf5plugin"
                ) from None
            shape = _data_shape(path)
            if len(shape) == 4:
                raise InputError(
                    f"image={path}: its data have four dimensions, {shape}, which this version of dxtbx does not read: "
                    "(images, slow, fast) is what it takes"
                ) from None
        except Exception as error:  # whatever else is wrong with a damaged file, the run says of each image
            logger.debug("the first image of %s cannot be checked: %s", path, error)
        return


def _data_shape(path: str) -> tuple[int, ...]:
    """Shape of the images in an NXmx file; empty where it has another layout."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return next((g["data/data"].shape for g in file.values() if "data/data" in g), ())
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError):
        return ()


@contextlib.contextmanager
def _reading_header(images: ImageSources, image: int):
    """Turn whatever comes up in dxtbx for a damaged header into BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        lacking = _lacking(images.locate(image)[0])
        if lacking:
            raise BadImage(images.name(image), lacking) from error
        raise BadImage(images.name(image), "header cannot be read", f"{type(error).__name__}: {error}") from error


def _lacking(path: str) -> str:
    """What a NeXus file lacks that dxtbx cannot do without; empty for others, or where nothing is found missing."""
    import h5py

    if not path.lower().endswith(HDF5_SUFFIXES):
        return ""
    try:
        with h5py.File(path, "r") as file:
            entry = next(g for g in file.values() if hasattr(g, "get") and "instrument" in g)
            samples = [g for g in entry.values() if g.attrs.get("NX_class") in (b"NXsample", "NXsample")]
            # not every version looks into the beam of the sample
            groups = [g for g in entry["instrument"].values() if hasattr(g, "keys")]
            if not any("incident_wavelength" in group for group in groups):
                return "the file has no wavelength (incident_wavelength of its NXbeam)"
            if not samples:
                return "the file has no sample (NXsample)"
            angles = [f for s in samples for f in s.get("transformations", {}).values() if f.ndim and len(f) > 1]
            if any(f.attrs.get("transformation_type") in (b"rotation", "rotation") and f[1] < f[0] for f in angles):
                return "the rotation angles of the file go backwards, which dxtbx does not read"
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError, StopIteration):
        # damaged, or another layout
        pass
    return ""


class ExperimentMaker:
    """Makes the DIALS experiment of one image: imageset of that image alone, beam and detector.

    Parameters
    ----------
    images
        The images of the run.
    geometry : (detector, beam), optional
        Models that replace those of the image headers.
    mask : UserMask, optional
        Mask of the user, on top of that of the detector.
    overrides
        Extracted scope of dials.import, whose geometry and format parameters apply; None for none.
    formats
        Format classes found before, by folder and suffix; it grows with those found here.
    expected : (detector, beam), optional
        What the headers of files of one image have to be like; otherwise any will do.
    own_wavelengths
        Whether each image keeps the wavelength of its header where `geometry` replaces the rest.
    gain
        Pixel values to a photon, in place of those of the headers; None leaves these. Whoever asks dxtbx for corrected
        data, DIALS too, gets photons.
    """

    def __init__(
        self,
        images: ImageSources,
        geometry=None,
        mask: UserMask | None = None,
        overrides=None,
        formats: dict[tuple[str, str], type] | None = None,
        expected=None,
        own_wavelengths: bool = False,
        gain: float | None = None,
    ):
        self.images = images
        self.geometry = geometry
        self._mask = mask
        self._overrides = overrides
        self.formats = {} if formats is None else formats
        self._expected = expected
        self._own_wavelengths = own_wavelengths
        self._gain = gain
        self._stack: _Stack | None = None
        self._trusts_like_header = False

    def with_geometry(self, geometry) -> ExperimentMaker:
        """The same, with (detector, beam) in place of the models used so far."""
        return self._with(geometry=geometry)

    def with_mask(self, mask: UserMask) -> ExperimentMaker:
        """The same, with the user's mask on top of that of the detector."""
        return self._with(mask=mask)

    def with_headers(self, expected, own_wavelengths: bool) -> ExperimentMaker:
        """The same, with what is expected of headers and taken from each."""
        return self._with(expected=expected, own_wavelengths=own_wavelengths)

    def with_gain(self, gain: float) -> ExperimentMaker:
        """The same, with so many pixel values to a photon."""
        return self._with(gain=gain)

    def _with(self, **changes) -> ExperimentMaker:
        same = {
            "geometry": self.geometry,
            "mask": self._mask,
            "overrides": self._overrides,
            "formats": self.formats,
            "expected": self._expected,
            "own_wavelengths": self._own_wavelengths,
            "gain": self._gain,
        }
        return ExperimentMaker(self.images, **{**same, **changes})

    def experiment(self, image: int):
        """A dxtbx Experiment without crystal, goniometer and scan; its imageset keeps the pixels that it has read.

        Raises
        ------
        BadImage
            When the header of the image cannot be read, or is of another detector or wavelength.
        """
        from dxtbx.model import Experiment

        with _reading_header(self.images, image):
            imageset = self._imageset(image)
            if self._expected is not None and self.images.locate(image)[1] is None:
                self._check_header(image, imageset)
            detector, beam = self._models(imageset)
        if detector is None or beam is None:
            raise BadImage(self.images.name(image), "its header has no detector or no beam")
        if self._gain is not None:
            for panel in detector:
                panel.set_gain(self._gain)
        imageset.set_detector(detector, 0)
        imageset.set_beam(beam, 0)
        imageset.set_goniometer(None, 0)
        imageset.set_scan(None, 0)
        return Experiment(imageset=imageset, beam=beam, detector=detector, identifier=self.images.identifier(image))

    def first_readable(self, among: range | None = None) -> int:
        """The first image, of all or of those `among`, whose header can be read.

        Raises
        ------
        InputError
            When there is none among the first thousand.
        """
        among = range(len(self.images)) if among is None else among
        first_error: BadImage | None = None
        for image in among[:_MOST_TRIED]:
            try:
                self.experiment(image)
            except BadImage as error:
                first_error = first_error or error
            else:
                return image
        others = "" if len(among) == 1 else f", nor can any of the next {min(len(among), _MOST_TRIED) - 1}"
        raise InputError(f"image={first_error}{others}")

    def check_data(self, image: int) -> None:
        """Make sure that `image` has pixels of its own.

        Raises
        ------
        BadImage
            When the data file that it comes from is missing or damaged.
        """
        with _reading_header(self.images, image):
            self._imageset(image)
        path, index = self.images.locate(image)
        if index is not None and self._stack is not None and self._stack.path == path:
            self._stack.data_files.check(index)

    def header(self, image: int):
        """(detector, beam) as the header of `image` has them, or those that replace them."""
        return self.geometry or self._header_models(self._imageset(image))

    def rotation(self, image: int) -> float:
        """Degrees by which the crystal turns in `image`, as its header has it; 0 where it has none."""
        path, _ = self.images.locate(image)
        with _reading_header(self.images, image):
            scan = self._format(path).get_instance(path, **self._format_kwargs()).get_scan()
        if scan is None or not scan.get_num_images():
            return 0.0
        try:
            return float(scan.get_oscillation()[1])
        except RuntimeError:
            # newer versions raise where a scan has no angles, as one of stills
            return 0.0

    def wavelength_of_each_shot(self) -> bool:
        """Whether headers have it, as those of XFELs: it differs between images of the first source."""
        own, found = self.images.ranges()[0], []
        for image in {own[0], own[len(own) // 2], own[-1]}:
            with contextlib.suppress(BadImage), _reading_header(self.images, image):
                found.append(self._header_beam(self._imageset(image)).get_wavelength())
        return max(found) - min(found) > _SHOT_TO_SHOT * max(found) if found else False

    def _check_header(self, image: int, imageset) -> None:
        if not _alike(self._header_models(imageset), self._expected):
            raise BadImage(self.images.name(image), "its header has another detector or wavelength than the first one")

    def _models(self, imageset):
        if self.geometry is None:
            return self._header_models(imageset)
        detector, beam = self.geometry
        if not self._trusts_like_header:
            # which counts are good is a matter of these images, not of where the geometry came from; versions of DIALS
            # do not even agree on whether the ends of the range belong to it
            header = imageset.get_detector(0)
            for panel, own in zip(detector, header):
                panel.set_trusted_range(own.get_trusted_range())
            self._trusts_like_header = True
        if self._own_wavelengths:
            beam = with_wavelength(beam, self._header_beam(imageset).get_wavelength())
        return detector, beam

    def _header_models(self, imageset):
        detector, beam = imageset.get_detector(0), self._header_beam(imageset)
        if detector is None or beam is None:
            return detector, beam
        if self._overrides is not None:
            from dxtbx.model import DetectorFactory

            detector = DetectorFactory.from_phil(self._overrides.geometry, detector, beam)
        return detector, beam

    def _header_beam(self, imageset):
        beam = imageset.get_beam(0)
        if self._overrides is None or beam is None:
            return beam
        from dxtbx.model import BeamFactory

        return BeamFactory.from_phil(self._overrides.geometry, beam)

    def _imageset(self, image: int):
        path, index = self.images.locate(image)
        if path in unreadable():
            raise BadImage(path, unreadable()[path])
        if index is None or not path.lower().endswith(HDF5_SUFFIXES):
            return self._masked(self._format(path).get_imageset([path], as_imageset=True, **self._options()))
        if self._stack is None or self._stack.path != path:
            dials_compat.register_hdf5_filters()
            format_ = self._format(path)
            first = format_.get_imageset([path], single_file_indices=[index], as_imageset=True, **self._options())
            self._stack = _Stack(path, self._masked(first), format_.get_instance(path, **self._format_kwargs()))
        return self._stack.imageset(index)

    def _format(self, path: str):
        # asking the registry costs a tenth of a second or more: files of one kind in one folder have one format
        key = (str(Path(path).parent), Path(path).suffix)
        if key not in self.formats:
            self.formats[key] = format_class(path)
        return self.formats[key]

    def _format_kwargs(self) -> dict:
        if self._overrides is None:
            return {}
        from libtbx import Auto

        # what is left to dxtbx is not given to it: image sets keep what they were given, and JSON cannot hold Auto
        return {k: v for k, v in vars(self._overrides.format).items() if not k.startswith("_") and v is not Auto}

    def _options(self) -> dict:
        kwargs = self._format_kwargs()
        return {"format_kwargs": kwargs} if kwargs else {}

    def _masked(self, imageset):
        if self._mask is None:
            return imageset
        from dxtbx.format.image import ImageBool

        lookup = imageset.external_lookup.mask
        panels = self._mask.panels
        if not lookup.data.empty():
            panels = tuple(user & lookup.data.tile(k).data() for k, user in enumerate(panels))
        lookup.data = ImageBool(panels)
        lookup.filename = str(self._mask.path)
        return imageset


def read_geometry(path: Path, like=None):
    """(detector, beam) of the experiment list `path`.

    Parameters
    ----------
    path
        An .expt file.
    like : dxtbx Detector, optional
        The detector of the images, whose panels it must have.

    Raises
    ------
    InputError
        When it is none, or its detector has other panels.
    """
    from dxtbx.model.experiment_list import ExperimentListFactory

    try:
        experiments = ExperimentListFactory.from_json_file(str(path), check_format=False)
        detector, beam = experiments[0].detector, experiments[0].beam
    except Exception as error:  # whatever reading a file of another kind raises
        raise InputError(f"{path} is not a DIALS experiment list ({first_line(error)})") from None
    if detector is None or beam is None:
        raise InputError(f"{path} has no detector or no beam")
    if like is not None and [p.get_image_size() for p in detector] != [p.get_image_size() for p in like]:
        raise InputError(f"the detector in {path} has other panels than that of the images")
    return detector, beam


def geometry_as_dict(geometry) -> dict[str, Any]:
    """(detector, beam) as plain data, for :func:`geometry_from_dict`."""
    detector, beam = geometry
    return {"detector": detector.to_dict(), "beam": beam.to_dict()}


def geometry_from_dict(content: dict[str, Any]):
    """(detector, beam) of plain data.

    Making a detector normalises the axes of its panels, which may change their last digits. So do pickling and reading
    a file: whoever is to have the same numbers makes its detector of the same data, and once.
    """
    from dxtbx.model import BeamFactory, DetectorFactory

    return DetectorFactory.from_dict(content["detector"]), BeamFactory.from_dict(content["beam"])


def read_import_overrides(scope):
    """The part of a dials.import scope that applies here.

    Raises
    ------
    InputError
        When its geometry is at odds with itself; found at the first image otherwise.
    """
    if not hasattr(scope, "geometry") or not hasattr(scope, "format"):
        raise InputError("dials_import.phil: this version of dials.import has no geometry parameters")
    return scope


@dataclass(frozen=True)
class UserMask:
    """Mask given by the user: one flex.bool a panel, True where a pixel may be used."""

    path: Path
    panels: tuple


def read_mask(path: Path, detector) -> UserMask:
    """The DIALS mask file `path`, checked against the panels of `detector`.

    Raises
    ------
    InputError
        When the file is no mask or belongs to another detector.
    """
    try:
        panels = load_mask_file(path)
    except (ValueError, OSError) as error:
        raise InputError(f"mask={path}: not a DIALS mask file ({first_line(error)})") from None
    expected = [tuple(reversed(p.get_image_size())) for p in detector]
    if [tuple(p.all()) for p in panels] != expected:
        raise InputError(f"mask={path}: its panels do not have the shape of the detector, {expected}")
    return UserMask(path, panels)


class _Stack:
    """One open file of many images: format, reader and masks are made once for all of them."""

    def __init__(self, path: str, first, instance):
        self.path = path
        self._data = first.data()
        self._detector = first.get_detector(0)
        self._instance = instance
        self.data_files = _DataFiles(path)

    def imageset(self, index: int):
        from dxtbx.imageset import ImageSet
        from scitbx.array_family import flex

        imageset = ImageSet(self._data, flex.size_t([index]))
        imageset.set_detector(self._detector, 0)
        # XFEL files have the wavelength of each shot
        imageset.set_beam(self._instance.get_beam(index), 0)
        return imageset


class _DataFiles:
    """The files that the images of a virtual dataset come from.

    Where one of them is missing or damaged, HDF5 gives blank images without a word.
    """

    def __init__(self, path: str):
        import h5py

        self._path = path
        self._faults: dict[tuple, str | None] = {}
        # images, and where they are: file, dataset and how many images that must have
        self._sources: list[tuple[_Selected, tuple]] = []
        with h5py.File(path, "r") as file:
            dataset = _virtual_stack(file)
            for source in dataset.virtual_sources() if dataset is not None else []:
                images = _Selected.of(source.vspace, dataset.shape[0]) or _Selected(0, 1, dataset.shape[0], 1)
                # all of a source, whose shape is not told, is as much as it fills
                taken = _Selected.of(source.src_space, None)
                needed = images.count * images.block if taken is None else taken.last + 1
                for number, name in enumerate(_names_of_source(source.file_name, images)):
                    own = images if "%b" not in source.file_name else images.block_alone(number)
                    self._sources.append((own, (self._find(name), source.dset_name, needed)))

    def _find(self, name: str) -> str:
        # as HDF5 looks for it: "." is the file itself, a relative name counts from the folder of the file, and where an
        # absolute one leads nowhere its last part is looked for there
        if name == ".":
            return self._path
        beside = Path(self._path).parent
        given = beside / name
        return str(given if given.exists() or not Path(name).is_absolute() else beside / Path(name).name)

    def check(self, index: int) -> None:
        """Make sure that the data of image `index` are there.

        Raises
        ------
        BadImage
            When they are not.
        """
        for images, where in self._sources:
            if index in images:
                if where not in self._faults:
                    self._faults[where] = _fault_of_data_file(*where)
                fault = self._faults[where]
                if fault is not None:
                    raise BadImage(f"{self._path}:{index}", fault, where[0])


@dataclass(frozen=True)
class _Selected:
    """Images that a selection along the first axis of a dataset holds: `count` blocks of `block`, every `stride`."""

    start: int
    stride: int
    count: int
    block: int

    @classmethod
    def of(cls, space, length: int | None) -> _Selected | None:
        """Of an HDF5 dataspace; one without limit goes on to `length`. None for all of it."""
        import h5py

        if space.get_select_type() != h5py.h5s.SEL_HYPERSLABS:
            return None
        if not space.is_regular_hyperslab():
            (first, *_), (last, *_) = space.get_select_bounds()
            return cls(first, 1, last - first + 1, 1)
        (start, *_), (stride, *_), (count, *_), (block, *_) = space.get_regular_hyperslab()
        if count == h5py.h5s.UNLIMITED or count < 0:
            count = max(0, ((length or start + 1) - start + stride - 1) // stride)
        if block == h5py.h5s.UNLIMITED or block < 0:
            block = (length or start + 1) - start
        return cls(start, stride, count, block)

    @property
    def last(self) -> int:
        """The last image."""
        return self.start + (self.count - 1) * self.stride + self.block - 1

    def __contains__(self, image: int) -> bool:
        # a block that is alone may be longer than the stride
        number, within = divmod(image - self.start, self.stride)
        return (0 <= number < self.count and within < self.block) or (
            self.count == 1 and self.start <= image <= self.last
        )

    def block_alone(self, number: int) -> _Selected:
        """Block `number` of these."""
        return _Selected(self.start + number * self.stride, 1, 1, self.block)


def _names_of_source(name: str, images: _Selected) -> list[str]:
    """The files of a source; %b in the name stands for the number of the block."""
    return [name.replace("%b", str(number)) for number in range(images.count)] if "%b" in name else [name]


def _virtual_stack(file):
    """The virtual dataset of the images of an NXmx file, None where they are stored otherwise."""
    for entry in file.values():
        data = entry.get("data") if hasattr(entry, "get") else None
        stack = data.get("data") if data is not None and hasattr(data, "keys") else None
        if stack is not None and stack.ndim >= 3 and stack.is_virtual:
            return stack
    return None


def _fault_of_data_file(name: str, dataset: str, needed: int) -> str | None:
    """Why the data file `name` does not have `needed` images in `dataset`; None when it has."""
    import h5py

    try:
        with h5py.File(name, "r") as file:
            n_images = file[dataset].shape[0]
    except FileNotFoundError:
        return "its data file is missing"
    except (OSError, RuntimeError, KeyError, AttributeError):
        return "its data file is damaged"
    return None if n_images >= needed else "its data file has too few images"
