"""Pictures of the docs that are taken of the program: pages, DICOM objects, an exported model.

    vclipseg demo --out runs/demo
    python docs/take_pictures.py runs/demo

The anatomy is made up. Needs the extras `dev`, `serve`, `dicom` and `export`, and Chromium.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import numpy as np
from playwright.sync_api import Page, sync_playwright

from vclipseg.data.datasets import open_dataset
from vclipseg.data.dicom import read_series
from vclipseg.data.dicom_objects import read_labels
from vclipseg.data.dicom_seg import COLORS
from vclipseg.data.volume import Volume, read_image
from vclipseg.data.volume import read_labels as read_mask

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parents[1] / "tests" / "data"))
from dicom_made import write_series

IMAGES = Path(__file__).parent / "images"
SOFTWARE = (
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
)
SECONDS = 300  # that a page rendered in software may take
RUN = "vclipseg"  # of the two that the demo makes


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("demo", type=Path, help="folder that `vclipseg demo` made")
    demo = parser.parse_args().demo
    with tempfile.TemporaryDirectory() as folder:
        objects(demo, Path(folder))
        one_file(demo, Path(folder))
    with serving(demo) as address, browser_page() as page:
        for name, take in PAGES.items():
            take(page, address, demo)
            page.screenshot(path=IMAGES / name)


def vclipseg(*arguments: object) -> None:
    """A command of the program; what it says goes where this script's goes."""
    subprocess.run([sys.executable, "-m", "vclipseg", *map(str, arguments)], check=True)


# DICOM objects


def objects(demo: Path, folder: Path) -> None:
    """The SEG and the RTSTRUCT of a series, both read back: docs/images/dicom.png."""
    scan = test_scan(demo)
    series = write_series(folder / "series", scan.array[0], scan.affine)
    found = []
    for kind in ("seg", "rtstruct"):
        path = folder / f"{kind}.dcm"
        vclipseg("predict", demo / RUN, series, "-o", path, "--dicom", kind)
        labels = read_labels(path, read_series(series), ["background", "left atrium"])
        found.append(("read back from the " + kind.upper(), labels))
    draw(read_series(series), found, IMAGES / "dicom.png")


def one_file(demo: Path, folder: Path) -> None:
    """The masks of torch and of one ONNX file on the same scan: docs/images/export.png."""
    scan, model = folder / "scan.nii.gz", folder / "atrium.onnx"
    shutil.copy(test_paths(demo)[0], scan)
    exact = ("--set", "predict.precision=fp32")
    vclipseg("predict", demo / RUN, scan, "-o", folder / "torch.nii.gz", *exact)
    vclipseg("export", demo / RUN, model)
    lite = [sys.executable, "-m", "vclipseg.lite", model, scan, "-o", folder / "lite.nii.gz"]
    subprocess.run(list(map(str, lite)), check=True)
    masks = [read_mask(folder / f"{name}.nii.gz") for name in ("torch", "lite")]
    same = (masks[0].array == masks[1].array).mean()
    titles = (
        "vclipseg predict",
        f"vclipseg.lite: {same:.2%} of voxels alike",
    )
    draw(read_image(scan), list(zip(titles, masks, strict=True)), IMAGES / "export.png")


def test_paths(demo: Path) -> list[Path]:
    """The images of the demo's test cases."""
    dataset = open_dataset(demo / "phantom")
    return [Path(case.images[0]) for case in dataset.test]


def test_scan(demo: Path) -> Volume:
    """The first of them."""
    return read_image(test_paths(demo)[0])


def draw(image: Volume, masks: Sequence[tuple[str, Volume]], path: Path) -> None:
    """A row a mask: its outline on a slice of each axis through its middle."""
    spacing = np.linalg.norm(image.affine[:3, :3], axis=0)
    figure, rows = plt.subplots(
        len(masks), 3, figsize=(10, 3.4 * len(masks)), layout="constrained", squeeze=False
    )
    for (title, mask), row in zip(masks, rows, strict=True):
        inside = mask.array > 0
        middle = [int(np.median(indices)) for indices in np.nonzero(inside)]
        for axis, axes in enumerate(row):
            columns, lines = (s for i, s in enumerate(spacing) if i != axis)
            shown = {"origin": "lower", "aspect": lines / columns, "interpolation": "nearest"}
            axes.imshow(image.array[0].take(middle[axis], axis).T, cmap="gray", **shown)
            axes.contour(inside.take(middle[axis], axis).T, [0.5], colors=[COLORS[0]])
            axes.set_axis_off()
        row[1].set_title(title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


# pages


@contextmanager
def serving(demo: Path) -> Iterator[str]:
    """The demo's runs, served; gives the address."""
    command = [sys.executable, "-u", "-m", "vclipseg", "serve", str(demo), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield process.stdout.readline().strip().rstrip("/")
        process.terminate()


@contextmanager
def browser_page() -> Iterator[Page]:
    """A page of 1280 x 800 in Chromium without a screen."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("there is no Chromium on this machine; install it, or name it in CHROMIUM")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=[*SOFTWARE])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * SECONDS)
        yield page
        browser.close()


def loaded(page: Page, *layers: str) -> None:
    """Wait for layers of every stage."""
    for layer in layers:
        page.wait_for_selector(f".stage[data-loaded*={layer}]")
    page.wait_for_timeout(3000)  # they are drawn a frame later


def view(page: Page, address: str, demo: Path) -> None:
    """Cases, the worst first."""
    page.goto(f"{address}/#/view/{RUN}")
    loaded(page, "image", "reference", "prediction")


def predict(page: Page, address: str, demo: Path) -> None:
    """A scan that was sent, with its mask."""
    page.goto(f"{address}/#/predict/{RUN}")
    page.reload()
    page.set_input_files("input[type=file]", test_paths(demo)[1])
    loaded(page, "image", "prediction")


def review(page: Page, address: str, demo: Path) -> None:
    """The queue of unlabeled cases, with the brush on."""
    page.goto(f"{address}/#/review/{RUN}")
    page.reload()
    page.wait_for_selector("tbody tr[data-key]")
    looking = page.locator("text=Look at all cases")
    if looking.is_enabled():  # else it has, for earlier pictures
        looking.click()
    end = time.monotonic() + SECONDS
    count = len(open_dataset(demo / "phantom").unlabeled)
    while f"{count} looked at" not in page.inner_text(".head .hint"):
        assert time.monotonic() < end, "the model has not looked at all cases in time"
        time.sleep(1)
    page.reload()
    loaded(page, "image", "mask")
    page.keyboard.press("f")
    page.wait_for_timeout(1000)


def compare(page: Page, address: str, demo: Path) -> None:
    """Both runs on one case."""
    page.goto(f"{address}/#/compare/{RUN}")
    page.reload()
    for side in (0, 1):
        page.locator(".stage[data-loaded*=prediction]").nth(side).wait_for()
    page.wait_for_timeout(3000)


PAGES: dict[str, Callable[[Page, str, Path], None]] = {
    "serve.png": view,
    "serve-predict.png": predict,
    "serve-review.png": review,
    "serve-compare.png": compare,
}

if __name__ == "__main__":
    main()
