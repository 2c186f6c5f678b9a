from __future__ import annotations

import numpy as np
import pytest
import torch

from vclipseg.data.datasets import open_dataset
from vclipseg.data.plan import PlanSettings, make_plan
from vclipseg.defaults import CPU, GPU, choose_patch, own_data_defaults


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 64, 48), (64, 64, 48)),
        ((60, 50, 33), (64, 64, 48)),
        ((30, 30, 6), (32, 32, 16)),
        ((1, 1, 1), (16, 16, 16)),
        ((512, 512, 12), (96, 96, 16)),
        ((512, 512, 512), (48, 48, 48)),
    ],
)
def test_patch_follows_the_image(shape, expected):
    found = choose_patch(np.array(shape, dtype=float), CPU["voxels"])
    assert found == expected


@pytest.mark.parametrize("shape", [(512, 512, 12), (600, 80, 300), (90, 1000, 90), (5, 5, 900)])
@pytest.mark.parametrize("size", [CPU, GPU])
def test_patch_is_of_bounded_size(shape, size):
    patch = choose_patch(np.array(shape, dtype=float), size["voxels"])
    assert all(side % 16 == 0 and side >= 16 for side in patch)
    assert np.prod(patch) <= size["voxels"]


@pytest.mark.parametrize("gpu", [True, False])
def test_own_data_defaults(tiny_data, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    dataset = open_dataset(tiny_data)
    found = own_data_defaults(dataset, make_plan(dataset, dataset.train, PlanSettings()))
    size = GPU if gpu else CPU
    assert found["name"] == dataset.name
    assert found["train"] == {"patch": [32, 32, 32], "steps": size["steps"]}
    assert found["method"] == {"filters": size["filters"]}


def test_the_prepared_grid_decides_not_the_stored_one(tiny_data):
    """Stored 24 x 24 x 18 of 4 mm; at 2 mm along the last axis 36 slices."""
    dataset = open_dataset(tiny_data)
    plan = make_plan(dataset, dataset.train, PlanSettings(spacing=(8.0, 4.0, 2.0)))
    assert own_data_defaults(dataset, plan)["train"]["patch"] == [16, 32, 48]
