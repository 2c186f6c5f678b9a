"""README and docs agree with the code, the recipes and the records."""

from __future__ import annotations

import csv
import importlib
import json
import math
import re
import shlex
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import typer
from scipy.stats import spearmanr

from made_records import make_record, make_scores
from vclipseg import lite, records
from vclipseg.benchmark.grids import GridSettings, load_grid
from vclipseg.cli import app
from vclipseg.config import build_experiment, load_experiment
from vclipseg.data.plan import Plan
from vclipseg.methods import METHODS, presets
from vclipseg.metrics import METRICS
from vclipseg.scores import CASE_COLUMNS, write_rows
from vclipseg.settings import Settings
from vclipseg.tables.facts import GridFacts, read_facts, write_facts
from vclipseg.tables.markdown import markdown
from vclipseg.tables.sections import read_sections

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]
make_reference = importlib.import_module("make_reference")
readme = importlib.import_module("readme")
develop = importlib.import_module("develop")
second_test = importlib.import_module("second_test")

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
METHOD_FILES = sorted(
    file for file in (ROOT / "src/vclipseg/methods").glob("*.py")
    if file.stem not in ("__init__", "base")
)  # fmt: skip
COMMANDS = typer.main.get_command(app)
NOT_RUN = "<!-- not run:"
NEEDED = (
    "numpy",
    "nibabel",
    "onnxruntime",
    "openvino",
    "fire",
    "jsonschema",
)  # by an exported model

STATISTICS = " train.statistics_batches=25"
TILTED = f"augment.rotate=15 augment.zoom=0.35{STATISTICS}"
MEAN_TEACHER = f"method.name=mean_teacher train.seed=1 {TILTED} method.warmup=0.4"
AD_MT = MEAN_TEACHER.replace("mean_teacher", "ad_mt")
BEFORE_AND_AFTER = (
    "methods/ad_mt.md",
    "decisions/0020-a-head-begins-without-a-favorite.md",
    "explanation/experiments.md",
)
ROBUST_1 = f"train.seed=1 {TILTED} method.warmup=0.4"
MCNET_2 = f"method.name=mcnet {ROBUST_1.replace('seed=1', 'seed=2')}"
ARCO_2 = f"method.name=arco {ROBUST_1.replace('seed=1', 'seed=2')}"
NOT_OURS = ("arco", "caml", "caussl", "crossmatch")
LEVEL = ("mean_teacher", "ua_mt", "caml", "caussl", "bcp")
NO_DROPOUT = "method.preset=faithful method.dropout=0"
PLUS = "mcnet method.preset=plus_robust"
SEED_2 = ("mean_teacher", "ua_mt", "cps", "mcnet", PLUS, "vclipseg_x", "bcp", "ad_mt", *NOT_OURS)
UNMIXED = f"train.seed=1 {TILTED} method.warmup=0.4 method.copy_paste=0"
X_BY_NAME = f"method.name=vclipseg_x train.seed=1 {TILTED} method.warmup=0.4"
PLAIN_X = "method.deformation=0 method.threshold=0 method.least_share=0"
MEASURED_AGAIN = defaultdict(
    set, supervised={f"train.seed=1 {TILTED}"}, robust={AD_MT, X_BY_NAME, UNMIXED}
)  # with other heads: a page about them has both figures, others have those of before
FAITHFUL_TRAINING = "train.optimizer=sgd train.lr=0.01 train.lr_power=0 train.weights=last"
SURE = f"train.seed=1 {TILTED} method.warmup=0.4 method.threshold=0.9 method.copy_paste=0"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    run: bool

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        indent, language, content = found.groups()
        before = text[: found.start()].rstrip().rpartition("\n")[2]
        content = re.sub(f"^{indent}", "", content, flags=re.MULTILINE)
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, language, content, not before.startswith(NOT_RUN))


def parametrized(language: str):
    found = [block for page in PAGES for block in blocks(page) if block.language == language]
    return pytest.mark.parametrize("block", found, ids=lambda block: block.name)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


# Results: figures come from records


@pytest.mark.parametrize("page", readme.PAGES)
def test_pages_show_what_the_records_hold(page):
    old = text_of(page)
    assert re.search(r"<!-- (results|table|method|speed|simulation|development|modes):", old)
    assert readme.fill(old, ROOT / "results") == old, "run `python benchmarks/readme.py`"


def test_every_record_is_made_from_its_rows():
    """table.md of a committed grid is what its record gives today."""
    for grid in (ROOT / "results").glob("*/runs.csv"):
        sections = read_sections(grid.parent)
        text = (grid.parent / "table.md").read_text(encoding="utf-8")
        again = "run `vclipseg benchmark GRID.toml --tables`"
        assert markdown(sections, read_facts(grid.parent)).strip() in text, again


