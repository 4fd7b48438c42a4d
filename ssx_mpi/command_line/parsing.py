"""The command line of all programs: read as programs of DIALS read theirs, and refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ssx_mpi import __version__, dials_compat
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters.declaration import Definition, check_values, phil_text
from ssx_mpi.parameters.names import Names, assignments
from ssx_mpi.parameters.user_input import InputError


@dataclass(frozen=True)
class Program:
    """What a command line is read by.

    Attributes
    ----------
    usage : str
        The first lines of its help.
    definitions : sequence of Definition
        Its parameters.
    bare : str or None
        What to say of an argument that is no assignment and no file of parameters; None where such are names of files
        that the program takes.
    epilog : str
        The last lines of its help.
    without_meaning : mapping
        Names of parameters of xia2 that have no effect here, and why.
    """

    usage: str
    definitions: Sequence[Definition]
    bare: str | None
    epilog: str = ""
    without_meaning: Mapping[str, str] = field(default_factory=dict)

    def scope(self) -> Any:
        """Its PHIL scope object."""
        import iotbx.phil

        return iotbx.phil.parse(phil_text(self.definitions))


@dataclass(frozen=True)
class Given:
    """A command line that was read.

    Attributes
    ----------
    extract
        What PHIL extracted.
    files : tuple of str
        What is no parameter.
    verbosity : int
    typed : frozenset of str
        Full names of the parameters given, on the command line or in a file.
    notes : tuple of str
        Lines for the log about what was given and has no effect.
    """

    extract: Any
    files: tuple[str, ...]
    verbosity: int
    typed: frozenset[str]
    notes: tuple[str, ...]


def parse(program: Program, arguments: list[str]) -> Given:
    """What `arguments` say; what is typed wins over what a file of parameters has, wherever that is named.

    Raises
    ------
    InputError
        For an unknown parameter, or one with an impossible value; the message is one line.
    """
    from libtbx.utils import Sorry

    scope = program.scope()
    names = Names(program.definitions, program.without_meaning)
    parser = dials_compat.argument_parser(usage=program.usage, phil=scope, epilog=program.epilog, check_format=False)
    read = _Reader(names, program.definitions)
    # PHIL takes them in their order, so what is typed comes last
    others = [argument for argument in arguments if not _is_parameter_file(argument)]
    quoted = [text for argument in arguments if _is_parameter_file(argument) for text in read.file(argument)]
    quoted += [text for argument in others for text in read.argument(argument)]
    try:
        extract, options, left = parser.parse_args(quoted, show_diff_phil=False, return_unhandled=True)
    except (Sorry, RuntimeError, ValueError, AssertionError) as error:
        # of PHIL: a value of the wrong type
        raise InputError(" ".join(str(error).split())) from None
    unknown = [argument for argument in left if program.bare is not None or "=" in argument]
    if unknown:
        raise InputError(f"unknown parameter {unknown[0]!r}; {program.bare or '-c lists the parameters'}")
    check_values(extract, program.definitions)
    return Given(extract, tuple(left), options.verbose, frozenset(read.typed), tuple(read.notes()))


def _is_parameter_file(argument: str) -> bool:
    return "=" not in argument and argument.endswith((".phil", ".params"))


class _Reader:
    """Makes what is given into assignments of full names, and remembers which those are."""

    def __init__(self, names: Names, definitions: Iterable[Definition]) -> None:
        self._names = names
        self._definitions = {definition.name: definition for definition in definitions}
        self._unused: dict[str, None] = {}
        self.typed: set[str] = set()

    def file(self, file: str) -> list[str]:
        """All that a file sets."""
        return [text for given in assignments(file) for text in self._assign(given.name, given.value, f"{file}: ")]

    def argument(self, argument: str) -> list[str]:
        """One argument of the command line."""
        name, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or name.startswith("-"):
            return [argument]
        if not value:
            raise InputError(f"{argument}: there is no value behind the =")
        return self._assign(name, value, "")

    def _assign(self, name: str, value: str, where: str) -> list[str]:
        target = self._names.find(name)
        if target is None:
            several = self._names.several(name)
            said = f"it may be {' or '.join(f'{one}=' for one in several)}" if several else self._names.hint(name)
            raise InputError(f"{where}unknown parameter {f'{name}={value}'!r}; {said}")
        if target in self._names.without_meaning:
            self._unused.setdefault(target)
            return []
        self.typed.add(target)
        return [self._definitions[target].assignment(value, where)]

    def notes(self) -> list[str]:
        """A line about all that was given and has no effect."""
        if not self._unused:
            return []
        said = "; ".join(f"{name} ({self._names.without_meaning[name]})" for name in self._unused)
        return [f"without an effect here: {said}"]


def print_help(program: Program) -> None:
    """Print how `program` is used."""
    dials_compat.argument_parser(
        usage=program.usage, phil=program.scope(), epilog=program.epilog, check_format=False
    ).print_help()


def run_alone(name: str, main: Callable[[list[str]], int], arguments: list[str] | None) -> None:
    """Run a program of one process, and end with the exit code that its `main` returns.

    Parameters
    ----------
    name
        Of the program, for what it says when there is no DIALS that it can work with.
    arguments
        None for those of the command line.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--version" in arguments:
        print(f"ssx_mpi {__version__}")
        return
    try:
        dials_compat.prepare()
    except dials_compat.DialsError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(ExitCode.REFUSED)
    sys.exit(main(arguments))
