"""Image sets without a file, for tests."""

from dxtbx import flumpy
from dxtbx.imageset import ImageSet, ImageSetData, MemReader
from dxtbx.model import BeamFactory, DetectorFactory


class InMemory:
    """The part of a dxtbx format that a reader in memory needs."""

    def __init__(self, *panels):
        self._panels = tuple(flumpy.from_numpy(panel) for panel in panels)

    def get_raw_data(self):
        return self._panels


def imageset_in_memory(*panels, shape=None, trusted_range=(-1, 1000), gain=1.0, pedestal=0.0):
    """An image set of one still without a file; `shape` is that of the detector's panels."""
    slow, fast = shape or panels[0].shape
    detector = DetectorFactory.simple(
        "PAD", 100, (fast * 0.05, slow * 0.05), "+x", "-y", (0.1, 0.1), (fast, slow), trusted_range
    )
    for _ in panels[1:]:
        detector.add_panel(detector[0])
    for panel in detector:
        panel.set_gain(gain)
        panel.set_pedestal(pedestal)
    imageset = ImageSet(ImageSetData(MemReader([InMemory(*panels)]), None))
    imageset.set_detector(detector, 0)
    imageset.set_beam(BeamFactory.simple(1.0), 0)
    return imageset
