"""The folder of a run: what it was made from, so that results of different parameters are never mixed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ssx_mpi.params import InputError
from ssx_mpi.records.files import write_json

_IDENTITY = "import/run.json"
_OURS = ("import", "assess_crystals", "geometry_refinement", "DataFiles", "LogFiles", "data_reduction")


def fingerprint(identity: dict[str, str]) -> dict[str, str]:
    """A short form of `identity` for journals and batches."""
    text = json.dumps(identity, sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest()[:16]}


def claim(directory: Path, identity: dict[str, str], restart: bool) -> bool:
    """Take `directory` for the run of `identity`; True when it goes on with one that is there already.

    Raises
    ------
    InputError
        When the folder holds a run with other parameters or images, or cannot be written.
    """
    path = directory / _IDENTITY
    if restart:
        clear(directory)
    if path.exists():
        differing = _differences(json.loads(path.read_text()), identity)
        if differing:
            raise InputError(
                f"{directory} holds a run with other parameters: {'; '.join(differing)}. "
                "Use another output.directory, or restart=True to begin anew"
            )
        return True
    if any(directory.glob("batch_*")):
        raise InputError(
            f"{directory} holds batches of another program or run: use another output.directory, or restart=True"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, identity)
    except OSError as error:
        raise InputError(f"output.directory={directory} cannot be written: {error.strerror}") from None
    return False


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in names]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else f"{text[:60]}…{text[-37:]}"


def clear(directory: Path) -> None:
    """Remove what a run wrote into `directory`, and nothing else."""
    for folder in (*(directory / name for name in _OURS), *directory.glob("batch_*")):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
    for name in ("ssx_mpi.json", "ssx_mpi.html"):
        (directory / name).unlink(missing_ok=True)
