"""The published figures, checked against the text of the paper by other means than their file."""

from __future__ import annotations

import math

import pytest

from vclipseg.tables.published import datasets, is_full_size, names, published

PAPER = {  # Tables 1 and 2: Dice, Jaccard, 95HD, ASD
    ("la", 4, "supervised", "faithful"): (50.13, 39.32, 32.04, 10.27),
    ("la", 80, "supervised", "robust"): (92.27, 85.69, 4.33, 1.45),
    ("la", 8, "mean_teacher", "faithful"): (87.45, 77.88, 18.60, 4.96),
    ("la", 16, "ua_mt", "robust"): (90.19, 82.26, 7.64, 2.14),
    ("la", 4, "mcnet", "faithful"): (82.48, 70.79, 18.71, 4.49),
    ("la", 8, "mcnet", "plus"): (88.63, 79.72, 9.01, 1.78),
    ("la", 4, "caml", "faithful"): (87.42, 77.74, 9.57, 2.23),
    ("la", 4, "vclipseg", "faithful"): (88.51, 79.49, 10.48, 2.28),
    ("la", 8, "vclipseg", "robust"): (90.59, 82.87, 6.22, 1.61),
    ("la", 16, "vclipseg", "code"): (91.15, 83.82, 5.86, 1.49),
    ("la", 4, "vclipseg", "mcnet_dlb"): (86.93, 77.10, 9.22, 2.19),
    ("la", 4, "cps", "faithful"): (84.67, 73.77, 16.60, 5.04),
    ("la", 4, "cps", "cps_dlb"): (85.52, 75.11, 12.14, 2.67),
    ("pancreas", 12, "supervised", "faithful"): (75.07, 61.96, 10.79, 3.31),
    ("pancreas", 62, "supervised", "faithful"): (83.48, 71.98, 4.38, 1.25),
    ("pancreas", 12, "caussl", "mc"): (77.02, 63.85, 7.69, 1.62),
    ("pancreas", 12, "vclipseg", "paper"): (80.56, 68.13, 6.75, 1.49),
}


@pytest.mark.parametrize("key", PAPER, ids=lambda key: "-".join(map(str, key)))
def test_figures_of_the_paper(key):
    figure = published(*key)
    dice, jaccard, hd95, asd = PAPER[key]
    assert figure.dice == pytest.approx(dice / 100)
    assert figure.jaccard == pytest.approx(jaccard / 100)
    assert (figure.hd95_voxel, figure.asd_voxel) == (hd95, asd)
    assert figure.source.startswith("VCLIPSeg paper, Table")


def test_the_papers_own_differences_hold():
    """Figures that the text repeats: gains of dynamic labeling, and the lead over ARCO."""
    plain, dlb = (
        published("la", 4, *key) for key in (("mcnet", "faithful"), ("vclipseg", "mcnet_dlb"))
    )
    assert dlb.dice - plain.dice == pytest.approx(0.0445)
    assert plain.hd95_voxel - dlb.hd95_voxel == pytest.approx(9.49)
    cps, cps_dlb = (published("la", 4, "cps", preset) for preset in ("faithful", "cps_dlb"))
    assert cps_dlb.jaccard - cps.jaccard == pytest.approx(0.0134)
    ours, arco = published("la", 4, "vclipseg", "faithful"), published("la", 4, "arco", "faithful")
    assert ours.dice - arco.dice == pytest.approx(0.0071)
    assert math.isnan(arco.jaccard)


def test_ablations_are_found_by_name_only():
    assert published("la", 8, "vclipseg", "faithful, VWPM only") is None
    found = published("la", 8, "vclipseg", "faithful, VWPM only", "VCLIPSeg, VWPM only")
    assert found.dice == pytest.approx(0.8976)
    assert published("la", 16, "x", "y", "VCLIPSeg, VTCM only").dice == pytest.approx(0.9101)


def test_later_methods_say_how_they_were_chosen():
    bcp = published("la", 4, "bcp", "robust")
    assert (bcp.dice, bcp.hd95_voxel) == (pytest.approx(0.8802), 7.90)
    assert bcp.origin.endswith("checkpoint: best on test; only the largest component")
    assert published("la", 4, "ad_mt", "faithful").dice == pytest.approx(0.8963)
    crossmatch = published("la", 8, "crossmatch", "robust")
    assert (crossmatch.dice, crossmatch.selection) == (pytest.approx(0.9133), "last")
    assert published("la", 4, "crossmatch", "robust") is None


def test_no_figure_where_there_is_none():
    assert published(None, 4, "vclipseg", "faithful") is None
    assert published("la", 5, "vclipseg", "faithful") is None
    assert published("hippocampus", 4, "vclipseg", "faithful") is None


def test_size_of_the_published_runs():
    assert set(datasets()) == {"la", "pancreas"}
    assert is_full_size("la", 16, (112, 112, 80))
    assert not is_full_size("la", 8, (64, 64, 48))
    assert {"V-Net", "VCLIPSeg", "CPS + DLB"} <= set(names("la"))
