"""What is said of failures, the same for like causes."""

import numpy as np
import pytest
from dxtbx import IncorrectFormatError
from dxtbx.imageset import ImageSet, ImageSetData, MemReader
from dxtbx.model import Experiment, ExperimentList
from in_memory_images import InMemory
from made_stills import BEAM, DETECTOR

from ssx_mpi.stages.still_results import Crystals, Indexed, Spots, Still, short_reason


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


def test_pixels_are_let_go_of_by_image_sets_too():
    """An image set keeps the image that it read; hundreds of stills that are kept must not keep their pixels."""
    read = []

    class Counted(InMemory):
        def get_raw_data(self):
            read.append(True)
            return super().get_raw_data()

    imageset = ImageSet(ImageSetData(MemReader([Counted(np.zeros((4, 5), np.int32))]), None))
    experiment = Experiment(detector=DETECTOR, beam=BEAM, imageset=imageset)
    for _ in range(2):
        imageset.get_raw_data(0)
    assert len(read) == 1, "dxtbx keeps the pixels"
    spots = Spots(experiment=experiment, frame=object(), table=object(), hit=True)
    crystals = Crystals(ExperimentList([experiment]), None)
    for still in (Still(0, spots), Still(0, Spots(hit=True), Indexed((), crystals))):
        imageset.get_raw_data(0)
        read.clear()
        assert still.without_pixels().spots.frame is None
        imageset.get_raw_data(0)
        assert len(read) == 1, "the pixels were still there"
