"""The images of a run as a compact list of sources, found by listing folders and reading sizes, not pixels.

No list of all images exists anywhere: :class:`ImageSources` is a few bytes an image, small enough to be broadcast.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import os
import re
import sys
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ssx_mpi.images.frames import BadImage
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records.files import natural_key

#: variable of the environment that names files whose headers must not be read, as JSON
UNREADABLE = "SSX_MPI_UNREADABLE_HEADERS"
HDF5_SUFFIXES = (".h5", ".nxs", ".hdf5", ".nx5", ".cxi")
_IMAGE_SUFFIXES = (".cbf", ".img", ".mccd", ".tif", ".edf", ".smv", ".bz2", ".gz")
# what tells one detector from another in an NXmx file; timestamps and exposures may differ
_DETECTOR_FIELDS = (
    b"beam_center_x",
    b"beam_center_y",
    b"detector_distance",
    b"distance",
    b"x_pixel_size",
    b"y_pixel_size",
    b"sensor_thickness",
)
# angstrom; two decimals, or all files would differ where it is that of a shot
_WAVELENGTH_FIELD = b"incident_wavelength"
# to keep the width of a number beside it: numbers have 15 digits at most
_MOST_DIGITS = 15
_WIDTH = 10**_MOST_DIGITS
# of a field; more would be numbers of each image
_MOST_NUMBERS = 64
_IDENTIFIER_SPACE = uuid.UUID("a4b8f0a6-5f5b-5c0e-9d52-0f5d5f0c7a11")


@dataclass(frozen=True)
class StackSource:
    """Consecutive images of one file that holds many: images `offset` to `offset` + `count` - 1, counted from zero.

    `detector` tells the detector of the file from another; None where only dxtbx can tell.
    """

    path: str
    offset: int
    count: int
    detector: str | None = field(default=None, compare=False)

    def locate(self, i: int) -> tuple[str, int | None]:
        return self.path, self.offset + i


@dataclass(frozen=True)
class NumberedSource:
    """Files of one image each, whose names differ by a number: `prefix` number `suffix`, zero-filled to `width`."""

    prefix: str
    suffix: str
    width: int
    numbers: np.ndarray

    @property
    def count(self) -> int:
        return len(self.numbers)

    def locate(self, i: int) -> tuple[str, int | None]:
        return f"{self.prefix}{int(self.numbers[i]):0{self.width}d}{self.suffix}", None


@dataclass(frozen=True)
class ImageSources:
    """All images of a run, numbered from zero in the order in which the user named them."""

    sources: tuple[StackSource | NumberedSource, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([s.count for s in self.sources], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.sources else 0

    def locate(self, image: int) -> tuple[str, int | None]:
        """Absolute path of the file that holds `image`, and its number in that file (None: the only one)."""
        k = int(np.searchsorted(self._ends, image, side="right"))
        start = int(self._ends[k]) - self.sources[k].count
        return self.sources[k].locate(image - start)

    def name(self, image: int) -> str:
        """How the log names `image`: the file and, counted from one, the number in it."""
        path, index = self.locate(image)
        return Path(path).name if index is None else f"{Path(path).name}:{index + 1}"

    def identifier(self, image: int, lattice: int | None = None) -> str:
        """Experiment identifier of `image`, or of a lattice on it: the same in every run on the same files."""
        path, index = self.locate(image)
        text = f"{path}#{'' if index is None else index}#{'' if lattice is None else lattice}"
        return str(uuid.uuid5(_IDENTIFIER_SPACE, text))

    def ranges(self) -> list[range]:
        """The images of each source."""
        return [range(int(end) - s.count, int(end)) for end, s in zip(self._ends, self.sources)]

    def as_json(self) -> list[dict]:
        """The sources as plain data, for people."""
        described = []
        for source in self.sources:
            if isinstance(source, StackSource):
                described.append({"path": source.path, "first": source.offset + 1, "images": source.count})
            else:
                numbers = source.numbers.tolist()
                names = f"{source.prefix}{'#' * source.width}{source.suffix}"
                described.append({"template": names, "images": source.count, "numbers": _spans(numbers)})
        return described

    def summary(self) -> str:
        """A short text that is another for other images: a digest of names and ranges, and their number."""
        digest = hashlib.sha256()
        for source in self.sources:
            if isinstance(source, StackSource):
                size = Path(source.path).stat().st_size
                digest.update(f"{source.path}:{source.offset}:{source.count}:{size}\n".encode())
            else:
                digest.update(f"{source.prefix}:{source.width}:{source.suffix}\n".encode() + source.numbers.tobytes())
        return f"{len(self)} images (digest {digest.hexdigest()[:12]})"


def _spans(numbers: list[int]) -> list[list[int]]:
    """Ascending numbers as inclusive spans."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return spans


