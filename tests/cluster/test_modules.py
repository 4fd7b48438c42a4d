"""Site-wide installation: the module files load it and it runs."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LMOD = Path("/usr/share/lmod/lmod/init/bash")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    prefix = tmp_path_factory.mktemp("sw") / "ssx_mpi"
    clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "install", f"PREFIX={prefix}"],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return prefix


@pytest.mark.timeout(500)
def test_the_lmod_module_loads_runs_and_unloads(installed):
    if not LMOD.exists():
        pytest.skip("Lmod is not installed")
    script = f"""
        . {LMOD}
        module use {installed}/share/ssx_mpi/modulefiles
        module load ssx_mpi
        cd /
        command -v ssx_mpi && ssx_mpi --version && ssx_mpi.submit -h | head -1 && ls $SSX_MPI_JOBSCRIPTS/chain.sh
        module unload ssx_mpi
        command -v ssx_mpi || echo gone
    """
    path = ":".join(p for p in os.environ["PATH"].split(":") if ".venv" not in p)
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"{installed}/bin/ssx_mpi", done.stderr
    assert lines[1].startswith("ssx_mpi ")
    assert "ssx_mpi.submit" in lines[2]
    assert lines[3].endswith("chain.sh")
    assert lines[4] == "gone"


def test_the_tcl_module_names_the_same_place(installed):
    text = next((installed / "share/ssx_mpi/modulefiles/ssx_mpi").glob("[0-9]*[0-9]")).read_text()
    assert text.startswith("#%Module")
    assert f"prepend-path PATH {installed}/bin" in text
    assert "@" not in text
