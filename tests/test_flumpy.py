"""No array goes to C++ as a temporary.

An exception that passes while a temporary ``flumpy.from_numpy(...)`` is an argument ends the process by SIGABRT, in
every version of dxtbx: its destructor runs while the interpreter has an error set. Bound to a name it lives longer.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ssx_mpi"
# methods of DIALS and dxtbx that only keep what they are given, and raise nothing
_CONVERTERS = ("from_numpy", "vec_from_numpy", "miller_index_from_numpy", "mat3_from_numpy")


def temporaries(source: str) -> list[int]:
    """Lines where an array of flumpy is an argument of a call, directly or through a generator."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            inner = argument.value if isinstance(argument, ast.Starred) else argument
            if isinstance(inner, ast.GeneratorExp | ast.ListComp):
                inner = inner.elt
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
                owner = inner.func.value
                if inner.func.attr in _CONVERTERS and isinstance(owner, ast.Name) and owner.id == "flumpy":
                    found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrays_have_names(path):
    assert temporaries(path.read_text()) == []


def test_a_temporary_is_noticed():
    assert temporaries("f(flumpy.from_numpy(x))") == [1]
    assert temporaries("f(*[flumpy.from_numpy(x) for x in y])") == [1]
    assert temporaries("f(a=flumpy.vec_from_numpy(x))") == [1]
    assert temporaries("x = flumpy.from_numpy(y)\nf(x)\nt['a'] = flumpy.from_numpy(y)") == []
