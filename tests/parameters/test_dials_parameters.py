"""Parameters for DIALS: ours, the user's, and who wins."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

import pytest

from ssx_mpi import dials_compat
from ssx_mpi.command_line.process import read_arguments
from ssx_mpi.parameters.dials_parameters import dials_parameters, user_texts
from ssx_mpi.parameters.user_input import InputError

CELL = ("space_group=P43212", "unit_cell=79.1,79.1,38.2,90,90,90")


def scopes(*arguments: str, **texts: str):
    return dials_parameters(read_arguments(["image=x.h5", *arguments])[0], texts)


def test_our_parameters_arrive_where_dials_reads_them():
    made = scopes(
        *CELL,
        *("d_min=1.9", "d_max=25", "max_lattices=2", "min_spots=12"),
        *("spotfinding.min_spot_size=2", "spotfinding.max_spot_size=55", "integration.algorithm=stills"),
    )
    spots, indexing = made.spotfinding.spotfinder.filter, made.indexing
    assert (spots.min_spot_size, spots.max_spot_size, spots.d_min, spots.d_max) == (2, 55, 1.9, 25)
    assert indexing.indexing.multiple_lattice_search.max_lattices == 2
    assert indexing.min_spots == 12
    assert indexing.indexing.known_symmetry.unit_cell.parameters() == (79.1, 79.1, 38.2, 90, 90, 90)
    assert str(indexing.indexing.known_symmetry.space_group) == "P 43 21 2"
    assert made.integration.algorithm == "stills"
    assert made.integration.prediction.d_min == 1.9
    assert made.notes == ()


def test_what_was_not_asked_for_is_left_to_dials():
    made = scopes()
    default = dials_compat.program_phil("find_spots").fetch().extract()
    for path in ("spotfinder.filter.d_min", "spotfinder.filter.d_max", "spotfinder.threshold.algorithm"):
        assert attrgetter(path)(made.spotfinding) == attrgetter(path)(default)
    assert made.indexing.indexing.known_symmetry.unit_cell is None


def test_the_users_file_is_obeyed_where_we_say_nothing():
    text = "spotfinder.threshold.dispersion.gain = 2.5\nspotfinder.filter.max_strong_pixel_fraction = 0.1\n"
    made = scopes(spotfinding=text)
    assert made.spotfinding.spotfinder.threshold.dispersion.gain == 2.5
    assert made.spotfinding.spotfinder.filter.max_strong_pixel_fraction == 0.1
    assert made.notes == ()


def test_our_parameter_wins_over_the_file_and_the_log_says_so():
    made = scopes("spotfinding.min_spot_size=4", spotfinding="spotfinder.filter.min_spot_size = 7")
    assert made.spotfinding.spotfinder.filter.min_spot_size == 4
    (note,) = made.notes
    for words in (
        "spotfinding.phil",
        "spotfinder.filter.min_spot_size = 7",
        "what was typed wins: spotfinding.min_spot_size=4",
    ):
        assert words in note


def test_where_both_say_the_same_there_is_nothing_to_note():
    assert scopes("spotfinding.min_spot_size=4", spotfinding="spotfinder.filter.min_spot_size = 4").notes == ()


def test_refinement_fixes_what_stills_cannot_tell():
    refinement = scopes(*CELL).geometry_refinement.refinement
    assert refinement.parameterisation.beam.fix == ["all"]
    assert "Tau1" in refinement.parameterisation.detector.fix_list
    assert refinement.reflections.outlier.algorithm == "sauter_poon"
    assert refinement.refinery.engine == dials_compat.refinement_engine()


def test_a_file_wins_over_a_default_that_nobody_typed():
    file = "spotfinder.filter.min_spot_size = 2"
    made = scopes(spotfinding=file, indexing="min_spots = 5")
    assert made.spotfinding.spotfinder.filter.min_spot_size == 2
    assert made.indexing.min_spots == 5
    assert "spotfinding.phil: spotfinder.filter.min_spot_size = 2" in made.notes
    # the default, typed
    assert scopes("spotfinding.min_spot_size=3", spotfinding=file).spotfinding.spotfinder.filter.min_spot_size == 3
    assert scopes("min_spot_size=3", spotfinding=file).spotfinding.spotfinder.filter.min_spot_size == 3


@pytest.mark.parametrize(
    "text", ["spotfinder.filter.d_min = __import__('os').getpid()", "spotfinder.filter.d_min = 9**9"]
)
def test_numbers_in_files_are_not_evaluated(text):
    with pytest.raises(InputError, match="not a number"):
        scopes(spotfinding=text)


def test_the_users_refinement_wins_over_our_defaults():
    made = scopes(geometry_refinement="refinement.refinery.engine = LevMar\nrefinement.refinery.max_iterations = 3")
    assert made.geometry_refinement.refinement.refinery.engine == "LevMar"
    assert made.geometry_refinement.refinement.refinery.max_iterations == 3


def test_a_cell_is_restrained_on_request_only():
    path = "refinement.parameterisation.crystal.unit_cell.restraints.tie_to_target"

    def ties(*arguments: str) -> list:
        made = attrgetter(path)(scopes(*CELL, *arguments).geometry_refinement)
        return [tie for tie in made if tie.values is not None]

    assert ties() == []
    (tie,) = ties("geometry_refinement.restrain_cell=True")
    assert list(tie.values) == [79.1, 79.1, 38.2, 90, 90, 90]
    assert all(sigma > 0 for sigma in tie.sigmas)


def test_no_program_starts_processes_or_writes_of_its_own():
    made = scopes(spotfinding="spotfinder.mp.nproc = 8", indexing="nproc = 8", integration="nproc = 8")
    # dials.refine looks for outliers on all cores by default
    for scope in (made.geometry_refinement, made.indexing):
        assert scope.refinement.reflections.outlier.nproc == scope.refinement.mp.nproc == 1
    assert made.spotfinding.spotfinder.mp.nproc == 1
    assert made.indexing.nproc == 1
    assert made.integration.nproc == 1
    for scope in (made.indexing, made.integration):
        assert scope.output.nuggets is None


def test_what_a_version_cannot_do_need_not_be_kept_from_it(monkeypatch):
    import libtbx.phil

    sizes = "min_spot_size = 3\n .type = int\n max_spot_size = 9\n .type = int\n"
    lacking = libtbx.phil.parse("spotfinder { mp.nproc = 8\n .type = int\n filter {" + sizes + "} }")
    program_phil = dials_compat.program_phil
    monkeypatch.setattr(dials_compat, "program_phil", lambda n: lacking if n == "find_spots" else program_phil(n))
    made = scopes()
    assert not hasattr(made.spotfinding.spotfinder.mp, "njobs")
    assert made.spotfinding.spotfinder.mp.nproc == 1


@pytest.mark.parametrize(
    ("stage", "text", "said"),
    [
        ("indexing", "indexing.known_symetry.unit_cell = 1,1,1,90,90,90", "known_symetry"),
        ("spotfinding", "spotfinder {", "not valid PHIL"),
        ("integration", "algorithm = guess", "not valid PHIL"),
        ("spotfinding", "spotfinder.filter.min_spot_size = many", "not a number"),
    ],
)
def test_files_with_faults_are_refused_in_one_line(stage, text, said):
    with pytest.raises(InputError) as refused:
        scopes(**{stage: text})
    assert stage in str(refused.value)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_are_read_once_and_may_be_unreadable(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("good.phil").write_text("d_min = 2")
    Path("bad.phil").write_bytes(b"\xff\xfe\x00")
    good = read_arguments(["image=x.h5", "indexing.phil=good.phil"])[0]
    assert user_texts(good) == {"indexing": "d_min = 2"}
    bad = read_arguments(["image=x.h5", "integration.phil=bad.phil"])[0]
    with pytest.raises(InputError, match=r"integration\.phil=.*bad\.phil: cannot be read"):
        user_texts(bad)


def test_an_ellipsoid_model_that_dials_lacks_is_refused_only_where_dials_integrates(monkeypatch):
    def lacking(model):
        raise dials_compat.DialsError("no such model")

    monkeypatch.setattr(dials_compat, "rlp_mosaicity", lacking)
    scopes("engine=fast", "rlp_mosaicity=simple6angular1")
    with pytest.raises(InputError, match="no such model"):
        scopes("engine=dials", "rlp_mosaicity=simple6angular1")
