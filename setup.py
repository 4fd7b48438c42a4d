"""Builds the compiled loops of ssx_mpi.kernels; everything else about the package stands in setup.cfg.

The library is plain C without Python.h or NumPy headers (it is called through ctypes), so it needs nothing but a C
compiler, and one build serves every Python and NumPy version.
"""

from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.c"))
HEADERS = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.h"))

setup(
    ext_modules=[
        Extension(
            "ssx_mpi.kernels._loops",
            SOURCES,
            depends=HEADERS,
            extra_compile_args=[
                "-std=gnu11",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wall",
                "-Wextra",
            ],
            libraries=["m"],
        )
    ]
)
