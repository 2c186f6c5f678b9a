from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from vclipseg.networks.attention import CrossSampleAttention


def make(channels=8, dropout=0.0):
    torch.manual_seed(0)
    return CrossSampleAttention(channels, heads=4, dropout=dropout)


def numbers(tensor):
    return tensor.detach().double().numpy()


def naive_norm(x, norm):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps)
    return x * numbers(norm.weight) + numbers(norm.bias)


def naive_layer(tokens, layer, heads=4):
    """One post-norm Transformer encoder layer on the tokens (N, F) of one set."""
    count, channels = tokens.shape
    width = channels // heads
    qkv = tokens @ numbers(layer.self_attn.in_proj_weight).T + numbers(layer.self_attn.in_proj_bias)
    q, k, v = np.split(qkv, 3, axis=1)
    mixed = np.zeros_like(tokens)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for n in range(count):
            scores = np.exp(k[:, part] @ q[n, part] / math.sqrt(width))
            mixed[n, part] = (scores / scores.sum()) @ v[:, part]
    out = layer.self_attn.out_proj
    tokens = naive_norm(tokens + mixed @ numbers(out.weight).T + numbers(out.bias), layer.norm1)
    hidden = np.maximum(tokens @ numbers(layer.linear1.weight).T + numbers(layer.linear1.bias), 0)
    fed = hidden @ numbers(layer.linear2.weight).T + numbers(layer.linear2.bias)
    return naive_norm(tokens + fed, layer.norm2)


def test_tokens_attend_to_their_patch_and_then_to_the_other_patches():
    attention, features = make(), torch.randn(3, 8, 2, 1, 3)
    tokens = numbers(features).reshape(3, 8, 6).transpose(0, 2, 1)  # (B, N, F)
    tokens = np.stack([naive_layer(patch, attention.within) for patch in tokens])
    tokens = np.stack([naive_layer(tokens[:, n], attention.across) for n in range(6)], axis=1)
    expected = tokens.transpose(0, 2, 1).reshape(features.shape)
    np.testing.assert_allclose(numbers(attention(features)), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_compared_at_the_same_position():
    attention, features = make(), torch.randn(3, 8, 2, 2, 2)
    attention.within = nn.Identity()
    changed = features.clone()
    changed[2, :, 1, 0, 1] += 1
    moved = (attention(features) - attention(changed)).abs().amax(1) > 1e-6
    assert moved[:, 1, 0, 1].all()
    assert moved.sum() == 3


def test_evaluation_leaves_the_map_as_it_is():
    attention, features = make(dropout=0.5), torch.randn(2, 8, 2, 2, 2)
    assert not torch.equal(attention(features), features)
    assert torch.equal(attention.eval()(features), features)


@pytest.mark.parametrize(("channels", "parameters"), [(128, 2 * 198_272), (8, 2 * 872)])
def test_parameter_count(channels, parameters):
    """3F^2 + 3F, F^2 + F, 8F^2 + 5F and 4F a layer."""
    assert sum(p.numel() for p in make(channels).parameters()) == parameters


def test_bfloat16():
    with torch.autocast("cpu", torch.bfloat16):
        out = make()(torch.randn(2, 8, 2, 2, 2).bfloat16())
    assert torch.isfinite(out).all()