@functools.cache
def unreadable() -> dict[str, str]:
    """Files whose headers must not be read, and why; see :mod:`ssx_mpi.images.header_probe`."""
    return json.loads(os.environ.get(UNREADABLE, "{}"))


def find_images(requested: tuple[Source, ...]) -> ImageSources:
    """The images that the user asked for, found by listing folders and reading sizes, not pixels.

    Raises
    ------
    InputError
        For no source at all, one that is not there, a template without matches, or a range outside the data.
    """
    if not requested:
        raise InputError("no images given: use image=, template= or directory=")
    return ImageSources(tuple(_find(requested)))


def _find(requested: tuple[Source, ...]):
    # generators keep memory at the size of the result
    named = itertools.chain.from_iterable(map(expand, requested))
    for single, group in itertools.groupby(named, _is_single_image):
        if single:
            yield from _numbered(_checked_file(source) for source in group)
            continue
        for source in group:
            finder = {"image": _find_stack, "template": _find_template, "directory": _find_directory}[source.kind]
            yield from finder(source)


def expand(source: Source) -> Iterator[Source]:
    """The sources that one with wildcards in the name of its image stands for, in the order of their numbers.

    A range is that in each of them. Of HDF5 files those that lead to the others are taken, as in a folder.

    Raises
    ------
    InputError
        When nothing matches.
    """
    if source.kind != "image" or not re.search(r"[*?\[]", source.name) or Path(source.name).exists():
        yield source
        return
    found = [name for name in glob.iglob(source.name) if Path(name).is_file()]  # noqa: PTH207  (an absolute pattern)
    if not found:
        raise InputError(f"image={source.name}: no file matches")
    stacks = [name for name in found if name.lower().endswith(HDF5_SUFFIXES)]
    others = [name for name in found if not name.lower().endswith(HDF5_SUFFIXES)]
    for name in sorted(others + _leading(stacks), key=natural_key):
        yield replace(source, name=name)


def _leading(stacks: list[str]) -> list[str]:
    """Of HDF5 files, those through which the others are read: masters, or else .nxs files, or else all."""
    return (
        [n for n in stacks if n.endswith("_master.h5")] or [n for n in stacks if n.endswith((".nxs", ".nx5"))] or stacks
    )


def _is_single_image(source: Source) -> bool:
    return source.kind == "image" and not source.name.lower().endswith(HDF5_SUFFIXES)


def _checked_file(source: Source) -> str:
    if not Path(source.name).is_file():
        raise InputError(f"image={source.name}: there is no such file")
    if _is_single_image(source) and source.first is not None and (source.first, source.last) != (1, 1):
        raise InputError(f"image={source.name}:{source.first}:{source.last}: the file holds one image")
    return source.name


def _find_stack(source: Source):
    path = Path(_checked_file(source))
    if str(path) in unreadable():
        raise InputError(f"image={path}: {unreadable()[str(path)]}")
    total, detector = _look_into_hdf5(path)
    first, last = _checked_range(source, 1, total)
    yield StackSource(str(path), first - 1, last - first + 1, detector)


def _checked_range(source: Source, lowest: int, highest: int) -> tuple[int, int]:
    if source.first is None or source.last is None:
        return lowest, highest
    if source.first < lowest or source.last > highest:
        raise InputError(
            f"{source.kind}={source.name}:{source.first}:{source.last}: images are numbered {lowest} to {highest}"
        )
    return source.first, source.last


