"""The command line of all programs: what is refused, with which words, and which arguments are files."""

from __future__ import annotations

import pytest

from ssx_mpi.command_line.parsing import Program, parse
from ssx_mpi.parameters.declaration import Definition
from ssx_mpi.parameters.user_input import InputError

DEFINITIONS = (
    Definition("count", "int", 3, "How many.", least=1),
    Definition("box.name", "str", None, "Of the box."),
)
STRICT = Program("p [options]", DEFINITIONS, "give name=value")
WITH_FILES = Program("p [options] files", DEFINITIONS, None)


def test_what_is_given_is_read_with_its_full_names():
    given = parse(STRICT, ["count=4", "name=a b", "-v"])
    assert (given.extract.count, given.extract.box.name, given.verbosity) == (4, "a b", 1)
    assert given.typed == {"count", "box.name"}


def test_files_are_files_only_where_the_program_takes_them():
    assert parse(WITH_FILES, ["a.expt", "count=2", "b.refl"]).files == ("a.expt", "b.refl")
    with pytest.raises(InputError, match="give name=value"):
        parse(STRICT, ["a.expt"])


@pytest.mark.parametrize("program", [STRICT, WITH_FILES])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("cuont=2", "did you mean count="),
        ("box.naem=x", "did you mean box.name="),
        ("count=0", "count"),
        ("count=None", "count=None: it must have a value"),
        ("count=__import__('os')", "not a number"),
        ("lost.phil", "lost.phil: there is no such file"),
    ],
)
def test_every_program_refuses_alike_in_one_line(program, argument, said):
    with pytest.raises(InputError) as caught:
        parse(program, [argument])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
