"""The pages in a real browser: load, scroll, draw, save, reload and see it.

Skipped where there is no Chromium (`apt-get install chromium`) or no playwright.
"""

from __future__ import annotations

import os
import shutil
import time

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")

from scans_made import nifti

from vclipseg.data.datasets import open_dataset
from vclipseg.data.reviews import latest_review

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
    pytest.mark.filterwarnings("ignore"),  # of the driver's own
]
SOFTWARE = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")
PATIENCE = 1000 * int(os.environ.get("BROWSER_SECONDS", "180"))  # ms: rendered in software
READ = "document.querySelector('.stage').viewer"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *SOFTWARE])
        yield made
        made.close()


@pytest.fixture
def page(browser, server):
    """A page that fails the test where it says an error or asks for anything from elsewhere."""
    made = browser.new_page(viewport={"width": 1280, "height": 800})
    made.set_default_timeout(PATIENCE)
    wrong = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)

    def asked(request):
        if not request.url.startswith((server, "data:", "blob:")):
            wrong.append(f"asked for {request.url}")

    made.on("request", asked)
    yield made
    made.close()
    assert not wrong, wrong


def until(page, condition):
    """Wait until JavaScript says true; the page's policy forbids playwright's own way, which is eval."""
    end = time.monotonic() + PATIENCE / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.1)


def loaded(page, *layers):
    for layer in layers:
        page.wait_for_selector(f".stage[data-loaded*={layer}]")


def drawn(page):
    """Voxels of the drawing by value."""
    return page.evaluate(
        f"() => {{ const n = {{}}; for (const v of {READ}.drawing()) n[v] = (n[v] ?? 0) + 1; return n }}"
    )


def test_view_shows_the_worst_case_and_scrolls(page, server):
    page.goto(server)
    loaded(page, "image", "reference", "prediction")
    rows = page.locator("tbody tr[data-key]")
    assert rows.count() >= 7
    assert rows.first.get_attribute("aria-selected") == "true"
    page.click("button[value=axial]")
    box = page.locator(".stage canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    before = page.get_attribute(".stage", "data-at")
    page.mouse.wheel(0, 100)
    until(page, f"document.querySelector('.stage').dataset.at !== '{before}'")
    page.click("button[value=render]")
    second = rows.nth(1).get_attribute("data-key")
    rows.nth(1).click()
    until(page, f"document.querySelector('.bar strong').textContent === '{second}'")
    loaded(page, "prediction")
    page.reload()  # the case stands in the address
    until(page, f"document.querySelector('.bar strong')?.textContent === '{second}'")


def test_view_says_where_decoders_differ(page, server):
    page.goto(server)
    loaded(page, "prediction")
    page.click("text=Where do decoders differ?")
    loaded(page, "disagreement")
    page.click("button[data-layer=disagreement]")


def test_predict_a_scan_and_save_its_mask(page, server, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(nifti((32, 32, 24)))
    page.goto(f"{server}/#/predict/first")
    page.set_input_files("input[type=file]", tmp_path / "scan.nii.gz")
    loaded(page, "image", "prediction")
    with page.expect_download() as download:
        page.click("#download-nifti")
    assert download.value.suggested_filename == "scan_seg.nii.gz"
    assert download.value.path().read_bytes()[:2] == b"\x1f\x8b"


def test_predict_says_what_is_wrong_with_a_scan(browser, server, tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"hello" * 100)
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{server}/#/predict/first")
    page.set_input_files("input[type=file]", tmp_path / "scan.nii.gz")
    page.wait_for_selector("#message:not([hidden])")
    assert "not a NIfTI file" in page.inner_text("#message")
    page.close()


def test_draw_save_reload_and_see_it(page, server, data):
    case = open_dataset(data).unlabeled[0].case_id
    look_at(page, server)
    page.goto(f"{server}/#/review/first/{case}")
    page.reload()
    loaded(page, "image", "mask")
    before = drawn(page)
    page.click("button[value=axial]")
    page.keyboard.press("1")
    for _ in range(2):
        page.keyboard.press("]")
    stroke(page, 0.35, 0.65)
    page.keyboard.press("v")
    stroke(page, 0.65, 0.35)
    after = drawn(page)
    assert after.get("2", 0) > 0
    assert after != before
    page.keyboard.press("s")
    page.wait_for_selector(f"tr[data-key={case}] .tag.fixed")
    page.reload()
    loaded(page, "mask")
    assert drawn(page) == after
    dataset = open_dataset(data)
    labels = dataset.training_labels(dataset.case(case)).array
    counts = {str(v): int(n) for v, n in zip(*np.unique(labels, return_counts=True), strict=True)}
    assert counts == {{"2": "255"}.get(v, v): n for v, n in after.items()}


def test_accept_and_ignore_by_keyboard(page, server, data):
    look_at(page, server)
    first = page.get_attribute("tbody tr[aria-selected=true]", "data-key")
    page.keyboard.press("a")
    page.wait_for_selector(f"tr[data-key={first}] .tag.accepted")
    page.wait_for_selector(f"tbody tr[aria-selected=true]:not([data-key={first}])")
    loaded(page, "mask")
    second = page.get_attribute("tbody tr[aria-selected=true]", "data-key")
    page.keyboard.press("i")
    page.wait_for_selector(f"tr[data-key={second}] .tag.ignored")
    assert latest_review(data, first).decision == "accepted"
    assert latest_review(data, second).decision == "ignored"


def test_compare_two_runs_side_by_side(page, server):
    page.goto(f"{server}/#/compare/first")
    until(
        page,
        "[...document.querySelectorAll('.stage')]"
        ".filter((s) => s.dataset.loaded?.includes('prediction')).length === 2",
    )
    assert page.locator(".sides strong").all_inner_texts() == ["first", "second"]


def look_at(page, server):
    """Let the model look at the queue's cases, and wait for the first mask."""
    page.goto(f"{server}/#/review/first")
    page.wait_for_selector("tbody tr[aria-selected=true]")
    until(page, "document.querySelector('.head .hint').textContent.includes('3 looked at')")
    loaded(page, "image", "mask")


def stroke(page, start, end):
    """Draw from one place of the canvas to another, in shares of its middle square."""
    box = page.locator(".stage canvas").bounding_box()
    side = min(box["width"], box["height"])
    left = box["x"] + (box["width"] - side) / 2
    top = box["y"] + (box["height"] - side) / 2
    page.mouse.move(left + start * side, top + 0.4 * side)
    page.mouse.down()
    page.mouse.move(left + end * side, top + 0.5 * side, steps=8)
    page.mouse.up()
