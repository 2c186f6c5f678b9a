"""How far decoders differ, by the formula and on a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from toy import build
from vclipseg.data.plan import Plan
from vclipseg.data.volume import Volume
from vclipseg.disagreement import disagreement, look, uncertainty
from vclipseg.inference import Predictor
from vclipseg.methods import METHODS


def opinions(count=2, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, 4, 5, 6, generator=generator).softmax(1)


def test_of_two_it_is_the_total_variation_distance():
    p = opinions()
    expected = 0.5 * (p[0] - p[1]).abs().sum(0)
    torch.testing.assert_close(disagreement(p), expected)


def test_its_ends():
    same = opinions(1).repeat(3, 1, 1, 1, 1)
    assert disagreement(same).max() < 1e-6
    sure = torch.zeros(2, 2, 1, 1, 1)
    sure[0, 0] = sure[1, 1] = 1
    assert disagreement(sure).item() == 1


def test_of_one_it_is_the_entropy():
    p = opinions(1)
    entropy = -(p[0] * p[0].log()).sum(0) / math.log(3)
    torch.testing.assert_close(disagreement(p), entropy)


def test_uncertainty_does_not_grow_with_the_organ():
    def ball(share):
        p = torch.zeros(2, 2, 10, 10, 10)
        p[:, 0] = 1
        for opinion, extent in ((0, share), (1, share - 1)):
            p[opinion, 1, :extent] = 1
            p[opinion, 0, :extent] = 0
        return p

    assert uncertainty(ball(2)) > uncertainty(ball(8))
    nothing = torch.zeros(2, 2, 4, 4, 4)
    nothing[:, 0] = 1
    assert uncertainty(nothing) == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_look_has_the_mask_of_predict(name):
    method = build(name)
    description = {
        "class_names": ["background", "organ"],
        "label_values": [0, 1],
        "channel_names": ["MRI"],
        "plan": Plan(spacing=(1.0, 1.0, 1.0), intensity=("zscore",)).model_dump(mode="json"),
        "predict": {"precision": "fp32"},
        "patch": [16, 16, 16],
        "method": {"filters": 4},
    }
    predictor = Predictor(method, description)
    rng = np.random.default_rng(0)
    affine = np.diag([-1.0, 1.0, 1.25, 1.0])
    image = Volume(rng.normal(size=(1, 18, 16, 14)).astype(np.float32), affine)
    windows = []
    made = look(predictor, image, windows.append)
    assert np.array_equal(made.mask.array, predictor.predict(image).array)
    assert made.disagreement.array.shape == (18, 16, 14)
    assert 0 <= made.disagreement.array.min() <= made.disagreement.array.max() <= 1
    assert 0 < made.uncertainty <= 1
    assert made.class_shares == (float((made.mask.array == 1).mean()),)
    assert len(made.features) == 64
    assert sum(windows) > 1
