"""What differs between builds of DIALS is found out by asking the build."""

from __future__ import annotations

import importlib
import sys
import types

import pytest
from support import run

from ssx_mpi import dials_compat
from ssx_mpi.dials_compat import DialsError


def test_the_version_is_a_tuple_of_numbers():
    assert dials_compat.dials_version() >= dials_compat.OLDEST_DIALS


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("DIALS 3.12.1-gabc", (3, 12, 1)),
        ("DIALS 3.30.0-0-g5a1b2c3-release", (3, 30, 0)),
        ("DIALS 3.dev.1234", (4,)),
        ("DIALS __DIALS_RELEASE__VERSION__", (4,)),
        ("DIALS 3.22", (3, 22)),
    ],
)
def test_versions_as_builds_write_them(monkeypatch, text, version):
    module = importlib.import_module("dials.util.version")
    monkeypatch.setattr(module, "dials_version", lambda: text)
    assert dials_compat.dials_version.__wrapped__() == version


def test_a_version_that_is_too_old_is_refused_with_its_number(monkeypatch):
    monkeypatch.setattr(dials_compat, "dials_version", lambda: (3, 5, 2))
    with pytest.raises(DialsError, match=r"DIALS 3\.5\.2 is too old"):
        dials_compat.prepare()


def test_without_dials_it_says_which_python_has_none(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dials" else find(name))
    with pytest.raises(DialsError, match="no DIALS for") as refused:
        dials_compat.prepare()
    assert sys.executable in str(refused.value)


def test_the_program_without_dials_ends_with_one_line(tmp_path):
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, *a: None if name == 'dials' else find(name, *a);"
        "from ssx_mpi.command_line.process import run; run(['image=x.h5', 'nproc=1'])"
    )
    done = run([sys.executable, "-c", program], timeout=60, cwd=tmp_path)
    assert done.status == 2
    assert "no DIALS for" in done.err
    assert "Traceback" not in done.err


def test_stills_indexing_can_be_imported():
    # the module that it needs and does not use is missing from Debian's build
    importlib.import_module("dials.algorithms.indexing.nave_parameters")
    assert "xfel_mono_sim_ext" in sys.modules


@pytest.mark.parametrize("program", ["process", "reduce", "simulate", "submit"])
def test_numpy_is_loaded_with_one_thread_whatever_the_environment_says(program):
    from support import run

    spy = """
import importlib.abc, os, sys
class Spy(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            print("numpy with", os.environ["OPENBLAS_NUM_THREADS"], os.environ["OMP_NUM_THREADS"])
sys.meta_path.insert(0, Spy())
import ssx_mpi.command_line.%s
import numpy
"""
    done = run([sys.executable, "-c", spy % program], timeout=60, OPENBLAS_NUM_THREADS="3", OMP_NUM_THREADS="2")
    assert "numpy with 1 1" in done.out, done.text


def test_preparing_again_changes_nothing(monkeypatch):
    import os

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = dict(os.environ)
    dials_compat.prepare()
    assert dict(os.environ) == before


def test_reflections_are_messagepack_whatever_the_user_has_dials_write(monkeypatch, tmp_path):
    from dials.array_family import flex

    for name in ("DIALS_USE_PICKLE", "DIALS_USE_H5", "DIALS_USE_GZIP_REFL"):
        monkeypatch.setenv(name, "1")
    dials_compat.prepare()
    table = flex.reflection_table(2)
    table.as_file(str(tmp_path / "some.refl"))
    assert (tmp_path / "some.refl").read_bytes() == table.as_msgpack()


@pytest.mark.parametrize("program", ["dials_import", "find_spots", "ssx_index", "refine", "ssx_integrate"])
def test_every_program_has_its_scope(program):
    assert dials_compat.program_phil(program).fetch().extract() is not None


def words(*names: str):
    """A stand-in for the scope of dials.ssx_integrate whose models have these names."""
    import libtbx.phil

    return libtbx.phil.parse(f"profile.ellipsoid.rlp_mosaicity.model = {' '.join(names)}\n  .type = choice")


