"""The page: a verdict that fits the numbers, every figure drawn in a browser, nothing fetched, small for any run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from ssx_mpi.command_line import report as program
from ssx_mpi.parameters.user_input import InputError
from ssx_mpi.report import figures, page
from ssx_mpi.report.run_summary import RunSummary
from ssx_mpi.report.table_one import TableOne

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
N_SHELLS = 10


def merging(cc_end: float = 0.3) -> dict:
    """Statistics by shell as dials.merge.json has them, from 40 to 2 angstrom."""
    edges = np.linspace(0.0006, 0.25, N_SHELLS + 1)
    cc = np.linspace(0.99, cc_end, N_SHELLS)
    column = np.ones(N_SHELLS)
    return {
        "d_star_sq_max": edges[:-1].tolist(),
        "d_star_sq_min": edges[1:].tolist(),
        "n_obs": [5000] * N_SHELLS,
        "n_uniq": [800] * N_SHELLS,
        "multiplicity": (6 * column).tolist(),
        "completeness": (97 * column).tolist(),
        "i_mean": np.geomspace(1000, 20, N_SHELLS).tolist(),
        "i_over_sigma_mean": np.linspace(12, 1.5, N_SHELLS).tolist(),
        "cc_one_half": [*cc[:-1].tolist(), cc_end],
        "cc_one_half_sd": (0.02 * column).tolist(),
        "cc_star": np.sqrt(2 * cc / (1 + cc)).tolist(),
        "r_split": np.linspace(0.05, 0.8, N_SHELLS).tolist(),
        "cc_anom": [None] * N_SHELLS,
    }


def reduction(**more) -> dict:
    overall = {
        "n_crystals": 200,
        "d_min": 2.0,
        "d_min_estimated": True,
        "n_obs": 50000,
        "n_uniq": 8000,
        "multiplicity": 6.25,
        "completeness": 97.0,
        "i_over_sigma_mean": 8.0,
        "cc_one_half": 0.985,
        "cc_star": 0.996,
        "r_split": 0.09,
    }
    return {
        "state": "done",
        "crystals": {"merged": 200, "too different a cell": 3},
        "cell": [79.1, 79.1, 38.2, 90, 90, 90],
        "space_group": "P 43 21 2",
        "wavelength": 0.976,
        "warnings": [],
        "merged": {"merged": {**overall, **more}},
    }


def run(**counts) -> dict:
    numbers = {"images": 1000, "hits": 300, "indexed": 280, "lattices": 300, "crystals": 290, **counts}
    return {
        "state": "done",
        "n_images": 1000,
        "ranks": 2,
        "seconds": 60.0,
        "parameters": {"space_group": "P 43 21 2", "mask": "None"},
        "left_out": [["a.nxs:3", "read", "truncated"]],
        "total": {
            "counts": numbers,
            "failures": {"index: no lattice": 20, "read: truncated": 1},
            "cpu_seconds": {"find_spots": 50.0, "index": 40.0, "integrate": 30.0},
            "slowest_image": {"image": "a.nxs:7", "cpu_seconds": 1.5},
        },
    }


def images(n: int = 1000) -> dict:
    rng = np.random.default_rng(1)
    hit = (rng.random(n) < 0.3).astype(np.uint8)
    lattices = hit * (rng.random(n) < 0.9)

    def known(values):
        return np.where(lattices > 0, values, np.nan).astype(np.float32)

    return {
        "image": np.arange(n),
        "file": (np.arange(n) * 4 // n).astype(np.int32),
        "files": ["a.nxs", "b.nxs", "c.nxs", "d.nxs"],
        "hit": hit,
        "n_spots": rng.poisson(40, n),
        "n_lattices": lattices,
        **{name: known(rng.normal(mean, 0.1, n)) for name, mean in zip(("a", "b", "c"), (79.1, 79.1, 38.2))},
        **{name: known(np.full(n, 90.0)) for name in ("alpha", "beta", "gamma")},
        "d_min": known(rng.normal(2.2, 0.2, n)),
        "rmsd": known(rng.gamma(4, 0.1, n)),
        "mosaicity": known(rng.gamma(4, 0.01, n)),
        "i_over_sigma": known(rng.gamma(4, 1.0, n)),
    }


def geometry() -> dict:
    node = {"level": 1, "panels": [0], "n_spots": 500, "shift": [0.1, -0.05, 0.2], "shift_sigma": [0.001, 0.001, 0.01]}
    node |= {"turn": [0.01, 0.02, 0.03], "turn_sigma": [0.001, 0.001, 0.001]}
    place = {"distance": 100.0, "beam_x": 70.0, "beam_y": 71.0}
    return {
        "n_crystals": 250,
        "steps": [{"rmsd_x": 0.1, "rmsd_y": 0.1}, {"rmsd_x": 0.01, "rmsd_y": 0.01}],
        "before": place,
        "after": {**place, "distance": 100.4},
        "cell_before": [79.3, 79.3, 38.3, 90, 90, 90],
        "cell_after": [79.1, 79.1, 38.2, 90, 90, 90],
        "uncertainty": {
            "sigma": {"distance": 0.01, "shift_fast": 0.001, "shift_slow": 0.001},
            "cell_correlation": {"distance": 0.97},
            "relative_cell_sigma": 1e-4,
        },
        "converged": True,
        "hierarchy_level": 1,
        "levels_tried": [],
        "nodes": [{**node, "name": f"/entry/instrument/detector/p{k}"} for k in range(3)],
    }


def summary(folder, **more) -> RunSummary:
    content = {"run": run(), "reduction": reduction(), "merging": merging(), "geometry": geometry(), "images": images()}
    return RunSummary(folder, **{**content, **more})


def test_a_good_run_is_called_good(tmp_path):
    good = summary(tmp_path)
    assert good.verdict[0] == "good"
    assert "200 crystals merged to 2.00 Å: CC1/2 0.985, completeness 97.0%" in good.verdict[1]
    assert good.warnings == []


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        (
            {"reduction": {**reduction(), "warnings": ["only 20 of 90 crystals are merged"]}},
            "usable with warnings",
            "only 20",
        ),
        ({"reduction": reduction(cc_one_half=0.1)}, "unusable", None),
        ({"reduction": reduction(cc_one_half=None)}, "unusable", None),
        ({"reduction": reduction(completeness=3.0)}, "unusable", None),
        ({"run": run(crystals=0), "reduction": {}, "merging": {}}, "nothing", None),
        ({"reduction": {}, "merging": {}}, "not finished", None),
        ({"run": run(indexed=30)}, "usable with warnings", "only 30 of 300 hits are indexed"),
        ({"geometry": {**geometry(), "converged": False}}, "usable with warnings", "the geometry refinement did not"),
    ],
)
def test_the_verdict_fits_the_numbers(tmp_path, change, verdict, words):
    found = summary(tmp_path, **change)
    assert found.verdict[0] == verdict
    if words is not None:
        assert any(words in warning for warning in found.warnings)
        assert words[0].upper() + words[1:] in page.render(found)


def test_a_fault_of_the_sample_comes_first_among_the_warnings(tmp_path):
    blank = images()
    blank["hit"][300:700] = 0
    warned = summary(
        tmp_path, images=blank, reduction={**reduction(), "warnings": ["only 20 of 90 crystals are merged"]}
    )
    assert warned.verdict[0] == "usable with warnings"
    assert warned.warnings[0].startswith("images 30") and "next to no hits" in warned.warnings[0]
    assert "next to no hits" in page.render(warned).split("<noscript>")[0]


def test_images_that_could_not_be_read_are_a_warning(tmp_path):
    failing = run()
    failing["total"]["failures"] = {"read: truncated": 100}
    assert any("100 of 1000 images could not be read" in w for w in summary(tmp_path, run=failing).warnings)


def test_table_one_in_three_forms():
    table = TableOne.of(reduction(), merging())
    assert table is not None
    assert dict(table.rows)["CC1/2"] == ["0.985", "0.990", "0.300"]
    assert dict(table.rows)["CCano"] == ["-", "-", "-"]
    assert "P 43 21 2" in table.text and "2.11–2.00" in table.text
    assert r"$CC_{1/2}$ & 0.985 (0.300) \\" in table.latex
    assert re.search(r"_reflns\.pdbx_CC_half +0\.985", table.mmcif)
    assert re.search(r"_reflns_shell\.d_res_high +2\.000", table.mmcif)
    assert TableOne.of({"merged": {}}, merging()) is None


def test_figures_are_what_plotly_takes(tmp_path):
    objects = pytest.importorskip("plotly.graph_objects")
    found = summary(tmp_path)
    prediction = found.forecast()
    assert prediction is not None
    drawn = [
        *figures.along_images(found),
        *figures.cells(found),
        *figures.merging(found),
        *figures.scales([(np.zeros(20), np.arange(20.0))]),
        *figures.refinement(found.geometry),
        *figures.reasons(found.failures),
        *figures.cost(found.run),
        figures.growth(prediction),
    ]
    assert len(drawn) >= 13
    for figure in drawn:
        objects.Figure(**figure.as_json())  # raises for what plotly does not know
        assert figure.look and figure.title
        titles = [axis.get("title") for name, axis in figure.layout.items() if name.startswith(("xaxis", "yaxis"))]
        assert titles and all(title is not None for title in titles), figure.title


def test_a_million_images_take_no_more_room_than_a_thousand(tmp_path):
    small, large = (page.render(summary(tmp_path, images=images(n))) for n in (5_000, 1_000_000))
    assert len(large) < 1.1 * len(small) < 5_500_000


def test_text_of_users_is_not_taken_for_html(tmp_path):
    nasty = run()
    nasty["left_out"] = [["<script>alert(1)</script>.cbf", "read", "</script><b>x"]]
    nasty["total"]["failures"] = {"index: </script><img src=x>": 2}
    text = page.render(summary(tmp_path, run=nasty))
    assert "<script>alert(1)" not in text and "<img src=x>" not in text


@pytest.mark.parametrize(
    "content", [{}, {"run": run(), "reduction": {}, "merging": {}, "geometry": {}, "images": None}]
)
def test_little_is_reported_as_well(tmp_path, content):
    assert "ssx_mpi" in page.render(RunSummary(tmp_path, **content))


def write_folder(folder) -> None:
    (folder / "LogFiles").mkdir(parents=True)
    (folder / "ssx_mpi.json").write_text(json.dumps(run()))
    (folder / "LogFiles" / "ssx_mpi.reduce.json").write_text(json.dumps(reduction()))
    (folder / "LogFiles" / "dials.merge.json").write_text(json.dumps({"0.97600": {"merging_stats": merging()}}))
    (folder / "geometry_refinement").mkdir()
    (folder / "geometry_refinement" / "geometry_refinement.json").write_text(json.dumps(geometry()))


def test_the_program_writes_the_page_and_a_copy(tmp_path, capsys):
    folder, copy = tmp_path / "lyso", tmp_path / "logbook"
    write_folder(folder)
    assert program.main([str(folder), "forecast.d_min=1.8", f"report.copy_to={copy}"]) == 0
    text = (folder / "ssx_mpi.html").read_text()
    assert "at 1.80 Å" in text and "Good" in text
    assert (copy / "report.html").read_text() == text
    assert "dials2018" in (folder / "ssx_mpi.bib").read_text()
    assert str(folder / "ssx_mpi.html") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nowhere"], "nowhere: there is no such folder"),
        ([".", "forecast.d_min=deep"], "forecast.d_min=deep"),
        ([".", "forecast.d_min=-2"], "less than the minimum allowed value: -2 < 0.1"),
        ([".", "colour=red"], "colour="),
        ([".", ".."], "give one folder"),
        (["."], "neither a run nor a reduction"),
    ],
)
def test_wrong_commands_get_one_line(args, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert program.main(args) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_an_empty_folder_is_no_run(tmp_path):
    with pytest.raises(InputError, match="neither a run nor a reduction"):
        RunSummary.read(tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.timeout(120)
def test_a_browser_draws_every_figure_and_fetches_nothing(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.render(summary(tmp_path)))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    # any name that is asked for does not resolve
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/p"]
    done = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=100)
    drawn = re.search(r'data-drawn="(\w+)"', done.stdout)
    assert drawn is not None and drawn.group(1) == "yes", done.stdout[-500:]
    places = len(re.findall(r'id="figure-\d+-\d+"', done.stdout))
    assert places >= 12
    assert len(re.findall(r'class="figure js-plotly-plot"', done.stdout)) == places
    assert not re.findall(r"CONSOLE", done.stderr), done.stderr[-1000:]
    assert not re.search(r'(src|href)="https?:', path.read_text())