@pytest.mark.parametrize(
    ("page", "recipe", "overrides"),
    [
        ("decisions/0015-no-turns-where-orientation-is-known.md", recipe, overrides)
        for recipe, overrides in (
            ("supervised", "train.seed=1 augment.rotate_flip=true"),
            ("supervised", "train.seed=1 augment.rotate_flip=false"),
            ("robust", "train.seed=1 method.teacher_statistics=batch"),
            ("robust", "train.seed=1 augment.rotate_flip=false"),
        )
    ]
    + [
        (
            "decisions/0017-patches-are-tilted-and-zoomed.md",
            recipe,
            f"train.seed=1 {overrides}".strip(),
        )
        for recipe, overrides in (
            ("supervised", "augment.rotate=15 augment.zoom=0.2"),
            ("supervised", "augment.rotate=30 augment.zoom=0.2"),
            ("supervised", "augment.rotate=15 augment.zoom=0.35"),
            ("robust", "augment.rotate=15 augment.zoom=0.2"),
            ("robust", "augment.rotate=15 augment.zoom=0.35"),
            ("robust", "method.warmup=0.4 augment.rotate=15 augment.zoom=0.35"),
            ("hippocampus-4/supervised", ""),
            ("hippocampus-4/supervised", "augment.rotate=15 augment.zoom=0.2"),
            ("hippocampus-4/supervised", "augment.rotate=15 augment.zoom=0.35"),
            ("hippocampus-4/robust", ""),
            ("hippocampus-4/robust", "augment.rotate=15 augment.zoom=0.2"),
        )
    ]
    + [
        ("methods/vclipseg.md", recipe, overrides)
        for recipe, overrides in (
            ("supervised", f"train.seed=1 {TILTED} {FAITHFUL_TRAINING}"),
            ("supervised", f"train.seed=1 {TILTED} method.dropout=0.5"),
        )
    ]
    + [
        ("methods/bcp.md", recipe, overrides)
        for recipe, overrides in (
            ("robust", f"method.name=bcp train.seed=1 {TILTED} method.warmup=0.4"),
            ("robust", f"method.name=bcp train.seed=1 {TILTED} method.warmup=0.99"),
            (
                "robust",
                f"method.name=bcp train.seed=1 {TILTED} method.warmup=0.4 method.patches=[4,4]",
            ),
        )
    ]
    + [
        (f"methods/{method}.md", "supervised", f"train.seed=1 {TILTED}{patches}")
        for method, patches in (
            ("vclipseg", ""),
            ("bcp", ""),
            ("bcp", " method.patches=[2,0]"),
            ("mean_teacher", ""),
        )
    ]
    + [
        (page, recipe, overrides)
        for page in ("methods/mean_teacher.md", "explanation/experiments.md")
        for recipe, overrides in (
            ("robust", MEAN_TEACHER),
            ("robust", f"{MEAN_TEACHER} method.unlabeled_weight=0"),
            ("supervised", f"train.seed=1 {TILTED} method.patches=[2,0]"),
        )
    ]
    + [
        (page, recipe, overrides)
        for page in BEFORE_AND_AFTER
        for recipe, overrides in (
            ("supervised", f"train.seed=1 {TILTED}"),
            ("robust", AD_MT),
        )
    ]
    + [("methods/ad_mt.md", "robust", f"{AD_MT} method.unlabeled_weight=0")]
    + [("methods/mcnet.md", "supervised", f"train.seed=2 {TILTED}")]
    + [
        ("methods/mcnet.md", "robust", overrides)
        for overrides in (MCNET_2, f"{MCNET_2} method.unlabeled_weight=0")
    ]
    + [
        (page, "robust", overrides)
        for page in ("methods/arco.md", "explanation/experiments.md")
        for overrides in (ARCO_2, f"{ARCO_2} method.revisiting_weight=0")
    ]
    + [
        ("benchmark.md", f"hippocampus-4/{recipe}", overrides)
        for recipe, overrides in (
            ("supervised", "train.seed=0"),
            *(("robust", f"method.name={name} train.seed=0") for name in LEVEL),
            ("robust", "method.name=mean_teacher train.seed=0 method.unlabeled_weight=0"),
            ("supervised", "train.seed=0 method.preset=faithful"),
            ("supervised", f"train.seed=0 {NO_DROPOUT}"),
            ("robust", f"method.name=mean_teacher train.seed=0 {NO_DROPOUT}"),
            ("robust", f"method.name=bcp train.seed=0 {NO_DROPOUT}"),
            (
                "robust",
                f"method.name=bcp train.seed=0 {NO_DROPOUT} method.warmup=0.4 train.lr_drop_every=0",
            ),
            ("robust", f"method.name=ad_mt train.seed=0 {NO_DROPOUT}"),
            ("robust", f"method.name=ad_mt train.seed=0 {NO_DROPOUT} method.warmup=0.4"),
            (
                "robust",
                f"method.name=arco train.seed=0 {NO_DROPOUT} train.init_from=runs/pretrained",
            ),
            (
                "robust",
                f"method.name=arco train.seed=0 {NO_DROPOUT} method.warmup=0.4"
                " train.init_from=runs/pretrained",
            ),
            ("robust", f"method.name=arco train.seed=0 {NO_DROPOUT}"),
        )
    ]
    + [
        ("explanation/experiments.md", recipe, overrides)
        for recipe, overrides in (
            ("supervised", f"train.seed=1 {TILTED.removesuffix(STATISTICS)}"),
            ("supervised", f"data.labeled=40 train.seed=1 {TILTED}"),
            ("supervised", f"train.seed=1 {TILTED} method.patches=[8,0]"),
            ("hippocampus-4/supervised", f"train.seed=1 {TILTED.removesuffix(STATISTICS)}"),
            ("robust", f"train.seed=1 method.warmup=0.4 {TILTED.removesuffix(STATISTICS)}"),
            ("robust", f"{UNMIXED} method.threshold=0.9"),
            ("robust", f"{X_BY_NAME} method.twins=true"),
            ("robust", f"{X_BY_NAME} {PLAIN_X}"),
            ("robust", f"{X_BY_NAME} {PLAIN_X}".replace("seed=1", "seed=2")),
            ("robust", X_BY_NAME),
            ("robust", X_BY_NAME.removesuffix(" method.warmup=0.4")),
            ("robust", f"{X_BY_NAME} method.teacher_decay=0"),
            ("robust", f"{X_BY_NAME} method.labels_from=others"),
            ("robust", f"{X_BY_NAME} method.patches=[3,1]"),
            ("robust", f"{X_BY_NAME} method.networks=2 train.steps=700"),
            ("supervised", f"train.seed=1 {TILTED} train.steps=700"),
            ("hippocampus-4/robust", "train.seed=1 method.copy_paste=0 method.threshold=0.9"),
            ("robust", f"{SURE} method.unlabeled_weight=1.0"),
            ("robust", f"{SURE} method.patches=[1,3] method.largest_component=true"),
            ("robust", f"{SURE} method.largest_component=true"),
            ("robust", f"{SURE} method.cooldown=0.15"),
            ("robust", f"{SURE.removesuffix(' method.copy_paste=0')} method.paste=unlabeled"),
            ("robust", "labels=registered every=3"),
            ("supervised", f"train.seed=1 {TILTED} teachers=1"),
            ("supervised", f"train.seed=1 {TILTED} teachers=3"),
            *(("robust", f"method.name={name} {ROBUST_1}") for name in NOT_OURS),
            ("robust", ROBUST_1),
            ("robust", UNMIXED),
            ("robust", UNMIXED.replace("seed=1", "seed=2")),
            *(
                ("robust", f"method.name={name} {ROBUST_1.replace('seed=1', 'seed=2')}")
                for name in SEED_2
            ),
            ("robust", f"{ARCO_2} method.revisiting_weight=0".replace("seed=2", "seed=1")),
            (
                "hippocampus-4/robust",
                "method.name=arco train.seed=0 method.revisiting_weight=0",
            ),
            ("hippocampus-4/robust", "method.name=arco train.seed=0"),
            ("robust", f"{ARCO_2.replace('arco', 'mean_teacher')} method.unlabeled_weight=5"),
            ("supervised", f"train.seed=2 {TILTED}"),
            ("supervised", f"train.seed=1 {TILTED} train.init_from=runs/pre"),
        )
    ],
)
def test_figures_of_the_development_list_are_in_its_record(page, recipe, overrides):
    with (ROOT / "results/development.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    name = f"recipes/{recipe if '/' in recipe else f'la-1.25mm-4/{recipe}'}.toml"
    found = [r["dice"] for r in rows if (r["recipe"], r["overrides"]) == (name, overrides)]
    assert len(found) == (2 if overrides in MEASURED_AGAIN[recipe] else 1)
    for dice in found if page in BEFORE_AND_AFTER else found[:1]:
        assert f"{float(dice):.3f}" in text_of(f"docs/{page}")


def test_what_the_page_says_of_revisiting_is_in_its_record():
    with (ROOT / "results/arco-revisiting.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) >= 100]
    revisited = [row for row in rows if row["revisiting_weight"] == "1"]
    assert all(float(row["revisiting"]) < 0.004 for row in revisited)
    assert all(abs(float(row["contrast"]) - math.log(513)) < 0.002 for row in revisited)
    assert rows[-1]["revisiting_weight"] == "0"
    assert float(rows[-1]["contrast"]) < 3


def test_what_the_page_says_of_starts_is_in_their_record():
    grid = ROOT / "results/la-1.25mm-ablation"
    with (grid / "starts.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    dice = {run.settings_hash: run.dice for run in records.read_runs(grid) if not run.lcc}
    assert all(float(row["dice"]) == dice[row["settings_hash"]] for row in rows)
    runs = {(row["preset"].removeprefix("robust, "), int(row["seed"])): row for row in rows}
    loss = {run: float(row["supervised"]) for run, row in runs.items()}
    ends = {run: float(row["dice"]) for run, row in runs.items()}
    neither, without = "no VWPM, no VTCM", ("no VWPM, no VTCM", "VTCM only")
    assert max(loss, key=loss.get) == min(ends, key=ends.get) == (neither, 0)
    begun = [
        np.mean([loss[parts, seed] for parts in pair for seed in range(3)])
        for pair in (without, ("VWPM only", "robust"))
    ]
    slow = [parts for (parts, _), value in loss.items() if value > 0.28]
    assert len(slow) == 6
    assert sum(parts in ("VTCM only", "MC-Net + DLB") for parts in slow) == 4
    means = defaultdict(list)
    for run in records.read_runs(grid):
        if run.method in ("vclipseg", "supervised") and not run.lcc:
            means[run.preset if run.method == "vclipseg" else "supervised"].append(run.dice)
    below = {name for name in means if np.mean(means[name]) < np.mean(means["supervised"])}
    assert below == {"robust, VTCM only", "robust, MC-Net + DLB"}
    rho = spearmanr(list(loss.values()), list(ends.values())).statistic
    said = " ".join(text_of("docs/benchmark.md").split())
    for figures in (
        f"Over the {len(rows)} runs of VCLIPSeg",
        f"have a rank correlation of {rho:.2f}",
        f"a loss of {loss[neither, 0]:.3f}, and ends lowest, at {ends[neither, 0]:.3f}",
        f"seed 2, with {loss[neither, 2]:.3f}, ends at {ends[neither, 2]:.3f}",
        "the loss is {:.2f} on average over neither module and VTCM only, {:.2f} over".format(
            *begun
        ),
    ):
        assert figures in said


def test_what_the_page_says_of_labels_is_in_their_record():
    runs = [r for r in records.read_runs(ROOT / "results/la-1.25mm-budget") if not r.lcc]
    dice = {(run.method, run.labeled): run.dice for run in runs}
    said = " ".join(text_of("docs/benchmark.md").split())
    one = [f"{dice[method, 1]:.3f}" for method in ("vclipseg", "arco", "supervised")]
    assert "VCLIPSeg has {}, ARCO {}, supervised {}.".format(*one) in said
    many = [f"{dice[method, 16]:.3f}" for method in ("vclipseg", "arco", "supervised")]
    assert "level ({}, {} and {})".format(*many) in said
    assert f"no more, {dice['supervised', 80]:.3f}:" in said
    below = max(dice.values()) - dice["vclipseg", 4]
    assert f"VCLIPSeg is {below:.3f} below the most of all" in said
    most = f"{dice['vclipseg', 4]:.3f} with 4 labels, {max(dice.values()):.3f} at most with more"
    assert most in text_of("docs/explanation/experiments.md")


def test_two_ways_to_weigh_two_decoders_gave_the_same_runs():
    found = records.read_runs(ROOT / "results/la-1.25mm-ablation")
    equal, by_voxel = (
        {(run.seed, run.lcc): (run.dice, run.assd_mm) for run in found if name in run.preset}
        for name in ("equal weights", "weights per voxel")
    )
    both = equal.keys() & by_voxel.keys()
    assert both
    assert all(equal[of] == by_voxel[of] for of in both)


def test_the_readme_says_which_cases_make_the_lead():
    grid = ROOT / "results/la-1.25mm-4"
    methods = {r.settings_hash: r.method for r in records.read_runs(grid) if r.preset == "robust"}
    found = defaultdict(list)
    for (run, *_), scores in records.read_cases(grid).items():
        for score in scores:
            if run in methods and not score.lcc:
                found[methods[run], score.case_id].append(score.dice)
    mean = {of: sum(values) / len(values) for of, values in found.items()}
    cases = {case for _, case in mean}
    leads = {case: mean["vclipseg", case] - mean["supervised", case] for case in cases}
    two = sorted(cases, key=lambda case: -leads[case])[:2]
    assert len(cases) == 20
    assert sum(leads[case] for case in two) > 0.9 * sum(leads.values())
    figures = [f"{mean[of, case]:.2f}" for of in ("supervised", "vclipseg") for case in two]
    said = " ".join(text_of("README.md").split())
    assert "supervised has {} and {} there and VCLIPSeg {} and {};".format(*figures) in said


def test_a_grid_without_records_is_not_measured(tmp_path):
    text = "<!-- results:none -->\n| old | 0.9 |\n<!-- /results -->\nbelow\n"
    assert readme.fill(text, tmp_path) == (
        "<!-- results:none -->\n\nNot measured yet.\n\n<!-- /results -->\nbelow\n"
    )


def test_a_grid_is_shown_whole_with_its_figures(tmp_path):
    grid = tmp_path / "grid"
    scores = make_scores()
    records.record(
        grid,
        [
            make_record(scores),
        ],
        scores,
    )
    (grid / "label-budget.png").touch()
    text = "<!-- table:grid -->\n<!-- /table -->\n<!-- table:none -->\n<!-- /table -->\n"
    shown = readme.fill(text, tmp_path)
    assert "### la, 4 labeled, 16 filters, the mask as predicted\n" in shown
    assert "![label-budget](../results/grid/label-budget.png)" in shown
    assert "[runs.csv](../results/grid/runs.csv)" in shown
    assert shown.endswith("<!-- table:none -->\n\nNot measured yet.\n\n<!-- /table -->\n")


def test_a_measured_grid_shows_means_intervals_and_failures(tmp_path):
    grid = tmp_path / "grid"
    for seed, values in enumerate([(0.6, 0.7, 0.8), (0.8, 0.9, 1.0)]):
        scores = make_scores(values, failures=1 if seed == 0 else 0)
        facts = {"seed": seed, "settings_hash": f"hash{seed}", "seconds": 10.0 + 4 * seed}
        rows = [make_record(scores, lcc=lcc, **facts) for lcc in (False, True)]
        records.record(grid, rows, scores)
    shown = readme.show(grid)
    (line,) = [line for line in shown.splitlines() if line.startswith("| vclipseg")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["vclipseg (faithful, 6000 steps)", "random", "2"]
    assert cells[3].startswith("0.700 (")  # cases 0.4, 0.8, 0.9: the failure counts 0
    assert cells[5].startswith("2.00")  # voxels; no distance of the failure
    assert cells[-2:] == ["1 of 6", "12"]
    assert "4 labeled cases, 3 test cases, 16 filters, on cpu" in shown
    assert shown.count("| vclipseg") == 1  # not the largest components


def test_what_is_to_be_said_of_the_data_is_said_in_the_readme(tmp_path):
    scores = make_scores()
    records.record(tmp_path, [make_record(scores)], scores)
    write_facts(tmp_path, GridFacts("la", remarks=("Cut around the labels.",)))
    assert "\n- Of the data: Cut around the labels.\n\nMade from" in readme.show(tmp_path)


def test_several_methods_are_compared_with_the_baseline(tmp_path):
    for method, gain in (("supervised", 0.0), ("vclipseg", 0.1)):
        scores = make_scores([0.5 + gain + 0.01 * n for n in range(7)])
        facts = {"method": method, "settings_hash": method, "text": ""}
        records.record(tmp_path, [make_record(scores, **facts)], scores)
    shown = readme.show(tmp_path)
    assert shown.index("| supervised") < shown.index("| vclipseg")
    assert "higher Dice" in shown
    assert "| none |" in shown


def test_a_method_is_shown_beside_supervised(tmp_path):
    grid = tmp_path / "la-1.25mm-methods"
    for method, gain in (("supervised", 0.0), ("bcp", 0.1)):
        scores = make_scores([0.5 + gain + 0.01 * n for n in range(7)])
        facts = {"method": method, "settings_hash": method, "text": "", "preset": "robust"}
        records.record(grid, [make_record(scores, **facts)], scores)
    shown = readme.fill("<!-- method:bcp -->\n<!-- /method -->\n", tmp_path)
    assert "| la, 4 labeled | robust | 1 | 0.630 (" in shown
    assert "| +0.100 (+0.100 to +0.100) | 0.016 |" in shown
    assert "supervised |" not in shown.replace("Minus supervised |", "")
    assert "Not measured" in readme.fill("<!-- method:caml -->\n<!-- /method -->\n", tmp_path)


def test_what_to_annotate_next_is_shown_beside_random(tmp_path):
    rows = [
        f"{seed},{strategy},{labeled},case{n},{0.5 + 0.01 * n + gain}"
        for strategy, labeled, gain in (("start", 4, 0), ("random", 8, 0.1), ("class_rare", 8, 0.2))
        for seed in (0, 1)
        for n in range(7)
    ]
    (tmp_path / "cases.csv").write_text("seed,strategy,labeled,case_id,dice\n" + "\n".join(rows))
    shown = readme.show_simulation(tmp_path)
    assert "| 4 | start | 0.530 (" in shown
    assert "| 8 | random | 0.630 (" in shown
    assert "| +0.1000 (+0.1000 to +0.1000) | 0.016 |" in shown
    assert "2 seeds, 7 test cases." in shown
    assert "Not measured" in readme.show_simulation(tmp_path / "none")


def test_the_readme_says_of_speed_what_was_measured():
    rows = json.loads((ROOT / "results/speed-cpu.json").read_text(encoding="utf-8"))
    times = {row["name"]: row["value"] for row in rows}
    said = text_of("README.md")
    assert "training step takes less than a sixth of the time" in said
    assert times["training step, VCLIPSeg, batch of 4"] > 6
    assert "prediction less than a fortieth" in " ".join(said.split())
    assert times["predicting 20 scans, as by default"] > 60  # the reference differs between runs


def test_speed_is_shown_with_what_was_missed(tmp_path):
    row = {"unit": "s", "reference": 9.0, "ours": 3.0, "value": 3.0, "target": 2, "holds": True}
    more = {"note": "", "device": "a CPU", "commit": "abc"}
    missed = {**row, **more, "name": "b", "reference": None, "holds": False, "note": "so be it"}
    content = [{**row, **more, "name": "a"}, missed]
    (tmp_path / "speed-cpu.json").write_text(json.dumps(content))
    shown = readme.fill("<!-- speed:cpu -->\n<!-- /speed -->\n", tmp_path)
    assert "| a | 9 s | 3 s | 3 | 2 |  |" in shown
    assert "| b |  | 3 s | 3 | 2 | **missed** |" in shown
    assert "- b: so be it." in shown
    assert "a CPU, commit abc" in shown


def test_ways_to_cover_a_volume_are_shown(tmp_path):
    way = {
        "way": "whole",
        "dice": 0.8,
        "mean_difference": -0.001,
        "largest_difference": 0.02,
        "times_as_fast": 9.5,
    }
    record = {
        "model": "a",
        "trained": ["r.toml", "train.seed=1"],
        "cases": 3,
        "patch": [8, 8, 4],
        "stride": [2, 2, 1],
        "ways": [way],
    }
    (tmp_path / "m.json").write_text(json.dumps({**record, "device": "a CPU", "commit": "abc"}))
    shown = readme.fill("<!-- modes:m -->\n<!-- /modes -->\n", tmp_path)
    assert "| whole | 0.8000 | -0.0010 | 0.0200 | 9.5 |" in shown
    assert "windows of 8 x 8 x 4, the literature's 2 x 2 x 1 apart" in shown
    assert "Not measured" in readme.show_modes(tmp_path / "none")


def test_what_was_tried_is_shown(tmp_path):
    (tmp_path / "development.csv").write_text(
        "recipe,overrides,seed,cases,dice,lowest,seconds,device,commit,case_dice\n"
        "recipes/a/robust.toml,train.seed=1 method.warmup=0,1,9,0.5,0.25,60,a CPU,abc,\n"
        "recipes/b/robust.toml,,0,9,0.6,0.35,60,a CPU,abc,\n"
    )
    shown = readme.fill("<!-- development:a -->\n<!-- /development -->\n", tmp_path)
    assert "| robust | `method.warmup=0` | 1 | 0.500 |  | 0.25 | 60 | abc |" in shown
    assert "0.600" not in shown
    assert "| robust | nothing | 0 | 0.600 |" in readme.show_development(tmp_path / "b")
    assert "Not measured" in readme.show_development(tmp_path / "c")


def test_what_was_tried_is_compared_case_by_case_where_cases_are_recorded(tmp_path):
    def row(recipe, overrides, cases):
        return f"recipes/a/{recipe}.toml,{overrides},1,3,0.5,0.1,60,a CPU,abc,{cases}\n"

    (tmp_path / "development.csv").write_text(
        "recipe,overrides,seed,cases,dice,lowest,seconds,device,commit,case_dice\n"
        + row("supervised", "train.seed=1 augment.rotate=15", "0.1 0.1 0.1")  # measured again below
        + row("supervised", "train.seed=1 augment.rotate=15", "0.5 0.6 0.7")
        + row("robust", "train.seed=1 augment.rotate=15 method.warmup=0", "0.6 0.7 0.8")
        + row("robust", "train.seed=1 augment.rotate=15 teachers=2", "0.6 0.7")
        + row("robust", "train.seed=1 augment.rotate=15 teachers=3", "")
        + row("robust", "train.seed=1", "0.6 0.7 0.8")
    )
    lines = readme.show_development(tmp_path / "a").splitlines()[2:]
    differences = [line.split("|")[5].strip() for line in lines]
    assert differences == ["-0.500 (-0.600 to -0.400)", "", "+0.100 (+0.100 to +0.100)", "", "", ""]


def test_the_second_test_is_of_the_seeds_that_both_have(tmp_path):
    common = {"dataset": "la", "preset": "robust", "steps": 9, "device": "", "commit": ""}
    dice = {("vclipseg_x", 0): 0.8, ("vclipseg_x", 1): 0.1, ("cps", 0): 0.7}
    (tmp_path / "grid").mkdir()
    write_rows(
        tmp_path / "grid/second-test.csv",
        second_test.COLUMNS,
        [
            {
                **common,
                "settings_hash": m,
                "method": m,
                "seed": seed,
                "case_id": f"{i}",
                "dice": v + i / 100,
            }
            for (m, seed), v in dice.items()
            for i in range(10)
        ],
    )
    shown = readme.fill("<!-- second:grid -->\n<!-- /second -->\n", tmp_path)
    assert "| la | cps (robust) | 0 | 10 | +0.1000 (+0.1000 to +0.1000) |" in shown
    assert "Not measured" in readme.fill("<!-- second:none -->\n<!-- /second -->\n", tmp_path)


def test_what_a_server_went_through_is_shown(tmp_path):
    record = {
        "clients": 16,
        "seconds": 60.0,
        "requests": 12,
        "answers": {"page 200": 9, "infer 503": 2, "review 200": 1},
        "median_seconds": 0.01,
        "slowest_seconds": 3.5,
        "crashed": False,
        "wrong": [],
        "reviews_confirmed": 1,
        "reviews_lost": ["case"],
        "memory_mb": {"at_start": 300, "after_a_third": 400, "highest": 410},
        "device": "a CPU",
        "commit": "abc",
    }
    (tmp_path / "load.json").write_text(json.dumps(record))
    shown = readme.fill("<!-- load:load -->\n<!-- /load -->\n", tmp_path)
    assert "| requests | 12, of them 2 told to come again (503) |" in shown
    assert "| reviews confirmed, then lost | 1, 1 |" in shown
    assert "a CPU, commit abc" in shown
    assert "Not measured" in readme.show_load(tmp_path / "none")


# Commands


def commands(page: Path) -> Iterator[tuple[str, str]]:
    """Where and what: lines of shell blocks, and `vclipseg ...` within sentences."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.language in ("sh", "bash"):  # of a batch script, what starts vclipseg
            for line in block.text.replace("\\\n", " ").splitlines():
                if line.strip() and (block.language == "sh" or "vclipseg" in line):
                    yield block.name, line
    prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.MULTILINE | re.DOTALL)
    for found in re.finditer(r"`(vclipseg [^`]+)`", prose):
        yield str(page.relative_to(ROOT)), found[1]


ALL_COMMANDS = [command for page in PAGES for command in commands(page)]


def test_there_are_commands_to_check():
    assert sum("vclipseg train" in line for _, line in ALL_COMMANDS) > 10


@pytest.mark.parametrize(("where", "line"), ALL_COMMANDS, ids=[f"{w} {c}" for w, c in ALL_COMMANDS])
def test_command_is_one(where, line):
    words = shlex.split(line, comments=True)
    if words[0] == "vclipseg":
        check_vclipseg(words[1:])
    elif "torchrun" in words[:2]:  # srun torchrun ... -m vclipseg VERB
        at = words.index("-m")
        assert words[at + 1] == "vclipseg"
        check_vclipseg(words[at + 2 :])
    elif words[0] == "make":
        assert f"\n{words[1]}:" in text_of("Makefile"), line
    elif words[:2] == ["python", "-m"]:
        check_module(words[2:])
    elif words[0] == "python":
        check_script(words[1:])
    elif words[:2] == ["pip", "install"]:
        assert all(word.startswith(("vclipseg", "-")) or word in NEEDED for word in words[2:])
    else:
        assert words == ["source", ".venv/bin/activate"], line


def check_vclipseg(words: list[str]) -> None:
    """The verb and its options exist, and so do the settings, methods and recipes named."""
    command = COMMANDS.commands[words[0]]
    while hasattr(command, "commands"):  # a group of verbs
        command, words = command.commands[words[1]], words[1:]
    if len(words) == 1:  # a verb is spoken of
        return
    values = command.make_context(words[0], words[1:]).params
    overrides = list(values.get("settings") or [])
    for option in ("method", "preset"):
        if values.get(option):
            overrides.append(f"method.{'name' if option == 'method' else option}={values[option]}")
    load_experiment(None, [text for text in overrides if not text.startswith("grid.")])
    recipe = values.get("recipe")
    if recipe and Path(recipe).parts[0] == "recipes":  # some versions give text
        load_experiment(ROOT / recipe)
    if values.get("grid"):
        load_grid(ROOT / values["grid"], overrides)


def check_module(words: list[str]) -> None:
    """A module that is run: an exported model, or a MONAI bundle."""
    if words[0] == "vclipseg.lite":
        lite.parser().parse_args(words[1:])
    else:
        assert words[0] == "monai.bundle"
        assert callable(getattr(monai.bundle, words[1]))


def check_script(words: list[str]) -> None:
    script = (ROOT / words[0]).read_text(encoding="utf-8")
    for option in words:
        assert not option.startswith("--") or f'"{option}"' in script, option
    load_experiment(None, [word for word in words if re.match(r"[a-z_.]+=", word)])
    for path in words[1:]:
        assert not path.startswith("recipes/") or (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_recipe_loads(recipe):
    if "\n[grid]\n" in recipe.read_text(encoding="utf-8"):
        load_grid(recipe)
    else:
        load_experiment(recipe)


# Blocks of code


@parametrized("python")
def test_python_block_runs(block):
    code = compile(block.text, block.name, "exec")
    if block.run:
        exec(code, {"__name__": "docs"})
        return
    for found in re.finditer(r"^(?:import|from) .*$", block.text, re.MULTILINE):
        exec(found[0], {})
    for module, name in re.findall(r"\b(vclipseg)\.([a-z_]+)\(", block.text):
        assert hasattr(importlib.import_module(module), name)


@parametrized("toml")
def test_toml_block_is_a_recipe(block):
    values = tomllib.loads(block.text)
    if "grid" in values:
        GridSettings.model_validate(values.pop("grid"))
        assert (ROOT / "recipes/grids" / values.pop("extends")).resolve().is_file()
    build_experiment(values, {})


@parametrized("json")
def test_json_block_is_a_plan(block):
    Plan.model_validate(json.loads(block.text))


# Links


def anchors(page: Path) -> set[str]:
    """What headings may be linked by, as GitHub makes it."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_relative_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@each_page
def test_page_can_be_found(page):
    """Some other page links to it."""
    if page.name == "README.md" and page.parent == ROOT:
        return
    linked = {
        (other.parent / target.partition("#")[0]).resolve()
        for other in PAGES
        if other != page
        for target in re.findall(r"\]\(([^)\s:]+)\)", other.read_text(encoding="utf-8"))
    }
    assert page.resolve() in linked


# Reference


def test_pages_agree_with_the_code():
    stale = [str(page.relative_to(ROOT)) for page in make_reference.stale()]
    assert not stale, "run `python docs/make_reference.py`"


def settings_classes(base: type[Settings] = Settings) -> Iterator[type[Settings]]:
    for cls in base.__subclasses__():
        if cls.__module__.startswith("vclipseg."):  # not those of other tests
            yield cls
            yield from settings_classes(cls)


@pytest.mark.parametrize("cls", sorted(set(settings_classes()), key=lambda c: c.__name__))
def test_every_setting_is_in_the_reference(cls):
    page = text_of("docs/reference/settings.md")
    for key in cls.model_fields:
        assert f"`{key}`" in page or f"`[{key}]" in page, f"{cls.__name__}.{key}"


@pytest.mark.parametrize("file", METHOD_FILES, ids=lambda file: file.stem)
def test_every_method_has_a_page(file):
    page = text_of(f"docs/methods/{file.stem}.md")
    assert file.stem in METHODS
    assert f"docs/methods/{file.stem}.md" in text_of("README.md")
    for marker in (f"<!-- made:equation:{file.stem} -->", f"<!-- made:presets:{file.stem} -->"):
        assert marker in page
    for heading in ("Equation", "Differences", "Presets", "Logged terms", "Run it", "Result"):
        assert f"\n## {heading}" in page


@pytest.mark.parametrize("name", METHODS)
def test_page_says_why_robust_differs(name):
    page = text_of(f"docs/methods/{name}.md")
    explained = page.rpartition("<!-- /made -->")[2]
    for key in presets(name)["robust"]["method"]:
        assert f"`{key}`" in explained, key
    for preset in presets(name):
        assert f"`{preset}`" in explained, preset


def test_every_check_code_is_explained():
    names = ("check", "check_case", "compare_cases")
    names += ("dicom", "dicom_cases", "dicom_headers", "dicom_stack", "dicom_tree")
    sources = [ROOT / f"src/vclipseg/data/{name}.py" for name in names]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    codes = set(re.findall(r'"([a-z]+(?:-[a-z0-9]+)+)"', text))
    codes |= {"duplicate-in-train", "duplicate-in-test"}  # made from the case's role
    explained = set(re.findall(r"^\| `([a-z0-9-]+)`", text_of("docs/how-to/own-data.md"), re.M))
    assert codes == explained


def test_every_metric_and_column_is_explained():
    metrics, run_folder = (
        text_of("docs/reference/metrics.md"),
        text_of("docs/reference/run-folder.md"),
    )
    assert all(f"`{metric}`" in metrics for metric in METRICS)
    assert all(f"`{column}`" in run_folder for column in CASE_COLUMNS)
    page = text_of("docs/reference/records.md")
    facts = [field.name for field in fields(GridFacts)]
    for column in (*records.RUN_COLUMNS, *records.RECORD_CASE_COLUMNS, *develop.COLUMNS, *facts):
        assert f"`{column}`" in page or f"`{column}`" in run_folder, column


def test_decisions_are_numbered_and_listed():
    pages = sorted((ROOT / "docs/decisions").glob("0*.md"))
    listed = re.findall(r"\]\((0\d+-[\w-]+\.md)\)", text_of("docs/decisions/README.md"))
    assert listed == [page.name for page in pages]
    for number, page in enumerate(pages, start=1):
        text = page.read_text(encoding="utf-8")
        assert page.name.startswith(f"{number:04d}-")
        assert text.startswith(f"# {number}. ")
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Consequences"))


# The run folder


@pytest.mark.slow
def test_run_folder_page_names_every_file_and_key(tmp_path):
    from vclipseg.checkpoint import load_model, load_state
    from vclipseg.console import Console
    from vclipseg.data.phantom import make_phantom
    from vclipseg.experiment import evaluate_run, new_run, train_run

    data = make_phantom(
        tmp_path / "data", labeled=1, unlabeled=1, test=1, shape=(32, 32, 32), spacing=2.5
    )
    recipe = {
        "text": {"source": "orthogonal"},
        "method": {"filters": 2},
        "train": {"steps": 1, "patch": [32, 32, 32]},
    }
    console = Console(quiet=True)
    run, prepared = new_run(build_experiment(recipe, {}), data, tmp_path / "run", console)
    train_run(run, prepared.cases, console)
    evaluate_run(run, console)

    page = text_of("docs/reference/run-folder.md")
    for file in run.folder.rglob("*"):
        inner = file.parent.name in ("tensorboard", "predictions")
        assert inner or file.name in page, file.name
    keys = set(load_state(run.state_path)) | {"version"} | set(load_model(run.model_path)[1])
    for file in run.folder.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        keys |= set(content)
        if file.name == "experiment.json":
            keys |= set(content["settings"]) | set(content["data"]) | set(content["text"])
    assert not [key for key in keys if f"`{key}`" not in page]


def test_the_volumes_that_the_authors_constants_lose_are_of_the_record():
    """Masks as a share of the reference on the Left Atrium, as the benchmark page tells it."""
    folder = ROOT / "results" / "la-1.25mm-methods"
    asked = (
        ("cps", "faithful"),
        ("mcnet", "faithful"),
        ("mcnet", "plus"),
        ("vclipseg", "faithful"),
    )
    runs = {
        (run.method, run.preset): run.settings_hash
        for run in records.read_runs(folder)
        if run.seed == 0 and not run.lcc
    }
    ratios = defaultdict(list)
    with (folder / "cases.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["lcc"] == "0":
                ratio = float(row["prediction_ml"]) / float(row["reference_ml"])
                ratios[row["settings_hash"]].append(ratio)
    means = [f"{np.mean(ratios[runs[key]]):.2f}" for key in (*asked, ("supervised", "faithful"))]
    told = "have {}, {}, {} and {} of its volume on average, supervised's {}".format(*means)
    assert told in " ".join(text_of("docs/benchmark.md").split())


def test_what_dropout_costs_is_in_the_development_record():
    with (ROOT / "results" / "development.csv").open(newline="", encoding="utf-8") as file:
        dice = {row["overrides"]: float(row["dice"]) for row in csv.DictReader(file)}
    said = text_of("docs/benchmark.md")
    for changed in ("", " train.weights=ema train.ema_decay=0", " method.dropout=0"):
        cps, mcnet = (
            dice[f"method.name={name} train.seed=0 method.preset=faithful{changed}"]
            for name in ("cps", "mcnet")
        )
        assert f" | {cps:.3f} | {mcnet:.3f} |" in said
    for name, changed in (
        ("plus method.dropout=0", "mcnet"),
        ("faithful method.dropout=0", "vclipseg"),
    ):
        found = dice[f"method.name={changed} train.seed=0 method.preset={name}"]
        assert f" {found:.3f} |" in said
    for name, changed in (
        ("supervised", ""),
        ("supervised", " method.patches=[2,0]"),
        ("mean_teacher", ""),
        ("mean_teacher", " method.dropout=0"),
        ("mean_teacher", " method.warmup=0.4"),
        ("ua_mt", " method.dropout=0"),
    ):
        found = dice[f"method.name={name} train.seed=0 method.preset=faithful{changed}"]
        assert f" | {found:.3f} |" in said
    caml = dice[
        "method.name=caml train.seed=0 method.preset=faithful method.consistency_weight=0.1"
    ]
    assert f"(`method.consistency_weight=0.1`) gives {caml:.3f}" in said


def test_what_cps_loses_is_in_the_development_record():
    with (ROOT / "results" / "development.csv").open(newline="", encoding="utf-8") as file:
        dice = {row["overrides"]: float(row["dice"]) for row in csv.DictReader(file)}
    said = " ".join(text_of("docs/benchmark.md").split())
    dlb, ssl4mis, default = (
        f"{dice[f'method.name=cps train.seed=0 method.preset={changed}']:.3f}"
        for changed in (
            "cps_dlb method.dropout=0",
            "ssl4mis method.dropout=0",
            "ssl4mis method.dropout=0 method.initialization=default",
        )
    )
    assert f"| {dlb} | In this one seed it is dropout" in said
    assert f"`ssl4mis` has {ssl4mis} without dropout" in said
    assert f"(`method.initialization=default`) it has {default}." in said
    two = "method.name=supervised train.seed=0 method.preset=faithful method.patches=[2,0]"
    alone = "method.dice_weight=0 method.ce_weight=1"
    plain, slow, fast, whole = (
        f"{dice[f'{two} {changed}']:.3f}"
        for changed in (
            "method.dropout=0 train.lr_power=0.9",
            f"{alone} train.lr=0.005 train.lr_power=0.9",
            f"{alone} train.lr=0.02 train.lr_power=0.9",
            f"{alone} method.dropout=0 train.lr=0.005 train.lr_power=0.9",
        )
    )
    assert f"supervised without dropout has {plain}." in said
    assert f"has {slow}; with four times the rate it has {fast}, without dropout {whole}." in said


def test_what_is_said_of_thresholds_is_in_their_record():
    said = " ".join(text_of("docs/benchmark.md").split())
    with (ROOT / "results" / "thresholds.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for overrides in dict.fromkeys(row["overrides"] for row in rows):
        of_run = [row for row in rows if row["overrides"] == overrides]
        half = next(row for row in of_run if row["threshold"] == "0.5")
        best = max(of_run, key=lambda row: float(row["dice"]))
        dice, highest, ceiling = (float(best[key]) for key in ("dice", "highest", "ceiling"))
        if "ssl4mis" in overrides:
            assert f"the best, {best['threshold']}, gives {dice:.3f}." in said
        else:
            assert float(half["dice"]) == 0
            shown = f"0.000 | {dice:.3f} ({best['threshold']}) | {highest:.3f} | {ceiling:.3f} |"
            assert shown in said
