"""Parameters as a user gives them: what is read from them, and what is refused with which words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters import run_parameters
from ssx_mpi.parameters.reduction_parameters import ReductionParameters
from ssx_mpi.parameters.run_parameters import CrystalSelection, Source
from ssx_mpi.parameters.user_input import InputError


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """The parameters for command-line arguments given in an empty folder with one image, ``x.cbf``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.cbf").write_bytes(b"")
    return lambda *arguments: read_arguments(["image=x.cbf", *arguments])[0]


def refusal(parse, *arguments: str) -> str:
    """The one line with which `arguments` are refused."""
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_those_that_users_know(parse):
    p = parse()
    assert (p.max_lattices, p.min_spots, p.batch_size) == (3, 10, 1000)
    assert (p.spotfinding.min_spot_size, p.spotfinding.max_spot_size) == (3, 20)
    assert p.geometry == p.assess == CrystalSelection(250, None, None)
    assert p.steps == ("find_spots", "index", "integrate", "reduce")
    assert p.reduction == ReductionParameters()
    assert (p.integration.algorithm, p.integration.rlp_mosaicity) == ("ellipsoid", "simple6")
    assert (p.nproc, p.unit_cell, p.space_group, p.symmetry_known) == (None, None, None, False)


def test_paths_are_absolute_and_start_at_the_working_folder(parse, tmp_path):
    (tmp_path / "ref.expt").write_text("{}")
    p = parse("reference_geometry=ref.expt", "output.directory=out/deep")
    assert p.sources == (Source("image", str(tmp_path / "x.cbf")),)
    assert p.reference_geometry == tmp_path / "ref.expt"
    assert p.directory == tmp_path / "out" / "deep"


def test_short_names_work_where_they_are_unambiguous(parse):
    p = parse("unit_cell=79.1,79.1,38.2,90,90,90", "space_group=P43212", "max_lattices=1", "rlp_mosaicity=simple1")
    assert p.unit_cell == (79.1, 79.1, 38.2, 90, 90, 90)
    assert p.space_group == "P 43 21 2"
    assert (p.max_lattices, p.integration.rlp_mosaicity) == (1, "simple1")


def test_each_source_has_its_own_range(parse, tmp_path):
    p = parse("image=a.h5:1001:2000", "image=b.h5:1:5", "template=l_###.cbf:2:3", "template=l_###.cbf", "directory=d")
    assert p.sources[1:] == (
        Source("image", str(tmp_path / "a.h5"), 1001, 2000),
        Source("image", str(tmp_path / "b.h5"), 1, 5),
        Source("template", str(tmp_path / "l_###.cbf"), 2, 3),
        Source("template", str(tmp_path / "l_###.cbf")),
        Source("directory", str(tmp_path / "d")),
    )


def test_a_colon_in_a_name_is_no_range(parse, tmp_path):
    assert parse("image=scan_12:30.h5").sources[1] == Source("image", str(tmp_path / "scan_12:30.h5"))
    assert parse("image=12:30:scan.h5").sources[1] == Source("image", str(tmp_path / "12:30:scan.h5"))


@pytest.mark.parametrize("bad", ["5:4", "-3:4", ":4", "4:"])
def test_malformed_ranges_are_refused_by_name(parse, bad):
    assert f"image=a.h5:{bad}" in refusal(parse, f"image=a.h5:{bad}")


@pytest.mark.parametrize("bad", ["7", "3:2", "a:b", "1:2:3"])
@pytest.mark.parametrize("stage", ["geometry_refinement", "assess_crystals"])
def test_malformed_selections_are_refused_by_name(parse, stage, bad):
    assert f"{stage}.images_to_use={bad}" in refusal(parse, f"{stage}.images_to_use={bad}")


@pytest.mark.parametrize(
    ("argument", "closest"),
    [
        ("max_latices=2", "max_lattices"),
        ("unitcell=1,1,1,90,90,90", "unit_cell"),
        ("spacegroup=P1", "space_group"),
        ("geometry_refinement.ncrystals=3", "geometry_refinement.n_crystals"),
        ("spotfinding.min_spotsize=3", "spotfinding.min_spot_size"),
        ("min_spotsize=3", "spotfinding.min_spot_size"),
    ],
)
def test_an_unknown_parameter_names_the_closest_one(parse, argument, closest):
    message = refusal(parse, argument)
    assert argument in message
    assert f"did you mean {closest}=?" in message


def test_nothing_like_it_points_to_the_list(parse):
    assert "-c lists the parameters" in refusal(parse, "zzzz=3")


