from __future__ import annotations

import threading
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from vclipseg.data.augment import AugmentSettings
from vclipseg.data.batch import Batch, PatchSampler, made_ahead
from vclipseg.data.resident import Resident

LABELED, UNLABELED = ("a", "b", "c"), ("u", "v", "w", "x", "y")


def image(case_id, shape=(12, 10, 9)):
    """Every voxel holds the number of its case and its place."""
    number = sorted((*LABELED, *UNLABELED)).index(case_id)
    return (1000 * number + np.arange(np.prod(shape)).reshape(1, *shape)).astype(np.float32)


def labels(case_id):
    """The parity of the image, for labeled cases; nobody may ask for others."""
    if case_id not in LABELED:
        raise AssertionError(f"the labels of {case_id} were asked for")
    return (image(case_id)[0] % 2).astype(np.uint8)


def make_sampler(patches=(2, 2), seed=0, patch=(4, 4, 4), augment=None, **changes):
    values = {
        "image": image,
        "labels": labels,
        "labeled": LABELED,
        "unlabeled": UNLABELED,
        "patch": patch,
        "patches": lambda step: patches,
        "augment": augment or AugmentSettings(rotate_flip=True),
        "seed": seed,
    }
    return PatchSampler(**{**values, **changes})


def same(a, b):
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and a.case_ids == b.case_ids
        and a.generator.initial_seed() == b.generator.initial_seed()
    )


# The batch


def test_labels_of_unlabeled_cases_have_no_place():
    names = {f.name for f in fields(Batch)}
    assert names == {"images", "labels", "plain_images", "case_ids", "generator", "joint_generator"}
    batch = make_sampler().batch(0)  # `labels` above raises when asked for an unlabeled case
    assert (len(batch.images), len(batch.labels)) == (4, 2)


def test_batch_is_labeled_first():
    batch = Batch(torch.arange(5.0).view(5, 1, 1, 1, 1), torch.zeros(2, 1, 1, 1))
    assert batch.num_labeled == 2
    assert batch.labeled_images.flatten().tolist() == [0, 1]
    assert batch.unlabeled_images.flatten().tolist() == [2, 3, 4]
    assert [part.tolist() for part in batch.split(torch.arange(5))] == [[0, 1], [2, 3, 4]]
    assert batch.plain is batch.images


def test_batch_moves_as_a_whole():
    batch = make_sampler(augment=AugmentSettings(intensity=1.0)).batch(0)
    moved = batch.to("cpu")
    assert same(batch, moved)
    assert torch.equal(batch.plain, moved.plain)


