"""Everything that differs between builds and versions of DIALS, and nothing else.

Call :func:`prepare` before the first import of dials, dxtbx or cctbx: programs do so in their command line, tests in
``conftest.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import sys
import types
from functools import cache
from pathlib import Path

from ssx_mpi import deferred_imports

logger = logging.getLogger(__name__)

OLDEST_DIALS = (3, 12)
_UNRELEASED = (4,)
#: the first DIALS that writes reflection files of version 2, which older ones cannot read
TABLES_2 = (3, 29)
# with these DIALS writes, and expects, reflections in other forms than the MessagePack that is read and joined here
_OTHER_FORMS = ("DIALS_USE_PICKLE", "DIALS_USE_H5", "DIALS_USE_GZIP_REFL")


class DialsError(RuntimeError):
    """This Python has no DIALS that ssx_mpi can work with."""


def prepare() -> None:
    """Make the DIALS of this Python usable, whichever build it is; calling it again changes nothing.

    Raises
    ------
    DialsError
        When DIALS is missing or older than :data:`OLDEST_DIALS`, naming what was found.
    """
    os.environ.setdefault("DIALS_NOBANNER", "1")
    for name in _OTHER_FORMS:
        os.environ.pop(name, None)
    _point_libtbx_to_base_prefix()
    deferred_imports.install()
    if importlib.util.find_spec("dials") is None:
        raise DialsError(
            f"no DIALS for {sys.executable}: install ssx_mpi with the Python that DIALS belongs to "
            "(conda-forge: dials; Debian: dials)"
        )
    version = dials_version()
    if version < OLDEST_DIALS:
        raise DialsError(
            f"DIALS {'.'.join(map(str, version))} is too old: ssx_mpi needs {'.'.join(map(str, OLDEST_DIALS))} or newer"
        )
    if lacks_gemmi():
        raise DialsError(
            f"DIALS {'.'.join(map(str, version))} merges with gemmi, which is not installed: pip install gemmi "
            "(conda-forge: gemmi; Debian: python3-gemmi)"
        )
    _provide_mono_sim()


def lacks_gemmi() -> bool:
    """Whether the DIALS of this Python merges with gemmi, and there is none."""
    if importlib.util.find_spec("gemmi") is not None:
        return False
    found = importlib.util.find_spec("dials")
    folders = found.submodule_search_locations if found else None
    merging = [Path(folder) / "algorithms" / "merging" / "merge.py" for folder in folders or ()]
    return any("import gemmi" in path.read_text(errors="replace") for path in merging if path.is_file())


def _point_libtbx_to_base_prefix() -> None:
    # libtbx looks for its environment below sys.prefix, which in a virtual environment is not where cctbx stands
    if "LIBTBX_BUILD" in os.environ or sys.prefix == sys.base_prefix:
        return
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for below in (f"lib/cctbx/{python}", "share/cctbx", "lib/cctbx"):
        if (Path(sys.prefix) / below / "libtbx_env").exists():
            return
        candidate = Path(sys.base_prefix) / below
        if (candidate / "libtbx_env").exists():
            logger.debug("LIBTBX_BUILD set to %s", candidate)
            os.environ["LIBTBX_BUILD"] = str(candidate)
            return


def _provide_mono_sim() -> None:
    # Debian's DIALS leaves this extension out; stills indexing imports it and uses nothing of it
    name = "xfel_mono_sim_ext"
    if name in sys.modules:
        return
    # imports the extensions it is linked to
    importlib.import_module("scitbx.array_family.flex")
    try:
        importlib.import_module(name)
    except ImportError:
        logger.debug("an empty %s stands in for the one that this build of DIALS leaves out", name)
        sys.modules[name] = types.ModuleType(name)


@cache
def dials_version() -> tuple[int, ...]:
    """Version of the installed DIALS as numbers, such as ``(3, 12, 1)``; a newer one for a checkout that has none."""
    # a developer's DIALS would start git, and no rank may start a process
    os.environ.setdefault("DIALS_SKIP_GIT_VERSIONING", "1")
    version = importlib.import_module("dials.util.version").dials_version()
    numbers = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(n) for n in numbers.groups() if n is not None) if numbers else _UNRELEASED


def table_version() -> int:
    """Version of the form in which the installed DIALS writes reflection tables."""
    return 2 if dials_version() >= TABLES_2 else 1


def newer_table(path: Path) -> str:
    """Why the installed DIALS cannot read the reflections in `path`, where a newer one wrote them; empty otherwise."""
    import msgpack

    try:
        with path.open("rb") as file:
            unpacker = msgpack.Unpacker()
            unpacker.feed(file.read(256))
            unpacker.read_array_header()
            name, version = unpacker.unpack(), unpacker.unpack()
    except (OSError, ValueError, msgpack.UnpackException):
        return ""
    if name != "dials::af::reflection_table" or not isinstance(version, int) or version <= table_version():
        return ""
    return (
        f"{path} was written by DIALS {'.'.join(map(str, TABLES_2))} or newer, and DIALS "
        f"{'.'.join(map(str, dials_version()))} cannot read it: use the newer one here too"
    )


@cache
def register_hdf5_filters() -> bool:
    """Make the compression filters of hdf5plugin known to HDF5, which not every version of dxtbx does.

    Returns False where hdf5plugin is not installed; files without compression, or with gzip, are read all the same.
    """
    try:
        importlib.import_module("hdf5plugin")
    except ImportError:
        return False
    return True


_PROGRAM_SCOPES = {
    "dials_import": ("dials.command_line.dials_import", "phil_scope"),
    "find_spots": ("dials.command_line.find_spots", "working_phil"),
    "ssx_index": ("dials.command_line.ssx_index", "phil_scope"),
    "refine": ("dials.command_line.refine", "working_phil"),
    "ssx_integrate": ("dials.command_line.ssx_integrate", "working_phil"),
}


def program_phil(program: str):
    """PHIL scope of a DIALS program with its own defaults, as the installed version has it."""
    module, name = _PROGRAM_SCOPES[program]
    return getattr(importlib.import_module(module), name)


# the newest names of the ellipsoid models, and what DIALS before 3.16 calls them
_OLD_RLP_MOSAICITY = {"simple1angular1": "angular2", "simple1angular3": "angular4"}


def rlp_mosaicity(model: str) -> str:
    """Name of an ellipsoid `model`, given by its newest name, in the installed DIALS.

    Raises
    ------
    DialsError
        When this version does not have the model.
    """
    words = program_phil("ssx_integrate").get("profile.ellipsoid.rlp_mosaicity.model").objects[0].words
    known = {str(word).strip("*'\"") for word in words}
    for name in (model, _OLD_RLP_MOSAICITY.get(model)):
        if name in known:
            return name
    version = ".".join(map(str, dials_version()))
    raise DialsError(f"DIALS {version} has no ellipsoid model {model}: it has {', '.join(sorted(known))}")


@cache
def has_sparse_engine() -> bool:
    """Whether the sparse refinement engine works here: it needs cctbx built with Eigen."""
    try:
        lstbx = importlib.import_module("scitbx.examples.bevington")
    except ImportError:
        return False
    return hasattr(lstbx, "non_linear_ls_eigen_wrapper")


def refinement_engine() -> str:
    """The refinement engine to use: the sparse one where this build has it, otherwise Levenberg-Marquardt."""
    return "SparseLevMar" if has_sparse_engine() else "LevMar"


def argument_parser(**options):
    """The parser of DIALS programs, with `options`: raises RuntimeError where newer versions would end the program."""
    from dials.util.options import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message):
            raise RuntimeError(message)

    return Parser(**options)


def parameter(scope, path: str, default=None):
    """What an extracted PHIL `scope` has at `path`, or `default` where this version has no such parameter."""
    for name in path.split("."):
        if not hasattr(scope, name):
            return default
        scope = getattr(scope, name)
    return scope


def set_if_known(scope, path: str, value) -> None:
    """Set the parameter at `path` of an extracted PHIL `scope`, where this version has it."""
    parent, _, name = path.rpartition(".")
    place = parameter(scope, parent) if parent else scope
    if hasattr(place, name):
        setattr(place, name, value)


def uncovered(scope, covered: dict[str, tuple]) -> list[str]:
    """Parameters of an extracted PHIL `scope` whose values are not `covered`, as ``path=value``.

    Parameters
    ----------
    scope
        Extracted scope of a program.
    covered
        By path the values that are; a parameter that this version lacks has the first of them.
    """
    found = {path: parameter(scope, path, values[0]) for path, values in covered.items()}
    return [f"{path}={value}" for path, value in found.items() if value not in covered[path]]


def write_mtz(content, path: str) -> None:
    """Write what dials.merge made: an MTZ object of cctbx, or of gemmi in newer versions."""
    (content.write_to_file if hasattr(content, "write_to_file") else content.write)(path)


# where cctbx keeps the parameters for structure factors from a model, the newest place first
_STRUCTURE_FACTOR_SCOPES = (
    ("mmtbx.programs.fmodel", "master_phil"),
    ("mmtbx.programs.fmodel", "fmodel_from_xray_structure_master_params"),
    ("mmtbx.command_line.fmodel", "fmodel_from_xray_structure_master_params"),
)


def structure_factor_parameters():
    """The extracted parameters of mmtbx for structure factors from a model.

    Raises
    ------
    DialsError
        When this build of cctbx has none.
    """
    for module, name in _STRUCTURE_FACTOR_SCOPES:
        try:
            scope = getattr(importlib.import_module(module), name, None)
        except ImportError:
            continue
        if scope is not None:
            return scope.extract()
    raise DialsError("this build of cctbx has no parameters for structure factors from a model")
