"""The compiled loops, loaded once: C functions called through ctypes on NumPy arrays.

Each kernel module declares the signatures of the functions that it calls with :func:`declare`; the array types below
check dtype, number of dimensions and contiguity at every call, so a wrong array raises instead of being misread.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
from numpy.ctypeslib import ndpointer

c_double = ctypes.c_double
c_int = ctypes.c_int
c_int64 = ctypes.c_int64


def array(dtype: type, ndim: int | None = None, writeable: bool = False):
    """ctypes argument type of a C-contiguous NumPy array of `dtype` with `ndim` dimensions."""
    flags = ["C_CONTIGUOUS", "WRITEABLE"] if writeable else ["C_CONTIGUOUS"]
    return ndpointer(dtype=np.dtype(dtype), ndim=ndim, flags=flags)  # type: ignore[arg-type]


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
    """The C function `name` with its argument and result types set."""
    function = getattr(library(), name)
    function.argtypes = argtypes
    function.restype = restype
    return function