def test_types_and_shapes():
    batch = make_sampler(patches=(3, 1), patch=(4, 5, 6)).batch(0)
    assert (batch.images.shape, batch.images.dtype) == ((4, 1, 4, 5, 6), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((3, 4, 5, 6), torch.int64)
    assert len(batch.case_ids) == 4
    assert set(batch.case_ids[:3]) <= set(LABELED)
    assert batch.case_ids[3] in UNLABELED


# The sampler


def test_same_seed_same_batches():
    a, b, c = make_sampler(seed=1), make_sampler(seed=1), make_sampler(seed=2)
    for step in range(6):
        assert same(a.batch(step), b.batch(step))
    assert not all(same(a.batch(step), c.batch(step)) for step in range(6))


def test_a_batch_does_not_depend_on_those_before():
    fresh = make_sampler()
    in_order = list(make_sampler().batches(0, 8))
    assert all(same(fresh.batch(step), in_order[step]) for step in (5, 2, 7, 2))
    assert all(same(a, b) for a, b in zip(make_sampler().batches(5, 8), in_order[5:], strict=True))


def test_steps_and_slots_differ():
    one_case = make_sampler(labeled=("a",), unlabeled=("u",), patches=(2, 2))
    patches = [p for step in range(4) for p in one_case.batch(step).images]
    assert len({p.numpy().tobytes() for p in patches}) == len(patches)


@pytest.mark.parametrize("patches", [(2, 2), (1, 3), (4, 4), (3, 0)])
def test_each_case_once_an_epoch(patches):
    sampler = make_sampler(patches=patches)
    drawn = [sampler.batch(step).case_ids for step in range(30)]
    streams = (
        (LABELED, [i for ids in drawn for i in ids[: patches[0]]]),
        (UNLABELED, [i for ids in drawn for i in ids[patches[0] :]]),
    )
    for cases, stream in streams:
        epochs = [stream[i : i + len(cases)] for i in range(0, len(stream), len(cases))]
        assert all(sorted(epoch) == sorted(cases) for epoch in epochs[:-1])
        assert not stream or len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew


def test_the_number_of_patches_may_change_on_the_way():
    sampler = replace(make_sampler(), patches=lambda step: (4, 0) if step < 2 else (2, 2))
    batches = list(sampler.batches(0, 4))
    assert [batch.num_labeled for batch in batches] == [4, 4, 2, 2]
    assert all(len(batch.images) == 4 for batch in batches)


def test_image_and_labels_are_turned_and_cut_alike():
    sampler = make_sampler(augment=AugmentSettings(rotate_flip=True, foreground_share=0.5))
    for batch in sampler.batches(0, 10):
        assert torch.equal(batch.labeled_images[:, 0].long() % 2, batch.labels)


def test_labels_are_those_of_the_plain_patch():
    sampler = make_sampler(augment=AugmentSettings(rotate_flip=True, intensity=1.0))
    batch = sampler.batch(0)
    assert not torch.equal(batch.images, batch.plain)
    assert torch.equal(batch.plain[:2, 0].long() % 2, batch.labels)
    calm = make_sampler(augment=AugmentSettings(rotate_flip=True)).batch(0)
    assert torch.equal(calm.images, calm.plain)


def test_patches_come_from_their_cases():
    names = sorted((*LABELED, *UNLABELED))
    for batch in make_sampler().batches(0, 5):
        numbers = (batch.images.amin((1, 2, 3, 4)) // 1000).long().tolist()
        assert [names[n] for n in numbers] == list(batch.case_ids)


def test_volumes_smaller_than_the_patch():
    """Six slices under a patch of sixteen: padded, and labels with them."""
    batch = make_sampler(patch=(16, 16, 16)).batch(0)
    assert batch.images.shape == (4, 1, 16, 16, 16)
    assert torch.equal(batch.labeled_images[:, 0].long() % 2, batch.labels)
    thin = make_sampler(
        image=lambda case_id: image(case_id)[..., :6], labels=lambda i: labels(i)[..., :6]
    )
    assert thin.batch(0).images.shape == (4, 1, 4, 4, 4)


def test_foreground_share_places_labeled_patches_only():
    def rare(case_id):
        found = np.zeros((30, 30, 30), dtype=np.uint8)
        found[15, 15, 15] = LABELED.index(case_id) + 1
        return found

    def made(share):
        return make_sampler(
            image=lambda case_id: np.zeros((1, 30, 30, 30), dtype=np.float32),
            labels=rare,
            augment=AugmentSettings(foreground_share=share),
        )

    assert all(labels.any() for batch in made(1.0).batches(0, 10) for labels in batch.labels)
    hits = [bool(labels.any()) for batch in made(0.0).batches(0, 20) for labels in batch.labels]
    assert np.mean(hits) < 0.2


def test_several_channels_share_a_patch():
    sampler = make_sampler(image=lambda i: np.concatenate([image(i), -image(i)]))
    batch = sampler.batch(0)
    assert batch.images.shape[1] == 2
    assert torch.equal(batch.images[:, 0], -batch.images[:, 1])


def test_the_generator_is_seeded_by_the_step():
    sampler = make_sampler()
    draws = [torch.rand(3, generator=sampler.batch(step).generator).tolist() for step in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_unlabeled_patches_need_unlabeled_cases():
    with pytest.raises(ValueError, match="unlabeled cases"):
        make_sampler(unlabeled=()).batch(0)
    assert make_sampler(unlabeled=(), patches=(2, 0)).batch(0).images.shape[0] == 2


@pytest.mark.parametrize("patches", [(2, 2), (4, 0), (2, 4)])
def test_ranks_share_a_joint_batch(patches):
    """Row j of rank r is row r + jN of what one process with N times the patches has, each kind apart."""
    ranks = 3
    joint = make_sampler(patches=tuple(n * ranks for n in patches)).batch(5)
    for rank in range(ranks):
        mine = replace(make_sampler(patches=patches), rank=rank, ranks=ranks).batch(5)
        for name in ("images", "plain_images"):
            parts = zip(
                mine.split(getattr(mine, name)), joint.split(getattr(joint, name)), strict=True
            )
            for own, whole in parts:
                assert torch.equal(own, whole[rank::ranks])
        assert torch.equal(mine.labels, joint.labels[rank::ranks])
        labeled, unlabeled = joint.split(np.array(joint.case_ids))
        assert mine.case_ids == (*labeled[rank::ranks], *unlabeled[rank::ranks])


def test_ranks_draw_for_themselves_and_together():
    alone = make_sampler().batch(5)
    assert alone.common is alone.generator
    batches = [replace(make_sampler(), rank=rank, ranks=2).batch(5) for rank in (0, 1)]
    own = {float(torch.rand((), generator=batch.generator)) for batch in batches}
    common = {float(torch.rand((), generator=batch.common)) for batch in batches}
    assert (len(own), len(common)) == (2, 1)
    assert common == {float(torch.rand((), generator=alone.common))}


@pytest.mark.parametrize("patch", [(4, 4, 4), (16, 16, 16)], ids=["inside", "beyond"])
def test_batches_of_resident_volumes_are_the_same(patch):
    augment = AugmentSettings(rotate_flip=True, foreground_share=0.5)
    sampler = make_sampler(patch=patch, augment=augment)
    resident = replace(sampler, resident=Resident(torch.device("cpu"), 2**20))
    for step in range(4):
        assert same(resident.batch(step), sampler.batch(step))
    assert len(resident.resident.held) == 8 + 3  # images of all cases, labels of the labeled ones


# Made ahead


def test_the_next_batch_is_made_while_a_step_runs():
    asked, ready = [], threading.Event()

    def batch_at(step):
        asked.append(step)
        if step == 1:
            ready.set()
        return step

    with made_ahead(batch_at, 3) as next_batch:
        assert next_batch(0) == 0
        assert ready.wait(10)  # nobody asked for it yet
        assert [next_batch(1), next_batch(2)] == [1, 2]
    assert asked == [0, 1, 2]


def test_any_step_can_be_asked_for():
    with made_ahead(lambda step: step, 9) as next_batch:
        assert [next_batch(step) for step in (5, 6, 2, 8)] == [5, 6, 2, 8]


def test_an_error_reaches_the_step_whose_batch_it_is():
    def batch_at(step):
        if step == 1:
            raise OSError("the disk is gone")
        return step

    with made_ahead(batch_at, 3) as next_batch:
        assert next_batch(0) == 0
        with pytest.raises(OSError, match="disk"):
            next_batch(1)


def test_batches_made_ahead_are_the_same():
    sampler = make_sampler()
    with made_ahead(make_sampler().batch, 4) as next_batch:
        assert all(same(next_batch(step), sampler.batch(step)) for step in range(4))
