"""The gain of the detector: looked for in images of the run, set where that is asked for, named where it is not one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ssx_mpi.parallel.collective import on_root
from ssx_mpi.parallel.communicator import Communicator
from ssx_mpi.parameters.run_parameters import GAIN_AUTO
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.processing.importing import Run
from ssx_mpi.processing.watch import ImageAbandoned
from ssx_mpi.records.files import read_if_whole, storing, write_json

logger = logging.getLogger("ssx_mpi")

# images that are looked at, from the first to the last
_N_IMAGES = 6
_FILE = "gain.json"


def with_gain(comm: Communicator, run: Run) -> Run:
    """The run with the gain that its parameters ask for, after what the images say of it is on record. Collective.

    The images are chosen by their numbers and looked at on rank 0, once for a run: whoever goes on with it takes what
    was found.
    """
    found = on_root(comm, lambda: _found(run), InputError)
    gain = found["set"]
    return run if gain is None else replace(run, maker=run.maker.with_gain(gain))


def say_gain(directory: Path) -> None:
    """Say among the last lines what is wrong with the gain; rank 0."""
    warning = read_if_whole(directory / "import" / _FILE).get("warning")
    if warning:
        logger.warning("%s", warning[0].upper() + warning[1:])


def _found(run: Run) -> dict[str, Any]:
    path = run.directory / "import" / _FILE
    content = read_if_whole(path)
    if not isinstance(content.get("set", ""), (float, int, type(None))):
        content = _conclusion(run)
        if run.watch.stopping():
            # not all images may have been looked at
            return content
        with storing(path):
            write_json(path, content)
    if run.parameters.gain is not None:
        logger.info("%g pixel values to a photon", content["set"])
    return content


def _conclusion(run: Run) -> dict[str, Any]:
    """What the images say, what is set, and what the user is told."""
    asked = run.parameters.gain
    given = asked if isinstance(asked, float) else None
    found = _estimate(run, given)
    content: dict[str, Any] = {"set": given, "warning": ""}
    if found is None:
        if asked == GAIN_AUTO:
            content["set"] = 1.0
            content["warning"] = (
                "gain=auto: the images that were looked at have too little background to tell, one was taken: give "
                "gain= as a number"
            )
        return content
    value = float(f"{found.value * (given or 1.0):.3g}")
    content |= {"estimate": value, "error": found.error * (given or 1.0), "n_pairs": found.n_pairs}
    if asked == GAIN_AUTO:
        content["set"] = 1.0 if found.is_one else value
    elif not found.is_one:
        taken = f"of gain={given:g}" if given else "of the header"
        content["warning"] = (
            f"the gain looks like {value:g} pixel values to a photon, by the scatter of the background, instead "
            f"{taken}: thresholds for spots and sigmas are wrong. Set gain={value:g}, or gain=auto, with restart=True"
        )
    return content


def _estimate(run: Run, given: float | None) -> Any:
    # the first rank alone needs them
    from ssx_mpi.images.frames import BadImage, FrameReader
    from ssx_mpi.kernels.detector_gain import Image, estimate_gain

    maker = run.maker if given is None else run.maker.with_gain(given)
    read, images = FrameReader(), []
    for number in np.unique(np.linspace(0, len(run.images) - 1, _N_IMAGES).round().astype(int)).tolist():
        if number in run.watch.set_aside or number in run.watch.suspects:
            continue

        def look(number: int = number) -> Image:
            frame = read(maker.experiment(number).imageset)
            return Image(frame.data, frame.masks, frame.readout)

        try:
            images.append(run.watch.image(number, look))
        except (BadImage, ImageAbandoned):
            # it is counted when its turn comes
            continue
    return estimate_gain(images)
