"""The command line of all programs: read as programs of DIALS read theirs, and refused in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssx_mpi import __version__, dials_compat
from ssx_mpi.exit_codes import ExitCode
from ssx_mpi.parameters.declaration import Definition, phil_text
from ssx_mpi.parameters.user_input import (
    InputError,
    as_phil,
    check_numbers,
    check_values,
    names_given,
    unknown_parameter,
)


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
    """

    usage: str
    definitions: Sequence[Definition]
    bare: str | None
    epilog: str = ""

    def scope(self) -> Any:
        """Its PHIL scope object."""
        import iotbx.phil

        return iotbx.phil.parse(phil_text(self.definitions))


@dataclass(frozen=True)
class Given:
    """A command line that was read: what PHIL extracted, files, verbosity, full names of the parameters given."""

    extract: Any
    files: tuple[str, ...]
    verbosity: int
    typed: frozenset[str]


def parse(program: Program, arguments: list[str]) -> Given:
    """What `arguments` say.

    Raises
    ------
    InputError
        For an unknown parameter, or one with an impossible value; the message is one line.
    """
    import iotbx.phil
    from libtbx.utils import Sorry

    scope = program.scope()
    parser = dials_compat.argument_parser(usage=program.usage, phil=scope, epilog=program.epilog, check_format=False)
    try:
        for argument in arguments:
            # the parser of DIALS would take a missing, broken or empty phil file for an unknown parameter
            if "=" not in argument and argument.endswith((".phil", ".params")):
                if not Path(argument).is_file():
                    raise InputError(f"{argument}: there is no such file")
                given = iotbx.phil.parse(file_name=argument)
                if not given.objects:
                    raise InputError(f"{argument}: there are no parameters in it")
                check_numbers(given, scope, f"{argument}: ")
        quoted = [as_phil(argument, scope) for argument in arguments]
        extract, options, left = parser.parse_args(quoted, show_diff_phil=False, return_unhandled=True)
    except (Sorry, RuntimeError, ValueError, AssertionError) as error:
        # of PHIL: a value of the wrong type, a name that fits several parameters
        raise InputError(" ".join(str(error).split())) from None
    unknown = [argument for argument in left if program.bare is not None or "=" in argument]
    if unknown:
        raise InputError(unknown_parameter(unknown[0], scope, program.bare or ""))
    check_values(extract, scope)
    typed = frozenset(name for argument in arguments for name in names_given(argument, scope))
    return Given(extract, tuple(left), options.verbose, typed)


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
