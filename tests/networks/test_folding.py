from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from toy import batch_for, build
from vclipseg.methods import METHODS
from vclipseg.networks.folding import fold_batchnorm
from vclipseg.networks.vnet import MultiDecoderVNet


@torch.no_grad()
def with_statistics(model):
    """As after training: means, variances, scales and shifts of their own."""
    for norm in [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]:
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 2)
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", list(METHODS))
@torch.no_grad()
def test_predictions_stay(name):
    method = with_statistics(build(name))
    images = batch_for(method).images
    folded = fold_batchnorm(copy.deepcopy(method))
    torch.testing.assert_close(folded.predict(images), method.predict(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("upsampling", ["transposed", "trilinear", "nearest"])
def test_none_is_left_in_a_vnet(upsampling):
    model = fold_batchnorm(MultiDecoderVNet(1, 2, (upsampling,), 2).eval())
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm3d)]


def test_a_model_in_training_is_refused():
    with pytest.raises(ValueError, match="evaluation"):
        fold_batchnorm(build())
