"""The program as users start it: on 1, 2 and 4 ranks, on groups, with a reference, continuing, and on bad input."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import synthetic
from dials.array_family import flex
from dxtbx.model import ExperimentList
from iotbx import mtz
from support import run_mpi
from synthetic import Truth

from ssx_mpi.command_line import reduce
from ssx_mpi.parallel.communicator import SerialCommunicator

_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_mapby": ":oversubscribe",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
}


@pytest.fixture(autouse=True)
def handlers_removed():
    """The program installs handlers for its log; the next test starts without them."""
    yield
    remove_handlers()


def remove_handlers() -> None:
    for handler in list(reduce.logger.handlers):
        handler.close()
        reduce.logger.removeHandler(handler)


def run(folder: Path, *args) -> int:
    remove_handlers()
    return reduce.main(SerialCommunicator(), [*map(str, args), f"output.folder={folder}"])


def columns(path: Path) -> dict[str, np.ndarray]:
    file = mtz.object(str(path))
    return {c.label(): np.array(c.extract_values(not_a_number_substitute=-999.0)) for c in file.columns()}


def intensities(path: Path) -> dict[tuple, float]:
    table = columns(path)
    hkl = np.stack([table["H"], table["K"], table["L"]], axis=1).astype(int)
    return dict(zip(map(tuple, hkl.tolist()), table["IMEAN"]))


def correlation_to_truth(path: Path, truth) -> float:
    found = intensities(path)
    pairs = [(found[tuple(h)], i) for h, i in zip(truth.unique.hkl.tolist(), truth.intensity) if tuple(h) in found]
    assert len(pairs) > 0.8 * len(truth.unique)
    return float(np.corrcoef(np.array(pairs).T)[0, 1])


def test_merged_files_of_lysozyme(lysozyme, tmp_path, capsys):
    assert run(tmp_path, *lysozyme.paths, "anomalous=True") == 0
    for name in ("merged", "merged_full"):
        assert correlation_to_truth(tmp_path / "DataFiles" / f"{name}.mtz", lysozyme.truth) > 0.985
    table = columns(tmp_path / "DataFiles" / "merged.mtz")
    expected = {"IMEAN", "SIGIMEAN", "I(+)", "SIGI(-)", "F", "SIGF", "F(+)", "DANO", "N", "IHALF1", "SIGIHALF2"}
    assert expected <= set(table)
    assert table["F"].min() > 0
    log = (tmp_path / "ssx_mpi.reduce.log").read_text()
    assert "79 crystals merged" in log and "1 crystal unit cell outside the tolerance" in log
    assert "no indexing ambiguity" in log
    stats = json.loads((tmp_path / "LogFiles" / "dials.merge.json").read_text())["1.00000"]["merging_stats"]
    assert len(stats["cc_one_half"]) == 20
    assert stats["overall"]["n_obs"] == int(table["N"].sum()) == 79 * 400
    assert stats["overall"]["cc_one_half"] > 0.95
    assert stats["overall"]["d_star_sq_min"] == pytest.approx(2.6**-2, rel=0.01)


def test_dials_reads_what_was_scaled(lysozyme, tmp_path):
    assert run(tmp_path, *lysozyme.paths) == 0
    ours = intensities(tmp_path / "DataFiles" / "merged_full.mtz")
    number, total = 0, {}
    for part in (1, 2):
        stem = tmp_path / "DataFiles" / f"scaled_{part}"
        experiments = ExperimentList.from_file(str(stem.with_suffix(".expt")), check_format=False)
        table = flex.reflection_table.from_file(str(stem.with_suffix(".refl")))
        table.assert_experiment_identifiers_are_consistent(experiments)
        number += len(experiments)
        g = np.array(table["inverse_scale_factor"])
        scaled = np.array(table["intensity.scale.value"]) / g
        variance = np.array(table["intensity.scale.variance"]) / g**2
        row, _ = lysozyme.truth.unique.locate(
            table["miller_index"].as_vec3_double().as_numpy_array().reshape(-1, 3).astype(np.int32)
        )
        for u, i, v in zip(row, scaled, variance):
            s = total.setdefault(tuple(lysozyme.truth.unique.hkl[u].tolist()), [0.0, 0.0])
            s[0] += i / v
            s[1] += 1 / v
    assert number == 79
    # merging the file by hand gives the merged intensities, but for the few observations that were down-weighted
    again = np.array([[total[h][0] / total[h][1], i] for h, i in ours.items()])
    close = np.isclose(again[:, 0], again[:, 1], rtol=1e-3, atol=0.5)
    assert close.mean() > 0.97


def test_any_number_of_ranks_gives_the_same(ambiguous, tmp_path):
    mpiexec = shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec")
    results = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        done = subprocess.run(
            [mpiexec, "-n", str(ranks), sys.executable, "-m", "ssx_mpi.command_line.reduce", *map(str, ambiguous.paths),
             "filtering.method=deltacchalf", f"output.folder={folder}"],
            timeout=120, capture_output=True, text=True, env={**os.environ, **_MPI},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results[ranks] = columns(folder / "DataFiles" / "merged_full.mtz")
        log = (folder / "ssx_mpi.reduce.log").read_text().replace(str(folder), "")
        results[ranks]["log"] = log
    path = tmp_path / "4" / "DataFiles" / "merged_full.mtz"
    assert correlation_to_truth(path, _in_setting_of(path, ambiguous.truth)) > 0.97
    for ranks in (2, 4):
        assert results[ranks].pop("log") == results[1]["log"]
        for name, values in results[ranks].items():
            np.testing.assert_allclose(values, results[1][name], rtol=2e-5, atol=1e-3, err_msg=f"{name}, {ranks} ranks")


def test_there_may_be_fewer_crystals_than_ranks(lysozyme, tmp_path):
    from dials.array_family import flex
    from dxtbx.model.experiment_list import ExperimentListFactory

    experiments = ExperimentListFactory.from_json_file(str(lysozyme.paths[0]), check_format=False)[:2]
    table = flex.reflection_table.from_file(str(lysozyme.paths[0].with_suffix(".refl")))
    experiments.as_file(str(tmp_path / "two.expt"))
    table.select_on_experiment_identifiers([e.identifier for e in experiments]).as_file(str(tmp_path / "two.refl"))
    program = ["-m", "ssx_mpi.command_line.reduce", tmp_path / "two.expt", "filtering.method=deltacchalf"]
    for ranks in (1, 3):
        job = run_mpi(ranks, [*program, f"output.folder={tmp_path / str(ranks)}"], timeout=120)
        assert job.status == 0, job.text
    alone, spread = (columns(tmp_path / ranks / "DataFiles" / "merged.mtz") for ranks in ("1", "3"))
    for name, values in spread.items():
        np.testing.assert_allclose(values, alone[name], rtol=2e-5, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_request_to_one_rank_ends_all_in_order(name, lysozyme, tmp_path):
    program = Path(__file__).with_name("stopped.py")
    job = run_mpi(2, [program, name, *lysozyme.paths, f"output.folder={tmp_path}"], timeout=120)
    assert job.status == 75, job.text
    assert "Stopped" in job.out and "Traceback" not in job.text
    assert not (tmp_path / "DataFiles").exists()
    assert not list(tmp_path.rglob("*.partial*"))


def _in_setting_of(path: Path, truth: Truth) -> Truth:
    """The truth in the setting that the reduction took for the common one: that of the best correlation."""
    unique, found = truth.unique, intensities(path)
    row, _ = unique.locate(np.array(list(found), dtype=np.int32))
    moved = [truth.intensity[unique.locate(unique.hkl, setting)[0]] for setting in truth.settings]
    best = max(moved, key=lambda intensity: np.corrcoef(intensity[row], list(found.values()))[0, 1])
    return replace(truth, intensity=best)


def test_a_reference_settles_setting_and_scale(ambiguous, tmp_path):
    assert run(tmp_path / "first", *ambiguous.paths) == 0
    reference = tmp_path / "first" / "DataFiles" / "merged_full.mtz"
    assert run(tmp_path / "second", ambiguous.paths[0], f"reference={reference}") == 0
    stats = json.loads((tmp_path / "second" / "LogFiles" / "dials.merge.json").read_text())["1.00000"]
    assert stats["merging_stats"]["overall"]["cc_reference"] > 0.9


def test_crystals_added_continue_from_the_last_scales(ambiguous, tmp_path):
    assert run(tmp_path / "first", *ambiguous.paths[:2]) == 0
    assert run(tmp_path / "more", ambiguous.paths[2], f"append={tmp_path / 'first'}") == 0
    assert run(tmp_path / "all", *ambiguous.paths, f"reference={tmp_path / 'more/DataFiles/merged_full.mtz'}") == 0
    more, whole = (intensities(tmp_path / name / "DataFiles" / "merged_full.mtz") for name in ("more", "all"))
    assert more.keys() == whole.keys()
    assert np.corrcoef([[more[h], whole[h]] for h in whole], rowvar=False)[0, 1] > 0.9995
    assert "60 crystals merged" in (tmp_path / "more" / "ssx_mpi.reduce.log").read_text()


def test_dose_series_by_image_number(lysozyme, tmp_path):
    assert run(tmp_path, *lysozyme.paths, "dose_series_repeat=2", "export.scaled=False") == 0
    total = columns(tmp_path / "DataFiles" / "merged_full.mtz")["N"].sum()
    parts = [columns(tmp_path / "DataFiles" / f"dose_{k}_full.mtz")["N"].sum() for k in (1, 2)]
    # images 1, 3, ... 79 and 2, 4, ... 78: the 80th was left out
    assert parts == [40 * 400, 39 * 400]
    assert sum(parts) == total
    assert (tmp_path / "LogFiles" / "dials.merge.dose_2.json").is_file()
    # a second reduction into the folder leaves nothing of the first, and everything that it did not write
    (tmp_path / "DataFiles" / "mine.mtz").write_text("")
    assert run(tmp_path, *lysozyme.paths, "d_min=4", "export.scaled=False") == 0
    assert sorted(p.name for p in (tmp_path / "DataFiles").iterdir()) == ["merged.mtz", "mine.mtz"]
    assert sorted(p.name for p in (tmp_path / "LogFiles").iterdir()) == ["dials.merge.json", "ssx_mpi.reduce.json"]


def test_groups_by_metadata_in_hdf5(lysozyme, tmp_path):
    with h5py.File(tmp_path / "meta.h5", "w") as file:
        file["entry/delay"] = np.where(np.arange(80) < 30, 1.0, 5.0) + np.linspace(0, 0.01, 80)
    (tmp_path / "grouping.yml").write_text(
        f"""