@pytest.mark.parametrize(
    ("known", "asked", "name"),
    [
        (("simple1", "simple6", "angular2", "*angular4"), "simple1angular1", "angular2"),
        (("simple1", "simple6", "angular2", "*angular4"), "simple1angular3", "angular4"),
        (("simple1", "*simple6", "simple1angular1", "simple6angular1"), "simple6angular1", "simple6angular1"),
        (("simple1", "*simple6"), "simple6", "simple6"),
    ],
)
def test_ellipsoid_models_have_the_names_of_the_installed_version(monkeypatch, known, asked, name):
    monkeypatch.setattr(dials_compat, "program_phil", lambda program: words(*known))
    assert dials_compat.rlp_mosaicity(asked) == name


def test_a_model_that_this_version_lacks_is_refused_with_those_that_it_has(monkeypatch):
    monkeypatch.setattr(dials_compat, "program_phil", lambda program: words("simple1", "*simple6"))
    with pytest.raises(DialsError, match="no ellipsoid model simple6angular1: it has simple1, simple6"):
        dials_compat.rlp_mosaicity("simple6angular1")


@pytest.mark.parametrize(("sparse", "engine"), [(True, "SparseLevMar"), (False, "LevMar")])
def test_the_sparse_engine_is_used_where_there_is_one(monkeypatch, sparse, engine):
    monkeypatch.setattr(dials_compat, "has_sparse_engine", lambda: sparse)
    assert dials_compat.refinement_engine() == engine


def _in_new_python(program: str) -> str:
    done = run([sys.executable, "-c", program], timeout=120)
    assert done.status == 0, done.err
    return done.out


def test_what_dials_seldom_uses_is_loaded_when_it_is_used():
    program = """
import sys
from ssx_mpi import dials_compat
dials_compat.prepare()
dials_compat.prepare()
from dials.array_family import flex
from dxtbx.model import Detector
heavy = lambda: [n for n in ("sklearn.base", "pandas.core", "pkg_resources.extern", "joblib") if n in sys.modules]
print(heavy())
from dxtbx.model import detector_helpers, detector
axes = [[0.0, 0.0], [0.01, 0.0], [5.0, 5.0], [5.01, 5.0]]
print(detector_helpers.sklearn.cluster.DBSCAN(eps=0.1, min_samples=2).fit_predict(axes).tolist())
import sklearn.neighbors, sklearn.cluster
print(sklearn.neighbors.NearestNeighbors.__name__, sklearn.cluster is detector_helpers.sklearn.cluster)
from dxtbx.format.Registry import get_format_class_for
print(get_format_class_for("FormatNXmx").__name__)
"""
    lines = _in_new_python(program).splitlines()
    assert lines == ["[]", "[0, 0, 1, 1]", "NearestNeighbors True", "FormatNXmx"]


def test_a_part_of_a_deferred_package_finds_it_loaded():
    program = """
from ssx_mpi import dials_compat
dials_compat.prepare()
import dxtbx.model
from sklearn.decomposition import PCA
import pandas
from pandas.tseries.offsets import Day
print(PCA.__name__, pandas.DataFrame({"a": [1, 2]}).a.sum(), Day.__name__)
"""
    assert _in_new_python(program).split() == ["PCA", "3", "Day"]


def test_the_switch_turns_it_off(monkeypatch):
    monkeypatch.setenv("SSX_MPI_DEFER_IMPORTS", "0")
    program = """
import sys
from ssx_mpi import dials_compat
dials_compat.prepare()
import dxtbx.model
print("sklearn.base" in sys.modules)
"""
    assert _in_new_python(program).split() == ["True"]


def test_units_do_without_tables_and_tables_come_after():
    program = """
import sys
from ssx_mpi import dials_compat
dials_compat.prepare()
import pint
print((3 * pint.UnitRegistry().mm).to("m").magnitude, "pandas" in sys.modules)
import pandas
print(pandas.Series([1, 2]).sum())
"""
    assert _in_new_python(program).split() == ["0.003", "False", "3"]


def test_wrong_parameters_are_refused_alike_where_dials_would_end_the_program(monkeypatch):
    from dials.util.options import ArgumentParser

    from ssx_mpi.command_line import process, reduce
    from ssx_mpi.parameters.user_input import InputError

    def as_newer_versions_do(self, *args, **kwargs):
        self.error(message="Invalid phil parameter: no integer")

    monkeypatch.setattr(ArgumentParser, "parse_args", as_newer_versions_do)
    for parse in (
        lambda: process.read_arguments(["nproc=1.5"]),
        lambda: reduce._parse(["nproc=1.5"]),
    ):
        with pytest.raises(InputError, match="no integer"):
            parse()


