"""Parameters declared once: from a field of a frozen dataclass come its PHIL definition, its value, and its documents.

A field that is made by :func:`parameter` is one PHIL definition. One made by :func:`declared` has any number of them,
and a function that makes its value. :func:`group` holds a dataclass whose fields are declared in the same way.
CONTRIBUTING.md has an example.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from ssx_mpi.parameters.user_input import NUMBERS, InputError, PathReader, check_number, read_cell

#: the default of what the program finds out for itself; the value in the dataclass is None
AUTO = "Auto"

#: expert levels: for every run, for runs that need it, for tuning and for files of DIALS, for developers
LEVELS = ("Basic", "Advanced", "Expert", "Developer")

#: kinds of values, by the PHIL types that they have
_PHIL_TYPES = {"cell": "floats", "file": "path", "folder": "path", "choices": "choice"}

T = TypeVar("T")


@dataclass(frozen=True)
class Definition:
    """One parameter as a user sees it.

    Attributes
    ----------
    name : str
        With the names of its scopes, and points between them.
    kind : str
        bool, int, float, floats, str, space_group; cell: a,b,c,alpha,beta,gamma; choice, choices: one, or several, of
        `choices`; path; file: one that must be there; folder.
    default : object
        :data:`AUTO` where the program finds it out, None for none; a tuple for `floats` and `choices`.
    help : str
        What it does, with units.
    level : int
        Index in :data:`LEVELS`.
    least, most : float or None
        Limits of numbers, which are allowed themselves.
    size : int or None
        How many numbers `floats` are.
    choices : tuple of str
        What may be chosen.
    multiple : bool
        Whether it may be given more than once.
    optional : bool
        Whether None stands for something although it is not the default.
    auto : bool
        Whether Auto stands for something although it is not the default.
    aliases : tuple of str
        Other names, as xia2 has them, each with the names of its scopes.
    """

    name: str
    kind: str
    default: Any
    help: str
    level: int = 0
    least: float | None = None
    most: float | None = None
    size: int | None = None
    choices: tuple[str, ...] = ()
    multiple: bool = False
    optional: bool = False
    auto: bool = False
    aliases: tuple[str, ...] = ()

    @property
    def phil_type(self) -> str:
        """Its type with its limits, as PHIL has it."""
        limits = {
            "multi": True if self.kind == "choices" else None,
            "size": 6 if self.kind == "cell" else self.size,
            "value_min": self.least,
            "value_max": self.most,
        }
        given = ", ".join(f"{name}={_text(value)}" for name, value in limits.items() if value is not None)
        return f"{self._phil_kind}({given})" if given else self._phil_kind

    @property
    def _phil_kind(self) -> str:
        return _PHIL_TYPES.get(self.kind, self.kind)

    @property
    def default_text(self) -> str:
        """Its default, as PHIL has it."""
        if self.choices:
            chosen = self.default if isinstance(self.default, tuple) else (self.default,)
            return " ".join(f"*{choice}" if choice in chosen else choice for choice in self.choices)
        if isinstance(self.default, tuple):
            return ",".join(_text(value) for value in self.default) or "None"
        return _text(self.default)

    def within(self, scope: str) -> Definition:
        """The same definition with `scope`, and its point, before its names."""
        return dataclasses.replace(self, name=scope + self.name, aliases=tuple(scope + name for name in self.aliases))

    def phil(self) -> str:
        """Its definition in PHIL, without its scopes."""
        name = self.name.rpartition(".")[2]
        lines = [f"{name} = {self.default_text}", f"  .type = {self.phil_type}"]
        lines += ["  .multiple = True"] * self.multiple + ["  .optional = True"] * self.optional
        lines.append(f'  .help = "{self.help}"')
        lines += [f"  .expert_level = {self.level}"] * (self.level > 0)
        return "\n".join(lines)

    def assignment(self, value: str, where: str = "") -> str:
        """What gives it a value in PHIL: names and paths in quotes, so that PHIL takes them with all blanks and signs.

        Parameters
        ----------
        value
            As the user has it.
        where
            What to name before the parameter in an error.

        Raises
        ------
        InputError
            For a number that is none, see :func:`ssx_mpi.parameters.user_input.check_numbers`.
        """
        from libtbx.phil.tokenizer import quote_python_str

        if self._phil_kind in NUMBERS:
            check_number(where + self.name, value)
        if self._phil_kind == "choice" and "+" in value:
            # PHIL knows the choices in lower case alone where several are given in this way
            value = value.lower()
        elif self._phil_kind in ("str", "path") and value.lower() not in ("", "none", "auto") and value[0] not in "\"'":
            value = quote_python_str(chr(34), value)
        return f"{self.name}={value}"

    def check(self, value: Any) -> None:
        """Make sure that it may have a value, as PHIL extracted it.

        Raises
        ------
        InputError
            For None and Auto where they stand for nothing, and for numbers that are not finite.
        """
        from libtbx import Auto

        found_out = self.default == AUTO
        none_by_default = self.default is None or (self.default == () and not self.choices)
        for one in value if isinstance(value, list) else [value]:
            if one is None and not (none_by_default or found_out or self.optional):
                raise InputError(f"{self.name}=None: it must have a value")
            if one is Auto and not (found_out or self.auto):
                raise InputError(f"{self.name}=Auto: there is no automatic value")
            if isinstance(one, float) and not math.isfinite(one):
                raise InputError(f"{self.name}={one}: it must be a finite number")

    def read(self, value: Any, path: PathReader) -> Any:
        """Its value in a dataclass, for what PHIL extracted.

        Raises
        ------
        InputError
            For a file that is not there, and a cell that is none.
        """
        if value is None or str(value) == AUTO:
            return () if self.default == () else None
        if self.kind == "file":
            return path.existing(value, self.name)
        if self.kind == "folder":
            return path.absolute(value)
        if self.kind == "cell":
            return read_cell(value, self.name)
        if self.kind == "space_group":
            return str(value)
        if self.kind in ("floats", "choices"):
            return tuple(value)
        return value


def parameter(
    name: str, kind: str, default: Any, help: str, *, affects_results: bool = True, **more: Any
) -> Any:  # Any, as of dataclasses.field: the annotation of the field says what it is
    """A field of a dataclass that is one definition: its value is what the user gave.

    Parameters
    ----------
    name, kind, default, help, more
        Those of :class:`Definition`.
    affects_results
        False lets a run go on in its folder with another value.
    """
    in_class = None if default == AUTO else Path(default) if kind == "folder" and default else default
    return declared(Definition(name, kind, default, help, **more), default=in_class, affects_results=affects_results)


def declared(
    *definitions: Definition,
    make: Callable[..., Any] | None = None,
    uses: tuple[str, ...] = (),
    default: Any = MISSING,
    affects_results: bool = True,
) -> Any:
    """A field of a dataclass that is made of the values of any number of definitions.

    Parameters
    ----------
    definitions
        Those that this field declares.
    make
        ``make(*values, path)`` gives the value of the field for what PHIL extracted, of the definitions in their
        order and then of `uses`. Without it there is one definition, which reads itself.
    uses
        Names of definitions that another field declares.
    default
        Value of the field where the dataclass is made by hand.
    affects_results
        As for :func:`parameter`.
    """
    metadata = {"definitions": definitions, "make": make, "uses": uses, "affects_results": affects_results}
    return dataclasses.field(default=default, metadata=metadata)


def group(of: type, scope: str = "", *, affects_results: bool = True) -> Any:
    """A field that holds a dataclass of declared fields.

    Parameters
    ----------
    scope
        What stands before the names of its definitions, with its point; empty where they are complete.
    """
    return dataclasses.field(
        default_factory=of, metadata={"group": of, "scope": scope, "affects_results": affects_results}
    )


def definitions(of: type, scope: str = "") -> list[Definition]:
    """All that a dataclass declares, in the order of its fields.

    Parameters
    ----------
    scope
        What stands before their names, with its point.
    """
    found: list[Definition] = []
    for field in dataclasses.fields(of):
        if "group" in field.metadata:
            found += definitions(field.metadata["group"], scope + field.metadata["scope"])
        found += [d.within(scope) for d in field.metadata.get("definitions", ())]
    return found


def in_scopes(found: Iterable[Definition]) -> dict[str, Any]:
    """Definitions by their names, in dictionaries by the names of their scopes; a scope stands where it comes first."""
    tree: dict[str, Any] = {}
    for definition in found:
        *scopes, name = definition.name.split(".")
        place = tree
        for scope in scopes:
            place = place.setdefault(scope, {})
        place[name] = definition
    return tree


def check_values(extract: Any, found: Iterable[Definition]) -> None:
    """Make sure that no parameter has a value that only others may have; see :meth:`Definition.check`."""
    for definition in found:
        definition.check(attrgetter(definition.name)(extract))


def phil_text(found: Iterable[Definition]) -> str:
    """PHIL of definitions, in their scopes."""

    def lines(tree: dict[str, Any]) -> Iterator[str]:
        for name, one in tree.items():
            if isinstance(one, Definition):
                yield one.phil()
            else:
                yield from (f"{name} {{", *lines(one), "}")

    return "\n".join(lines(in_scopes(found))) + "\n"


def read(of: type[T], extract: Any, path: PathReader, scope: str = "", **undeclared: Any) -> T:
    """A dataclass of declared fields for what PHIL extracted.

    Parameters
    ----------
    extract
        ``scope_extract`` with all definitions of `of`.
    path
        Makes absolute paths.
    scope
        What stands before their names.
    undeclared
        Values of fields that are not declared, or are not to be what was declared.

    Raises
    ------
    InputError
        For what cannot be used, such as a file that is not there.
    """
    values = dict(undeclared)
    for field in dataclasses.fields(of):  # type: ignore[arg-type]
        how = field.metadata
        if field.name in values or not ("group" in how or "definitions" in how):
            continue
        if "group" in how:
            values[field.name] = read(how["group"], extract, path, scope + how["scope"])
            continue
        given = [attrgetter(scope + name)(extract) for name in (*(d.name for d in how["definitions"]), *how["uses"])]
        if how["make"] is not None:
            values[field.name] = how["make"](*given, path)
        else:
            (definition,) = how["definitions"]
            values[field.name] = definition.within(scope).read(given[0], path)
    return of(**values)


def _text(value: Any) -> str:
    """A default or a limit, as PHIL has it."""
    if value == "":
        # PHIL has nothing for no words
        return '""'
    return repr(value) if isinstance(value, float) else str(value)