def _find_template(source: Source):
    path = Path(source.name)
    match = re.fullmatch(r"(.*?)(#+)(.*)", path.name)
    if not match:
        raise InputError(f"template={source.name}: a template has # for the digits of the image number")
    before, hashes, after = match.groups()
    pattern = re.compile(re.escape(before) + rf"(\d{{{len(hashes)},}})" + re.escape(after))
    found = (pattern.fullmatch(name) for name in _names(path.parent, f"template={source.name}"))
    # a number longer than the # may not begin with 0: it would be another file than the one that it formats to
    digits = [m[1] for m in found if m]
    if any(len(d.lstrip("0")) > _MOST_DIGITS for d in digits):
        raise InputError(f"template={source.name}: numbers of images have {_MOST_DIGITS} digits at most")
    numbers = np.sort(np.fromiter((int(d) for d in digits if len(d) == len(hashes) or d[0] != "0"), np.int64))
    if not len(numbers):
        raise InputError(f"template={source.name}: no file matches")
    first, last = _checked_range(source, int(numbers[0]), int(numbers[-1]))
    chosen = numbers[(numbers >= first) & (numbers <= last)]
    if not len(chosen):
        raise InputError(f"template={source.name}:{first}:{last}: no file has a number in this range")
    yield NumberedSource(str(path.parent / before), after, len(hashes), _small(chosen))


def _names(folder: Path, where: str):
    if not folder.is_dir():
        raise InputError(f"{where}: there is no folder {folder}")
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry.name


def _find_directory(source: Source):
    folder = Path(source.name)
    names = [n for n in _names(folder, f"directory={source.name}") if not n.startswith(".")]
    images = [n for n in names if n.lower().endswith(_IMAGE_SUFFIXES)]
    if images:
        # a compressed copy beside an image is the same image
        once = set(images) - {f"{n}{packed}" for n in images for packed in (".bz2", ".gz")}
        yield from _numbered([str(folder / n) for n in sorted(once)])
        return
    stacks = [n for n in names if n.lower().endswith(HDF5_SUFFIXES)]
    # data files beside a master or .nxs file are read through it
    for name in sorted(_leading(stacks)):
        yield from _find_stack(Source("image", str(folder / name)))
    if not stacks:
        raise InputError(f"directory={source.name}: it holds no image files")


def _numbered(paths: Iterable[str]):
    """Sources for single-image files: runs of names that differ by their last number become one source."""

    def parts(path: str):
        match = re.fullmatch(r"(.*?)(\d{1,15})(\D*(?:\.bz2)?)", path)
        return (match[1], match[3], len(match[2]), int(match[2])) if match else (path, "", 0, 0)

    for key, run in itertools.groupby((parts(p) for p in paths), key=lambda p: p[:3]):
        prefix, suffix, width = key
        numbers = _small(np.fromiter((p[3] for p in run), np.int64))
        if width:
            yield NumberedSource(prefix, suffix, width, numbers)
        else:
            yield StackSource(prefix, 0, 1)


def _small(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.int32) if numbers[-1] < 2**31 else numbers


