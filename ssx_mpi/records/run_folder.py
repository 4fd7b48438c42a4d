"""The folder of a run: what it was made from, so that results of different parameters are never mixed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ssx_mpi.dials_compat import TABLES_2
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.records import in_hand
from ssx_mpi.records.batch_files import run_of
from ssx_mpi.records.files import StorageError, read_if_whole, write_json

_IDENTITY = "import/run.json"
_LOCK = "import/lock"
# of run.json: the first had nothing but the parameters, the images among them
_VERSION = 2
# import is the last to be removed: what it holds says that the others are ours
_OURS = (
    *("assess_crystals", "geometry_refinement", "DataFiles", "LogFiles", "data_reduction"),
    *(in_hand.FOLDER, "import"),
)
_OUR_FILES = (
    "ssx_mpi.json",
    "ssx_mpi.html",
    "ssx_mpi.bib",
    "images.h5",
    "live.jsonl",
    "progress.json",
    in_hand.STRIKES,
)


def fingerprint(identity: dict[str, str]) -> dict[str, str]:
    """A short form of `identity` for journals and batches."""
    text = json.dumps(identity, sort_keys=True)
    return {"run": hashlib.sha256(text.encode()).hexdigest()[:16]}


@dataclass(frozen=True)
class Claimed:
    """A folder that was taken for a run.

    Attributes
    ----------
    continued
        Whether it goes on with a run that was there already.
    identity
        Short form of what its results depend on, for journals and batches: of a run that goes on, the one that it
        was begun with.
    notes
        What the user is to know about going on, a line each.
    """

    continued: bool
    identity: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Programs:
    """Versions of what makes a run: of this program, and of DIALS as numbers."""

    program: str
    dials: tuple[int, ...]


@dataclass(frozen=True)
class _Begun:
    """What ``run.json`` says."""

    run: str
    parameters: dict[str, str]
    program: str
    dials: list[list[int]]


def claim(
    directory: Path,
    identity: dict[str, str],
    restart: bool,
    programs: Programs,
    defaults: Callable[[], dict[str, str]],
) -> Claimed:
    """Take `directory` for the run of `identity`, or go on with that run where it is there already.

    A parameter that the version which began the run did not have is taken to have had its default.

    Parameters
    ----------
    defaults
        Gives the identity of a run with the default of every parameter.

    Raises
    ------
    InputError
        When the folder holds a run with other parameters or images, or one whose files the installed DIALS cannot read,
        or another program's results, or cannot be written.
    """
    path = directory / _IDENTITY
    if not path.exists():
        _refuse_foreign(directory)
    elif restart:
        clear(directory)
    begun: _Begun | None = None
    notes: list[str] = []
    if path.exists():
        begun, notes = _begun(directory, identity)
        _refuse_other(directory, begun, identity, defaults)
        notes += _of_other_versions(directory, begun, programs)
    run = begun.run if begun else fingerprint(identity)["run"]
    used = begun.dials if begun else []
    content = {
        "version": _VERSION,
        "program": begun.program if begun else programs.program,
        "dials": used if list(programs.dials) in used else [*used, list(programs.dials)],
        "run": run,
        "parameters": identity,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or _read(path) != content:
            write_json(path, content)
    except OSError as error:
        raise InputError(f"output.directory={directory} cannot be written: {error.strerror}") from None
    except StorageError as error:
        raise InputError(f"output.directory={directory}: {error}") from None
    return Claimed(begun is not None, {"run": run}, tuple(notes))


def dials_versions(directory: Path) -> list[list[int]]:
    """The versions of DIALS that worked on the run in `directory`, in their order; none where that is not known."""
    versions = read_if_whole(directory / _IDENTITY).get("dials")
    return versions if isinstance(versions, list) else []


def _begun(directory: Path, identity: dict[str, str]) -> tuple[_Begun, list[str]]:
    """The run in `directory`, and what is to be said of its file.

    A damaged one is as good as the new one where batches or journals say that this is their run.
    """
    path = directory / _IDENTITY
    content = _read(path)
    if content is None:
        same = fingerprint(identity)["run"]
        found = {run_of(folder) for folder in _batches(directory)} - {None}
        if found != {same}:
            raise InputError(
                f"{path} is damaged, and what the run in this folder was made from cannot be told: use another "
                "output.directory, or restart=True to begin anew"
            )
        return _Begun(same, identity, "", []), [f"{path} was damaged: it is made again, its batches are of this run"]
    if content.get("version", 1) > _VERSION:
        raise InputError(f"{path} was written by a newer version of ssx_mpi than this one: use that one")
    if "version" not in content:
        program, dials = _versions_of_first(directory)
        return _Begun(fingerprint(content)["run"], content, program, dials), []
    return _Begun(content["run"], content["parameters"], content["program"], content["dials"]), []


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a ``run.json``; None where it is damaged."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    if "version" not in content:
        return content if "images" in content and all(isinstance(v, str) for v in content.values()) else None
    forms = {"version": int, "run": str, "parameters": dict, "program": str, "dials": list}
    if not isinstance(content["version"], int) or content["version"] > _VERSION:
        return content if isinstance(content["version"], int) else None
    return content if all(isinstance(content.get(name), form) for name, form in forms.items()) else None


def _versions_of_first(directory: Path) -> tuple[str, list[list[int]]]:
    """Versions of the program and of DIALS in the numbers of a run whose ``run.json`` has none."""
    content = read_if_whole(directory / "ssx_mpi.json")
    numbers = [int(n) for n in re.findall(r"\d+", str(content.get("dials", "")))]
    return str(content.get("program", "")), [numbers] if numbers else []


def _of_other_versions(directory: Path, begun: _Begun, programs: Programs) -> list[str]:
    """What is to be said of a run that goes on with other versions than it was begun with.

    Raises
    ------
    InputError
        When the installed DIALS cannot read the files of the one before.
    """
    others = [tuple(version) for version in begun.dials if tuple(version) != programs.dials]
    here = _dotted(programs.dials)
    for version in others:
        if version >= TABLES_2 > programs.dials:
            raise InputError(
                f"{directory} holds a run of DIALS {_dotted(version)}, whose reflection files DIALS {here} cannot "
                f"read: go on with DIALS {_dotted(TABLES_2)} or newer, or use another output.directory"
            )
    notes = []
    if others and list(programs.dials) not in begun.dials:
        notes.append(
            f"This run was begun with DIALS {_dotted(others[0])} and goes on with DIALS {here}: they do not find "
            "the same spots, nor intensities to the last digit"
        )
    elif others:
        notes.append(f"Batches of this run were made with DIALS {' and '.join(map(_dotted, begun.dials))}")
    if begun.program and begun.program != programs.program:
        notes.append(f"This run was begun with {begun.program} and goes on with {programs.program}")
    return notes


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))


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


def _refuse_other(
    directory: Path, begun: _Begun, identity: dict[str, str], defaults: Callable[[], dict[str, str]]
) -> None:
    """Refuse to go on with a run that was begun with other parameters."""
    old, new = begun.parameters, identity
    if old == new:
        return
    recorded, now = _one_by_one(old, new), _one_by_one(new, new)
    before = {**_one_by_one(defaults(), new), **recorded}
    differing = [
        f"{name} was {_short(before.get(name))}, is {_short(now.get(name))}"
        if name in now
        else f"{name} was {_short(before[name])}, which this version of ssx_mpi does not have"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and (name in now or name in recorded)
    ]
    if differing:
        raise InputError(
            f"{directory} holds a run with other parameters: {'; '.join(differing)}. "
            "Use another output.directory, or restart=True to begin anew"
        )


def _one_by_one(identity: dict[str, str], like: dict[str, str]) -> dict[str, str]:
    """An identity whose groups of parameters, ``name=value, name=value``, are taken apart.

    Groups are those of `like`, an identity of this version; of an older one they may have fewer members, or other ones.
    """
    found = {}
    for name, text in identity.items():
        members = re.split(r"(?:^|, )([a-z_]+)=", text)
        if name == "sources" or not re.match(r"[a-z_]+=", like.get(name, text)) or members[0]:
            found[name] = text
        else:
            found |= {f"{name}.{member}": value for member, value in zip(members[1::2], members[2::2])}
    return found


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
