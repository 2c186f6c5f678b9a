"""The page: complete in one file, true to cases.csv, and honest about what is missing."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from vclipseg.errors import UsageError
from vclipseg.report import write_report


@pytest.fixture(scope="module")
def page(two_runs: list[Path]) -> str:
    path = write_report(two_runs)
    assert path == two_runs[0] / "report.html"
    return path.read_text(encoding="utf-8")


def text_of(markup: str) -> str:
    """What a reader sees of markup, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", markup)).split())


def test_nothing_is_loaded_from_elsewhere(page: str):
    assert not re.search(r"https?://|<link|@import|url\(|<iframe", page)
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert "default-src 'none'" in page
    assert len(page) < 6e6


def test_sections_are_there_and_links_lead_to_them(page: str):
    ids = re.findall(r'<section id="(\w+)"', page)
    assert ids == ["results", "cases", "slices", "surfaces", "curves", "provenance"]
    assert re.findall(r'<a href="#(\w+)"', page) == ids


def test_the_first_lines_say_what_was_run_on_what(page: str):
    header = text_of(page[page.index("<header>") : page.index("<nav")])
    assert "vclipseg (preset robust) was trained on 1 labeled and 2 unlabeled cases" in header
    assert "of Phantom for 6,000 steps; on 8 test cases its mean Dice is 0." in header
    assert "Compared with baseline" in header


@pytest.mark.parametrize("lcc", [0, 1])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("metric", "digits"), [("dice", 3), ("hd95_mm", 2), ("asd_voxel", 2)])
def test_headline_means_are_those_of_cases_csv(page, two_runs, lcc, place, metric, digits):
    with (two_runs[place] / "cases.csv").open(newline="") as file:
        cells = [row[metric] for row in csv.DictReader(file) if row["lcc"] == str(lcc)]
    values = [float(cell) for cell in cells if cell]
    table = page[page.index(f'data-lcc="{lcc}"') :]
    row = re.findall(r'<tr class="of-run">(.*?)</tr>', table, re.DOTALL)[place]
    cell = re.search(rf'data-metric="{metric}">(.*?)</td>', row, re.DOTALL).group(1)
    assert text_of(cell).split()[0] == f"{sum(values) / len(values):.{digits}f}"
    assert ("of 8 cases" in cell) == (len(values) < 8)


def test_every_case_is_listed_with_its_own_numbers(page: str, two_runs: list[Path]):
    table = page[page.index('class="numbers per-case"') :]
    rows = re.findall(r'<tr><th scope="row">(case_\d+)</th>(.*?)</tr>', table, re.DOTALL)
    shown = {
        case_id: re.findall(r'data-metric="dice"[^>]*>([\d.]+)<', row) for case_id, row in rows
    }
    for place, run in enumerate(two_runs):
        with (run / "cases.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row["lcc"] == "0":
                    assert shown[row["case_id"]][place] == f"{float(row['dice']):.4f}"


def test_best_median_and_worst_case_are_drawn_with_every_run(page: str):
    drawn = page[page.index('<section id="slices"') : page.index('<section id="surfaces"')]
    assert re.findall(r'class="rank">(\w+)<', drawn) == ["best", "median", "worst"]
    assert drawn.count("<svg viewBox") == 3 * 2 * 3  # cases, runs, planes
    assert drawn.count("<image ") == 3 * 2 * 3
    assert "prediction: left atrium" in drawn


def test_surfaces_are_stored_for_the_viewer_and_drawn_without_it(page: str):
    stored = re.search(r'id="surface-data">(.*?)</script>', page, re.DOTALL).group(1)
    scenes = json.loads(stored)["scenes"]
    assert [len(scene["panels"]) for scene in scenes] == [3, 3, 3]
    assert scenes[0]["panels"][0]["title"] == "reference"
    assert page.count('<img src="data:image/png') == 9


def test_provenance_tells_how_to_repeat_the_run(page: str):
    provenance = text_of(page[page.index('<section id="provenance"') :])
    for said in (
        "vclipseg train 'my data' --set method.name=vclipseg",
        "sha256:abab",
        "A pixel of a <b>left</b>.",
        "abcdef012345",
        "case_90 case_91",
        "≠ name vclipseg supervised",
    ):
        assert said in provenance


def test_clean_runs_have_no_banner(page: str):
    assert 'class="banner"' not in page


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"transductive": True}, "Test images were used in training."),
        ({"protocol": "paper"}, "The checkpoint was chosen on the test list."),
        ({"text": {"source": "random"}}, "The text vectors are a control (random), not CLIP."),
        ({"text": {"source": "orthogonal"}}, "a control (orthogonal), not CLIP."),
        ({"text": {"source": "file", "made_as": "random"}}, "a control (random), not CLIP."),
        ({"text": {"source": "file", "file": "x"}}, "does not say how they were made."),
    ],
)
def test_what_spoils_the_numbers_comes_first(new_run: Callable[..., Path], options, said):
    page = write_report([new_run(cases=1, **options)]).read_text(encoding="utf-8")
    banner = page.index('class="banner"')
    assert banner < page.index("<h1>")
    assert said in text_of(page[banner : page.index("<h1>")])
    caption = page[page.index("<caption>") : page.index("</caption>")]
    assert '<small class="few">run: ' in caption  # and beside the numbers


