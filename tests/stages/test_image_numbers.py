"""Numbers about an image against those it was made with."""

from __future__ import annotations

import numpy as np
import pytest
from dials.array_family import flex
from dxtbx.model import BeamFactory, DetectorFactory, Experiment

from ssx_mpi.images.frames import Frame
from ssx_mpi.stages.image_numbers import ImageMeasure
from ssx_mpi.stages.still_results import ImageNumbers

PIXEL, SIDE = 0.172, 500


def experiment(distance: float = 100.0, wavelength: float = 1.0) -> Experiment:
    centre = PIXEL * SIDE / 2
    detector = DetectorFactory.simple(
        "PAD", distance, (centre, centre), "+x", "-y", (PIXEL, PIXEL), (SIDE, SIDE), (0, 1000)
    )
    return Experiment(beam=BeamFactory.simple(wavelength), detector=detector)


def spots(x, y):
    table = flex.reflection_table()
    table["xyzobs.px.value"] = flex.vec3_double(flex.double(x), flex.double(y), flex.double(len(x), 0.5))
    table["panel"] = flex.size_t(len(x), 0)
    return table


def frame(mean: float = 2.0) -> Frame:
    data = np.random.default_rng(1).poisson(mean, (SIDE, SIDE)).astype(np.int32)
    return Frame("x", 0, (data,), (data,), (np.ones((SIDE, SIDE), bool),), n_saturated=3)


def test_resolution_is_that_of_dxtbx():
    still = experiment()
    x = np.linspace(300, 480, 40)
    y = np.full(40, 120.0)
    d = [still.detector[0].get_resolution_at_pixel(still.beam.get_s0(), each) for each in zip(x, y)]
    found = ImageMeasure().spots(still, spots(x, y), ImageNumbers())
    assert found.spots_d_min == pytest.approx(1 / np.sqrt(np.percentile(1 / np.square(d), 95)), rel=1e-6)
    # too few to say
    assert ImageMeasure().spots(still, spots(x[:3], y[:3]), ImageNumbers()) == ImageNumbers()


def test_numbers_do_not_depend_on_the_images_before():
    measure, image = ImageMeasure(), frame()
    near, far, red = experiment(60.0), experiment(180.0), experiment(60.0, 1.3)
    alone = [ImageMeasure().pixels(e, image) for e in (near, far, red)]
    assert [measure.pixels(e, image) for e in (near, far, red)] == alone
    assert measure.pixels(near, image) == alone[0]
    assert alone[0].background == pytest.approx(2.0, rel=0.05)
    assert (alone[0].n_saturated, alone[2].wavelength) == (3, 1.3)
