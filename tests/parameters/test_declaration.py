"""What is made of a declaration: PHIL, values, documents; and that the documents of this checkout are not stale."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from ssx_mpi.command_line.parameter_documents import made, programs
from ssx_mpi.parameters import declaration, documents
from ssx_mpi.parameters.declaration import AUTO, Definition, declared, group, parameter
from ssx_mpi.parameters.user_input import InputError, PathReader

DOCS = Path(__file__).parents[2] / "docs"


@dataclass(frozen=True)
class Inner:
    sizes: tuple[float, ...] = parameter("box.sizes", "floats", (1.0, 2.5), "Edges.", size=2, level=2)
    both: int = declared(uses=("count",), make=lambda count, path: 2 * count, default=6)


@dataclass(frozen=True)
class Outer:
    count: int = parameter("count", "int", 3, "How many.", least=1, most=9)
    kind: str = parameter("kind", "choice", "b", "Which.", choices=("a", "b"))
    some: tuple[str, ...] = parameter("some", "choices", ("x",), "Any.", choices=("x", "y"))
    found: float | None = parameter("box.found", "float", AUTO, "By itself.", affects_results=False)
    file: Path | None = parameter("file", "file", None, "That is there.")
    inner: Inner = group(Inner)
    of_its_own: int = 17


def extracted(*lines: str, of: type = Outer, scope: str = ""):
    import iotbx.phil

    master = iotbx.phil.parse(declaration.phil_text(declaration.definitions(of, scope)))
    return master.fetch(source=iotbx.phil.parse("\n".join(lines))).extract()


def test_defaults_by_hand_are_those_of_phil(tmp_path):
    assert declaration.read(Outer, extracted(), PathReader(tmp_path)) == Outer()


def test_what_is_given_is_read(tmp_path):
    (tmp_path / "here").touch()
    lines = ("count=4", "kind=a", "some=*x *y", "box.found=1.5", "box.sizes=7,8", "file=here")
    found = declaration.read(Outer, extracted(*lines), PathReader(tmp_path))
    assert found == Outer(4, "a", ("x", "y"), 1.5, tmp_path / "here", Inner((7.0, 8.0), 8))


def test_names_in_another_scope_are_those_that_messages_have(tmp_path):
    given = extracted("deep.file=lost", scope="deep.")
    with pytest.raises(InputError, match=r"^deep\.file=lost: there is no such file$"):
        declaration.read(Outer, given, PathReader(tmp_path), "deep.")


def test_limits_choices_and_levels_are_those_of_phil():
    import iotbx.phil
    from libtbx.utils import Sorry

    for bad in ("count=0", "count=10", "kind=c", "box.sizes=1,2,3"):
        with pytest.raises((Sorry, RuntimeError)):
            extracted(bad)
    master = iotbx.phil.parse(declaration.phil_text(declaration.definitions(Outer)))
    levels = {d.path: d.object.expert_level for d in master.all_definitions()}
    assert levels["box.sizes"] == 2
    assert not levels["count"]


def test_a_scope_is_one_wherever_its_parameters_are_declared():
    tree = declaration.in_scopes(declaration.definitions(Outer))
    assert list(tree) == ["count", "kind", "some", "box", "file"]
    assert list(tree["box"]) == ["found", "sizes"]


def test_the_schema_takes_what_the_program_takes():
    properties = documents.schema({"p": declaration.definitions(Outer)})["$defs"]["p"]["properties"]
    assert properties["count"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 9,
        "default": 3,
        "description": "How many.",
        "x-expert-level": 0,
    }
    assert properties["box"]["properties"]["found"]["anyOf"] == [{"type": "number"}, {"enum": [None, AUTO]}]
    assert properties["some"]["items"] == {"enum": ["x", "y"]}


def test_the_page_says_what_may_be_given():
    page = documents.page({"p": [Definition("s.n", "int", 3, "a|b", least=1, level=1)]})
    assert "### s" in page
    assert "| `s.n` | whole number of 1 or more; 3 | 1 | a\\|b |" in page


def test_the_documents_are_not_stale():
    stale = [name for name, text in made().items() if (DOCS / name).read_text() != text]
    assert stale == [], "make parameters writes them anew"


@pytest.mark.parametrize("program", programs())
def test_every_parameter_has_a_sentence_and_a_level_that_differs(program):
    found = programs()[program]
    assert [d.name for d in found if not d.help.endswith(".") or not 0 <= d.level <= 3] == []
    # a program of three parameters shows them all
    assert len(found) <= 3 or len({d.level for d in found}) >= 3
    assert len({d.name for d in found}) == len(found)
