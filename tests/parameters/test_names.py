"""Names of parameters as users write them: shortened, as xia2 has them, in files; what is typed wins."""

from __future__ import annotations

import pytest

from ssx_mpi.command_line import reduce
from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters.user_input import InputError

# what `xia2.ssx -c` prints, without its help
XIA2_SSX = """
image = data_master.h5
template = None
directory = None
mask = None
reference_geometry = None
starting_geometry = None
grouping = None
multiprocessing {
  nproc = 4
  njobs = 2
}
space_group = P43212
d_min = 1.9
d_max = None
batch_size = 500
dose_series_repeat = 3
dials_import.phil = None
spotfinding {
  min_spot_size = 2
  max_spot_size = 20
  phil = None
}
indexing {
  unit_cell = 79.1 79.1 38.2 90 90 90
  max_lattices = 2
  min_spots = 12
  phil = None
}
integration {
  algorithm = stills *ellipsoid
  ellipsoid.rlp_mosaicity = simple1 *simple6 simple1angular1 simple1angular3 simple6angular1
  phil = None
}
reduction_batch_size = 1000
reference = None
partiality_threshold = 0.3
reference_model {
  k_sol = 0.35
  b_sol = 46
}
clustering {
  threshold = None
  absolute_angle_tolerance = 0
  absolute_length_tolerance = 2.0
  central_unit_cell = None
}
filtering {
  method = *deltacchalf Isigma
  stdcutoff = 3.5
  mean_i_over_sigma_threshold = 0.5
  remove_filtered_reflections = True
}
symmetry {
  space_group = P41212
  lattice_symmetry_max_delta = 0.5
  phil = None
}
scaling {
  anomalous = True
  model = None
  phil = None
}
assess_crystals {
  n_crystals = 250
  images_to_use = None
}
geometry_refinement {
  n_crystals = 100
  images_to_use = 1:500
  phil = None
}
workflow {
  steps = *find_spots *index *integrate reduce
}
enable_live_reporting = False
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_parameter_file_of_xia2_ssx_is_taken_as_it_is(here):
    (here / "xia2.phil").write_text(XIA2_SSX)
    p = read_arguments(["xia2.phil"])[0]
    assert [source.name for source in p.sources] == [str(here / "data_master.h5")]
    assert (p.nproc, p.space_group, p.d_min, p.batch_size) == (4, "P 43 21 2", 1.9, 500)
    assert p.unit_cell == (79.1, 79.1, 38.2, 90, 90, 90)
    assert (p.max_lattices, p.min_spots, p.spotfinding.min_spot_size) == (2, 12, 2)
    assert p.steps == ("find_spots", "index", "integrate")
    assert (p.geometry.n_crystals, p.geometry.first, p.geometry.last) == (100, 1, 500)
    r = p.reduction
    assert (r.anomalous, r.space_group, r.partiality_threshold, r.dose_series_repeat) == (True, "P 41 21 2", 0.3, 3)
    assert (r.filtering.delta_cc_half, r.filtering.i_over_sigma) == (True, False)
    assert (r.filtering.std_cutoff, r.filtering.min_i_over_sigma) == (3.5, 0.5)
    (note,) = p.notes
    for name in ("multiprocessing.njobs", "reduction_batch_size", "filtering.remove_filtered_reflections"):
        assert name in note


def test_none_of_the_methods_of_xia2_is_none(here):
    (here / "xia2.phil").write_text(XIA2_SSX.replace("*deltacchalf", "deltacchalf"))
    filtering = read_arguments(["xia2.phil"])[0].reduction.filtering
    assert (filtering.delta_cc_half, filtering.i_over_sigma) == (False, False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("indexing.unit_cell=79,79,38,90,90,90", lambda p: p.unit_cell == (79, 79, 38, 90, 90, 90)),
        ("workflow.steps=find_spots", lambda p: p.steps == ("find_spots",)),
        ("multiprocessing.nproc=3", lambda p: p.nproc == 3),
        ("symmetry.space_group=P4", lambda p: p.reduction.space_group == "P 4" and p.space_group is None),
        ("scaling.anomalous=True", lambda p: p.reduction.anomalous),
        ("stdcutoff=2", lambda p: p.reduction.filtering.std_cutoff == 2),
        ("filtering.method=deltacchalf+Isigma", lambda p: p.reduction.filtering.i_over_sigma),
    ],
)
def test_full_names_of_xia2_are_typed(here, argument, value):
    assert value(read_arguments(["image=x.h5", argument])[0])


def test_a_model_is_a_reference(here):
    (here / "model.pdb").write_text("")
    assert read_arguments(["image=x.h5", "scaling.model=model.pdb"])[0].reduction.reference == here / "model.pdb"


def test_the_reduction_has_the_names_of_its_own_program():
    given = reduce._parse(
        [
            *("workflow.steps=merge", "scaling.anomalous=True", "multiprocessing.nproc=2", "symmetry.space_group=P4"),
            *("input.directory=run", "input.experiments=a.expt", "reduction_batch_size=10", "input.validate=True"),
        ]
    )
    found = given.extract
    assert (found.steps, found.anomalous, found.nproc, str(found.space_group)) == (["merge"], True, 2, "P 4")
    assert found.input.directory[-1] == "run" and found.input.experiments[-1] == "a.expt"
    assert "reduction_batch_size" in given.notes[0] and "input.validate" in given.notes[0]


@pytest.mark.parametrize("order", [("own.phil", "min_spots=7"), ("min_spots=7", "own.phil")])
def test_what_is_typed_wins_over_a_parameter_file_wherever_that_stands(here, order):
    (here / "own.phil").write_text("image = x.h5\nmin_spots = 5\nmax_lattices = 9\n")
    p = read_arguments(list(order))[0]
    assert (p.min_spots, p.max_lattices) == (7, 9)


def test_a_file_may_shorten_names_and_quote_values(here):
    (here / "own.phil").write_text('image = "my chip/x 1.h5"\n!min_spots = 3\nreduction { filtering.stdcutoff = 3 }\n')
    p = read_arguments(["own.phil"])[0]
    assert p.sources[0].name == str(here / "my chip" / "x 1.h5")
    assert (p.min_spots, p.reduction.filtering.std_cutoff) == (10, 3)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("indexing.unitcell=1,1,1,90,90,90", "did you mean unit_cell="),
        ("indexing.wavelet=3", "-c lists the parameters"),
        ("n_crystals=4", "assess_crystals.n_crystals= or geometry_refinement.n_crystals="),
        ("multiprocessing.nprocs=4", "did you mean nproc="),
        ("min_spots=__import__('os').getpid()", "not a number"),
    ],
)
def test_what_is_refused_says_what_was_meant(here, argument, said):
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        read_arguments(["image=x.h5", argument])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("unit_cel = 1", "own.phil: unknown parameter 'unit_cel=1'; did you mean unit_cell="),
        ("min_spots = __import__('os').getpid()", "own.phil: min_spots=__import__("),
        ("min_spots = {", "own.phil"),
        ("include scope os.path", "own.phil"),
        ("", "own.phil: there are no parameters in it"),
    ],
)
def test_a_parameter_file_is_refused_by_its_name(here, text, said):
    (here / "own.phil").write_text(text)
    with pytest.raises(InputError, match=r"^[^\n]*$") as caught:
        read_arguments(["image=x.h5", "own.phil"])
    assert said in str(caught.value)
