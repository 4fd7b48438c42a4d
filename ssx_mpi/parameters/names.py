"""Names of parameters as users write them: in full, shortened, or as xia2 has them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssx_mpi.parameters.declaration import Definition
from ssx_mpi.parameters.user_input import InputError


@dataclass(frozen=True)
class Assignment:
    """A value given in a file.

    Attributes
    ----------
    name : str
        As the file has it, with all its scopes.
    value : str
        As the file has it.
    file : str
        Its name.
    """

    name: str
    value: str
    file: str


class Names:
    """The names that a program knows.

    Parameters
    ----------
    definitions
        Its parameters.
    without_meaning
        Names that are accepted and have no effect, and why.
    """

    def __init__(self, definitions: Iterable[Definition], without_meaning: Mapping[str, str]) -> None:
        definitions = list(definitions)
        self._targets = {alias: d.name for d in definitions for alias in d.aliases}
        self._targets |= {d.name: d.name for d in definitions}
        self.without_meaning = without_meaning

    def find(self, name: str) -> str | None:
        """The full name of the one parameter that `name` stands for, in full or without the first of its scopes."""
        if name in self._targets:
            return self._targets[name]
        if name in self.without_meaning:
            return name
        found = self.several(name)
        return found[0] if len(found) == 1 else None

    def several(self, name: str) -> list[str]:
        """Full names of the parameters that `name` may be short for, in order."""
        return sorted({target for known, target in self._targets.items() if known.endswith(f".{name}")})

    def hint(self, name: str) -> str:
        """What to say of a name that no parameter has."""
        # the last word tells more than the scopes, which may be those of another program
        by_last: dict[str, list[str]] = {}
        for known in self._targets:
            by_last.setdefault(known.rpartition(".")[2], []).append(known)
        close = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1, cutoff=0.6)
        if not close:
            return "-c lists the parameters"
        best = max(by_last[close[0]], key=lambda known: difflib.SequenceMatcher(None, known, name).ratio())
        return f"did you mean {self._targets[best]}=?"


def _includes(scope: Any) -> bool:
    return any(one.name == "include" if one.is_definition else _includes(one) for one in scope.objects)


def assignments(file: str) -> Iterator[Assignment]:
    """What a file of parameters sets, in its order.

    Raises
    ------
    InputError
        When there is no such file, it is no PHIL, or there is nothing in it.
    """
    import iotbx.phil
    from libtbx.utils import Sorry

    if not Path(file).is_file():
        raise InputError(f"{file}: there is no such file")
    try:
        given = iotbx.phil.parse(file_name=file)
    except (Sorry, RuntimeError, ValueError, AssertionError, OSError) as error:
        raise InputError(f"{file}: {' '.join(str(error).split())}") from None
    if not given.objects:
        raise InputError(f"{file}: there are no parameters in it")
    if _includes(given):
        # of other files, or of what a Python module holds
        raise InputError(f"{file}: include is not followed: name that file too")
    for definition in given.all_definitions():
        yield Assignment(definition.path, " ".join(str(word) for word in definition.object.words), file)
