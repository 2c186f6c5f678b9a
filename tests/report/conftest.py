"""Made-up run folders: a small data set with sphere-like classes and runs that blur it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from vclipseg.data.volume import Volume, write
from vclipseg.metrics import dice, jaccard
from vclipseg.scores import CaseScore, EvaluateSettings, summarize, write_scores

SHAPE = (30, 34, 18)
AFFINE = np.diag([-0.9, -0.9, 2.0, 1.0])  # LPS axes, thick slices
CLASS_NAMES = ("background", "left atrium")


def organ(case: int, wobble: float = 0.0, shape: Sequence[int] = SHAPE, classes: int = 1):
    """A lobed ball (X, Y, Z); `wobble` spoils its surface."""
    rng = np.random.default_rng([case, int(1000 * wobble)])
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    x, y, z = (axis - shift for axis, shift in zip(grid, rng.uniform(-0.1, 0.1, 3), strict=True))
    lobes = 0.12 * np.sin(4 * x + case) * np.cos(3 * y - case)
    waves = wobble * np.sin(9 * x + rng.uniform(0, 6)) * np.sin(8 * y + rng.uniform(0, 6))
    radius = np.sqrt(x**2 + 1.2 * y**2 + 0.9 * z**2) + lobes + waves
    labels = (radius < 0.6).astype(np.uint8)
    if classes == 2:
        labels[(radius < 0.6) & (y > 0.1)] = 2
    return labels


def make_data(
    root: Path, cases: int = 8, shape: Sequence[int] = SHAPE, class_names=CLASS_NAMES
) -> Path:
    """A data set in nnU-Net's layout, with `cases` test cases and one train case."""
    for folder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for case in range(cases + 1):
        part = "Ts" if case else "Tr"
        labels = organ(case, shape=shape, classes=len(class_names) - 1)
        image = 100 * (labels > 0) + 30 * rng.standard_normal(shape)
        name = f"case_{case:02d}"
        image_path = root / f"images{part}" / f"{name}_0000.nii.gz"
        write(Volume(image[None].astype(np.float32), AFFINE), image_path)
        write(Volume(labels, AFFINE), root / f"labels{part}" / f"{name}.nii.gz")
    content = {
        "name": "Phantom",
        "channel_names": {"0": "MRI"},
        "labels": {name: index for index, name in enumerate(class_names)},
        "numTraining": 1,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def make_run(
    folder: Path,
    data: Path,
    *,
    method: str = "vclipseg",
    cases: int = 8,
    wobble: float = 0.05,
    shape: Sequence[int] = SHAPE,
    class_names: Sequence[str] = CLASS_NAMES,
    text: dict | None = None,
    protocol: str = "strict",
    transductive: bool = False,
    empty: Sequence[int] = (),
    lcc: bool = False,
) -> Path:
    """A run folder with everything: settings, log, predictions and scores."""
    folder.mkdir(parents=True)
    scores, ids = [], [f"case_{case:02d}" for case in range(1, cases + 1)]
    for case, case_id in enumerate(ids, start=1):
        classes = len(class_names) - 1
        truth = organ(case, shape=shape, classes=classes)
        spoiled = organ(case, wobble + 0.01 * case, shape, classes)
        if case in empty:
            spoiled[:] = 0
        (folder / "predictions").mkdir(exist_ok=True)
        write(Volume(spoiled, AFFINE), folder / "predictions" / f"{case_id}.nii.gz")
        scores += made_up_scores(case_id, truth, spoiled, class_names)
    settings = EvaluateSettings(lcc=lcc)
    write_scores(folder, scores, summarize(scores, settings, protocol=protocol, seconds=12.3))
    write_description(folder, data, method, class_names, ids, text, transductive)
    write_log(folder, method, class_names)
    return folder


def made_up_scores(case_id, truth, prediction, class_names) -> list[CaseScore]:
    """True overlaps; distances that only look like some, which is all a report needs."""
    scores = []
    for k in range(1, len(class_names)):
        a, b = truth == k, prediction == k
        overlap, gap = dice(a, b), np.nan if not b.any() else 8 * (1 - dice(a, b))
        distances = {"hd95_voxel": gap, "asd_voxel": gap / 3, "hd95_mm": gap, "assd_mm": gap / 3}
        volumes = {"reference_ml": a.sum() / 1000, "prediction_ml": b.sum() / 1000}
        scores += [
            CaseScore(
                case_id,
                k,
                class_names[k],
                lcc,
                dice=overlap,
                jaccard=jaccard(a, b),
                nsd=overlap,
                failure=int(not b.any()),
                counts=(0, 0, 0, 0),
                **distances,
                **volumes,
            )
            for lcc in (0, 1)
        ]
    return scores


def write_description(folder, data, method, class_names, test, text, transductive):
    splits = {
        "labeled": ["case_00"],
        "unlabeled": ["case_90", "case_91", *(test if transductive else [])],
        "test": test,
        "seed": None,
        "transductive": transductive,
        "hash": "sha256:" + "ab" * 32,
    }
    experiment = {
        "version": 1,
        "created": "2026-01-02T03:04:05+00:00",
        "command": ["vclipseg", "train", "my data", "--set", f"method.name={method}"],
        "name": folder.name,
        "data": {"root": str(data), "name": "Phantom", "layout": "nnunet", "hash": splits["hash"]},
        "class_names": list(class_names),
        "label_values": list(range(len(class_names))),
        "channel_names": ["MRI"],
        "settings": {
            "preset": "robust",
            "data": {"labeled": 1, "draw": None, "class_names": None, "label_values": None},
            "method": {"name": method, "filters": 16},
            "train": {"steps": 6000, "seed": 7, "patch": [112, 112, 80], "lr": 0.01},
            "evaluate": EvaluateSettings().model_dump(mode="json"),
        },
        "settings_hash": "0123456789ab",
        "plan": {"orientation": "RAS", "spacing": [0.9, 0.9, 2.0], "intensity": ["zscore"]},
        "text": text,
        "transductive": transductive,
        "seed": 7,
    }
    environment = {"vclipseg": "0.1.0", "python": "3.11.2", "torch": "2.13", "threads": 2}
    environment |= {"device": "One CPU", "platform": "Linux", "commit": "abcdef012345"}
    for name, content in (
        ("splits", splits),
        ("experiment", experiment),
        ("environment", environment),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))


