"""Slices, surfaces and charts: geometry that can be checked by number."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from vclipseg.report.cases import ShownCase
from vclipseg.report.figures import Line, Strip, charts, line_chart, strip_plot
from vclipseg.report.reading import Log, Run
from vclipseg.report.slices import planes
from vclipseg.report.surface import draw, make_scene, pack, vertex_budget

OBLIQUE = np.array([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, -3], [0, 0, 2, 1], [0, 0, 0, 1.0]])


def ball(radius_mm: float, spacing=(1.0, 1.0, 2.0), shape=(40, 40, 20)) -> np.ndarray:
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return (sum(axis**2 for axis in grid) < radius_mm**2).astype(np.uint8)


def case(reference, predictions=None, affine=OBLIQUE, image=None) -> ShownCase:
    spacing = tuple(np.linalg.norm(affine[:3, :3], axis=0))
    return ShownCase("best", "a", spacing, affine, image, reference, predictions or {})


def volume(points: np.ndarray, faces: np.ndarray) -> float:
    """Enclosed volume, positive when faces look outward."""
    a, b, c = (points[faces[:, k]].astype(float) for k in range(3))
    return float(np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("affine", [OBLIQUE, np.diag([-1.0, 1, 2, 1])])
def test_surface_is_in_mm_and_looks_outward(affine):
    scene = make_scene(case(ball(14), affine=affine), [], 5000)
    (mesh,) = scene.panels[0].meshes
    center = (affine @ [19.5, 19.5, 9.5, 1])[:3]
    radii = np.linalg.norm(mesh.points - center, axis=1)
    assert radii.mean() == pytest.approx(14, abs=0.5)
    assert volume(mesh.points - center, mesh.faces) == pytest.approx(4 / 3 * np.pi * 14**3, rel=0.1)


def test_errors_are_signed_distances_to_the_reference():
    scene = make_scene(case(ball(12), {0: ball(15), 1: ball(10)}), ["more", "less"], 5000)
    reference, more, less = (panel.meshes[0] for panel in scene.panels)
    assert reference.errors is None
    assert np.median(more.errors) == pytest.approx(3, abs=0.7)
    assert np.median(less.errors) == pytest.approx(-2, abs=0.7)


@pytest.mark.parametrize("budget", [400, 1500])
def test_all_surfaces_of_a_case_keep_to_the_budget_alike(budget):
    rough = ball(15) * (np.random.default_rng(0).random((40, 40, 20)) > 0.2)
    scene = make_scene(case(ball(15), {0: rough.astype(np.uint8)}), ["rough"], budget)
    sizes = [len(mesh.points) for panel in scene.panels for mesh in panel.meshes]
    assert max(sizes) <= 1.3 * budget
    assert scene.step_mm > 1


def test_empty_masks_and_thin_ones():
    thin = np.zeros((40, 40, 20), np.uint8)
    thin[5:35, 20, 10] = 1
    scene = make_scene(case(thin, {0: np.zeros_like(thin)}), ["empty"], 300)
    assert len(scene.panels[0].meshes) == 1  # not smoothed away
    assert scene.panels[1].meshes == ()
    nothing = make_scene(case(None, {0: np.zeros_like(thin)}), ["empty"], 300)
    assert draw(nothing) == {}
    assert pack([nothing], ["organ"])["scenes"][0]["panels"][0]["meshes"] == []


def test_packed_points_can_be_read_again():
    scene = make_scene(case(ball(12), {0: ball(14)}), ["run"], 3000)
    packed = pack([scene], ["organ"])
    stored = packed["scenes"][0]["panels"][1]["meshes"][0]
    points = np.frombuffer(base64.b64decode(stored["points"]), "<i2").reshape(-1, 3) / 32767
    faces = np.frombuffer(base64.b64decode(stored["faces"]), "<u2").reshape(-1, 3)
    errors = np.frombuffer(base64.b64decode(stored["errors"]), "<i1") / 127 * packed["limit"]
    mesh = scene.panels[1].meshes[0]
    shift = mesh.points - points * packed["scenes"][0]["reach"]
    assert np.ptp(shift, axis=0).max() < 0.01
    assert (faces == mesh.faces).all()
    assert np.abs(errors - np.clip(mesh.errors, -packed["limit"], packed["limit"])).max() < 0.05


def test_a_thin_surface_keeps_to_the_budget_too():
    """A sheet of one voxel is no voxel at the stride, and is drawn all the same."""
    sheet = np.zeros((200, 200, 9), np.uint8)
    sheet[3:-3, 3:-3, 4] = 1
    scene = make_scene(case(sheet), [], 700)
    (mesh,) = scene.panels[0].meshes
    assert 0 < len(mesh.points) <= 1.3 * 700


def test_drawn_surfaces_are_pictures():
    images = draw(make_scene(case(ball(12), {0: ball(14)}), ["run"], 1000), size=60)
    assert list(images) == ["reference", "run"]
    data = base64.b64decode(images["run"].split(",")[1])
    picture = np.asarray(Image.open(io.BytesIO(data)))
    assert picture.shape == (60, 60, 4)
    assert picture[30, 30, 3] == 255
    assert picture[0, 0, 3] == 0


@pytest.mark.parametrize(("surfaces", "budget"), [(1, 7000), (20, 3600), (10_000, 700)])
def test_the_budget_is_shared(surfaces, budget):
    assert vertex_budget(surfaces) == budget


def test_planes_have_true_proportions_and_radiological_sides():
    image = np.zeros((40, 40, 20), np.float32)
    image[30:, 30:, 15:] = 1  # right, anterior, superior
    shown = case(ball(14), {0: ball(12)}, np.diag([1.0, 1, 2, 1]), image)
    axial, coronal, sagittal = planes(shown, 0, ["organ"])
    assert [panel.plane for panel in (axial, coronal, sagittal)] == ["axial", "coronal", "sagittal"]
    assert re.findall(r'class="edge"[^>]*>([A-Z])<', coronal.svg) == ["R", "L", "S", "I"]
    outline = re.search(r'class="outline reference dash0" d="([^"]*)"', axial.svg).group(1)
    points = np.array([float(x) for x in re.findall(r"[\d.]+", outline)]).reshape(-1, 2)
    assert np.ptp(points, axis=0) == pytest.approx(28, abs=1.1)  # mm
    for panel in (axial, coronal, sagittal):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', panel.svg).groups())
        assert (width, height) == pytest.approx((40, 40), abs=2.1)
    bright = case(image.astype(np.uint8), {}, np.diag([1.0, 1, 2, 1]), image)
    for panel, corner in zip(planes(bright, 0, []), ("left", "left", "left"), strict=True):
        data = base64.b64decode(re.search(r"base64,([^\"]*)", panel.svg).group(1))
        picture = np.asarray(Image.open(io.BytesIO(data))).astype(float)
        rows, columns = (n // 2 for n in picture.shape)
        assert corner == "left"
        assert picture[:rows, :columns].mean() > 2 * picture[rows:, columns:].mean()


def test_two_classes_have_two_line_styles():
    labels = ball(14)
    labels[:20] *= 2
    svg = planes(case(labels, {2: labels}), 2, ["one", "two"])[0].svg
    assert "outline prediction run2 dash0" in svg
    assert "outline prediction run2 dash1" in svg
    assert "prediction: two" in svg


def fake_run(columns: dict, name: str = "run") -> Run:
    arrays = {key: np.asarray(values, float) for key, values in columns.items()}
    experiment = {"class_names": ["background", "left atrium"]}
    return Run(folder=None, name=name, experiment=experiment, log=Log(arrays))


def test_charts_show_terms_weights_and_extra_columns():
    shared = {"step": [1, 2, 3], "seconds": [1, 2, 3], "lr": [3, 2, 1], "total": [3, 2, 1]}
    full = shared | {"dice": [1, 1, 1], "dice_weight": [1, 2, 3], "share": [0, np.nan, 1]}
    full |= {"prototype_background": [1, 2, 3], "prototype_left_atrium": [3, 2, 1]}
    full |= {"never": [np.nan] * 3}
    found = {chart.title: chart for chart in charts([fake_run(full), fake_run(shared, "other")])}
    assert list(found) == ["total loss", "dice", "learning rate", "share", "prototype by class"]
    assert found["prototype by class"].note == "solid: background, dashed: left atrium"
    assert "run, weighted: 3 at the end" in found["dice"].svg
    assert "other: 1 at the end" in found["total loss"].svg
    assert "nan" not in "".join(chart.svg for chart in found.values())


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-9, 1e9], [np.nan, 5.0, np.inf]])
def test_line_chart_of_any_numbers(values):
    svg = line_chart("x", [Line("a", np.arange(len(values)), np.array(values))])
    assert not re.search(r"nan|inf", svg)


def test_long_curves_are_shortened():
    line = Line("a", np.arange(15_000), np.random.default_rng(0).random(15_000))
    assert len(line_chart("x", [line])) < 20_000


def test_strip_plot_names_every_case_and_joins_pairs():
    strips = [
        Strip(0, "a", {"one": 0.5, "two": 1.0, "none": float("nan")}, 0.75, 0.5, 1.0),
        Strip(1, "b", {"one": 0.6}, 0.6, float("nan"), float("nan")),
    ]
    svg = strip_plot(strips, "Dice")
    assert "one: Dice 0.500 (a)" in svg
    assert svg.count("<circle") == 3
    assert svg.count('class="pair"') == 1
    assert "nan" not in svg
