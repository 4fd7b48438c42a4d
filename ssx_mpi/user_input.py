"""What a user gives, whatever the program: paths, names of parameters, and the error for what cannot be used."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any


class InputError(Exception):
    """Bad input or parameters: nothing was processed. The message is one line for the user; the exit code is 2."""


@dataclass(frozen=True)
class PathReader:
    """Makes absolute paths of names that a user gave, relative to `cwd`."""

    cwd: Path

    def absolute(self, name: str) -> Path:
        return (self.cwd / Path(name).expanduser()).resolve()

    def existing(self, name: str | None, parameter: str) -> Path | None:
        """The path of a file, None when none is named.

        Raises
        ------
        InputError
            When it is not there, with the name of the `parameter`.
        """
        if name is None:
            return None
        path = self.absolute(name)
        if not path.is_file():
            raise InputError(f"{parameter}={name}: there is no such file")
        return path


def unknown_parameter(argument: str, known_scope, without_name: str) -> str:
    """The message for an `argument` that a scope does not know, naming the closest parameter that it does.

    Parameters
    ----------
    known_scope
        The PHIL scope object.
    without_name
        What to say of an argument that is no assignment.
    """
    name = argument.split("=")[0].strip()
    known = [d.path for d in known_scope.all_definitions()]
    by_last = {path.split(".")[-1]: path for path in reversed(known)}
    close = difflib.get_close_matches(name, known + list(by_last), n=1, cutoff=0.5)
    hint = f"did you mean {by_last.get(close[0], close[0])}=?" if close else "-c lists the parameters"
    return f"unknown parameter {argument!r}; {hint if '=' in argument else without_name}"


def identity(parameters: Any) -> dict[str, str]:
    """The fields of a dataclass that results depend on, by name, as text; files with a digest of their contents."""
    return {
        f.name: _identity_of(getattr(parameters, f.name))
        for f in fields(parameters)
        if f.metadata.get("affects_results", True)
    }


def _identity_of(value: Any) -> str:
    if isinstance(value, Path) and value.is_file():
        return f"{value} (sha256 {hashlib.sha256(value.read_bytes()).hexdigest()[:16]})"
    if hasattr(value, "__dataclass_fields__"):
        return ", ".join(f"{f.name}={_identity_of(getattr(value, f.name))}" for f in fields(value))
    if isinstance(value, tuple):
        return "; ".join(_identity_of(v) for v in value)
    return str(value)
