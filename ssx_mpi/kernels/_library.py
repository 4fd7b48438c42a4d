"""The compiled loops, loaded once: C functions called through ctypes on NumPy arrays.

Each kernel module declares the signatures of the functions that it calls with :func:`declare`; the array types below
check dtype, number of dimensions and contiguity at every call, so a wrong array raises instead of being misread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.ctypeslib import ndpointer

c_double = ctypes.c_double
c_int = ctypes.c_int
c_int64 = ctypes.c_int64


def array(dtype: type, ndim: int | None = None, writeable: bool = False):
    """ctypes argument type of a C-contiguous NumPy array of `dtype` with `ndim` dimensions."""
    flags = ["C_CONTIGUOUS", "WRITEABLE"] if writeable else ["C_CONTIGUOUS"]
    return type("CheckedArray", (_CheckedArray,), {"pointer": ndpointer(np.dtype(dtype), ndim, flags=flags)})  # type: ignore[arg-type]


class _CheckedArray:
    """What `numpy.ctypeslib.ndpointer` checks, at a third of its cost: an image makes thousands of calls.

    Where one of the checks fails, ndpointer itself looks again, and says what is wrong.
    """

    pointer: Any

    @classmethod
    def from_param(cls, obj: Any) -> Any:
        wanted = cls.pointer
        if (
            type(obj) is not np.ndarray
            or obj.dtype != wanted._dtype_
            or (wanted._ndim_ is not None and obj.ndim != wanted._ndim_)
            or obj.flags.num & wanted._flags_ != wanted._flags_
        ):
            return wanted.from_param(obj)
        if obj.flags.writeable and obj.size:
            return ctypes.byref(ctypes.c_char.from_buffer(obj))  # type: ignore[arg-type]  # the stubs of NumPy 1.24 know no buffer
        return ctypes.c_void_p(obj.ctypes.data)


@cache
def library() -> ctypes.CDLL:
    """The shared library built from ``kernels/src/*.c`` by ``pip install``.

    Raises
    ------
    ImportError
        When the package was copied rather than installed, so that the library was never built.
    """
    folder = Path(__file__).parent
    for suffix in EXTENSION_SUFFIXES:
        path = folder / f"_loops{suffix}"
        if path.exists():
            return ctypes.CDLL(str(path))
    raise ImportError(f"the compiled kernels of ssx_mpi are missing from {folder}: install the package with pip")


def declare(name: str, argtypes: list, restype=None):
    """The C function `name` with its argument and result types set.

    Raises
    ------
    ImportError
        When the library was built from older sources, which do not have it.
    """
    function = getattr(library(), name, None)
    if function is None:
        raise ImportError(
            f"the compiled kernels of ssx_mpi are older than the package ({name} is missing): install it again"
        )
    function.argtypes = argtypes
    function.restype = restype
    return function
