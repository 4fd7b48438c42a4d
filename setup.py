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


def there_under_another_name(module: str) -> bool:
    """Whether `module` can be imported here though pip does not know it, as Debian's h5py.

    pip would install a second one, whose HDF5 library does not know the file handles of the one in dxtbx. The question
    is put to the Python that is installed to: here, pip hides its packages.
    """
    question = (
        "import sys; from importlib.metadata import packages_distributions as known; from importlib.util import find_spec;"
        "sys.exit(not (find_spec(sys.argv[1]) and sys.argv[1] not in known().get(sys.argv[1], [])))"
    )
    return subprocess.run([sys.executable, "-I", "-c", question, module], check=False).returncode == 0


setup(
    install_requires=[r for r in REQUIREMENTS if not (r.startswith("h5py") and there_under_another_name("h5py"))],
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