def write_log(folder: Path, method: str, class_names: Sequence[str], rows: int = 600) -> None:
    rng = np.random.default_rng(len(method))
    steps = 10 * np.arange(1, rows + 1)
    fall = np.exp(-steps / 1500)
    columns = {"step": steps, "seconds": 0.4 * steps, "lr": 0.01 * (1 - steps / (10 * rows)) ** 0.9}
    terms = {"dice": np.ones(rows)}
    if method != "supervised":
        terms["consistency"] = np.exp(-5 * (1 - steps / steps[-1]) ** 2)
    total = np.zeros(rows)
    for term, weight in terms.items():
        value = 0.1 + 0.6 * fall + 0.03 * rng.standard_normal(rows)
        total += weight * value
        columns |= {term: value, f"{term}_weight": weight}
    columns["total"] = total
    if method != "supervised":
        columns["pseudo_share"] = 1 - fall
        for index, name in enumerate(class_names):
            columns[f"prototype_{name.replace(' ', '_')}"] = (1 - fall) / (index + 1)
    lines = [
        ",".join(columns),
        *(",".join(f"{v:.6g}" for v in row) for row in zip(*columns.values(), strict=True)),
    ]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "Phantom")


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    clip = {"source": "clip", "model": "openai/clip", "prompts": ["A pixel of a <b>left</b>."]}
    return [
        make_run(folder / "ours", data, wobble=0.05, text=clip),
        make_run(folder / "baseline", data, method="supervised", wobble=0.2, empty=[3]),
    ]


@pytest.fixture
def new_run(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """Make a run folder of the shared data."""
    return lambda name="run", **options: make_run(tmp_path / name, data, **options)