def test_a_bare_file_name_says_how_to_give_images(parse, tmp_path):
    (tmp_path / "data.h5").write_bytes(b"")
    assert "image=" in refusal(parse, "data.h5")


@pytest.mark.parametrize("argument", ["max_lattices=0", "max_lattices=two", "batch_size=0", "d_min=-1", "nproc=0"])
def test_impossible_values_are_refused_by_name(parse, argument):
    assert argument.split("=")[0] in refusal(parse, argument)


@pytest.mark.parametrize(
    "argument",
    [
        *("batch_size=None", "output.directory=None", "restart=None", "reduction.merging.n_bins=None", "engine=Auto"),
        *("image=Auto", "space_group=Auto", "d_min=nan", "image_timeout=inf", "unit_cell=nan,79,38,90,90,90"),
        *("unit_cell=79,79,38", "unit_cell=79,79,-38,90,90,90", "unit_cell=79,79,38,10,10,90", "mask="),
    ],
)
def test_values_that_stand_for_nothing_are_refused_by_name(parse, argument):
    assert argument.split("=")[0] in refusal(parse, argument)


def test_none_is_taken_where_it_stands_for_something(parse):
    p = parse("steps=None", "nproc=None", "time_limit=None", "cc_half_cutoff=None", "absolute_length_tolerance=None")
    assert (p.steps, p.nproc, p.time_limit) == ((), None, None)
    assert (p.reduction.merging.cc_half_cutoff, p.reduction.cells.length_tolerance) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("d_min=5", "d_max=2"), "d_min=5 is not below d_max=2"),
        (("reduction.d_min=5", "d_max=2"), "reduction.d_min=5 is not below d_max=2"),
        (("min_spot_size=7", "max_spot_size=6"), "min_spot_size=7 is above spotfinding.max_spot_size=6"),
    ],
)
def test_limits_at_odds_with_each_other_are_refused(parse, arguments, said):
    assert said in refusal(parse, *arguments)


@pytest.mark.parametrize(
    "name", ["two  blanks.h5", "a;b.h5", 'say "hi".h5', "it's.h5", "{x}#1 #2.h5", "a=b.h5", "ü\\*?.h5"]
)
def test_names_are_taken_as_they_are(parse, tmp_path, name):
    p = parse(f"image={name}", f"output.directory={name}")
    assert p.sources[1] == Source("image", str(tmp_path / name))
    assert p.directory == tmp_path / name


def test_names_may_be_in_quotes(parse, tmp_path):
    assert parse("output.directory='a  b'").directory == parse('output.directory="a  b"').directory == tmp_path / "a  b"


@pytest.mark.parametrize(
    "argument", ["space_group=P43221", "unit_cell=79,79,38,90,90,0", "engine=slow", "steps=find_spot"]
)
def test_values_that_are_none_are_refused(parse, argument):
    assert refusal(parse, argument)


@pytest.mark.parametrize(
    ("group", "cell"),
    [("P43212", "79,82,38,90,90,90"), ("P213", "96,96,96,90,90,93"), ("P212121", "30,40,50,90,95,90")],
)
def test_a_cell_that_the_space_group_forbids(parse, group, cell):
    message = refusal(parse, f"space_group={group}", f"unit_cell={cell}")
    assert "forbidden by space_group" in message
    assert cell.split(",")[1] in message


def test_a_cell_within_measurement_of_the_space_group_is_taken(parse):
    assert parse("space_group=P43212", "unit_cell=79.1,79.2,38.2,90,90,90").symmetry_known


@pytest.mark.parametrize(
    "name",
    [
        "reference_geometry",
        "starting_geometry",
        "mask",
        "dials_import.phil",
        "spotfinding.phil",
        "indexing.phil",
        "geometry_refinement.phil",
        "integration.phil",
        "reduction.reference",
        "reduction.grouping",
        "reduction.symmetry.phil",
        "reduction.scaling.phil",
        "reduction.merging.phil",
    ],
)
def test_every_file_that_is_not_there_is_named(parse, name):
    assert refusal(parse, f"{name}=lost.file") == f"{name}=lost.file: there is no such file"


def test_a_phil_file_of_ours_that_is_not_there_is_named(parse):
    assert "lost.phil: there is no such file" in refusal(parse, "lost.phil")


@pytest.mark.parametrize(
    ("text", "said"),
    [("d_min = {", "mine.phil"), ("", "no parameters"), ("d_minn = 2", "d_minn"), ("d_min = x", "d_min")],
)
def test_a_phil_file_of_ours_that_is_none_is_refused(parse, tmp_path, text, said):
    (tmp_path / "mine.phil").write_text(text)
    message = refusal(parse, "mine.phil")
    assert said in message
    assert "unknown parameter 'mine.phil'" not in message


