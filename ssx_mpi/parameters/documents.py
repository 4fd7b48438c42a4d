"""The parameters of programs as documents, from their declarations: a page for readers, a JSON schema for web forms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ssx_mpi.parameters.declaration import AUTO, LEVELS, Definition, in_scopes

_HEAD = """# Parameters

<!-- made of the declarations by `make parameters`; do not edit -->

Give them as `name=value` on the command line, or in a file whose name ends in `.phil`. The scopes before a name may be
left out where the rest is unambiguous. Limits are included. The default comes last; of choices it is in bold. `Auto` is
found out by the program. Levels: {levels}; `-c -e 2` prints those of levels 0 to 2.
[parameters.schema.json](parameters.schema.json) has the same as a JSON schema, with a definition for each program, for
web forms and workflow engines.
"""


def page(programs: Mapping[str, Sequence[Definition]]) -> str:
    """A page of Markdown.

    Parameters
    ----------
    programs
        Definitions by the name of their program.
    """
    levels = ", ".join(f"{number} {name.lower()}" for number, name in enumerate(LEVELS))
    lines = [_HEAD.format(levels=levels)]
    for program, definitions in programs.items():
        lines.append(f"## {program}\n")
        lines += _tables("", in_scopes(definitions))
    return "\n".join(lines)


def _tables(scope: str, tree: Mapping[str, Any]) -> Iterator[str]:
    """A table of what is in no scope, then one of each scope with all that is in it."""
    own = [one for one in tree.values() if isinstance(one, Definition)]
    if own:
        if scope:
            yield f"### {scope}\n"
        yield "| parameter | value | level | |\n|---|---|---|---|"
        yield from (f"| `{one.name}` | {_value(one)} | {one.level} | {_cell(one.help)}{_aliases(one)} |" for one in own)
        yield ""
    for name, one in tree.items():
        if not isinstance(one, Definition):
            yield from _tables(f"{scope}.{name}" if scope else name, one)


def _aliases(one: Definition) -> str:
    return f" xia2: {', '.join(f'`{name}`' for name in one.aliases)}." if one.aliases else ""


def _value(one: Definition) -> str:
    """What may be given, and the default."""
    if one.choices:
        chosen = one.default if isinstance(one.default, tuple) else (one.default,)
        return (", " if one.kind == "choices" else " or ").join(
            f"**{choice}**" if choice in chosen else choice for choice in one.choices
        )
    limits = ""
    if one.least is not None and one.most is not None:
        limits = f", {one.least:g} to {one.most:g}"
    elif one.least is not None:
        limits = f" of {one.least:g} or more"
    kind = {"floats": "numbers", "float": "number", "int": "whole number", "str": "text", "bool": "True or False"}
    several = ", any number of times" * one.multiple
    name = f"{one.size} numbers" if one.size else kind.get(one.kind, one.kind.replace("_", " "))
    return f"{name}{limits}{several}; {_cell(one.default_text)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def schema(programs: Mapping[str, Sequence[Definition]]) -> dict[str, Any]:
    """A JSON schema with a definition for each program; scopes are objects.

    Parameters
    ----------
    programs
        Definitions by the name of their program.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Parameters of ssx_mpi",
        "$defs": {program: _object(in_scopes(definitions)) for program, definitions in programs.items()},
    }


def _object(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            name: _property(one) if isinstance(one, Definition) else _object(one) for name, one in tree.items()
        },
    }


def _property(one: Definition) -> dict[str, Any]:
    found = _type(one)
    if one.default is None or one.optional or one.default == AUTO:
        # what is not given, or stands for something of its own
        found = {"anyOf": [found, {"enum": [None, AUTO] if one.default == AUTO else [None]}]}
    if one.multiple:
        found = {"type": "array", "items": found}
    default = [] if one.multiple else list(one.default) if isinstance(one.default, tuple) else one.default
    return {**found, "default": default, "description": one.help, "x-expert-level": one.level}


def _type(one: Definition) -> dict[str, Any]:
    if one.kind == "choice":
        return {"enum": list(one.choices)}
    if one.kind == "choices":
        return {"type": "array", "items": {"enum": list(one.choices)}, "uniqueItems": True}
    limits = {key: value for key, value in (("minimum", one.least), ("maximum", one.most)) if value is not None}
    if one.kind in ("floats", "cell"):
        size = 6 if one.kind == "cell" else one.size
        length = {"minItems": size, "maxItems": size} if size else {}
        return {"type": "array", "items": {"type": "number", **limits}, **length}
    if one.kind in ("int", "float"):
        return {"type": "integer" if one.kind == "int" else "number", **limits}
    return {"type": "boolean" if one.kind == "bool" else "string"}
