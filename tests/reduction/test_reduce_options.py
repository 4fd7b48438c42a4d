"""Parameters and files beside the merging: the user's PHIL for DIALS, free flags, exports, filters, metadata."""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from cctbx import crystal, miller
from dials.array_family import flex
from iotbx import mtz
from test_reduce_program import columns, run

LYSOZYME = crystal.symmetry((79.1, 79.1, 38.2, 90, 90, 90), "P 43 21 2")
QUICK = ("d_min=3.2", "export.scaled=False")


@pytest.fixture(autouse=True)
def handlers_removed():
    yield
    from test_reduce_program import remove_handlers

    remove_handlers()


def log_of(folder: Path) -> str:
    return (folder / "ssx_mpi.reduce.log").read_text()


def test_free_flags_are_carried_over_and_never_invented(lysozyme, tmp_path):
    truth = lysozyme.truth
    # as another program wrote them: in another asymmetric unit, of four fifths of the reflections
    some = np.random.default_rng(1).random(len(truth.unique)) < 0.8
    flag = np.arange(len(truth.unique)) % 20
    hkl = truth.unique.hkl[some][:, [1, 0, 2]] * [1, 1, -1]
    indices = miller.set(LYSOZYME, flex.miller_index([tuple(map(int, h)) for h in hkl]), False)
    intensities = indices.array(flex.double(truth.intensity[some])).set_observation_type_xray_intensity()
    dataset = intensities.as_mtz_dataset("I")
    dataset.add_miller_array(indices.array(flex.int(flag[some].astype(np.int32))), "FreeR_flag", column_types="I")
    reference = tmp_path / "reference.mtz"
    dataset.mtz_object().write(str(reference))

    assert run(tmp_path / "with", *lysozyme.paths, f"reference={reference}", *QUICK) == 0
    table = columns(tmp_path / "with" / "DataFiles" / "merged.mtz")
    row, _ = truth.unique.locate(np.stack([table[x] for x in "HKL"], axis=1).astype(np.int32))
    expected = np.where(some[row], flag[row], -999)
    assert np.array_equal(table["FreeR_flag"], expected)
    assert np.count_nonzero(expected >= 0) > 500 and np.count_nonzero(expected < 0) > 100
    assert {c.label(): c.type() for c in mtz.object(str(tmp_path / "with/DataFiles/merged.mtz")).columns()}[
        "FreeR_flag"
    ] == "I"

    assert run(tmp_path / "without", *lysozyme.paths, *QUICK) == 0
    assert not any("free" in label.lower() for label in columns(tmp_path / "without" / "DataFiles" / "merged.mtz"))

    # and where they are asked for, they are new, whatever the reference has
    assert run(tmp_path / "new", *lysozyme.paths, f"reference={reference}", "free_flags=new", *QUICK) == 0
    table = columns(tmp_path / "new" / "DataFiles" / "merged.mtz")
    assert np.mean(table["FreeR_flag"] == 0) == pytest.approx(0.05, abs=0.01)
    assert table["FreeR_flag"].min() == 0
    header = mtz.object(str(tmp_path / "new" / "DataFiles" / "merged.mtz"))
    assert header.space_group_name() == "P 43 21 2" and "79 crystals" in " ".join(header.history())


def test_summary_for_programs(lysozyme, tmp_path):
    assert run(tmp_path, *lysozyme.paths, *QUICK, "merging.n_bins=10") == 0
    summary = json.loads((tmp_path / "LogFiles" / "ssx_mpi.reduce.json").read_text())
    assert summary["crystals"] == {"merged": 79, "unit cell outside the tolerance": 1}
    assert summary["space_group"] == "P 43 21 2" and summary["cell"][0] == pytest.approx(79.1, rel=1e-3)
    assert summary["ambiguity"] is None
    assert summary["scaling"]["converged"] and 0 < summary["scaling"]["rounds"] < 100
    assert summary["scaling"]["normalised_deviation"] == pytest.approx(1.0, abs=0.1)
    merged = summary["merged"]["merged"]
    assert (
        merged["n_crystals"] == 79 and merged["d_min"] == pytest.approx(3.2, rel=0.01) and not merged["d_min_estimated"]
    )
    table = columns(tmp_path / "DataFiles" / "merged.mtz")
    assert merged["n_obs"] == table["N"].sum() and merged["n_uniq"] == len(table["N"])
    assert "n_shells=10" in summary["parameters"]["merging"]
    assert [Path(experiments) for experiments, _ in summary["inputs"]] == lysozyme.paths


