"""Integration of real stills, against what DIALS 3.30 gives on the same indexed crystals."""

import bz2
import copy
import importlib.util

import numpy as np
import pytest
from dials.array_family import flex
from dials.command_line import ssx_integrate
from dxtbx import flumpy
from dxtbx.model import ExperimentList

from ssx_mpi.images.frames import Frame
from ssx_mpi.kernels.ellipsoid import MODELS
from ssx_mpi.kernels.shoeboxes import Background
from ssx_mpi.stages.fast.fast_integration import (
    FastEllipsoidIntegrator,
    IntegrationSettings,
    profile_model_for_dials,
)
from ssx_mpi.stages.still_results import Crystals

IMAGE = 14  # the thinnest of the stills


def pixels(data, masks=None) -> Frame:
    """A frame with these pixels; without masks, all that are not negative are good."""
    masks = [part >= 0 for part in data] if masks is None else masks
    return Frame("thin still", 0, tuple(data), tuple(data), tuple(masks))


@pytest.fixture(scope="module")
def loader(real_data):
    path = real_data / "thaumatin_dials_3_30" / "load.py"
    spec = importlib.util.spec_from_file_location("thaumatin_load", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def indexed(loader, real_data, tmp_path_factory):
    """The indexed thin still: experiments, spots, data and mask. Its image alone is unpacked."""
    name, folder = f"thau_3_2_{IMAGE:04d}.cbf", tmp_path_factory.mktemp("thin_still")
    (folder / name).write_bytes(bz2.decompress((real_data / "thaumatin_grid" / f"{name}.bz2").read_bytes()))
    stored = loader.crystals()["indexed"]
    row = stored["image"].index(IMAGE)
    one = {"indexed": {key: column[row : row + 1] for key, column in stored.items()}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "crystals", lambda: one)
        experiments, reflections = loader.load_indexed(folder)
    table = reflections.select(reflections["id"] == row)
    table["id"] = flex.int(len(table), 0)
    for key in list(table.experiment_identifiers().keys()):
        del table.experiment_identifiers()[key]
    table.experiment_identifiers()[0] = experiments[0].identifier
    data = [flumpy.to_numpy(panel).copy() for panel in experiments[0].imageset.get_raw_data(0)]
    return Crystals(experiments, table), pixels(data)


@pytest.fixture(scope="module")
def params():
    return ssx_integrate.working_phil.extract()


@pytest.fixture(scope="module")
def result(indexed, params):
    return FastEllipsoidIntegrator(params).integrate(*indexed)


def test_a_still_is_integrated_as_by_dials_3_30(loader, result):
    crystals = loader.crystals()["integrated"]
    row = crystals["image"].index(IMAGE)
    reference = loader.load_integrated()
    on_image = reference["image"] == IMAGE
    reference = {name: column[on_image] for name, column in reference.items()}
    assert result.failures == ()

    cell = np.array(result.experiments[0].crystal.get_unit_cell().parameters())
    np.testing.assert_allclose(cell, crystals["cell"][row], rtol=5e-4)
    np.testing.assert_allclose(np.reshape(result.experiments[0].crystal.get_A(), -1), crystals["A"][row], atol=2e-6)
    eigenvalues = np.linalg.eigvalsh(np.array(result.experiments[0].profile.sigma()))
    np.testing.assert_allclose(eigenvalues, np.linalg.eigvalsh(crystals["profile"][row]["sigma"]), rtol=0.05)

    table = result.reflections
    where = {index: k for k, index in enumerate(table["miller_index"])}
    pairs = [(where[h], k) for k, h in enumerate(map(tuple, reference["miller_index"].tolist())) if h in where]
    ours, theirs = np.array(pairs).T
    flags = flumpy.to_numpy(table["flags"])[ours]
    integrated = reference["flags"] & (1 << 8) != 0
    both = (flags & (1 << 8) != 0) & integrated[theirs]
    assert both.sum() > 0.98 * integrated.sum()
    ours, theirs = ours[both], theirs[both]

    def column(name):
        return flumpy.to_numpy(table[name])[ours], reference[name][theirs].astype(float)

    intensity, variance = column("intensity.sum.value"), column("intensity.sum.variance")
    assert np.corrcoef(*intensity)[0, 1] > 0.9995
    assert np.corrcoef(*np.sqrt(variance))[0, 1] > 0.998
    assert intensity[0].sum() == pytest.approx(intensity[1].sum(), rel=5e-3)
    for name, tolerance in (("partiality", 0.005), ("background.mean", 0.005), ("lp", 1e-3), ("d", 1e-3)):
        assert np.median(np.abs(np.subtract(*column(name)))) < tolerance, name
    assert (flags[both] == reference["flags"][theirs]).mean() > 0.98
    distance = flumpy.to_numpy(table["xyzcal.px"])[ours, :2] - reference["xyzcal.px"][theirs]
    assert np.abs(distance).max() < 0.1
    boxes = np.array([box[:4] for box in table["bbox"]])[ours]
    assert (boxes == reference["bbox"][theirs]).all(axis=1).mean() > 0.9


def test_partialities_and_pixel_counts_make_sense(result):
    table = result.reflections
    partiality = flumpy.to_numpy(table["partiality"])
    assert ((partiality > 0) & (partiality <= 1)).all()
    counts = {part: flumpy.to_numpy(table[f"num_pixels.{part}"]) for part in ("valid", "foreground", "background")}
    assert (counts["foreground"] + counts["background"] == counts["valid"]).all()
    assert (flumpy.to_numpy(table["intensity.sum.variance"]) >= 0).all()


def test_result_is_written_and_read_by_dials(result, tmp_path):
    result.experiments.as_file(tmp_path / "integrated.expt")
    result.reflections.as_file(tmp_path / "integrated.refl")
    experiments = ExperimentList.from_file(tmp_path / "integrated.expt", check_format=False)
    table = flex.reflection_table.from_file(tmp_path / "integrated.refl")
    table.assert_experiment_identifiers_are_consistent(experiments)
    np.testing.assert_allclose(experiments[0].profile.sigma(), result.experiments[0].profile.sigma())
    np.testing.assert_allclose(experiments[0].crystal.get_A(), result.experiments[0].crystal.get_A())
    assert len(table) == len(result.reflections)


def test_lattices_of_an_image_are_integrated_or_fail_one_by_one(indexed, params, result):
    ((experiment,), table), frame = indexed
    experiments, tables = ExperimentList(), flex.reflection_table()
    for k, name in enumerate(("first", "poor", "second")):
        part = table[:8] if name == "poor" else table[:]
        part["id"] = flex.int(len(part), k)
        for key in list(part.experiment_identifiers().keys()):
            del part.experiment_identifiers()[key]
        part.experiment_identifiers()[k] = name
        tables.extend(part)
        experiments.append(copy.copy(experiment))
        experiments[k].identifier = name
    found = FastEllipsoidIntegrator(params).integrate(Crystals(experiments, tables), frame)
    assert [experiment.identifier for experiment in found.experiments] == ["first", "second"]
    assert [name for name, _ in found.failures] == ["poor"]
    assert "strong spots" in found.failures[0][1]
    assert dict(found.reflections.experiment_identifiers()) == {0: "first", 1: "second"}
    one, two = (found.reflections.select(found.reflections["id"] == k) for k in (0, 1))
    assert list(one["intensity.sum.value"]) == list(two["intensity.sum.value"])
    assert list(one["intensity.sum.value"]) == list(result.reflections["intensity.sum.value"])


def test_strong_spots_are_marked_alike_where_numpy_numbers_rows_in_a_column(indexed, params, result, monkeypatch):
    unique = np.unique

    def as_in_numpy_2_0(array, **options):
        found = unique(array, **options)
        return (found[0], found[1][:, None]) if options.get("return_inverse") else found

    monkeypatch.setattr(np, "unique", as_in_numpy_2_0)
    found = FastEllipsoidIntegrator(params).integrate(*indexed)
    assert list(found.reflections["flags"]) == list(result.reflections["flags"])


@pytest.mark.parametrize("change", ["shoebox", "counts", "index"])
def test_a_hopeless_lattice_fails_with_a_reason(indexed, params, change):
    (experiments, table), frame = indexed
    table = table[:]
    if change == "shoebox":
        del table["shoebox"]
    elif change == "counts":
        frame = pixels([part * 0 for part in frame.data])
    else:
        table["xyzobs.px.value"] = flex.vec3_double(np.random.default_rng(0).uniform(0, 2400, (len(table), 3)))
    found = FastEllipsoidIntegrator(params).integrate(Crystals(experiments, table), frame)
    assert len(found.experiments) == 0 and len(found.reflections) == 0
    ((name, reason),) = found.failures
    assert name == experiments[0].identifier
    expected = {"shoebox": "no shoeboxes", "counts": "no counts", "index": "strong spots|outliers|volume|mosaicity"}
    assert any(part in reason for part in expected[change].split("|"))


@pytest.mark.parametrize("model", [name for name in MODELS if name != "simple6"])
def test_other_models_integrate_the_same_spots(indexed, params, result, model):
    found = FastEllipsoidIntegrator(params, model=model).integrate(*indexed)
    assert found.failures == ()
    default = dict(zip(result.reflections["miller_index"], result.reflections["intensity.sum.value"]))
    other = dict(zip(found.reflections["miller_index"], found.reflections["intensity.sum.value"]))
    common = default.keys() & other.keys()
    assert len(common) > 0.95 * len(default)
    assert np.corrcoef([(default[h], other[h]) for h in common], rowvar=False)[0, 1] > 0.995


def test_parameters_come_from_the_scope_of_dials(params):
    scope = ssx_integrate.working_phil.extract()
    scope.profile.ellipsoid.refinement.max_separation = 3.5
    scope.profile.ellipsoid.unit_cell.fixed = True
    scope.prediction.d_min = 2.5
    scope.integration.background.algorithm = "glm"
    scope.integration.background.glm.robust.tuning_constant = 2.0
    settings = IntegrationSettings.from_params(scope, model="simple1", n_macro_cycles=2)
    assert (settings.max_separation, settings.fix_unit_cell, settings.d_min) == (3.5, True, 2.5)
    assert (settings.model, settings.n_macro_cycles) == ("simple1", 2)
    assert settings.counting_background.tuning == settings.other_background.tuning == 2.0
    scope.integration.background.algorithm = "simple"
    scope.integration.background.simple.min_pixels = 20
    settings = IntegrationSettings.from_params(scope)
    assert settings.counting_background == settings.other_background == Background("mean", min_pixels=20)
    defaults = IntegrationSettings.from_params(params)
    assert (defaults.counting_background.method, defaults.other_background.method) == ("glm", "mean")
    assert IntegrationSettings.from_params(params).mosaicity_max_limit == 0.004
    with pytest.raises(ValueError, match="unknown ellipsoid model angular2"):
        IntegrationSettings.from_params(params, model="angular2")


def test_resolution_limit_and_fixed_cell_are_kept(indexed, params, result):
    found = FastEllipsoidIntegrator(params, d_min=3.0, fix_unit_cell=True).integrate(*indexed)
    assert found.reflections["d"].all_ge(3.0)
    start = indexed[0].experiments[0].crystal.get_unit_cell().parameters()
    np.testing.assert_allclose(found.experiments[0].crystal.get_unit_cell().parameters(), start, rtol=1e-9)
    assert result.experiments[0].crystal.get_unit_cell().parameters()[0] != pytest.approx(start[0], rel=1e-5)


@pytest.mark.parametrize(
    "name, value",
    [
        ("algorithm", "stills"),
        ("ellipsoid.integration.use_crude_shoebox_mask", True),
        ("integration.background.algorithm", "gmodel"),
        ("integration.background.glm.model.algorithm", "loglinear2d"),
        ("integration.background.simple.outlier.algorithm", "tukey"),
        ("debug.output.shoeboxes", True),
    ],
)
def test_what_is_not_covered_is_said(name, value):
    scope = ssx_integrate.working_phil.extract()
    assert FastEllipsoidIntegrator.supports(scope) == (True, "")
    *parents, last = name.split(".")
    node = scope
    for parent in parents:
        node = getattr(node, parent)
    setattr(node, last, value)
    covered, reason = FastEllipsoidIntegrator.supports(scope)
    assert not covered and name in reason


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_profile_models_are_known_to_the_installed_dials(model):
    from dxtbx.model import ProfileModelFactory

    parameters = model.start(5e-4)
    profile = profile_model_for_dials(model.name, parameters, 100)
    np.testing.assert_allclose(profile.sigma(), model.sigma(parameters))
    again = ProfileModelFactory.from_dict(profile.to_dict())
    np.testing.assert_allclose(again.sigma(), model.sigma(parameters))


def test_panels_of_a_detector_are_integrated_as_one(indexed, params, result):
    """The same still on a detector that is cut into an upper and a lower half."""
    from dxtbx.model import Detector, Panel

    ((experiment,), table), frame = indexed
    (data,), (mask,) = frame.data, frame.masks
    whole, cut = experiment.detector[0].to_dict(), 1200
    halves = Detector()
    for first, last in ((0, cut), (cut, data.shape[0])):
        shift = np.array(whole["slow_axis"]) * whole["pixel_size"][1] * first
        size = [data.shape[1], last - first]
        origin = list(np.array(whole["origin"]) + shift)
        halves.add_panel(Panel.from_dict(whole | {"origin": origin, "image_size": size}))
    boxes = np.array([box[:4] for box in table["bbox"]])
    inside = (boxes[:, 3] <= cut) | (boxes[:, 2] >= cut)
    table = table.select(flumpy.from_numpy(inside))
    lower = boxes[inside, 2] >= cut
    spots = flumpy.to_numpy(table["xyzobs.px.value"]).copy()
    spots[lower, 1] -= cut
    table["xyzobs.px.value"] = flumpy.vec_from_numpy(spots)
    table["panel"] = flumpy.from_numpy(lower.astype(np.uint64))
    shoeboxes = table["shoebox"]
    for k in np.nonzero(lower)[0]:
        shoebox = shoeboxes[int(k)]
        x0, x1, y0, y1, z0, z1 = shoebox.bbox
        shoebox.bbox = x0, x1, y0 - cut, y1 - cut, z0, z1
        shoeboxes[int(k)] = shoebox
    table["shoebox"] = shoeboxes
    split = copy.copy(experiment)
    split.detector = halves

    found = FastEllipsoidIntegrator(params).integrate(
        Crystals(ExperimentList([split]), table), pixels([data[:cut], data[cut:]], [mask[:cut], mask[cut:]])
    )
    assert found.failures == ()
    cell = result.experiments[0].crystal.get_unit_cell().parameters()
    np.testing.assert_allclose(found.experiments[0].crystal.get_unit_cell().parameters(), cell, rtol=1e-4)
    assert set(found.reflections["panel"]) == {0, 1}
    one = dict(zip(result.reflections["miller_index"], result.reflections["intensity.sum.value"]))
    two = dict(zip(found.reflections["miller_index"], found.reflections["intensity.sum.value"]))
    common = one.keys() & two.keys()
    assert len(common) > 0.97 * len(one)
    assert np.corrcoef([(one[h], two[h]) for h in common], rowvar=False)[0, 1] > 0.999
    # where the refined crystals agree, so do the positions
    position = dict(zip(result.reflections["miller_index"], result.reflections["xyzcal.px"]))
    for h, panel, (x, y, _) in zip(*(found.reflections[name] for name in ("miller_index", "panel", "xyzcal.px"))):
        if h in position:
            assert np.hypot(x - position[h][0], y + cut * panel - position[h][1]) < 0.2


def test_a_model_that_dials_cannot_write_is_announced_once(params, caplog):
    FastEllipsoidIntegrator(params)
    assert caplog.text == ""
    FastEllipsoidIntegrator(params, model="simple6angular1")
    written = profile_model_for_dials("simple6angular1", np.full(7, 1e-4), 10).to_dict()["parameterisation"]
    assert ("static part" in caplog.text) == (written != "simple6angular1")
