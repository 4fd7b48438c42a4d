"""Builds the compiled loops of ssx_mpi.kernels, and says what pip is to install; all else stands in setup.cfg.

The library is plain C without Python.h or NumPy headers (it is called through ctypes), so it needs nothing but a C
compiler, and one build, and one wheel, serves every Python and NumPy version.
"""

import platform
import site
from importlib.machinery import PathFinder
from importlib.metadata import Distribution
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70
    from wheel.bdist_wheel import bdist_wheel

SOURCES = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.c"))
HEADERS = sorted(str(p) for p in Path("ssx_mpi/kernels/src").glob("*.h"))

# dials, dxtbx, cctbx and libtbx are not on PyPI: ssx_mpi.dials_compat checks for them at start
REQUIREMENTS = [
    "h5py>=3.7",
    "hdf5plugin>=4.0",
    "jinja2>=3",
    "matplotlib>=3.5",
    "msgpack>=1.0",
    "mpi4py>=3.1",
    "numpy>=1.23",
    "plotly>=5",
    "pyyaml>=6",
    "rich>=13",
    "scipy>=1.9",
    "tabulate>=0.8",
    "tqdm>=4.60",
]


def h5py_has_another_name() -> bool:
    """Whether h5py can be imported here though pip does not know it by its name, as Debian's.

    pip would install a second one, for us or for hdf5plugin, and its HDF5 library does not know the file handles of the
    one in dxtbx. Looked for where the Python that is installed to has its packages, which pip hides from this one.
    """
    folders = site.getsitepackages()
    known = next(iter(Distribution.discover(name="h5py", path=folders)), None)
    return known is None and PathFinder.find_spec("h5py", folders) is not None


class BuildOnce(build_ext):
    """Names the library of a wheel without the version of Python, which it does not depend on.

    In a checkout it has it: there may be one of each build that this is tested on, with C libraries of different age.
    """

    def get_ext_filename(self, fullname: str) -> str:
        if self.inplace or getattr(self, "editable_mode", False):
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split("."))) + ".so"


class OneWheel(bdist_wheel):
    """A wheel for every Python 3, on machines whose C library is not older than that of this one."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        library, version = platform.libc_ver()
        machine = platform.machine()
        system = f"linux_{machine}" if library != "glibc" else f"manylinux_{version.replace('.', '_')}_{machine}"
        return "py3", "none", system


LEFT_OUT = ("h5py", "hdf5plugin") if h5py_has_another_name() else ()

setup(
    cmdclass={"build_ext": BuildOnce, "bdist_wheel": OneWheel},
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