def test_parameters_of_dials_that_the_fast_engine_has(lysozyme, tmp_path):
    (tmp_path / "scale.phil").write_text("cut_data.d_min=3.4\noutput.html=None\nmodel=KB\n")
    (tmp_path / "merge.phil").write_text("merging.n_bins=7\nanomalous=True\n")
    arguments = [f"scaling.phil={tmp_path / 'scale.phil'}", f"merging.phil={tmp_path / 'merge.phil'}"]
    assert run(tmp_path / "out", *lysozyme.paths, *arguments, "export.scaled=False") == 0
    table = columns(tmp_path / "out" / "DataFiles" / "merged.mtz")
    assert "DANO" in table
    stats = json.loads((tmp_path / "out" / "LogFiles" / "dials.merge.json").read_text())["1.00000"]["merging_stats"]
    assert len(stats["cc_one_half"]) == 7
    assert stats["overall"]["d_star_sq_min"] == pytest.approx(3.4**-2, rel=0.01)
    log = log_of(tmp_path / "out")
    assert "scaling.phil: cut_data.d_min = 3.4" in log and "output.html has no effect" in log
    # what was typed wins
    assert run(tmp_path / "typed", *lysozyme.paths, *arguments, "d_min=4.0", "export.scaled=False") == 0
    assert "the parameter of ssx_mpi wins: 4.0" in log_of(tmp_path / "typed")


def test_parameters_that_only_dials_has_make_dials_scale(ambiguous, tmp_path):
    (tmp_path / "scale.phil").write_text("KB.decay_correction=False\n")
    out = tmp_path / "out"
    assert run(out, ambiguous.paths[0], "d_min=4.5", f"scaling.phil={tmp_path / 'scale.phil'}") == 0
    assert "scaling.phil sets KB.decay_correction, which engine=fast does not have: DIALS scales and merges" in log_of(
        out
    )
    assert (out / "DataFiles" / "scaled.refl").is_file()
    assert json.loads((out / "LogFiles" / "ssx_mpi.reduce.json").read_text())["scaling"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scaling.phil={}/nowhere.phil"], "scaling.phil=.*nowhere.phil: there is no such file"),
        (["scaling.phil={}/misspelt.phil"], "dials.scale has no parameter cut_data.dmin"),
        (["merging.phil={}/broken.phil"], "merging.phil=.*broken.phil: not valid PHIL"),
        (
            ["engine=dials", "dose_series_repeat=2", "filtering.method=Isigma"],
            "dose_series_repeat, filtering.method: not",
        ),
    ],
)
def test_parameters_that_cannot_be_used_are_one_line(arguments, message, lysozyme, tmp_path, capfd):
    (tmp_path / "misspelt.phil").write_text("cut_data.dmin=2\n")
    (tmp_path / "broken.phil").write_text("d_min = high {\n")
    capfd.readouterr()
    assert run(tmp_path / "out", lysozyme.paths[0], *(text.format(tmp_path) for text in arguments)) == 2
    said = capfd.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    import re

    assert re.search(message, said), said


def test_clusters_of_cells(lysozyme, tmp_path):
    wide = ("clustering.absolute_length_tolerance=None", "clustering.absolute_angle_tolerance=None")
    assert run(tmp_path / "all", *lysozyme.paths, *wide, *QUICK) == 0
    assert "80 crystals merged" in log_of(tmp_path / "all")
    assert run(tmp_path / "largest", *lysozyme.paths, *wide, *QUICK, "clustering.threshold=50") == 0
    assert "79 crystals merged" in log_of(tmp_path / "largest")
    assert "cell cluster 2: 1 sampled" in log_of(tmp_path / "largest")


def test_a_crystal_of_noise_is_found_by_delta_cc_half(lysozyme, tmp_path):
    stem = tmp_path / "integrated_1"
    shutil.copy(lysozyme.paths[0], stem.with_suffix(".expt"))
    table = flex.reflection_table.from_file(str(lysozyme.paths[0].with_suffix(".refl")))
    rows = table["id"] == 7
    value = np.array(table["intensity.sum.value"].select(rows))
    table["intensity.sum.value"].set_selected(rows, flex.double(np.random.default_rng(1).permutation(value)))
    table.as_file(str(stem.with_suffix(".refl")))
    arguments = ("filtering.method=deltacchalf", "filtering.deltacchalf.stdcutoff=4", *QUICK)
    assert run(tmp_path / "out", stem.with_suffix(".expt"), *arguments) == 0
    with np.load(tmp_path / "out" / "data_reduction" / "scales_1.npz") as scales:
        gone = np.flatnonzero(scales["fate"] != 0)
        assert 7 in gone and len(gone) <= 3


def test_nothing_left_after_a_filter(lysozyme, tmp_path, capfd):
    arguments = ("filtering.method=Isigma", "filtering.Isigma.min_i_over_sigma=1e6", *QUICK)
    assert run(tmp_path, *lysozyme.paths, *arguments) == 3
    assert (
        "no crystal is left to merge: 1 unit cell outside the tolerance, 79 mean I/sigma too low"
        in capfd.readouterr().err
    )