def test_what_is_to_be_said_of_the_data_comes_first_too(new_run: Callable[..., Path]):
    run = new_run(cases=1)
    description = json.loads((run / "experiment.json").read_text(encoding="utf-8"))
    description["data"]["remarks"] = ["Cut around the labels.", "One case is there twice."]
    (run / "experiment.json").write_text(json.dumps(description))
    page = write_report([run]).read_text(encoding="utf-8")
    banner = text_of(page[page.index('class="banner"') : page.index("<h1>")])
    assert "About the data. Cut around the labels. One case is there twice." in banner
    assert "run: see the note about the data" in page


def test_one_run_has_no_comparison(new_run: Callable[..., Path]):
    page = write_report([new_run(cases=2)]).read_text(encoding="utf-8")
    assert 'class="verdict' not in page
    assert "Compared with" not in page


def test_a_run_that_is_not_evaluated_is_reported(new_run: Callable[..., Path]):
    run = new_run(cases=2)
    for name in ("cases.csv", "metrics.json"):
        (run / name).unlink()
    page = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert "it is not evaluated yet" in page
    assert f"run `vclipseg evaluate {run}`" in page
    assert "learning rate" in page
    assert "case_01" in page  # predictions are drawn all the same


def test_predictions_that_are_gone_are_missed(new_run: Callable[..., Path]):
    run = new_run(cases=3)
    shutil.rmtree(run / "predictions")
    page = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert "no predictions, so there are no pictures of them" in page
    assert "No prediction to draw." in page


def test_data_out_of_reach_leaves_the_predictions(new_run: Callable[..., Path], tmp_path, data):
    run = new_run(cases=3)
    experiment = json.loads((run / "experiment.json").read_text(encoding="utf-8"))
    experiment["data"]["root"] = str(tmp_path / "gone")
    (run / "experiment.json").write_text(json.dumps(experiment))
    page = write_report([run]).read_text(encoding="utf-8")
    assert "Images and references are not shown" in text_of(page)
    assert "prediction: left atrium" in page
    assert "reference: left atrium" not in page
    found = write_report([run], tmp_path / "new" / "page.html", data_root=data)
    assert found == tmp_path / "new" / "page.html"
    assert "reference: left atrium" in found.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("log.csv", "step,total\n"),
        ("log.csv", "no,columns\n1,2\n"),
        ("cases.csv", "case_id,dice\na,b\n"),
        ("metrics.json", "{"),
        ("splits.json", "[]"),
        ("environment.json", "null"),
        ("predictions/case_01.nii.gz", "not an image"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(new_run, name, content):
    run = new_run(cases=2)
    (run / name).write_text(content)
    page = text_of(write_report([run]).read_text(encoding="utf-8"))
    assert name.removeprefix("predictions/") in page[: page.index("Results Cases")]
    assert "Provenance" in page


def test_settings_of_unexpected_shape_do_no_harm(new_run: Callable[..., Path]):
    run = new_run(cases=1)
    odd = {"name": None, "settings": [1], "data": "x", "text": "y", "class_names": None}
    (run / "experiment.json").write_text(json.dumps(odd))
    (run / "splits.json").write_text('{"labeled": null, "test": "x"}')
    assert "run" in write_report([run]).read_text(encoding="utf-8")


def test_an_experiment_alone_makes_a_report(tmp_path: Path):
    (tmp_path / "experiment.json").write_text("{}")
    page = text_of(write_report([tmp_path]).read_text(encoding="utf-8"))
    assert "There is no log to draw curves from." in page
    assert "There are no masks to make surfaces of." in page


def test_names_are_escaped(new_run: Callable[..., Path]):
    run = new_run(cases=1)
    evil = '<script>alert("x")</script>'
    for name in ("experiment.json", "cases.csv", "log.csv"):
        text = (run / name).read_text(encoding="utf-8")
        (run / name).write_text(
            text.replace('"name": "run"', f'"name": {json.dumps(evil)}')
            .replace("left atrium", "</svg><b>&")
            .replace("pseudo_share", "<i>share</i>")
        )
    page = write_report([run]).read_text(encoding="utf-8")
    assert evil not in page
    assert "<b>&" not in page
    assert "<i>share" not in page
    assert html.escape(evil, quote=False).replace('"', "&#34;") in page


@pytest.mark.parametrize("folders", [[], ["nowhere"]])
def test_nothing_to_report_is_an_error(tmp_path: Path, folders: list[str]):
    with pytest.raises(UsageError):
        write_report([tmp_path / folder for folder in folders])


def test_a_file_that_cannot_be_written_is_an_error(new_run: Callable[..., Path], tmp_path: Path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        write_report([new_run(cases=1)], tmp_path / "taken")
