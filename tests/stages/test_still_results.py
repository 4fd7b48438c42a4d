"""What is said of failures, the same for like causes."""

import pytest
from dxtbx import IncorrectFormatError

from ssx_mpi.stages.still_results import short_reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("cannot open /data/run_12/x.cbf"), "cannot open …"),
        (ValueError("12 of 1.5e3 pixels\nmore"), "# of # pixels"),
        (RuntimeError(""), "RuntimeError"),
        (RuntimeError("<a.b.Format object at 0x7f1ab3c0> failed"), "a.b.Format failed"),
        (IncorrectFormatError(object(), "/data/x.cbf"), "not of the format of the other images"),
    ],
)
def test_like_causes_have_one_reason(error, reason):
    assert short_reason(error) == reason
