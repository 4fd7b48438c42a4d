"""Finding images, whatever their number, and making the experiment of any one of them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chips import small_chip

from ssx_mpi.images.experiment_maker import (
    ExperimentMaker,
    check_compression,
    check_same_detector,
    check_stills,
    read_geometry,
    read_mask,
)
from ssx_mpi.images.frames import BadImage
from ssx_mpi.images.sources import ImageSources, NumberedSource, StackSource, check_no_image_twice, find_images
from ssx_mpi.parameters import dials_parameters
from ssx_mpi.parameters.run_parameters import Source
from ssx_mpi.parameters.user_input import InputError

# dxtbx divides zero by zero where it looks for the step of an axis that does not turn
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def h5(path: Path, n_images: int, shape=(8, 9), distance: float = 0.1) -> Path:
    """The skeleton of an NXmx file: as much as it takes to count images and to tell detectors apart."""
    import h5py

    with h5py.File(path, "w") as file:
        file.create_dataset("entry/data/data", (n_images, *shape), np.uint16, chunks=(1, *shape))
        file["entry/instrument/detector/detector_distance"] = distance
        file["entry/instrument/detector/x_pixel_size"] = 75e-6
    return path


def names(images: ImageSources) -> list[str]:
    return [images.name(i) for i in range(len(images))]


class TestTemplates:
    def test_numbers_are_sorted_and_may_have_gaps(self, tmp_path):
        touch(tmp_path, "x_10.cbf", "x_02.cbf", "x_01.cbf", "x_02.cbf.bak", "y_03.cbf", "x_3.cbf")
        images = find_images((Source("template", f"{tmp_path}/x_##.cbf"),))
        assert names(images) == ["x_01.cbf", "x_02.cbf", "x_10.cbf"]
        assert images.locate(2) == (f"{tmp_path}/x_10.cbf", None)

    def test_numbers_may_grow_past_the_hashes(self, tmp_path):
        touch(tmp_path, "x_98.cbf", "x_99.cbf", "x_100.cbf", "x_0100.cbf")
        assert names(find_images((Source("template", f"{tmp_path}/x_##.cbf"),))) == [
            *("x_98.cbf", "x_99.cbf", "x_100.cbf")
        ]

    def test_dots_and_brackets_in_names_are_themselves(self, tmp_path):
        touch(tmp_path / "a[1]", "x.y+z_1.cbf", "xAy+z_1.cbf")
        assert names(find_images((Source("template", f"{tmp_path}/a[1]/x.y+z_#.cbf"),))) == ["x.y+z_1.cbf"]

    def test_a_range_selects_by_number(self, tmp_path):
        touch(tmp_path, *[f"x_{n:03d}.cbf" for n in (1, 2, 5, 6, 9)])
        images = find_images((Source("template", f"{tmp_path}/x_###.cbf", 2, 6),))
        assert names(images) == ["x_002.cbf", "x_005.cbf", "x_006.cbf"]

    @pytest.mark.parametrize(("span", "said"), [((0, 3), "numbered 1 to 9"), ((3, 4), "no file has a number")])
    def test_a_range_without_images(self, tmp_path, span, said):
        touch(tmp_path, "x_001.cbf", "x_009.cbf")
        with pytest.raises(InputError, match=said):
            find_images((Source("template", f"{tmp_path}/x_###.cbf", *span),))

    def test_a_number_of_twenty_digits(self, tmp_path):
        touch(tmp_path, f"x_{10**19}.cbf")
        with pytest.raises(InputError, match="15 digits at most"):
            find_images((Source("template", f"{tmp_path}/x_{'#' * 20}.cbf"),))
        touch(tmp_path, f"y_{7:020d}.cbf")
        found = find_images((Source("template", f"{tmp_path}/y_{'#' * 20}.cbf"),))
        assert found.locate(0) == (f"{tmp_path}/y_{7:020d}.cbf", None)

    def test_a_template_without_hashes(self, tmp_path):
        with pytest.raises(InputError, match="#"):
            find_images((Source("template", f"{tmp_path}/x_001.cbf"),))


class TestDirectories:
    def test_images_come_before_stacks(self, tmp_path):
        touch(tmp_path, "b_2.cbf", "a_1.cbf", "a_2.cbf", ".hidden.cbf", "notes.txt", "x.h5")
        assert names(find_images((Source("directory", str(tmp_path)),))) == ["a_1.cbf", "a_2.cbf", "b_2.cbf"]

    def test_a_compressed_copy_beside_an_image_is_not_another(self, tmp_path):
        touch(tmp_path, "a_1.cbf", "a_1.cbf.bz2", "a_2.cbf.gz", "a_3.cbf", "a_3.cbf.gz")
        assert sorted(names(find_images((Source("directory", str(tmp_path)),)))) == ["a_1.cbf", "a_2.cbf.gz", "a_3.cbf"]

    def test_names_without_numbers_are_images_too(self, tmp_path):
        touch(tmp_path, "first.cbf", "second.cbf")
        images = find_images((Source("directory", str(tmp_path)),))
        assert [images.locate(i)[0] for i in range(2)] == [f"{tmp_path}/first.cbf", f"{tmp_path}/second.cbf"]

    def test_master_files_stand_for_their_data(self, tmp_path):
        h5(tmp_path / "a_master.h5", 3)
        h5(tmp_path / "a_data_000001.h5", 3)
        assert names(find_images((Source("directory", str(tmp_path)),))) == [f"a_master.h5:{n}" for n in (1, 2, 3)]

    def test_nexus_files_stand_for_their_data(self, tmp_path):
        h5(tmp_path / "a.nxs", 2)
        h5(tmp_path / "a_000001.h5", 2)
        assert len(find_images((Source("directory", str(tmp_path)),))) == 2


class TestStacks:
    def test_ranges_differ_by_input(self, tmp_path):
        a, b = h5(tmp_path / "a.h5", 10), h5(tmp_path / "b.h5", 4)
        images = find_images((Source("image", str(a), 9, 10), Source("image", str(b)), Source("image", str(a), 1, 1)))
        assert names(images) == ["a.h5:9", "a.h5:10", "b.h5:1", "b.h5:2", "b.h5:3", "b.h5:4", "a.h5:1"]
        assert images.ranges() == [range(2), range(2, 6), range(6, 7)]

    def test_linked_data_files_count_as_far_as_they_are_there(self, tmp_path):
        import h5py

        h5(tmp_path / "d1.h5", 5)
        h5(tmp_path / "d2.h5", 2)
        with h5py.File(tmp_path / "a_master.h5", "w") as file:
            for n in (1, 2, 3):
                file[f"entry/data/data_{n:06d}"] = h5py.ExternalLink(f"d{n}.h5", "entry/data/data")
        assert len(find_images((Source("image", str(tmp_path / "a_master.h5")),))) == 7

    def test_a_file_of_one_image_has_no_second(self, tmp_path):
        touch(tmp_path, "x_1.cbf")
        assert len(find_images((Source("image", f"{tmp_path}/x_1.cbf", 1, 1),))) == 1
        with pytest.raises(InputError, match="holds one image"):
            find_images((Source("image", f"{tmp_path}/x_1.cbf", 1, 2),))

    def test_no_hdf5_in_spite_of_its_name(self, tmp_path):
        (tmp_path / "x.h5").write_text("text")
        with pytest.raises(InputError, match="not a readable HDF5 file"):
            find_images((Source("image", f"{tmp_path}/x.h5"),))


def test_no_images_at_all():
    with pytest.raises(InputError, match="no images given"):
        find_images(())


counts = st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 99)), min_size=1, max_size=6)


@given(counts)
@settings(deadline=None, max_examples=50)
def test_every_image_has_one_place_one_name_and_one_identifier(parts):
    sources = tuple(
        StackSource(f"/d/s{k}.h5", offset, n)
        if stack
        else NumberedSource(f"/d/n{k}_", ".cbf", 4, np.arange(offset, offset + n))
        for k, (stack, n, offset) in enumerate(parts)
    )
    images = ImageSources(sources)
    expected = [s.locate(i) for s in sources for i in range(s.count)]
    assert [images.locate(i) for i in range(len(images))] == expected
    assert len({images.identifier(i) for i in range(len(images))}) == len(images)
    assert images.identifier(0, 0) not in {images.identifier(0, 1), images.identifier(0)}
    assert pickle.loads(pickle.dumps(images)).locate(len(images) - 1) == expected[-1]
    json.dumps(images.as_json())


def test_summaries_tell_other_images_apart(tmp_path):
    touch(tmp_path, *[f"x_{n}.cbf" for n in range(5)])
    template = Source("template", f"{tmp_path}/x_#.cbf")
    everything = find_images((template,)).summary()
    assert everything.startswith("5 images")
    assert find_images((template,)).summary() == everything
    assert find_images((Source("template", template.name, 0, 3),)).summary() != everything
    (tmp_path / "x_2.cbf").unlink()
    assert find_images((template,)).summary() != everything


class TestMany:
    """A hundred thousand images: found quickly, and a few bytes each."""

    @pytest.mark.parametrize("kind", ["template", "directory"])
    def test_hundred_thousand_names(self, monkeypatch, kind):
        # a folder in memory: making so many files would take longer than all other tests here
        all_names = [f"lyso_1_{n:06d}.cbf" for n in range(1, 100_001)]
        np.random.default_rng(1).shuffle(all_names)
        monkeypatch.setattr("ssx_mpi.images.sources._names", lambda folder, where: iter(all_names))
        name = "/data/lyso_1_######.cbf" if kind == "template" else "/data"
        began = time.process_time()
        images = find_images((Source(kind, name),))
        assert time.process_time() - began < 5
        assert len(images) == 100_000
        assert images.locate(99_999) == ("/data/lyso_1_100000.cbf", None)
        assert len(pickle.dumps(images)) < 5 * 100_000
        assert images.as_json()[0]["numbers"] == [[1, 100_000]]

    def test_memory_stays_below_a_hundred_bytes_an_image(self, monkeypatch):
        monkeypatch.setattr("ssx_mpi.images.sources._names", lambda *_: (f"lyso_1_{n:06d}.cbf" for n in range(100_000)))
        tracemalloc.start()
        try:
            images = find_images((Source("template", "/data/lyso_1_######.cbf"),))
            kept, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(images) == 100_000
        assert kept < 5 * 100_000
        assert most < 100 * 100_000

    def test_four_thousand_files_are_opened_briefly(self, tmp_path):
        # 400 files behind 4,000 names
        for k in range(400):
            h5(tmp_path / f"x_{k:03d}.h5", 25)
        for copy in range(1, 10):
            for k in range(400):
                os.link(tmp_path / f"x_{k:03d}.h5", tmp_path / f"x_{k:03d}_{copy}.h5")
        program = (
            "import sys, time; from ssx_mpi import dials_compat; dials_compat.prepare();"
            "from ssx_mpi.images.sources import find_images; from ssx_mpi.parameters.run_parameters import Source;"
            "began = time.process_time(); images = find_images((Source('directory', sys.argv[1]),));"
            "import pickle; print(len(images), time.process_time() - began, len(pickle.dumps(images)))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
        )
        n_images, seconds, size = done.stdout.split()
        assert int(n_images) == 100_000
        # of the 20 s that a start may take; most is opening each file once
        assert float(seconds) < 15
        assert int(size) < 100 * 100_000


@pytest.fixture(scope="module")
def maker(chip):
    return ExperimentMaker(find_images((Source("image", str(chip.image)),)))


class TestExperiments:
    def test_each_has_its_own_pixels_and_the_models_of_the_header(self, chip, maker):
        import h5py

        with h5py.File(chip.image) as file:
            stored = file["entry/data/data"][()].astype(np.int32)
        for i in (13, 0, 23):
            experiment = maker.experiment(i)
            assert np.array_equal(experiment.imageset.get_raw_data(0)[0].as_numpy_array(), stored[i])
            assert experiment.imageset.indices()[0] == i
            assert experiment.goniometer is None
            assert experiment.scan is None
            assert experiment.identifier == maker.images.identifier(i)
            assert experiment.detector[0].get_directed_distance() == pytest.approx(75.0, abs=1e-4)

    def test_a_given_geometry_takes_the_place_of_the_header(self, chip, maker):
        geometry = read_geometry(chip.truth)
        experiment = maker.with_geometry(geometry).experiment(3)
        assert experiment.detector[0].get_origin() == geometry[0][0].get_origin()
        assert experiment.detector[0].get_origin() != maker.experiment(3).detector[0].get_origin()
        assert experiment.imageset.get_detector(0) == experiment.detector

    def test_each_image_keeps_the_wavelength_of_its_shot(self, chip, maker, tmp_path):
        geometry = read_geometry(chip.truth)
        assert not maker.wavelength_of_each_shot()
        same = maker.with_geometry(geometry).with_headers(None, True)
        assert same.experiment(3).beam is same.experiment(4).beam, "where headers have one, so has the geometry"
        image = chip.with_wavelengths(tmp_path, 0.9763 * (1 + 0.003 * np.sin(np.arange(24))))
        of_shots = ExperimentMaker(find_images((Source("image", str(image)),)))
        assert of_shots.wavelength_of_each_shot()
        for i in (7, 0, 23):
            beam = of_shots.with_geometry(geometry).with_headers(None, True).experiment(i).beam
            assert beam.get_wavelength() == pytest.approx(0.9763 * (1 + 0.003 * np.sin(i)), rel=1e-9)
            assert beam.get_unit_s0() == geometry[1].get_unit_s0()

    def test_the_users_mask_comes_on_top_of_the_detectors(self, chip, maker, tmp_path):
        from dials.array_family import flex

        own = maker.experiment(0).imageset.get_mask(0)[0].as_numpy_array()
        user = np.ones(own.shape, bool)
        user[100:120, 50:90] = False
        assert own[100:120, 50:90].any()
        path = tmp_path / "user.mask"
        path.write_bytes(pickle.dumps((flex.bool(user),)))
        masked = maker.with_mask(read_mask(path, maker.experiment(0).detector))
        for i in (0, 7):
            mask = masked.experiment(i).imageset.get_mask(0)[0].as_numpy_array()
            assert np.array_equal(mask, user & maker.experiment(i).imageset.get_mask(0)[0].as_numpy_array())

    def test_a_mask_of_one_panel_may_be_bare(self, maker, tmp_path):
        from dials.array_family import flex

        path = tmp_path / "bare.mask"
        path.write_bytes(pickle.dumps(flex.bool(flex.grid(407, 487), True)))
        assert len(read_mask(path, maker.experiment(0).detector).panels) == 1

    def test_parameters_of_dials_import_apply(self, chip):
        text = "geometry.detector.distance = 81.5\ngeometry.beam.wavelength = 1.25\n"
        scope = dials_parameters._extract("dials_import", None, text)
        maker = ExperimentMaker(find_images((Source("image", str(chip.image)),)), overrides=scope)
        experiment = maker.experiment(2)
        assert abs(experiment.detector[0].get_distance()) == pytest.approx(81.5, abs=1e-3)
        assert experiment.beam.get_wavelength() == 1.25

    def test_a_file_for_dials_import_leaves_an_experiment_that_can_be_written(self, chip):
        from ssx_mpi.stages.packing import pack

        scope = dials_parameters._extract("dials_import", None, "geometry.detector.distance = 81.5\n")
        maker = ExperimentMaker(find_images((Source("image", str(chip.image)),)), overrides=scope)
        assert json.loads(json.dumps(pack([maker.experiment(0)])))["detector"]


class TestWhatAFileLacks:
    """One sentence each, in words of ours."""

    def changed(self, chip, tmp_path, change):
        import h5py

        path = tmp_path / "x.nxs"
        shutil.copy(chip.image, path)
        with h5py.File(path, "r+") as file:
            change(file["entry"])
        return find_images((Source("image", str(path)),))

    def turned(self, step: float):
        def change(entry):
            group = entry["sample"].create_group("transformations")
            group.attrs["NX_class"] = "NXtransformations"
            n = len(entry["data/data"])
            group["omega"] = np.arange(n) * step
            axis = {"depends_on": ".", "transformation_type": "rotation", "units": "deg", "vector": [1.0, 0, 0]}
            group["omega"].attrs.update(axis)
            group["omega_increment_set"] = np.full(n, step)
            del entry["sample/depends_on"]
            entry["sample/depends_on"] = np.bytes_("/entry/sample/transformations/omega")

        return change

    def test_a_wavelength(self, chip, tmp_path):
        def change(entry):
            del entry["instrument/beam/incident_wavelength"]

        images = self.changed(chip, tmp_path, change)
        with pytest.raises(InputError, match=r"x\.nxs:1: the file has no wavelength"):
            ExperimentMaker(images).first_readable()

    def test_a_sample(self, chip, tmp_path):
        def change(entry):
            del entry["sample"]

        images = self.changed(chip, tmp_path, change)
        with pytest.raises(InputError, match=r"x\.nxs:1: the file has no sample"):
            ExperimentMaker(images).first_readable()

    @pytest.mark.parametrize("step", [0.1, 1e-6, 0.0])
    def test_rotation_scans_are_refused_and_stills_are_not(self, chip, tmp_path, step):
        images = self.changed(chip, tmp_path, self.turned(step))
        maker = ExperimentMaker(images)
        if step < 1e-3:
            check_stills(images, maker, [0])
            return
        with pytest.raises(InputError, match=r"x\.nxs is one of a rotation scan.*turns by 0\.1 degrees.*stills=True"):
            check_stills(images, maker, [0])

    def test_a_header_of_one_line(self, tmp_path):
        (tmp_path / "x_1.cbf").write_text("###CBF: VERSION 1.5\n")
        images = find_images((Source("directory", str(tmp_path)),))
        with pytest.raises(InputError, match=r"image=x_1\.cbf: (its )?header"):
            ExperimentMaker(images).first_readable()

    def test_four_dimensions(self, chip, tmp_path):
        def change(entry):
            data = entry["data/data"][()]
            del entry["data/data"]
            entry["data/data"] = data[:, None]

        images = self.changed(chip, tmp_path, change)
        with pytest.raises(InputError, match=r"x\.nxs: its data have four dimensions, \("):
            check_compression(images, ExperimentMaker(images))


class TestDamagedHeaders:
    def test_they_are_faults_of_their_image_alone(self, chip, tmp_path):
        """Also of the first image that a rank gets, when it does not know the format yet."""
        (tmp_path / "x_1.cbf").write_bytes(b"")
        (tmp_path / "x_2.cbf").write_text("###CBF: VERSION 1.5\n_array_data.header_convention PILATUS_1.2\n")
        maker = ExperimentMaker(find_images((Source("template", f"{tmp_path}/x_#.cbf"),)))
        for image in (0, 1):
            with pytest.raises(BadImage):
                maker.experiment(image)
            with pytest.raises(BadImage):
                maker.check_data(image)

    def test_the_first_that_can_be_read_is_found(self, chip, tmp_path):
        (tmp_path / "x_1.cbf").write_bytes(b"")
        images = find_images((Source("image", f"{tmp_path}/x_1.cbf"), Source("image", str(chip.image))))
        maker = ExperimentMaker(images)
        assert maker.first_readable() == 1
        with pytest.raises(InputError, match=r"x_1\.cbf"):
            maker.first_readable(range(1))


def test_files_named_one_by_one_become_one_source(tmp_path):
    touch(tmp_path, *[f"x_{n:03d}.cbf" for n in range(40)])
    images = find_images(tuple(Source("image", f"{tmp_path}/x_{n:03d}.cbf") for n in range(40)))
    assert len(images.sources) == 1
    assert images.name(39) == "x_039.cbf"


class TestSameDetector:
    def test_files_of_one_detector_pass_and_the_headers_of_like_ones_are_not_read(self, chip, monkeypatch):
        images = find_images((Source("image", str(chip.image), 1, 2), Source("image", str(chip.image), 5, 6)) * 3)
        maker = ExperimentMaker(images)
        read = []
        header = maker.header
        monkeypatch.setattr(maker, "header", lambda i: read.append(i) or header(i))
        assert check_same_detector(images, maker) == [0]
        assert read == [0]

    @pytest.mark.parametrize("names", [("distance", "det_z", "detector_z"), ("incident_wavelength",)])
    def test_another_distance_or_wavelength_is_refused_and_named(self, chip, tmp_path, names):
        import shutil

        import h5py

        for path in chip.image.parent.glob("lyso*"):
            shutil.copy(path, tmp_path)
        other = tmp_path / "lyso.nxs"
        with h5py.File(other, "r+") as file:
            moved = []

            def shift(name, item):
                if isinstance(item, h5py.Dataset) and name.endswith(names):
                    item[...] = np.asarray(item[()]) * 1.1
                    moved.append(name)

            file.visititems(shift)
            assert moved
        images = find_images((Source("image", str(chip.image)), Source("image", str(other))))
        assert images.sources[0].detector != images.sources[1].detector
        with pytest.raises(InputError, match="differs from that of") as refused:
            check_same_detector(images, ExperimentMaker(images))
        assert str(other) in str(refused.value)

    def test_a_geometry_given_for_both_settles_it(self, chip):
        images = find_images((Source("image", str(chip.image)),) * 2)
        check_same_detector(images, ExperimentMaker(images, read_geometry(chip.truth)))


class TestImagesNamedTwice:
    @pytest.mark.parametrize(
        ("sources", "name"),
        [
            ((("image", "a.h5"), ("image", "a.h5", 3, 4)), "a.h5:3"),
            ((("image", "a.h5", 1, 3), ("image", "b.h5"), ("image", "a.h5", 3, 5)), "a.h5:3"),
            ((("template", "x_#.cbf"), ("image", "x_10.cbf")), "x_10.cbf"),
            ((("image", "x_1.cbf"), ("directory", ".")), "x_1.cbf"),
            ((("image", "bare.cbf"), ("directory", ".")), "bare.cbf"),
        ],
    )
    def test_they_are_refused_and_named(self, tmp_path, sources, name):
        h5(tmp_path / "a.h5", 5), h5(tmp_path / "b.h5", 5)
        touch(tmp_path, "x_1.cbf", "x_01.cbf", "x_10.cbf", "bare.cbf")
        images = find_images(tuple(Source(kind, str(tmp_path / named), *span) for kind, named, *span in sources))
        with pytest.raises(InputError, match="named twice") as refused:
            check_no_image_twice(images)
        assert str(refused.value).startswith(f"{tmp_path}/{name} is")

    def test_others_pass(self, tmp_path):
        h5(tmp_path / "a.h5", 5), h5(tmp_path / "b.h5", 5)
        touch(tmp_path, "x_1.cbf", "x_01.cbf", "x_10.cbf", "bare.cbf")
        spans = (Source("image", f"{tmp_path}/a.h5", 1, 2), Source("image", f"{tmp_path}/a.h5", 3, 5))
        check_no_image_twice(find_images((*spans, Source("directory", str(tmp_path)))))


class TestHeadersOfFilesOfOneImage:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        small_chip(tmp_path / "x.cbf", n_images=3, hit_rate=1.0)
        return tmp_path

    def images(self, folder: Path) -> ImageSources:
        return find_images((Source("directory", str(folder)),))

    def change(self, path: Path, old: bytes, new: bytes) -> None:
        assert path.read_bytes().count(old) == 1
        path.write_bytes(path.read_bytes().replace(old, new))

    @pytest.mark.parametrize(
        ("old", "new"), [(b"Wavelength 0.976", b"Wavelength 1.300"), (b"distance 0.0750000", b"distance 0.0762000")]
    )
    def test_those_unlike_the_first_are_faults_of_their_image(self, folder, old, new):
        self.change(folder / "x_00002.cbf", old, new)
        images = self.images(folder)
        maker = ExperimentMaker(images)
        for expecting in (
            maker.with_headers(maker.header(0), True),
            maker.with_headers(maker.header(0), True).with_geometry(read_geometry(folder / "truth.expt")),
        ):
            expecting.experiment(0)
            with pytest.raises(BadImage, match="another detector or wavelength"):
                expecting.experiment(1)
            expecting.experiment(2)
        maker.with_geometry(read_geometry(folder / "truth.expt")).experiment(1)

    def test_readings_of_a_motor_may_differ(self, folder):
        self.change(folder / "x_00002.cbf", b"distance 0.0750000", b"distance 0.0750200")
        maker = ExperimentMaker(self.images(folder))
        maker.with_headers(maker.header(0), True).experiment(1)

    def test_sources_of_two_wavelengths_are_refused(self, folder):
        self.change(folder / "x_00002.cbf", b"Wavelength 0.976", b"Wavelength 1.300")
        (folder / "x_00002.cbf").rename(folder / "y_1.cbf")
        images = self.images(folder)
        with pytest.raises(InputError, match=r"y_1\.cbf differs from that of"):
            check_same_detector(images, ExperimentMaker(images))

    def test_no_distance_is_refused(self, folder):
        self.change(folder / "x_00001.cbf", b"distance 0.0750000", b"distance 0.0")
        images = self.images(folder)
        with pytest.raises(InputError, match=r"x_00001\.cbf has no distance"):
            check_same_detector(images, ExperimentMaker(images))
        check_same_detector(images, ExperimentMaker(images, read_geometry(folder / "truth.expt")))


def test_a_compression_without_its_plugin_is_named(chip, tmp_path):
    import shutil

    import h5py

    shutil.copy(chip.image, tmp_path)
    (first,) = chip.image.parent.glob("lyso_000001.h5")
    with h5py.File(first) as source, h5py.File(tmp_path / first.name, "w") as file:
        shape = source["entry/data/data"].shape
        # a filter that nobody has; optional, or HDF5 would not even make the dataset
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_chunk((1, *shape[1:]))
        creation.set_filter(40_000, h5py.h5z.FLAG_OPTIONAL, ())
        file.create_group("entry/data")
        made = h5py.h5d.create(
            file["entry/data"].id, b"data", h5py.h5t.NATIVE_UINT32, h5py.h5s.create_simple(shape), creation
        )
        for i in range(shape[0]):
            made.write_direct_chunk((i, 0, 0), b"compressed by something else")
    images = find_images((Source("image", str(tmp_path / "lyso.nxs")),))
    with pytest.raises(InputError, match="plugin") as refused:
        check_compression(images, ExperimentMaker(images))
    assert "lyso.nxs" in str(refused.value)


def test_geometries_that_are_none_are_refused(tmp_path):
    (tmp_path / "x.expt").write_text('{"__id__": "ExperimentList", "experiment": []}')
    with pytest.raises(InputError, match="is not a DIALS experiment list"):
        read_geometry(tmp_path / "x.expt")


class TestVirtualDatasets:
    """Where the images of a virtual dataset are: selections as HDF5 has them, and files where HDF5 finds them."""

    N = 12

    def layout(self, tmp_path, fill):
        import h5py

        layout = h5py.VirtualLayout((self.N, 3, 4), np.uint16)
        fill(h5py, layout)
        with h5py.File(tmp_path / "master.nxs", "w") as file:
            file.create_group("entry/data").create_virtual_dataset("data", layout)
        return str(tmp_path / "master.nxs")

    def source(self, h5py, path, n, name=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["d"] = np.ones((n, 3, 4), np.uint16)
        return h5py.VirtualSource(name or path.name, "d", (n, 3, 4))

    def missing(self, master):
        from ssx_mpi.images.experiment_maker import _DataFiles

        files, found = _DataFiles(master), []
        for image in range(self.N):
            try:
                files.check(image)
            except BadImage as error:
                assert error.reason == "its data file is missing"
                found.append(image)
        return found

    def test_writers_that_take_images_in_turn(self, tmp_path):
        def fill(h5py, layout):
            for k in range(3):
                layout[k::3] = self.source(h5py, tmp_path / f"w_{k}.h5", self.N // 3)

        master = self.layout(tmp_path, fill)
        assert self.missing(master) == []
        (tmp_path / "w_1.h5").unlink()
        assert self.missing(master) == [1, 4, 7, 10]

    def test_writers_that_take_blocks_in_turn(self, tmp_path):
        def fill(h5py, layout):
            for k in range(2):
                source = self.source(h5py, tmp_path / f"w_{k}.h5", self.N // 2)
                for j, first in enumerate(range(2 * k, self.N, 4)):
                    layout[first : first + 2] = source[2 * j : 2 * j + 2]

        master = self.layout(tmp_path, fill)
        assert self.missing(master) == []
        (tmp_path / "w_0.h5").unlink()
        assert self.missing(master) == [0, 1, 4, 5, 8, 9]

    @pytest.mark.parametrize("stale", [True, False])
    def test_absolute_names(self, tmp_path, stale):
        where = tmp_path if stale else tmp_path / "raw"
        name = "/gone/d.h5" if stale else str(where / "d.h5")

        def fill(h5py, layout):
            layout[:] = self.source(h5py, where / "d.h5", self.N, name)

        master = self.layout(tmp_path, fill)
        assert self.missing(master) == []
        (where / "d.h5").unlink()
        assert self.missing(master) == list(range(self.N))

    def test_too_few_images_in_a_source(self, tmp_path):
        from ssx_mpi.images.experiment_maker import _DataFiles

        def fill(h5py, layout):
            self.source(h5py, tmp_path / "d.h5", 5)
            layout[:6] = h5py.VirtualSource("d.h5", "d", (6, 3, 4))

        files = _DataFiles(self.layout(tmp_path, fill))
        with pytest.raises(BadImage, match="too few images"):
            files.check(0)
        files.check(7)
