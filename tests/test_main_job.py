"""The main job from images to merged data, on a small simulated chip: results, ranks, resuming, and bad input."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from small_chips import SYMMETRY, small_chip
from support import Finished, run_mpi, ssx_mpi

from ssx_mpi.stages.stills import StillProcessor

BATCHES = ("batch_size=8", "geometry_refinement.n_crystals=3")
# what is the same for every number of ranks, to the last byte; the others hold times
RESULTS = (
    *("imported.expt", "strong.refl", "indexed.expt", "indexed.refl", "integrated_1.expt", "integrated_1.refl"),
    *("refined.expt", "refined.refl", "geometry_refinement.json", "sources.json", "run.json"),
)
HITS_IN_BATCHES = [1, 4, 4]


def results(folder: Path) -> dict[str, bytes]:
    """Contents of all result files of a run, by their names in its folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.name in RESULTS}


def assert_same_results(one: Path, other: Path) -> None:
    first, second = results(one), results(other)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder` with the time of its last change."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def load(folder: Path, name: str):
    """Experiments, with their images, and reflections of a batch, as DIALS programs load them."""
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    experiments = ExperimentListFactory.from_json_file(str(folder / f"{name}.expt"), check_format=True)
    return experiments, flex.reflection_table.from_file(str(folder / f"{name}.refl"))


@pytest.fixture(scope="module")
def done(chip, tmp_path_factory) -> Path:
    """Folder of a whole run on one process, geometry refinement and all."""
    folder = tmp_path_factory.mktemp("done") / "out"
    job = ssx_mpi(f"image={chip.image}", *chip.symmetry, *BATCHES, "live_merge=True", f"output.directory={folder}")
    assert job.status == 0, job.text
    return folder


@pytest.fixture(scope="module")
def geometry(done) -> str:
    """The geometry of that run, given as a reference."""
    return f"reference_geometry={done / 'geometry_refinement' / 'refined.expt'}"


def copied(done: Path, to: Path) -> Path:
    return shutil.copytree(done, to / "copy", symlinks=True)


def again(chip, folder: Path, *more: str) -> Finished:
    """The command of the whole run, for another folder."""
    return ssx_mpi(f"image={chip.image}", *chip.symmetry, *BATCHES, f"output.directory={folder}", *more)


def test_the_wavelength_of_each_shot_is_that_of_its_crystals(chip, done, tmp_path):
    wavelengths = 0.9763 * (1 + 0.004 * np.sin(np.arange(24)))
    image = chip.with_wavelengths(tmp_path, wavelengths)
    steps = "steps=find_spots+index+integrate"
    job = ssx_mpi(f"image={image}", *chip.symmetry, *BATCHES, steps, f"output.directory={tmp_path / 'out'}")
    assert job.status == 0, job.text
    with_one, with_many = integrated(done), integrated(tmp_path / "out")
    found = [e.beam.get_wavelength() for e in with_many]
    assert found == pytest.approx(wavelengths[list(chip.hits)])
    # the images are the same, so that the cells follow the wavelengths of the headers
    scales = [
        [e.crystal.get_unit_cell().parameters()[0] / e.beam.get_wavelength() for e in experiments]
        for experiments in (with_one, with_many)
    ]
    assert np.ptp(found) > 0.004
    assert np.ptp(np.divide(*scales)) < 0.0005


def integrated(folder: Path) -> list:
    """The integrated crystals of a run in the order of their images."""
    from dxtbx.model.experiment_list import ExperimentListFactory

    paths = sorted(folder.glob("batch_*/integrated*.expt"))
    return [e for path in paths for e in ExperimentListFactory.from_json_file(str(path), check_format=False)]


def finished(reduction: dict) -> str:
    """The state of a run with this reduction: nine crystals may be warned of, by one DIALS and not by another."""
    return "done_with_warnings" if reduction.get("warnings") else "done"


class TestResults:
    def test_every_crystal_is_found_where_it_truly_is(self, chip, done):
        from ssx_mpi.simulation.truth import compare_run

        found = compare_run(chip.truth.parent, done)
        assert len(chip.hits) == found.hits == found.hits_indexed == found.lattices == 9
        assert found.false_lattices == found.duplicate_lattices == 0
        # strong crystals: four times better than the median of a whole chip
        assert found.orientation_error_deg < 0.02
        # of 0.11 mm in the header; three crystals leave a thousandth, and the distance is not better than before
        assert found.beam_centre_error_mm < 0.005
        assert found.distance_error_mm < 0.1

    def test_the_layout_is_that_of_xia2(self, done):
        assert sorted(p.name for p in done.iterdir()) == [
            *("DataFiles", "LogFiles", "batch_1", "batch_2", "batch_3", "data_reduction"),
            *("geometry_refinement", "images.h5", "import"),
            *("ssx_mpi.bib", "ssx_mpi.html", "ssx_mpi.json", "ssx_mpi.log"),
        ]
        assert sorted(p.name for p in (done / "DataFiles").glob("*.mtz")) == ["merged.mtz", "merged_full.mtz"]
        for number in (1, 2, 3):
            for suffix in (".expt", ".refl"):
                link = done / "DataFiles" / f"integrated_{number}{suffix}"
                assert link.is_symlink()
                assert link.resolve() == (done / f"batch_{number}" / f"integrated_1{suffix}").resolve()
        assert not list(done.rglob("*.partial*"))
        assert not list(done.rglob("journal"))

    @pytest.mark.parametrize("name", ["indexed", "integrated_1"])
    def test_dials_reads_the_files_as_they_are(self, chip, done, name):
        number = 0
        for batch, n_hits in enumerate(HITS_IN_BATCHES, 1):
            experiments, reflections = load(done / f"batch_{batch}", name)
            reflections.assert_experiment_identifiers_are_consistent(experiments)
            assert list(dict(reflections.experiment_identifiers())) == list(range(n_hits))
            assert sorted(set(reflections["id"])) == list(range(n_hits))
            for i, experiment in enumerate(experiments):
                assert experiment.scan is None
                assert experiment.goniometer is None
                assert experiment.imageset.indices()[0] == chip.hits[number]
                assert experiment.imageset.get_raw_data(0)[0].all() == (407, 487)
                own = reflections.select(reflections["id"] == i)
                if name == "indexed":
                    assert set(own["imageset_id"]) == {i}
                assert len(own) > 50
                number += 1
        assert number == 9

    def test_dials_show_prints_them(self, done, capsys):
        from dials.command_line import show

        batch = done / "batch_2"
        show.run([str(batch / "integrated_1.expt"), str(batch / "integrated_1.refl")])
        text = capsys.readouterr().out
        assert text.count("Experiment ") >= 4
        assert "intensity.sum.value" in text

    def test_strong_spots_belong_to_the_imported_images(self, done):
        for batch in (1, 2, 3):
            folder = done / f"batch_{batch}"
            from dials.array_family import flex
            from dxtbx.model.experiment_list import ExperimentListFactory

            imported = ExperimentListFactory.from_json_file(str(folder / "imported.expt"), check_format=True)
            strong = flex.reflection_table.from_file(str(folder / "strong.refl"))
            assert [e.imageset.indices()[0] for e in imported] == list(range(8 * (batch - 1), 8 * batch))
            names = [e.identifier for e in imported]
            assert all(names[i] == name for i, name in dict(strong.experiment_identifiers()).items())
            strong["shoebox"].is_consistent()

    def test_the_numbers_are_those_of_the_files(self, done):
        summary = json.loads((done / "ssx_mpi.json").read_text())
        tables = [load(done / f"batch_{n}", "integrated_1") for n in (1, 2, 3)]
        counts = summary["total"]["counts"]
        assert summary["state"] == finished(summary["reduction"])
        assert (counts["images"], counts["hits"], counts["lattices"], counts["crystals"]) == (24, 9, 9, 9)
        assert [summary["batches"][str(n)]["counts"]["crystals"] for n in (1, 2, 3)] == HITS_IN_BATCHES
        good = sum(t.get_flags(t.flags.integrated_sum).count(True) for _, t in tables)
        assert counts["reflections"] == good
        cells = np.array([e.crystal.get_unit_cell().parameters() for es, _ in tables for e in es])
        for name, own in zip(("a", "b", "c"), cells.T):
            assert summary["total"]["median"][name] == pytest.approx(np.median(own), rel=1.5e-4)
        assert summary["total"]["failures"] == {}

    def test_the_log_tells_the_story(self, done):
        log = (done / "ssx_mpi.log").read_text()
        told = ["24 images from 1 sources", "Geometry, round 1", "Joint refinement", "distance (mm)", "Batch 1 of 3"]
        told += ["Batch 3 of 3", "Dispatch:", "Reduction of", "9 crystals merged to", "  d_max", "Merged intensities:"]
        places = [log.index(words) for words in told]
        assert places == sorted(places)
        assert "9 (37.5%)" in log
        assert "Traceback" not in log


def merged(folder: Path, name: str = "merged") -> dict[str, np.ndarray]:
    """Columns of a merged file of a run."""
    from iotbx import mtz

    file = mtz.object(str(folder / "DataFiles" / f"{name}.mtz"))
    return {c.label(): np.array(c.extract_values(not_a_number_substitute=-999.0)) for c in file.columns()}


def assert_merged_alike(one: Path, other: Path) -> None:
    first, second = merged(one), merged(other)
    assert list(first) == list(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def numbers(folder: Path) -> dict:
    return json.loads((folder / "ssx_mpi.json").read_text())


class TestReduction:
    def test_merged_intensities_are_the_true_ones(self, chip, done):
        from ssx_mpi.simulation.truth import compare_run

        found = compare_run(chip.truth.parent, done).reduced
        assert found is not None
        # nine crystals share few reflections, so that their scales are uncertain
        assert found.cc_truth > 0.65
        assert found.n_merged == len(merged(done)["IMEAN"]) > 1000

    def test_the_numbers_are_those_of_the_merged_file(self, done):
        reduction, table = numbers(done)["reduction"], merged(done)
        assert reduction["state"] == "done"
        assert reduction["crystals"] == {"merged": 9}
        overall = reduction["merged"]["merged"]
        assert (overall["n_uniq"], overall["n_obs"]) == (len(table["N"]), table["N"].sum())
        assert 0.5 < overall["cc_one_half"] < 1.0

    def test_only_what_is_missing_is_done_again(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        path = folder / "DataFiles" / "merged.mtz"
        before = state(folder)[str(path)]
        job = again(chip, folder)
        assert job.status == 0, job.text
        assert "reduced before" in job.out
        assert state(folder)[str(path)] == before
        assert numbers(folder)["reduction"] == numbers(done)["reduction"]
        # a file that was lost, and a reduction that did not come to its end
        for lost in (path, folder / "LogFiles" / "ssx_mpi.reduce.json"):
            lost.unlink()
            job = again(chip, folder)
            assert job.status == 0, job.text
            assert "24 of 24 images are finished already" in job.out
            assert "9 crystals merged to" in job.out
            assert_merged_alike(done, folder)

    def test_other_parameters_reduce_anew_and_leave_nothing_of_the_old(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        job = again(chip, folder, "dose_series_repeat=2")
        assert job.status == 0, job.text
        assert list(numbers(folder)["reduction"]["merged"]) == ["merged", "dose_1", "dose_2"]
        job = again(chip, folder, "reduction.d_min=4", "steps=reduce")
        assert job.status == 0, job.text
        assert numbers(folder)["reduction"]["merged"]["merged"]["d_min"] == pytest.approx(4.0, rel=0.01)
        assert [p.name for p in (folder / "DataFiles").glob("*.mtz")] == ["merged.mtz"]
        # what it says of the images stays
        assert numbers(folder)["total"]["histograms"] == numbers(done)["total"]["histograms"]

    @pytest.mark.parametrize("at", ["_resolve", "_merge"])
    def test_stopped_in_the_reduction_it_goes_on_with_it(self, chip, done, tmp_path, monkeypatch, at):
        from ssx_mpi.reduction import procedure

        folder = copied(done, tmp_path)
        (folder / "LogFiles" / "ssx_mpi.reduce.json").unlink()
        work = getattr(procedure, at)

        def signal_and_work(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return work(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(procedure, at, signal_and_work)
            job = again(chip, folder)
        assert job.status == 75, job.text
        assert "Stopped on request (SIGTERM)" in job.out
        assert numbers(folder)["state"] == "stopped"
        assert not (folder / "LogFiles" / "ssx_mpi.reduce.json").exists()
        assert not list(folder.rglob("*.partial*"))
        job = again(chip, folder)
        assert job.status == 0, job.text
        assert numbers(folder)["state"] == finished(numbers(folder)["reduction"])
        assert_merged_alike(done, folder)

    def test_no_time_left_after_the_last_image(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        (folder / "LogFiles" / "ssx_mpi.reduce.json").unlink()
        job = again(chip, folder, "time_limit=0:00:00")
        assert job.status == 75, job.text
        assert "Stopped ahead of the time limit" in job.out

    def test_crystals_that_cannot_be_merged_are_no_failure_of_the_run(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        far = "central_unit_cell=90,90,40,90,90,90"
        job = again(chip, folder, far)
        assert job.status == 0, job.text
        assert "No merged intensities: no crystal is left to merge: 9 unit cell outside the tolerance" in job.out
        assert numbers(folder)["state"] == finished(numbers(folder)["reduction"])
        assert numbers(folder)["reduction"]["state"] == "nothing_left"
        assert not (folder / "DataFiles" / "merged.mtz").exists()
        assert len(list((folder / "DataFiles").glob("integrated_*"))) == 6
        # who asks for nothing but this has nothing to show for it
        assert again(chip, folder, far, "steps=reduce").status == 3

    @pytest.mark.parametrize("n", [1, 2])
    def test_very_few_crystals_are_merged_as_far_as_they_go(self, chip, geometry, tmp_path, n):
        hits = "+".join(str(hit) for hit in chip.hits[:n])
        images = [f"image={chip.image}:{hit + 1}:{hit + 1}" for hit in chip.hits[:n]]
        job = ssx_mpi(*images, *chip.symmetry, geometry, "live_merge=True", f"output.directory={tmp_path}/out")
        assert job.status == 0, (hits, job.text)
        assert numbers(tmp_path / "out")["reduction"]["crystals"] == {"merged": n}

    def test_dials_reduces_the_crystals_of_a_run(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        job = again(chip, folder, "reduction.engine=dials", "steps=reduce")
        assert job.status == 0, job.text
        reduction = numbers(folder)["reduction"]
        assert reduction["merged"]["merged"]["n_uniq"] > 1000
        assert reduction["scaling"] is None
        assert (folder / "DataFiles" / "scaled.refl").is_file()
        assert not (folder / "DataFiles" / "scaled_1.refl").exists()

    def test_there_must_be_something_to_reduce(self, chip, tmp_path):
        job = again(chip, tmp_path / "out", "steps=reduce")
        assert job.status == 2
        assert "holds no batch_*/integrated*.expt" in job.err

    def test_a_reference_of_another_kind_is_refused_before_anything_is_done(self, chip, tmp_path):
        for reference, symmetry, words in (
            ("truth.mtz", ("space_group=P4", "unit_cell=79.1,79.1,38.2,90,90,90"), "has space group"),
            ("truth.mtz", ("space_group=P43212", "unit_cell=99,99,38.2,90,90,90"), "has another cell"),
            ("truth.json", chip.symmetry, "truth.json"),
        ):
            path = chip.truth.parent / reference
            job = ssx_mpi(f"image={chip.image}", *symmetry, f"reference={path}", f"output.directory={tmp_path}/out")
            assert job.status == 2, job.text
            assert words in job.err
            assert not (tmp_path / "out").exists()

    def test_a_reduction_that_is_refused_keeps_what_was_integrated(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        (tmp_path / "grouping.yml").write_text(
            "metadata: {delay: {/other/file.h5: 1.0}}\ngrouping: {merge_by: {values: [delay]}}\n"
        )
        job = again(chip, folder, f"grouping={tmp_path}/grouping.yml")
        assert job.status == 2
        assert "nothing is said about" in job.err
        assert numbers(folder)["state"] == "not_reduced"
        assert_same_results(done, folder)
        assert again(chip, folder).status == 0


class TestLiveMerge:
    def test_it_grows_batch_by_batch(self, done):
        live = numbers(done)["live_merge"]
        assert [step["n_crystals"] for step in live["growth"]] == list(np.cumsum(HITS_IN_BATCHES))
        completeness = [step["completeness"] for step in live["growth"]]
        assert 0 < completeness[0] < completeness[1] < completeness[2] == live["completeness"]
        assert live["growth"][0]["cc_half"] is None
        assert live["cc_half"] > 0.5
        log = (done / "ssx_mpi.log").read_text()
        assert f"{live['completeness']:.1f}%" in log
        assert f"{live['cc_half']:.3f} (9 crystals)" in log

    def test_batches_finished_before_count(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        shutil.rmtree(folder / "batch_2")
        job = again(chip, folder, "live_merge=True", "steps=find_spots+index+integrate")
        assert job.status == 0, job.text
        live, whole = numbers(folder)["live_merge"], numbers(done)["live_merge"]
        assert live.pop("growth") == [
            {"batch": 2, **{k: v for k, v in whole.pop("growth")[-1].items() if k != "batch"}}
        ]
        assert live == whole


class TestRanks:
    @pytest.mark.parametrize("n", [2, 3])
    def test_results_do_not_depend_on_the_number_of_ranks(self, chip, done, tmp_path, n):
        folder = tmp_path / "out"
        arguments = [f"image={chip.image}", *chip.symmetry, *BATCHES, "live_merge=True", f"output.directory={folder}"]
        job = run_mpi(n, ["-m", "ssx_mpi", *arguments], timeout=300)
        assert job.status == 0, job.text
        assert_same_results(done, folder)
        summary = json.loads((folder / "ssx_mpi.json").read_text())
        before = json.loads((done / "ssx_mpi.json").read_text())
        assert summary["ranks"] == n
        assert sum(summary["dispatch"]["images_of_rank"]) == 24
        assert all(summary["dispatch"]["images_of_rank"])
        for part in ("counts", "failures", "median", "spread", "histograms"):
            assert summary["total"][part] == before["total"][part]
        assert job.out.count("Batch 1 of 3") == 1, "one rank speaks for all"
        live, live_before = summary["live_merge"], before["live_merge"]
        # the order in which batches are finished may differ, what they add up to may not
        assert len(live.pop("growth")) == len(live_before.pop("growth")) == 3
        assert live == live_before
        assert_merged_alike(done, folder)

    @pytest.mark.parametrize(
        ("n", "environment"),
        [
            (1, {"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}),
            (2, {"OMPI_MCA_hwloc_base_binding_policy": "core", "PRTE_MCA_bindto": "core"}),
        ],
        ids=["threads asked for", "bound to cores"],
    )
    def test_results_do_not_depend_on_threads_and_binding(self, chip, done, tmp_path, n, environment):
        folder = tmp_path / "out"
        arguments = [f"image={chip.image}", *chip.symmetry, *BATCHES, f"output.directory={folder}"]
        job = run_mpi(n, ["-m", "ssx_mpi", *arguments], timeout=300, **environment)
        assert job.status == 0, job.text
        assert_same_results(done, folder)
        assert_merged_alike(done, folder)

    def test_a_run_killed_after_the_refinement_goes_on_with_the_same_numbers(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        for left in (*folder.glob("batch_*"), folder / "DataFiles", folder / "LogFiles"):
            shutil.rmtree(left)
        arguments = [f"image={chip.image}", *chip.symmetry, *BATCHES, f"output.directory={folder}"]
        job = run_mpi(2, ["-m", "ssx_mpi", *arguments], timeout=300, OMPI_MCA_hwloc_base_binding_policy="core")
        assert job.status == 0, job.text
        assert "Geometry as refined before" in job.out
        assert_same_results(done, folder)

    def test_bad_input_ends_all_ranks_with_one_line(self, chip, tmp_path):
        job = run_mpi(3, ["-m", "ssx_mpi", f"image={tmp_path}/lost.h5", f"output.directory={tmp_path}/out"], timeout=90)
        assert job.status == 2
        assert job.err.count("lost.h5: there is no such file") == 1
        assert "Traceback" not in job.text
        assert not (tmp_path / "out").exists()

    def test_an_unknown_parameter_ends_all_ranks_with_one_line(self, tmp_path):
        job = run_mpi(2, ["-m", "ssx_mpi", "max_latices=2"], timeout=90, cwd=tmp_path)
        assert job.status == 2
        assert job.err.count("did you mean max_lattices=?") == 1


class TestGoingOn:
    def test_a_finished_run_is_not_done_again(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        before = {name: mtime for name, (mtime, _) in state(folder).items() if name.endswith((".refl", ".expt"))}
        job = again(chip, folder)
        assert job.status == 0, job.text
        assert "24 of 24 images are finished already" in job.out
        assert {name: mtime for name, (mtime, _) in state(folder).items() if name in before} == before
        summary = json.loads((folder / "ssx_mpi.json").read_text())
        assert summary["total"]["counts"]["crystals"] == 9

    def test_stopped_by_a_signal_and_killed_in_a_record_it_gives_the_same(
        self, chip, done, geometry, tmp_path, monkeypatch
    ):
        from ssx_mpi.processing import batches

        keep, kept = batches.Batches.keep, []

        def keep_and_signal(self, item, result):
            kept.append(item)
            if len(kept) == 14:
                os.kill(os.getpid(), signal.SIGUSR1)
            return keep(self, item, result)

        folder = tmp_path / "out"
        with monkeypatch.context() as patched:
            patched.setattr(batches.Batches, "keep", keep_and_signal)
            job = again(chip, folder, geometry)
        assert job.status == 75, job.text
        assert "Stopped on request" in job.out
        assert json.loads((folder / "ssx_mpi.json").read_text())["state"] == "stopped"
        assert kept == list(range(14))
        assert (folder / "batch_1" / "integrated_1.refl").exists()
        journal = folder / "batch_2" / "journal"
        # as if the kill had come while the record of the last image, number 13, was being written
        os.truncate(journal, journal.stat().st_size - 3)
        with monkeypatch.context() as patched:
            done_now: list[int] = []
            patched.setattr(batches.Batches, "keep", lambda s, i, r: done_now.append(i) or keep(s, i, r))
            job = again(chip, folder, geometry)
        assert job.status == 0, job.text
        assert "13 of 24 images are finished already" in job.out
        assert done_now == list(range(13, 24))
        for number in (1, 2, 3):
            assert_same_results(done / f"batch_{number}", folder / f"batch_{number}")

    def test_step_by_step_gives_the_same_as_all_at_once(self, chip, done, tmp_path):
        folder = tmp_path / "out"
        for steps in ("None", "find_spots", "index", "integrate", "reduce"):
            assert not (folder / "data_reduction").exists()
            job = again(chip, folder, f"steps={steps}")
            assert job.status == 0, job.text
            if steps == "None":
                assert (folder / "geometry_refinement" / "refined.expt").exists()
                assert not list(folder.glob("batch_*"))
            if steps == "index":
                assert not list(folder.rglob("integrated_1.refl"))
        assert_same_results(done, folder)

    def test_a_step_without_the_one_before_is_refused_before_any_work(self, chip, tmp_path, monkeypatch):
        monkeypatch.setattr(StillProcessor, "find_spots", lambda *_: pytest.fail("the geometry is being refined"))
        job = again(chip, tmp_path / "out", "steps=integrate")
        assert job.status == 2, job.text
        assert "has no results of index yet" in job.err
        assert not list(tmp_path.rglob("*.refl"))

    def test_images_that_are_lost_between_two_steps_are_left_out(self, chip, geometry, tmp_path):
        for path in chip.image.parent.glob("lyso*"):
            shutil.copy(path, tmp_path)
        given = [
            f"image={tmp_path}/lyso.nxs",
            *chip.symmetry,
            geometry,
            "batch_size=8",
            f"output.directory={tmp_path}/o",
        ]
        assert ssx_mpi(*given, "steps=find_spots").status == 0
        (tmp_path / "lyso_000002.h5").unlink()
        assert ssx_mpi(*given, "steps=index").status == 0
        (tmp_path / "lyso_000003.h5").unlink()
        job = ssx_mpi(*given, "steps=integrate")
        assert job.status == 0, job.text
        total = json.loads((tmp_path / "o" / "ssx_mpi.json").read_text())["total"]
        assert total["failures"] == {"read: its data file is missing (…)": 8}
        assert total["counts"]["crystals"] == HITS_IN_BATCHES[0]

    @pytest.mark.parametrize("name", ["batch_2/batch.json", "import/run.json"])
    def test_damaged_files_of_an_earlier_run_are_named_and_cost_nothing_else(self, chip, done, tmp_path, name):
        folder = copied(done, tmp_path)
        (folder / name).write_text("{")
        job = again(chip, folder)
        assert job.status == 0, job.text
        said = [line for line in job.text.splitlines() if f"{name} " in line]
        assert len(said) == 1 and "damaged" in said[0]
        for product in (
            "batch_2/integrated_1.refl",
            "batch_2/integrated_1.expt",
            "batch_2/strong.refl",
            "DataFiles/merged.mtz",
        ):
            assert (folder / product).read_bytes() == (done / product).read_bytes()
        assert json.loads((folder / name).read_text())

    def test_crystals_of_another_dials_are_reduced_again(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        path = folder / "import" / "run.json"
        content = json.loads(path.read_text())
        content["dials"] = [[3, 11], *content["dials"]]
        path.write_text(json.dumps(content))
        reduced_before = "The crystals were reduced before"
        assert reduced_before not in again(chip, folder).text
        assert reduced_before in again(chip, folder).text

    def test_other_parameters_are_refused_and_nothing_changes(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        before = state(folder)
        job = again(chip, folder, "d_min=3")
        assert job.status == 2
        assert job.err.strip().count("\n") == 0
        assert "d_min was None, is 3.0" in job.err
        assert state(folder) == before

    def test_a_geometry_that_was_changed_since_is_refused(self, chip, done, tmp_path):
        folder = copied(done, tmp_path)
        path = folder / "geometry_refinement" / "refined.expt"
        content = json.loads(path.read_text())
        content["detector"][0]["panels"][0]["origin"][2] += 1.0
        path.write_text(json.dumps(content))
        before = state(folder)
        job = again(chip, folder)
        assert job.status == 2
        assert "refined.expt is not the file that this run wrote" in job.err
        after = state(folder)
        assert {k for k in before if before[k] != after.get(k)} <= {str(folder / "ssx_mpi.log")}

    def test_restart_begins_anew_with_other_parameters(self, chip, done, geometry, tmp_path):
        folder = copied(done, tmp_path)
        job = again(chip, folder, "restart=True", "steps=find_spots", "min_spots=250", geometry)
        # no image has as many spots
        assert job.status == 3
        assert not list(folder.rglob("integrated*"))
        assert not list(folder.rglob("geometry_refinement"))
        assert json.loads((folder / "ssx_mpi.json").read_text())["total"]["counts"]["hits"] == 0

    def test_a_batch_begun_with_other_steps_is_refused(self, chip, geometry, tmp_path, monkeypatch):
        from ssx_mpi.processing import batches

        keep = batches.Batches.keep

        def keep_and_signal(self, item, result):
            os.kill(os.getpid(), signal.SIGUSR2)
            return keep(self, item, result)

        image = (f"image={chip.image}:2:5", geometry, f"output.directory={tmp_path / 'out'}", *chip.symmetry)
        with monkeypatch.context() as patched:
            patched.setattr(batches.Batches, "keep", keep_and_signal)
            assert ssx_mpi(*image, "steps=find_spots").status == 75
        job = ssx_mpi(*image)
        assert job.status == 2
        assert "was begun with steps=find_spots" in job.err
        assert ssx_mpi(*image, "steps=find_spots").status == 3


def test_a_range_of_images_gives_the_same_crystals_and_only_what_was_asked_for(chip, done, geometry, tmp_path):
    job = ssx_mpi(
        f"image={chip.image}:9:16",
        *chip.symmetry,
        geometry,
        "keep_intermediate=False",
        f"output.directory={tmp_path}/out",
    )
    assert job.status == 0, job.text
    batch = tmp_path / "out" / "batch_1"
    assert sorted(p.name for p in batch.iterdir()) == [
        *("batch.json", "images.json", "integrated_1.expt", "integrated_1.refl"),
    ]
    for name in ("integrated_1.expt", "integrated_1.refl"):
        assert (batch / name).read_bytes() == (done / "batch_2" / name).read_bytes()


def test_without_symmetry_the_crystals_are_assessed(chip, tmp_path):
    from ssx_mpi.command_line.process import read_arguments

    job = ssx_mpi(f"image={chip.image}", "assess_crystals.n_crystals=2", f"output.directory={tmp_path}/out")
    assert job.status == 0, job.text
    folder = tmp_path / "out" / "assess_crystals"
    assessed = json.loads((folder / "assess_crystals.json").read_text())
    assert assessed["n_crystals"] >= 2
    best = assessed["clusters"][0]
    assert best["share"] > 0.5
    assert best["metric_symmetry"] == "P 4 2 2"
    assert sorted(best["median_reduced_cell"][:3]) == pytest.approx([38.2, 79.1, 79.1], rel=0.01)
    assert (folder / "unit_cells.png").read_bytes().startswith(b"\x89PNG")
    command = assessed["next_command"]
    assert command in job.out
    proposed = read_arguments(shlex.split(command)[1:])[0]
    assert proposed.symmetry_known
    assert proposed.sources[0].name == str(chip.image)
    assert not list((tmp_path / "out").glob("batch_*"))


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Path:
    """Folder of three CBF images without a crystal."""
    folder = tmp_path_factory.mktemp("noise")
    small_chip(folder / "noise_###.cbf", n_images=3, hit_rate=0.0)
    return folder


@pytest.mark.parametrize("more", ["symmetry", "reference", "nothing"])
def test_noise_ends_with_its_own_status_and_advice(chip, noise, geometry, tmp_path, more):
    given = {"symmetry": chip.symmetry, "reference": (*chip.symmetry, geometry), "nothing": ()}[more]
    job = ssx_mpi(f"directory={noise}", *given, f"output.directory={tmp_path}/out")
    assert job.status == 3, job.text
    assert not list(tmp_path.rglob("integrated*"))
    assert "No image had enough spots" in job.out


def test_a_master_without_its_data_ends_with_its_own_status_and_advice(chip, geometry, tmp_path):
    shutil.copy(chip.image, tmp_path)
    job = ssx_mpi(f"image={tmp_path}/lyso.nxs", *chip.symmetry, geometry, f"output.directory={tmp_path}/out")
    assert job.status == 3, job.text
    assert "24  read: its data file is missing" in job.out
    assert "No crystal came out. No image could be read" in job.out


class TestBadInput:
    def refused(self, tmp_path, *arguments: str) -> str:
        """The line with which they are refused; nothing may have been written."""
        before = state(tmp_path)
        job = ssx_mpi(*arguments, f"output.directory={tmp_path}/out")
        assert job.status == 2, job.text
        assert "Traceback" not in job.text
        lines = job.err.strip().splitlines()
        assert len(lines) == 1, lines
        assert not (tmp_path / "out").exists()
        assert state(tmp_path) == before
        return lines[0]

    def test_no_image(self, tmp_path):
        assert "no images given" in self.refused(tmp_path, "max_lattices=1")

    def test_files_that_are_not_there(self, chip, tmp_path):
        assert "lost.nxs: there is no such file" in self.refused(tmp_path, f"image={tmp_path}/lost.nxs")
        assert "no file matches" in self.refused(tmp_path, f"template={tmp_path}/x_###.cbf")
        assert "there is no folder" in self.refused(tmp_path, f"template={tmp_path}/deep/x_###.cbf")
        assert "there is no folder" in self.refused(tmp_path, f"directory={tmp_path}/deep")
        assert "holds no image files" in self.refused(tmp_path, f"directory={tmp_path}")
        assert "lost.expt" in self.refused(tmp_path, f"image={chip.image}", "starting_geometry=lost.expt")

    @pytest.mark.parametrize("span", ["0:3", "20:25", "25:25"])
    def test_images_outside_the_data(self, chip, tmp_path, span):
        line = self.refused(tmp_path, f"image={chip.image}:{span}")
        assert f":{span}" in line
        assert "numbered 1 to 24" in line

    def test_images_to_use_outside_the_data(self, chip, tmp_path):
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, "geometry_refinement.images_to_use=20:25")
        assert "images are numbered 1 to 24" in line
        line = self.refused(tmp_path, f"image={chip.image}", "assess_crystals.images_to_use=0:3")
        assert "images are numbered 1 to 24" in line

    @pytest.mark.parametrize("name", ["reference_geometry", "starting_geometry", "mask"])
    def test_files_of_another_kind(self, chip, tmp_path, name):
        (tmp_path / "some.file").write_text("not what it should be")
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, f"{name}={tmp_path}/some.file")
        assert "some.file" in line
        assert "is not a DIALS" in line or "not a DIALS mask file" in line

    @pytest.mark.parametrize("name", ["reference_geometry", "starting_geometry"])
    def test_a_geometry_of_another_detector(self, chip, tmp_path, name):
        from dxtbx.model import BeamFactory, DetectorFactory, Experiment, ExperimentList

        detector = DetectorFactory.simple("PAD", 100, (5, 5), "+x", "-y", (0.1, 0.1), (100, 100), (0, 100))
        other = ExperimentList([Experiment(beam=BeamFactory.simple(1.0), detector=detector)])
        other.as_file(str(tmp_path / "other.expt"))
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, f"{name}={tmp_path}/other.expt")
        assert "other panels" in line

    def test_a_mask_of_another_detector(self, chip, tmp_path):
        import pickle

        from dials.array_family import flex

        (tmp_path / "other.mask").write_bytes(pickle.dumps((flex.bool(flex.grid(10, 10), True),)))
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, f"mask={tmp_path}/other.mask")
        assert "shape of the detector" in line

    @pytest.mark.parametrize("stage", ["spotfinding", "indexing", "geometry_refinement", "integration", "dials_import"])
    def test_dials_parameters_that_do_not_exist(self, chip, tmp_path, stage):
        (tmp_path / "mine.phil").write_text("no_such.parameter = 3\n")
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, f"{stage}.phil={tmp_path}/mine.phil")
        assert "no_such.parameter" in line
        assert stage in line

    @pytest.mark.parametrize("text", ["spotfinder {", "= = =", "spotfinder.filter.min_spot_size = many"])
    def test_dials_parameters_that_are_none(self, chip, tmp_path, text):
        (tmp_path / "mine.phil").write_text(text)
        line = self.refused(tmp_path, f"image={chip.image}", *chip.symmetry, f"spotfinding.phil={tmp_path}/mine.phil")
        assert "spotfinding.phil" in line

    def test_a_damaged_master_file(self, chip, tmp_path):
        (tmp_path / "bad.nxs").write_bytes(chip.image.read_bytes()[:2000])
        assert "not a readable HDF5 file" in self.refused(tmp_path, f"image={tmp_path}/bad.nxs")

    def test_a_data_file_instead_of_its_master(self, chip, tmp_path):
        line = self.refused(tmp_path, f"image={chip.image.parent}/lyso_000001.h5")
        assert "lyso_000001.h5" in line
        assert "read through their master or .nxs file" in line

    def test_wildcards_that_match_nothing(self, chip, tmp_path):
        assert "no file matches" in self.refused(tmp_path, f"image={chip.image.parent}/*.nx7")

    def test_an_image_named_twice(self, chip, tmp_path):
        line = self.refused(tmp_path, f"image={chip.image}", f"image={chip.image}:5:6")
        assert "lyso.nxs:5 is named twice" in line

    def test_an_image_that_is_none(self, tmp_path):
        (tmp_path / "bad.cbf").write_text("not an image")
        assert "bad.cbf" in self.refused(tmp_path, f"image={tmp_path}/bad.cbf")

    def test_a_cell_that_the_space_group_forbids(self, chip, tmp_path):
        line = self.refused(tmp_path, f"image={chip.image}", "space_group=P213", "unit_cell=79,79,38,90,90,90")
        assert "forbidden by space_group P 21 3" in line

    def test_a_folder_that_is_a_file(self, chip, tmp_path):
        (tmp_path / "file").write_text("")
        job = ssx_mpi(f"image={chip.image}", *chip.symmetry, f"output.directory={tmp_path}/file")
        assert job.status == 2
        assert "cannot be written" in job.err


def test_spots_are_found_once_for_beam_centre_and_first_crystals(chip, tmp_path, monkeypatch):
    find_spots, found = StillProcessor.find_spots, []
    monkeypatch.setattr(StillProcessor, "find_spots", lambda self, i: found.append(i) or find_spots(self, i))
    job = again(chip, tmp_path / "out", "steps=None")
    assert job.status == 0, job.text
    assert "beam centre" in job.out
    assert sorted(found) == list(range(24))


@pytest.fixture(scope="module")
def cbf_files(tmp_path_factory) -> Path:
    """Folder of six CBF files, each with a strong crystal."""
    folder = tmp_path_factory.mktemp("cbf")
    small_chip(folder / "lyso.cbf", n_images=6, seed=5, hit_rate=1.0)
    return folder


class TestDamagedFirstImages:
    def process(self, folder: Path, out: Path) -> Finished:
        truth = f"reference_geometry={folder / 'truth.expt'}"
        return ssx_mpi(f"template={folder}/lyso_#####.cbf", *SYMMETRY, truth, f"output.directory={out}")

    def test_they_are_counted_and_left_out(self, cbf_files, tmp_path):
        folder = shutil.copytree(cbf_files, tmp_path / "images")
        # empty; without a detector in the header; cut off within the pixels
        (folder / "lyso_00001.cbf").write_bytes(b"")
        (folder / "lyso_00002.cbf").write_bytes((folder / "lyso_00002.cbf").read_bytes()[:200])
        (folder / "lyso_00003.cbf").write_bytes((folder / "lyso_00003.cbf").read_bytes()[:20_000])
        job = self.process(folder, tmp_path / "out")
        assert job.status == 0, job.text
        summary = json.loads((tmp_path / "out" / "ssx_mpi.json").read_text())
        assert summary["total"]["counts"]["crystals"] == 3
        assert [name for name, *_ in summary["left_out"]] == [f"lyso_0000{n}.cbf" for n in (1, 2, 3)]
        imported = json.loads((tmp_path / "out" / "import" / "imported.expt").read_text())
        assert imported["imageset"][0]["images"][0].endswith("lyso_00003.cbf")

    def test_a_source_without_any_readable_image_is_refused(self, cbf_files, tmp_path):
        folder = shutil.copytree(cbf_files, tmp_path / "images")
        for path in folder.glob("*.cbf"):
            path.write_bytes(b"")
        job = self.process(folder, tmp_path / "out")
        assert job.status == 2
        assert "lyso_00001.cbf" in job.err
        assert "nor can any of the next 5" in job.err
        assert not (tmp_path / "out").exists()


def test_images_of_a_damaged_data_file_are_counted_and_the_others_processed(chip, done, geometry, tmp_path):
    for path in chip.image.parent.glob("lyso*"):
        shutil.copy(path, tmp_path)
    # images 9 to 16 are in the second data file
    second = tmp_path / "lyso_000002.h5"
    second.write_bytes(second.read_bytes()[:3000])
    job = ssx_mpi(
        f"image={tmp_path}/lyso.nxs", *chip.symmetry, geometry, "batch_size=8", f"output.directory={tmp_path}/out"
    )
    assert job.status == 0, job.text
    summary = json.loads((tmp_path / "out" / "ssx_mpi.json").read_text())
    assert summary["total"]["counts"]["crystals"] == 5
    named = [name for name, stage, reason in summary["left_out"]]
    assert named == [f"lyso.nxs:{n}" for n in range(9, 17)]
    assert sum(summary["total"]["failures"].values()) == 8
    assert "lyso.nxs:9 left out at read" in job.out