def _look_into_hdf5(path: Path) -> tuple[int, str | None]:
    """Number of images in an HDF5 file, and what tells its detector from another; the file is opened once."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            root = h5py.h5o.open(file.id, b"/")
            shape = _stack_shape(root)
            detector = _detector_fingerprint(root, shape)
    except (OSError, RuntimeError, KeyError) as error:
        raise InputError(f"image={path}: not a readable HDF5 file ({first_line(error)})") from None
    return (shape[0] if shape else _images_by_dxtbx(path)), detector


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _stack_shape(root) -> tuple[int, ...] | None:
    """Shape of the images in an NXmx file, (images, [panels,] slow, fast), or None where its layout is another."""
    for entry in _members(root):
        data = _member(entry, b"data")
        stack = _member(data, b"data")
        if len(getattr(stack, "shape", ())) >= 3:
            return stack.shape
        linked = [name for name in _names_in(data) if re.fullmatch(rb"data_\d+", name)]
        # the links of a master file may run past the data files that were written
        shapes = [found.shape for name in sorted(linked) if (found := _member(data, name)) is not None]
        if shapes:
            return (sum(s[0] for s in shapes), *shapes[0][1:])
    return None


# HDF5 objects by their low-level identifiers: thousands of files are looked into, and h5py's File, Group and Dataset
# take several times as long


def _names_in(group) -> list[bytes]:
    import h5py

    return list(group) if isinstance(group, h5py.h5g.GroupID) else []


def _member(group, name: bytes):
    """What `group` has under `name`; None where it is no group, or the name or what it links to is not there."""
    import h5py

    if not isinstance(group, h5py.h5g.GroupID):
        return None
    try:
        return h5py.h5o.open(group, name)
    except (KeyError, OSError):
        return None


def _members(group):
    return (_member(group, name) for name in _names_in(group))


def _images_by_dxtbx(path: Path) -> int:
    try:
        return len(format_class(str(path)).get_imageset([str(path)], as_imageset=True))
    except BadImage as error:
        raise InputError(f"image={error}") from None
    except Exception as error:  # formats raise whatever comes up below them when a file is damaged
        raise InputError(f"image={path}: its header cannot be read ({first_line(error)})") from None


def format_class(path: str):
    """The dxtbx format class that reads `path`.

    Raises
    ------
    BadImage
        When dxtbx knows no format for the file.
    """
    from dxtbx.format.Registry import get_format_class_for_file

    found = get_format_class_for_file(path)
    if found is None or found.is_abstract():
        way = ": data files are read through their master or .nxs file" if path.lower().endswith(HDF5_SUFFIXES) else ""
        raise BadImage(path, f"dxtbx knows no format for it{way}")
    return found


def _detector_fingerprint(root, shape: tuple[int, ...] | None) -> str | None:
    """What tells the detector of an HDF5 file from another; None where only dxtbx can tell."""
    instruments = (_member(entry, b"instrument") for entry in _members(root))
    fields = [
        (name, _numbers(dataset, 2 if name == _WAVELENGTH_FIELD else 9))
        for instrument in instruments
        for group in _members(instrument)
        for name in (*_DETECTOR_FIELDS, _WAVELENGTH_FIELD)
        if (dataset := _member(group, name)) is not None
    ]
    if shape is None or not fields:
        return None
    # the same object for the same detector, or the sources of thousands of files would take its size each
    return sys.intern(hashlib.sha256(repr((shape[1:], fields)).encode()).hexdigest()[:16])


def _numbers(dataset, decimals: int) -> list[float] | None:
    """A small dataset of numbers; None for others."""
    import h5py

    if not isinstance(dataset, h5py.h5d.DatasetID) or dataset.get_space().get_simple_extent_npoints() > _MOST_NUMBERS:
        return None
    if dataset.get_type().get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
        return None
    values = np.empty(dataset.shape)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, values)
    return values.ravel().round(decimals).tolist()


def check_no_image_twice(images: ImageSources) -> None:
    """Make sure that no image is named twice: it would be merged as if it had been measured twice.

    Raises
    ------
    InputError
        Naming the first one that is.
    """
    named: dict[tuple[str, str | None], list[np.ndarray]] = {}
    for source in images.sources:
        if isinstance(source, StackSource):
            named.setdefault((source.path, None), []).append(np.arange(source.offset, source.offset + source.count))
        else:
            named.setdefault((source.prefix, source.suffix), []).append(_with_width(source))
    for (path, suffix), numbers in named.items():
        found, counts = np.unique(np.concatenate(numbers), return_counts=True)
        if (counts > 1).any():
            width, number = divmod(int(found[counts > 1][0]), _WIDTH)
            name = f"{path}:{number + 1}" if suffix is None else f"{path}{number:0{width}d}{suffix}"
            raise InputError(f"{name} is named twice by image=, template= or directory=: it would be merged twice")


def _with_width(source: NumberedSource) -> np.ndarray:
    """The numbers, with the digits that they have in the names: 1 and 01 are two files."""
    numbers = source.numbers.astype(np.int64)
    digits = 1 + np.floor(np.log10(np.maximum(numbers, 1))).astype(np.int64)
    return np.maximum(digits, source.width) * _WIDTH + numbers
