"""Modules that DIALS and dxtbx import at their top and seldom use are executed at the first look into them.

``SSX_MPI_DEFER_IMPORTS=0`` in the environment turns this off, to find out whether it is the cause of some trouble: a
process then opens twice as many files at its start, and all else is the same.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types

#: variable of the environment that turns this off with the value 0
SWITCH = "SSX_MPI_DEFER_IMPORTS"

# what modules of DIALS and dxtbx that are always loaded import at their top, for functions that are seldom called: with
# what they import themselves, more than half of all files that a process opens at its start
_SELDOM_USED = ("sklearn", "sklearn.cluster", "pandas", "pkg_resources", "jinja2", "dxtbx.format.Registry")
# NeXus formats need units; these the package of units would load only to know their types, and works without
_UNITS, _NOT_FOR_UNITS = "pint", ("pandas", "xarray", "dask")


def install() -> None:
    """Have what is seldom used executed when something of it is looked up, not when it is imported.

    Calling it again changes nothing; :data:`SWITCH` in the environment keeps it from doing anything.
    """
    if os.environ.get(SWITCH) == "0":
        return
    if not any(isinstance(finder, _DeferringFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeferringFinder(_SELDOM_USED))


class _DeferredModule(types.ModuleType):
    """A module that is executed at the first look at something in it.

    The lazy modules of :mod:`importlib.util` do not serve: a package among them is executed as soon as one of its
    submodules is imported.
    """

    def __getattr__(self, name: str):
        _execute(self)
        return getattr(self, name)


def _execute(module: types.ModuleType) -> None:
    """Do now what was deferred, the packages that `module` is in first."""
    parent = sys.modules.get(module.__name__.rpartition(".")[0])
    if isinstance(parent, _DeferredModule):
        _execute(parent)
    if isinstance(module, _DeferredModule):
        module.__class__ = types.ModuleType  # type: ignore[assignment]
        assert module.__spec__ is not None
        assert module.__spec__.loader is not None
        module.__spec__.loader.exec_module(module)


class _LoaderInPlace(importlib.abc.Loader):
    """Stands in the place of `loader` until the module is executed."""

    def __init__(self, loader) -> None:
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)


class _DeferringLoader(_LoaderInPlace):
    """Makes a deferred module of one that `loader` would load."""

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        module.__class__ = _DeferredModule


class _UnitsLoader(_LoaderInPlace):
    """Loads the package of units as `loader` would if those that it can work with were not installed."""

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        hidden = [name for name in _NOT_FOR_UNITS if type(sys.modules.get(name)) is not types.ModuleType]
        before = {name: sys.modules.get(name) for name in hidden}
        sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
        try:
            self._loader.exec_module(module)
        finally:
            for name, known in before.items():
                del sys.modules[name]
                if known is not None:
                    sys.modules[name] = known


class _DeferringFinder(importlib.abc.MetaPathFinder):
    """Finds the modules `names`, to be loaded by a :class:`_DeferringLoader`, and the package of units."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name, path=None, target=None):
        if name not in self._names and name != _UNITS:
            # other parts of a deferred package expect that it has been executed
            parent = sys.modules.get(name.rpartition(".")[0])
            if isinstance(parent, _DeferredModule):
                _execute(parent)
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _UnitsLoader(spec.loader) if name == _UNITS else _DeferringLoader(spec.loader)
        return spec
