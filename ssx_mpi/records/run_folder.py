"""The folder of a run: what it was made from, so that results of different parameters are never mixed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from pathlib import Path
from typing import IO, Any

from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records import in_hand
from ssx_mpi.records.files import StorageError, read_json, write_json

_IDENTITY = "import/run.json"
_LOCK = "import/lock"
# import is the last to be removed: what it holds says that the others are ours
_OURS = (
    *("assess_crystals", "geometry_refinement", "DataFiles", "LogFiles", "data_reduction"),
    *(in_hand.FOLDER, "import"),
)
_OUR_FILES = ("ssx_mpi.json", "ssx_mpi.html", "ssx_mpi.bib", "images.h5", in_hand.STRIKES)


def fingerprint(identity: dict[str, str]) -> dict[str, str]:
    """A short form of `identity` for journals and batches."""
    text = json.dumps(identity, sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest()[:16]}


def claim(directory: Path, identity: dict[str, str], restart: bool) -> bool:
    """Take `directory` for the run of `identity`; True when it goes on with one that is there already.

    Raises
    ------
    InputError
        When the folder holds a run with other parameters or images, or another program's results, or cannot be written.
    """
    path = directory / _IDENTITY
    if not path.exists():
        _refuse_foreign(directory)
    elif restart:
        clear(directory)
    if path.exists():
        differing = _differences(read_json(path), identity)
        if differing:
            raise InputError(
                f"{directory} holds a run with other parameters: {'; '.join(differing)}. "
                "Use another output.directory, or restart=True to begin anew"
            )
        return True
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)
    except OSError as error:
        raise InputError(f"output.directory={directory} cannot be written: {error.strerror}") from None
    except StorageError as error:
        raise InputError(f"output.directory={directory}: {error}") from None
    return False


def _refuse_foreign(directory: Path) -> None:
    """Make sure that nothing else has a name of ours: it would be written over, or removed by a restart."""
    folders = [directory / name for name in _OURS] + _batches(directory)
    # what a run leaves that was killed before it said who it is does not count
    names = [f.name for f in folders if f.is_dir() and any(p.name[0] != "." and p.name != "lock" for p in f.iterdir())]
    if names:
        raise InputError(f"{directory} holds {', '.join(names)} of another program: use another output.directory")


def _batches(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("batch_*")) if path.name[6:].isdigit()]


def lock(directory: Path) -> IO[bytes] | None:
    """Keep other runs out of `directory` for as long as what is returned is open; None where there is no run yet.

    The system lets go of the lock when the process ends, however it does. File systems that cannot lock are trusted.

    Raises
    ------
    InputError
        When another process works in the folder.
    """
    path = directory / _LOCK
    if not path.parent.is_dir():
        return None
    try:
        file = path.open("ab")
    except OSError:
        # without permission to write nothing will go wrong here; whoever wants to write says so
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{directory}: another process is at work in this folder; wait for it, or end it") from None
    except OSError:
        pass
    return file


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-37:]}"


def clear(directory: Path) -> None:
    """Remove what a run wrote into `directory`, and nothing else."""
    for folder in (*_batches(directory), *(directory / name for name in _OURS)):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    for name in _OUR_FILES:
        (directory / name).unlink(missing_ok=True)