metadata:
  delay:
    "/nowhere/shot_######.cbf": "{tmp_path}/meta.h5:/entry/delay"
grouping:
  merge_by:
    values: [delay]
    tolerances: [0.1]
"""
    )
    assert run(tmp_path, *lysozyme.paths, f"grouping={tmp_path / 'grouping.yml'}", "export.scaled=False") == 0
    parts = [columns(tmp_path / "DataFiles" / f"group_{k}_full.mtz")["N"].sum() for k in (1, 2)]
    assert parts == [30 * 400, 49 * 400]
    assert not (tmp_path / "DataFiles" / "group_3.mtz").exists()


def test_stream_for_partialator(ambiguous, tmp_path):
    assert run(tmp_path, ambiguous.paths[0], "export.stream=True", "export.scaled=False") == 0
    text = (tmp_path / "DataFiles" / "crystals_1.stream").read_text()
    assert text.startswith("CrystFEL stream format 2.3\n")
    assert text.count("--- Begin crystal") == text.count("----- End chunk -----") == 25
    # as libcrystfel's reader wants it: the geometry first, in full, and methods that it knows
    head, first = text.split("----- Begin chunk -----")[:2]
    geometry = dict(
        line.split(" = ") for line in head.split("Begin geometry file -----\n")[1].splitlines() if " = " in line
    )
    assert head.rstrip().endswith("----- End geometry file -----")
    panel = {name[3:]: value for name, value in geometry.items() if name.startswith("p0/")}
    assert {"min_fs", "max_fs", "min_ss", "max_ss", "corner_x", "corner_y", "fs", "ss", "clen", "res"} == set(panel)
    # the detector is 200 mm from the sample, its corner 100 mm from the beam either way, 0.1 mm a pixel
    assert float(panel["clen"]) == pytest.approx(0.2) and float(panel["res"]) == pytest.approx(1e4)
    assert abs(float(panel["corner_x"])) == pytest.approx(1000) == abs(float(panel["corner_y"]))
    fast, slow = (np.array([float(x[:-1]) for x in panel[name].split()]) for name in ("fs", "ss"))
    # from its corner the panel reaches back across the beam
    corner = np.array([float(panel["corner_x"]), float(panel["corner_y"]), 0.0])
    np.testing.assert_allclose(corner + 1000 * fast + 1000 * slow, 0.0, atol=1e-6)
    assert "indexed_by = file\n" in first and "unique_axis = *\n" in first
    assert float(first.split("beam_bandwidth = ")[1].splitlines()[0]) == pytest.approx(1e-8)
    chunk = text.split("----- Begin chunk -----")[3]
    rows = {line.split(" = ")[0]: line.split(" = ")[1] for line in chunk.splitlines() if " = " in line}
    assert rows["lattice_type"] == "cubic" and rows["centering"] == "P"
    axes = np.array([[float(x) for x in rows[f"{name}star"].split()[:3]] for name in "abc"])
    np.testing.assert_allclose(np.linalg.norm(axes, axis=1), 10 / 96.4, rtol=3e-3)
    assert np.linalg.det(axes) > 0
    listed = chunk.split("panel\n")[1].split("End of reflections")[0].splitlines()
    assert len(listed) == int(rows["num_reflections"]) == 300


def test_filters_and_their_counts(lysozyme, tmp_path):
    assert run(tmp_path, *lysozyme.paths, "filtering.method=Isigma", "filtering.Isigma.min_i_over_sigma=6") == 0
    log = (tmp_path / "ssx_mpi.reduce.log").read_text()
    gone = int(next(line.split()[0] for line in log.splitlines() if line.endswith("crystals mean I/sigma too low")))
    assert 0 < gone < 79


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("no files", 2, "no integrated data given"),
        ("missing file", 2, "nothing.expt is not there"),
        ("no partner", 2, "is not there to go with"),
        ("not json", 2, "is not an experiment list"),
        ("not reflections", 2, "cannot be read as a reflection table"),
        ("mixed space groups", 2, "different space groups"),
        ("mixed wavelengths", 2, "different wavelengths"),
        ("twice", 2, "crystals are there twice"),
        ("folder", 2, "give the folder of a run as directory="),
        ("strangers", 2, "does not match its .expt file"),
        ("far cell", 3, "no crystal is left to merge"),
        ("wrong reference", 2, "space group"),
        ("no append", 2, "no earlier reduction"),
        ("misspelt", 2, "unknown parameter 'partiality_treshold=0.3'; did you mean partiality_threshold=?"),
        ("not a number", 2, "d_min"),
        ("cut reference", 2, "cannot be read"),
        ("cutoff of nothing", 2, "cc_half_cutoff"),
    ],
)
def test_bad_input_is_one_line(change, code, message, lysozyme, ambiguous, tmp_path, capfd):
    first = tmp_path / "integrated_1.expt"
    shutil.copy(lysozyme.paths[1], first)
    shutil.copy(lysozyme.paths[1].with_suffix(".refl"), first.with_suffix(".refl"))
    content = json.loads(first.read_text())
    args = [first]
    if change == "no files":
        args = []
    elif change == "missing file":
        args = [tmp_path / "nothing.expt"]
    elif change == "no partner":
        first.with_suffix(".refl").unlink()
    elif change == "not json":
        first.write_text("no")
    elif change == "not reflections":
        first.with_suffix(".refl").write_text("no")
    elif change == "mixed space groups":
        args.append(ambiguous.paths[0])
    elif change == "mixed wavelengths":
        content["beam"].append({**content["beam"][0], "wavelength": 1.3})
        content["experiment"][3]["beam"] = 1
        first.write_text(json.dumps(content))
    elif change == "twice":
        args.append(lysozyme.paths[1])
    elif change == "folder":
        # of a run, whose batches are not looked for
        (tmp_path / "run" / "batch_1").mkdir(parents=True)
        args.append(tmp_path / "run")
    elif change == "strangers":
        content["experiment"][3]["identifier"] = "somebody else"
        first.write_text(json.dumps(content))
    elif change == "far cell":
        args.append("clustering.central_unit_cell=90,90,40,90,90,90")
    elif change == "wrong reference":
        assert run(tmp_path / "other", ambiguous.paths[0], "export.scaled=False") == 0
        args.append(f"reference={tmp_path / 'other' / 'DataFiles' / 'merged.mtz'}")
    elif change == "no append":
        args.append(f"append={tmp_path}")
    elif change == "misspelt":
        args.append("partiality_treshold=0.3")
    elif change == "not a number":
        args.append("d_min=high")
    elif change == "cut reference":
        (tmp_path / "cut.mtz").write_bytes(b"MTZ " + bytes(range(256)))
        args.append(f"reference={tmp_path / 'cut.mtz'}")
    elif change == "cutoff of nothing":
        args.append("cc_half_cutoff=0")
    capfd.readouterr()
    assert run(tmp_path / "out", *args) == code
    said = capfd.readouterr().err.strip()
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out" / "DataFiles").exists()


def test_a_run_that_is_not_finished_is_said_to_be(lysozyme, tmp_path, capfd):
    for batch in ("batch_1", "batch_2"):
        (tmp_path / "run" / batch).mkdir(parents=True)
    shutil.copy(lysozyme.paths[1], tmp_path / "run/batch_1/integrated_1.expt")
    shutil.copy(lysozyme.paths[1].with_suffix(".refl"), tmp_path / "run/batch_1/integrated_1.refl")
    (tmp_path / "run/batch_2/journal").touch()
    assert run(tmp_path / "out", f"directory={tmp_path}/run") == 0
    assert "run is not finished" in capfd.readouterr().out
    assert "run is not finished" in (tmp_path / "out/ssx_mpi.reduce.log").read_text()


@pytest.mark.parametrize("folder", ["taken", "taken/within"])
def test_a_folder_that_cannot_be_made_is_one_line(folder, lysozyme, tmp_path, capfd):
    (tmp_path / "taken").write_text("a file of somebody")
    with pytest.raises(SystemExit) as left:
        run(tmp_path / folder, *lysozyme.paths)
    said = capfd.readouterr().err.strip()
    assert left.value.code == 1 and "cannot be written" in said and len(said.splitlines()) == 1
    assert (tmp_path / "taken").read_text() == "a file of somebody"


@pytest.mark.parametrize("wrong", ["negative", "noise", "one crystal", "alike"])
def test_crystals_of_little_use_are_merged_as_they_are(wrong, tmp_path, capfd):
    lattice = synthetic.Lattice(synthetic.LYSOZYME.cell, synthetic.LYSOZYME.space_group, 3.5)
    observations, _ = synthetic.simulate(lattice, 1 if wrong == "one crystal" else 12, per_crystal=200)
    if wrong == "negative":
        observations = replace(observations, intensity=-observations.intensity)
    elif wrong == "noise":
        scatter = np.sqrt(observations.variance)
        observations = replace(observations, intensity=np.random.default_rng(1).normal(0.0, scatter))
    elif wrong == "alike":
        first = np.tile(np.arange(200), 12)
        rows = (getattr(observations, name)[first] for name in ("hkl", "intensity", "variance", "offset_sq"))
        observations = type(observations)(observations.start, *rows)
    paths = synthetic.write_files(tmp_path / "in", observations, lattice)
    assert run(tmp_path / "out", *paths, "filtering.method=deltacchalf", "export.scaled=False") == 0
    assert not capfd.readouterr().err
    table = columns(tmp_path / "out" / "DataFiles" / "merged.mtz")
    assert table["N"].sum() == len(observations.intensity)
    log = (tmp_path / "out" / "ssx_mpi.reduce.log").read_text()
    assert ("hardly any signal" in log) == (wrong in ("negative", "noise"))
    summary = (tmp_path / "out" / "LogFiles" / "ssx_mpi.reduce.json").read_text()
    assert "NaN" not in summary and json.loads(summary)["state"] == "done"


def test_engine_dials_on_the_same_crystals(ambiguous, tmp_path):
    arguments = (ambiguous.paths[0], "d_min=4.5")
    assert run(tmp_path / "fast", *arguments) == 0
    assert run(tmp_path / "dials", *arguments, "engine=dials") == 0
    ours, theirs = (intensities(tmp_path / name / "DataFiles" / "merged.mtz") for name in ("fast", "dials"))
    common = ours.keys() & theirs.keys()
    assert len(common) > 0.9 * len(ours)
    assert np.corrcoef([[ours[h], theirs[h]] for h in common], rowvar=False)[0, 1] > 0.97


def test_nitrite_reductase_runs_through(real_data, tmp_path):
    integrated = real_data / "cunir_serial_processed" / "integrated.expt"
    assert run(tmp_path, integrated, "ambiguity.min_margin=0") == 0
    table = columns(tmp_path / "DataFiles" / "merged_full.mtz")
    assert table["N"].sum() > 2000
    assert "not converged" not in (tmp_path / "ssx_mpi.reduce.log").read_text()
    # five crystals with hardly a reflection in common: what is kept must not run away
    assert np.abs(table["IMEAN"]).max() < 1e4
    assert mtz.object(str(tmp_path / "DataFiles" / "merged.mtz")).space_group_name() == "P 21 3"


def test_thaumatin_runs_through(real_data, tmp_path):
    folder = real_data / "thaumatin_dials_3_30"
    crystals = json.loads((folder / "crystals.json").read_text())["integrated"]
    axes = [np.linalg.inv(np.reshape(a_matrix, (3, 3))) for a_matrix in crystals["A"]]
    names = [f"thau-{number}" for number in crystals["image"]]
    images = [f"/nowhere/thau_3_2_{number:04d}.cbf" for number in crystals["image"]]
    path = tmp_path / "integrated_1.expt"
    synthetic.write_experiments(path, axes, "P 41 21 2", names, images, wavelength=0.96859)
    with np.load(folder / "integrated.npz") as table:
        kept = ("id", "intensity.sum.value", "intensity.sum.variance", "partiality", "lp")
        data = {name: table[name] for name in kept}
        hkl = table["miller_index"]
    synthetic.write_reflections(path.with_suffix(".refl"), hkl, data, names, tuple(crystals["cell"][4]))
    assert run(tmp_path / "out", path) == 0
    stats = json.loads((tmp_path / "out" / "LogFiles" / "dials.merge.json").read_text())["0.96859"]["merging_stats"]
    assert stats["overall"]["n_obs"] > 10000
    # one crystal, thirteen times in nearly the same orientation: few reflections, well measured
    assert stats["overall"]["cc_one_half"] > 0.9
    log = (tmp_path / "out" / "ssx_mpi.reduce.log").read_text()
    assert "not converged" not in log
    assert "13 crystals merged" in log and "no indexing ambiguity in P 41 21 2" in log


def test_merging_again_what_was_scaled(lysozyme, tmp_path):
    assert run(tmp_path / "first", *lysozyme.paths) == 0
    assert run(tmp_path / "again", f"directory={tmp_path / 'first'}", "steps=merge", "d_min=3.5") == 0
    first, again = (intensities(tmp_path / name / "DataFiles" / "merged.mtz") for name in ("first", "again"))
    assert 0.3 * len(first) < len(again) < 0.5 * len(first)
    assert np.corrcoef([[first[h], again[h]] for h in again], rowvar=False)[0, 1] > 0.9999
    assert not (tmp_path / "again" / "DataFiles" / "scaled_1.refl").exists()
    assert not (tmp_path / "again" / "DataFiles" / "merged_full.mtz").exists()


def test_crystals_are_reduced_in_the_space_group_that_is_asked_for(lysozyme, tmp_path, capsys):
    assert run(tmp_path / "own", *lysozyme.paths) == 0
    assert run(tmp_path / "lower", *lysozyme.paths, "space_group=P43") == 0
    assert run(tmp_path / "hand", *lysozyme.paths, "space_group=P41212") == 0
    own, lower, hand = (
        mtz.object(str(tmp_path / name / "DataFiles" / "merged_full.mtz")) for name in ("own", "lower", "hand")
    )
    assert str(lower.space_group_info()) == "P 43" and str(hand.space_group_info()) == "P 41 21 2"
    # half the symmetry: nearly twice the reflections; the other hand: the same intensities
    assert lower.n_reflections() > 1.5 * own.n_reflections()
    assert intensities(tmp_path / "hand" / "DataFiles" / "merged_full.mtz") == intensities(
        tmp_path / "own" / "DataFiles" / "merged_full.mtz"
    )
    scaled = ExperimentList.from_file(str(tmp_path / "hand" / "DataFiles" / "scaled_1.expt"), check_format=False)
    assert {str(e.crystal.get_space_group().info()) for e in scaled} == {"P 41 21 2"}


@pytest.mark.parametrize(("group", "said"), [("I4", "centring"), ("P6", "forbids the cell")])
def test_a_space_group_that_the_crystals_cannot_have_is_refused(lysozyme, tmp_path, capsys, group, said):
    assert run(tmp_path, *lysozyme.paths, f"space_group={group}") == 2
    assert said in capsys.readouterr().err