def a_scope():
    import libtbx.phil

    return libtbx.phil.parse("a { b = 1\n .type = int\n }\nc = None\n .type = int").extract()


def test_parameters_that_a_version_lacks_have_their_default():
    scope = a_scope()
    assert dials_compat.parameter(scope, "a.b", 7) == 1
    assert dials_compat.parameter(scope, "c", 7) is None
    assert [dials_compat.parameter(scope, path, 7) for path in ("a.d", "d", "d.b", "c.b", "a.b.c")] == [7] * 5


def test_parameters_that_a_version_lacks_are_not_set():
    scope = a_scope()
    for path in ("a.b", "c", "a.d", "d", "d.b"):
        dials_compat.set_if_known(scope, path, 5)
    assert (scope.a.b, scope.c) == (5, 5)
    assert not hasattr(scope, "d")
    assert not hasattr(scope.a, "d")


def test_what_is_not_covered_is_named_and_what_a_version_lacks_is_covered():
    covered = {"a.b": (0, 2), "c": (None,), "d.e": (False,)}
    assert dials_compat.uncovered(a_scope(), covered) == ["a.b=1"]


class _Mtz:
    def __init__(self, method: str) -> None:
        self.written: list[str] = []
        setattr(self, method, self.written.append)


@pytest.mark.parametrize("method", ["write", "write_to_file"])
def test_merged_data_are_written_by_cctbx_and_by_gemmi(method):
    mtz = _Mtz(method)
    dials_compat.write_mtz(mtz, "merged.mtz")
    assert mtz.written == ["merged.mtz"]


def test_structure_factors_have_the_parameters_of_the_installed_cctbx():
    assert dials_compat.structure_factor_parameters().fmodel.k_sol == 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("mmtbx.programs.fmodel", "master_phil"),
        ("mmtbx.command_line.fmodel", "fmodel_from_xray_structure_master_params"),
    ],
)
def test_parameters_of_structure_factors_are_found_where_each_cctbx_has_them(monkeypatch, module, name):
    import libtbx.phil

    there = types.SimpleNamespace(**{name: libtbx.phil.parse("fmodel.k_sol = 0.35\n .type = float")})

    def load(asked):
        if asked != module:
            raise ImportError(asked)
        return there

    monkeypatch.setattr(importlib, "import_module", load)
    assert dials_compat.structure_factor_parameters().fmodel.k_sol == 0.35
    delattr(there, name)
    with pytest.raises(DialsError, match="no parameters for structure factors"):
        dials_compat.structure_factor_parameters()


@pytest.mark.parametrize(
    ("stage", "program"),
    [("fast_spotfinding", "find_spots"), ("fast_indexing", "ssx_index"), ("fast_integration", "ssx_integrate")],
)
def test_a_version_without_the_rarer_parameters_is_covered(stage, program):
    module = importlib.import_module(f"ssx_mpi.stages.fast.{stage}")
    scope = dials_compat.program_phil(program).extract()
    for path in module._COVERED:
        parent, _, name = path.rpartition(".")
        place = dials_compat.parameter(scope, parent) if parent else scope
        # the fast engines read these two themselves
        if hasattr(place, name) and path != "spotfinder.threshold.algorithm":
            delattr(place, name)
    assert dials_compat.uncovered(scope, module._COVERED) == []


def test_a_dials_that_merges_with_gemmi_needs_it(monkeypatch, tmp_path):
    merging = tmp_path / "dials" / "algorithms" / "merging"
    merging.mkdir(parents=True)
    find_spec = importlib.util.find_spec

    def without_gemmi(name, *arguments):
        if name == "gemmi":
            return None
        if name == "dials":
            return types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "dials")])
        return find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without_gemmi)
    (merging / "merge.py").write_text("import iotbx.mtz\n")
    assert not dials_compat.lacks_gemmi()
    (merging / "merge.py").write_text("import gemmi\n")
    assert dials_compat.lacks_gemmi()
    with pytest.raises(dials_compat.DialsError, match="pip install gemmi"):
        dials_compat.prepare()