def test_crystals_without_reflections(lysozyme, tmp_path, capfd):
    stem = tmp_path / "integrated_1"
    shutil.copy(lysozyme.paths[0], stem.with_suffix(".expt"))
    whole = lysozyme.paths[0].with_suffix(".refl")

    def unusable(rows_of) -> None:
        table = flex.reflection_table.from_file(str(whole))
        table.unset_flags(rows_of(table), table.flags.integrated_sum)
        table.as_file(str(stem.with_suffix(".refl")))

    unusable(lambda table: table["id"] < 3)
    assert run(tmp_path / "out", stem.with_suffix(".expt"), *QUICK) == 0
    assert "3 crystals without enough usable reflections" in log_of(tmp_path / "out")
    unusable(lambda table: table["id"] >= 0)
    capfd.readouterr()
    assert run(tmp_path / "none", stem.with_suffix(".expt"), *QUICK) == 3
    assert "50 without enough usable reflections" in capfd.readouterr().err
    # those that the file does not even know of belong to another file
    table = flex.reflection_table.from_file(str(whole))
    table.select(table["id"] >= 3).as_file(str(stem.with_suffix(".refl")))
    assert run(tmp_path / "other", stem.with_suffix(".expt"), *QUICK) == 2
    assert "does not match its .expt file: no reflections of crystal shot-0" in capfd.readouterr().err


def test_reference_of_another_cell(lysozyme, tmp_path, capfd):
    model = tmp_path / "model.pdb"
    model.write_text(
        "CRYST1   99.100   99.100   38.200  90.00  90.00  90.00 P 43 21 2\n"
        "ATOM      1  CA  ALA A   1      10.000  12.000   5.000  1.00 20.00           C\nEND\n"
    )
    assert run(tmp_path / "out", lysozyme.paths[0], f"reference={model}", *QUICK) == 2
    assert "has another cell (99.1 99.1 38.2" in capfd.readouterr().err


def test_unmerged_mtz_through_dials(lysozyme, tmp_path):
    assert run(tmp_path, *lysozyme.paths, "d_min=3.2", "export.unmerged_mtz=True", "export.unmerged_mmcif=True") == 0
    content = mtz.object(str(tmp_path / "DataFiles" / "scaled_unmerged.mtz"))
    labels = set(content.column_labels())
    assert {"H", "K", "L", "M_ISYM", "BATCH", "I", "SIGI"} <= labels
    merged = columns(tmp_path / "DataFiles" / "merged.mtz")
    assert content.n_reflections() == merged["N"].sum()
    if not (tmp_path / "DataFiles" / "scaled_unmerged.cif").exists():
        # DIALS 3.12 writes mmCIF only of images with a scan; the log says that it could not
        assert "cannot export these data to mmcif" in log_of(tmp_path)


def test_metadata_of_images_in_one_hdf5_file(lysozyme, tmp_path):
    # as a run over a NeXus file leaves it: all stills in one master, and beside the frames an array with a value each
    master = tmp_path / "chip.nxs"
    with h5py.File(master, "w") as file:
        file["entry/sample/delay"] = np.repeat([0.5, 20.0], 30).astype(np.float32)
    content = json.loads(lysozyme.paths[0].read_text())
    for number, experiment in enumerate(content["experiment"]):
        content["imageset"][experiment["imageset"]] = {
            "__id__": "ImageSet", "images": [str(master)], "single_file_indices": [number], "params": {},
        }  # fmt: skip
    stem = tmp_path / "integrated_1"
    stem.with_suffix(".expt").write_text(json.dumps(content))
    shutil.copy(lysozyme.paths[0].with_suffix(".refl"), stem.with_suffix(".refl"))
    (tmp_path / "grouping.yml").write_text(
        f'metadata:\n  delay:\n    "{master}": "{master}:/entry/sample/delay"\n'
        "grouping:\n  merge_by:\n    values: [delay]\n    tolerances: [0.1]\n"
    )
    arguments = (f"grouping={tmp_path / 'grouping.yml'}", "export.scaled=False")
    assert run(tmp_path / "groups", stem.with_suffix(".expt"), *arguments) == 0
    parts = [columns(tmp_path / "groups" / "DataFiles" / f"group_{k}_full.mtz")["N"].sum() for k in (1, 2)]
    assert parts == [30 * 400, 20 * 400]
    assert "group_2 (delay = 20)" in log_of(tmp_path / "groups")
    assert run(tmp_path / "dose", stem.with_suffix(".expt"), "dose_series_repeat=5", "export.scaled=False") == 0
    assert columns(tmp_path / "dose" / "DataFiles" / "dose_3_full.mtz")["N"].sum() == 10 * 400
