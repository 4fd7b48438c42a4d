"""One wheel serves every Python: it is built, installed beside nothing else, and its kernels give numbers."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from support import run

TOP = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


@pytest.mark.skipif(
    importlib.util.find_spec("wheel") is None or shutil.which("cc") is None, reason="there is no wheel, or no compiler"
)
def test_one_wheel_for_all_pythons_works_where_it_is_installed(tmp_path):
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(TOP / name, source)
    shutil.copytree(TOP / "ssx_mpi", source / "ssx_mpi", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    offline = ["--no-deps", "--no-index"]
    built = run([*PIP, "wheel", *offline, "--no-build-isolation", "-w", str(wheels), str(source)], 300, tmp_path)
    assert built.status == 0, built.text
    (wheel,) = wheels.iterdir()
    assert "-py3-none-manylinux_" in wheel.name
    installed = run([*PIP, "install", *offline, "--target", str(target), str(wheel)], 120, tmp_path)
    assert installed.status == 0, installed.text
    assert [path.name for path in (target / "ssx_mpi" / "kernels").glob("*.so")] == ["_loops.so"]
    assert (target / "ssx_mpi" / "py.typed").is_file()
    program = """
import sys, ssx_mpi
from ssx_mpi.kernels._library import library
print(ssx_mpi.__file__, library()._name)
"""
    done = run([sys.executable, "-c", program], 60, tmp_path, PYTHONPATH=str(target))
    assert done.status == 0, done.text
    assert all(word.startswith(str(target)) for word in done.out.split())
