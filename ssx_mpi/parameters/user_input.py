"""What a user gives, whatever the program: paths, names of parameters, and the error for what cannot be used."""

from __future__ import annotations

import hashlib
import re
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


# PHIL evaluates what is given for a number as Python; numbers and sums of them need nothing else than this
_PLAIN = re.compile(r"[-+*/().,\s\deE]*")
#: PHIL types that are evaluated
NUMBERS = ("int", "ints", "float", "floats")


def check_numbers(given: Any, known_scope: Any, where: str = "") -> None:
    """Make sure that what is given for a number is one: PHIL would evaluate any Python.

    Parameters
    ----------
    given
        Parsed PHIL of the user.
    known_scope
        Scope that knows the types.
    where
        What to name before the parameter.

    Raises
    ------
    InputError
        For anything else.
    """
    kinds = {d.path: _kind(d) for d in known_scope.all_definitions()}
    for definition in given.all_definitions():
        if kinds.get(definition.path) in NUMBERS:
            check_number(where + definition.path, " ".join(word.value for word in definition.object.words))


def check_number(name: str, value: str) -> None:
    """Make sure that what is given for one number, or several, is no other Python; the error names the parameter."""
    if value.strip().lower() not in ("none", "auto") and (not _PLAIN.fullmatch(value) or "**" in value):
        raise InputError(f"{name}={value}: not a number")


def _kind(definition: Any) -> str | None:
    return getattr(definition.object.type, "phil_type", None)


def read_cell(given: list[float] | None, parameter: str) -> tuple[float, ...] | None:
    """Six numbers as a unit cell (angstrom, degrees), None for none.

    Raises
    ------
    InputError
        When no cell has them, with the name of the `parameter`.
    """
    from cctbx import uctbx

    try:
        return None if given is None else tuple(uctbx.unit_cell(given).parameters())
    except (RuntimeError, ValueError) as error:
        # of cctbx: what is wrong with the numbers
        raise InputError(f"{parameter}={','.join(f'{p:g}' for p in given or ())}: {error}") from None


def check_limits(d_min: float | None, d_max: float | None, prefix: str = "") -> None:
    """Make sure that resolution limits leave something between them.

    Raises
    ------
    InputError
        When they do not.
    """
    if d_min is not None and d_max is not None and d_min >= d_max:
        raise InputError(f"{prefix}d_min={d_min:g} is not below d_max={d_max:g}: nothing is left between them")


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
