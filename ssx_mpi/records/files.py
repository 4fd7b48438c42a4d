"""Writing files so that a reader, or the next run, sees either the old one whole or the new one whole."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ssx_mpi.parameters.user_input import InputError


class StorageError(Exception):
    """A file of the run cannot be written: full disk, quota, lost permission. The message is one line for the user."""


# what a full disk, a quota, a lost permission and a file system that became read-only say
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def refusals(directory: Path) -> Iterator[None]:
    """Whatever the system refuses to make or to write below `directory` within the block has a name and a reason.

    Raises
    ------
    StorageError
        For files and folders that are not written by the functions of this module.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if error.errno not in _REFUSALS or (name is not None and not Path(os.fsdecode(name)).is_relative_to(directory)):
            raise
        raise StorageError(f"{name or directory} cannot be written: {error.strerror}") from error


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Whatever the system refuses within the block is the fault of writing `path`.

    Raises
    ------
    StorageError
        Naming `path` and the reason.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def placing(path: Path) -> Iterator[Path]:
    """A name to write to, which takes the place of `path` when the block ends without an error.

    Raises
    ------
    StorageError
        When the system refuses.
    """
    # the suffix stays last: writers look at it. One rank writes a file, so a name left by a kill is used again
    beside = path.with_name(f".partial.{path.name}")
    try:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield beside
            beside.replace(path)
    except BaseException:
        # a file system that refused the writing may refuse this too
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write; otherwise as :func:`placing`, and safe on the disk before it takes its place."""
    with placing(path) as beside, beside.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def make_sure_of_room(path: Path, n_bytes: int) -> None:
    """Make sure that so many bytes can be written beside `path`, for libraries that do not survive a full disk.

    Raises
    ------
    StorageError
        When the system refuses.
    """
    beside = path.with_name(f".room.{path.name}")
    try:
        with storing(path), beside.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """`content` as JSON in `path`, at once."""
    with replacing(path) as file:
        file.write(json.dumps(content, indent=indent).encode())


def write_hastily(path: Path, content: Any) -> None:
    """`content` as JSON in `path`, whole, but not forced onto the disk: for what is soon out of date."""
    with placing(path) as beside:
        beside.write_text(json.dumps(content))


def read_json(path: Path) -> Any:
    """The content of a file of an earlier run.

    Raises
    ------
    InputError
        When it is damaged.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): use another output.directory, or restart=True") from None


def read_if_whole(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; empty where there is no such file, or something else in it."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


class DamagedFileError(ValueError):
    """A file of the state of a run is not what this program writes; the message names it."""


def read_state(path: Path, forms: dict[str, type]) -> dict[str, Any]:
    """The content of a file of an earlier start, a JSON object with at least the members of these `forms`.

    Raises
    ------
    DamagedFileError
        When it is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path} is damaged (it holds no JSON object)")
    for name, form in forms.items():
        if not isinstance(content.get(name), form):
            raise DamagedFileError(f"{path} is damaged (no {name})")
    return content


def natural_key(path: str | Path) -> list[str | tuple[int, str]]:
    """Sorts paths by the values of the numbers in them: batch_10 comes after batch_9."""
    # text and digits alternate, so like meets like
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if k % 2 else part for k, part in enumerate(parts)]


def link(path: Path, target: Path) -> None:
    """A relative symbolic link at `path` to `target`; an older one is replaced."""
    relative = os.path.relpath(target, path.parent)
    if path.is_symlink() and str(path.readlink()) == relative:
        return
    with placing(path) as beside:
        beside.unlink(missing_ok=True)
        beside.symlink_to(relative)