def test_a_phil_file_of_ours_is_read(parse, tmp_path):
    (tmp_path / "mine.phil").write_text("max_lattices = 7\nspotfinding.min_spot_size = 2\n")
    p = parse("mine.phil")
    assert (p.max_lattices, p.spotfinding.min_spot_size) == (7, 2)


def test_steps_come_in_their_order_and_none_is_none(parse):
    assert parse("steps=integrate+find_spots").steps == ("find_spots", "integrate")
    assert parse("steps=index").steps == ("index",)
    assert parse("steps=None").steps == parse("steps=None").image_steps == ()
    p = parse("steps=reduce+integrate")
    assert (p.steps, p.image_steps) == (("integrate", "reduce"), ("integrate",))
    assert parse("steps=reduce").image_steps == ()


def test_reduction_without_what_it_takes_is_refused(parse):
    assert "steps=index+reduce" in refusal(parse, "steps=index+reduce")


def test_parameters_of_the_reduction_do_not_clash_with_those_of_the_run(parse, tmp_path):
    (tmp_path / "model.pdb").touch()
    p = parse("d_min=2", "d_max=30", "engine=dials", "steps=integrate", "reference=model.pdb", "anomalous=True")
    assert (p.d_min, p.d_max, p.engine, p.steps) == (2.0, 30.0, "dials", ("integrate",))
    own = p.reduction
    assert (own.engine, own.steps, own.reference) == ("fast", ("scale", "merge"), tmp_path / "model.pdb")
    # the data end at d_min, and where the merged ones do is estimated; what is hidden at low angles is so for all
    assert (own.d_min, own.d_max, own.anomalous) == (None, 30.0, True)
    p = parse("d_max=30", "reduction.d_min=2.5", "reduction.d_max=20", "threshold=900", "reduction.steps=scale")
    assert (p.d_min, p.reduction.d_min, p.reduction.d_max) == (None, 2.5, 20.0)
    assert (p.reduction.cells.threshold, p.reduction.steps) == (900.0, ("scale",))


def test_identity_leaves_out_what_does_not_change_results(parse, tmp_path):
    p = parse()
    other = replace(p, nproc=7, steps=("index",), restart=True, directory=tmp_path / "elsewhere", live_merge=True)
    assert other.identity() == p.identity() == replace(p, reduction=ReductionParameters(d_min=2.0)).identity()
    for changed in (replace(p, d_min=2.0), replace(p, max_lattices=1), replace(p, engine="dials")):
        assert changed.identity() != p.identity()


def test_identity_notices_an_edited_file(parse, tmp_path):
    (tmp_path / "spots.phil").write_text("spotfinder.filter.min_spot_size=2")
    before = parse("spotfinding.phil=spots.phil").identity()
    (tmp_path / "spots.phil").write_text("spotfinder.filter.min_spot_size=4")
    after = parse("spotfinding.phil=spots.phil").identity()
    assert {name for name in before if before[name] != after[name]} == {"spotfinding"}


def test_every_parameter_has_help():
    without = [d.path for d in run_parameters.scope().all_definitions() if not d.object.help]
    assert without == []


@pytest.mark.parametrize(
    "argument",
    [
        "d_min=__import__('os').system('touch evaluated')",
        "unit_cell=79,79,38,90,90,max(90,1)",
        "batch_size=9**9**9",
        "d_min=open('x')",
    ],
)
def test_numbers_are_not_evaluated(argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="not a number"):
        read_arguments(["image=x.cbf", argument])
    (tmp_path / "user.phil").write_text(argument.replace("=", " = ", 1) + "\n")
    with pytest.raises(InputError, match="not a number"):
        read_arguments(["image=x.cbf", "user.phil"])
    assert not (tmp_path / "evaluated").exists()


def test_sums_of_numbers_are_numbers():
    assert read_arguments(["image=x.cbf", "d_min=1.5+0.25", "max_failures=1/2"])[0].d_min == 1.75


def test_who_gave_a_value_matters_beside_files_for_dials_alone(tmp_path):
    assert "typed" not in read_arguments(["image=x.cbf", "d_min=2"])[0].identity()
    (tmp_path / "spots.phil").write_text("spotfinder.filter.min_spot_size=2")
    identities = [
        read_arguments(["image=x.cbf", f"spotfinding.phil={tmp_path / 'spots.phil'}", *more])[0].identity()
        for more in ((), ("min_spot_size=3",))
    ]
    assert identities[0] != identities[1]
