"""Builds the compiled loops of ssx_mpi.kernels, and says what pip is to install; all else stands in setup.cfg.

The library is plain C without Python.h or NumPy headers (it is called through ctypes), so it needs nothing but a C
compiler, and one build serves every Python and NumPy version.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup

SOURCES = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.c"))
HEADERS = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.h"))

# dials, dxtbx, cctbx and libtbx are not on PyPI: ssx_mpi.dials_compat checks for them at start
REQUIREMENTS = [
    "h5py>=3.7",
    "hdf5plugin>=4.0",
    "matplotlib>=3.5",
    "msgpack>=1.0",
    "mpi4py>=3.1",
    "numpy>=1.23",
    "pyyaml>=6",
    "scipy>=1.9",
    "tabulate>=0.8",
    "tqdm>=4.60",
]


def h5py_has_another_name() -> bool:
    """Whether h5py can be imported here though pip does not know it by its name, as Debian's.

    pip would install a second one, for us or for hdf5plugin, and its HDF5 library does not know the file handles of the
    one in dxtbx. The question is put to the Python that is installed to: here, pip hides its packages.
    """
    question = (
        "import sys; from importlib.util import find_spec;"
        "from importlib.metadata import packages_distributions as known;"
        "sys.exit(not (find_spec('h5py') and 'h5py' not in known().get('h5py', [])))"
    )
    return subprocess.run([sys.executable, "-I", "-c", question], check=False).returncode == 0


LEFT_OUT = ("h5py", "hdf5plugin") if h5py_has_another_name() else ()

setup(
    install_requires=[requirement for requirement in REQUIREMENTS if not requirement.startswith(LEFT_OUT)],
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
    ],
)
