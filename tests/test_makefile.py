"""Which Python the Makefile takes for that of DIALS."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from support import run

MAKEFILE = Path(__file__).parents[1] / "Makefile"
# as a Python that has DIALS would answer, and one that has not
WITH_DIALS, WITHOUT = "echo $0", "exit 1"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("programs", "chosen"),
    [
        # an environment of conda-forge has no dials.python
        ({"dials.python": WITHOUT, "python3": WITH_DIALS}, "python3"),
        ({"dials.python": WITH_DIALS, "python3": WITH_DIALS}, "dials.python"),
        ({"dials.python": WITHOUT, "python3": WITHOUT, "python": WITHOUT}, "/usr/bin/python3"),
    ],
)
def test_the_python_of_dials_is_found(tmp_path, programs, chosen):
    for name, content in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{content}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(
        ["make", "-s", "-f", str(MAKEFILE), "--eval=show: ; @echo $(DIALS_PYTHON)", "show"], 60, tmp_path, PATH=path
    )
    assert done.status == 0, done.err
    found = Path(done.out.strip())
    assert found == (Path(chosen) if chosen.startswith("/") else tmp_path / chosen), sys.executable
