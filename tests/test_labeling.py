"""Pseudo-labels of several outputs, against their formulas in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vclipseg.labeling import fuse


def naive_fuse(probs, dices, weighting):
    """VCLIPSeg's equations 7 to 9 and their variants."""
    if weighting == "equal":
        weights = [1.0 for _ in probs]
    elif weighting == "voxel_entropy":
        weights = [np.exp((p * np.log(p)).sum(1, keepdims=True)) for p in probs]
    else:
        weights = [math.exp(1 - 1 / (1 + math.exp(-d))) for d in dices]
    return sum(w * p for w, p in zip(weights, probs, strict=True)) / sum(weights)


@pytest.mark.parametrize("weighting", ["dynamic", "equal", "voxel_entropy"])
@pytest.mark.parametrize("outputs", [2, 3])
def test_fuse_formula(weighting, outputs):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], (outputs, 2, 4, 3, 2))  # (outputs, B, X, Y, Z, K)
    probs = np.moveaxis(probs, -1, 2)
    dices = [0.2, 0.9, 0.5][:outputs]
    found = fuse([torch.from_numpy(p) for p in probs], torch.tensor(dices).double(), weighting)
    np.testing.assert_allclose(found, naive_fuse(list(probs), dices, weighting), rtol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1)


def test_the_better_output_counts_more():
    probs = [torch.zeros(1, 2, 1, 1, 1), torch.ones(1, 2, 1, 1, 1)]
    assert float(fuse(probs, torch.tensor([0.1, 0.8]), "dynamic").mean()) < 0.5
    assert float(fuse(probs, torch.tensor([0.8, 0.1]), "dynamic").mean()) > 0.5
    assert float(fuse(probs, torch.tensor([0.4, 0.4]), "dynamic").mean()) == pytest.approx(0.5)


@pytest.mark.parametrize("weighting", ["dynamic", "equal", "voxel_entropy"])
def test_fuse_is_exact_where_networks_are_bf16(weighting):
    """Weights differ by less than bf16 can tell."""
    probs = list(torch.rand(2, 3, 2, 4, 4, 4).softmax(2))
    dices = torch.tensor([0.30, 0.31])
    with torch.autocast("cpu", torch.bfloat16):
        found = fuse(probs, dices, weighting)
    assert found.dtype == torch.float32
    assert torch.equal(found, fuse(probs, dices, weighting))


def test_fuse_of_certain_outputs_is_finite():
    probs = [
        torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1),
        torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1),
    ]
    assert torch.isfinite(fuse(probs, torch.zeros(2), "voxel_entropy")).all()


@pytest.mark.parametrize(("num_classes", "same"), [(2, True), (3, False)])
def test_of_two_classes_the_surer_of_two_decides_the_mean_as_well(num_classes, same):
    torch.manual_seed(0)
    probs = [torch.randn(2, num_classes, 8, 8, 8).softmax(1) for _ in range(2)]
    equal, by_voxel = (
        fuse(probs, torch.zeros(2), weighting).argmax(1) for weighting in ("equal", "voxel_entropy")
    )
    assert torch.equal(equal, by_voxel) is same
