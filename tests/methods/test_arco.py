"""ARCO's equations, written once more in numpy, its memories and its switches one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import vclipseg.contrast
from toy import LATE, batch_for, build, fast, fit, make_batch, make_sure
from vclipseg.contrast import ContrastSettings, VoxelContrast
from vclipseg.losses import IGNORE
from vclipseg.methods import preset
from vclipseg.methods.arco import ArcoSettings
from vclipseg.networks.vnet import VNet
from vclipseg.views import jittered_and_blurred

NUM_CLASSES = 3
SIZE = (16, 20, 16)
SMALL = {
    "anchors": 12,
    "negatives_per_anchor": 9,
    "banks": (60, 40),
    "bank_intake": 8,
    "pooled": (3, 2, 2),
    "windows": (3, 2, 1),
    "relation_embedding": 6,
    "queue": 7,
}
STEP, STEPS = 1_500, 6_000


def make(preset_name="faithful", **changes):
    """A small method whose banks are full and whose teacher is another network."""
    settings = {**SMALL, "dropout": 0.0, "patches": (2, 3), "filters": 2, **changes}
    method = build("arco", preset_name, num_classes=NUM_CLASSES, steps=STEPS, **settings)
    make_sure(method)
    with torch.no_grad():
        for teacher, _ in method.pairs():
            for p in teacher.parameters():
                p.mul_(1.1)
    if method.settings.stage == "train":
        for bank in method.contrast.all_banks():
            bank.push(torch.randn(50, 16))
    return method


def patches(num_labeled=2, rows=5):
    """Labels of classes that the network knows something of, some of them unknown."""
    batch = make_batch(3, SIZE, num_classes=NUM_CLASSES, patches=(rows, 0))
    labels = batch.labels[:num_labeled].clone()
    labels[:, :2] = IGNORE
    plain = batch.images + 0.1 * torch.randn(batch.images.shape, generator=batch.generator)
    return replace(batch, labels=labels, plain_images=plain)


BATCH = patches()


@pytest.fixture
def draws(monkeypatch):
    """Every draw that is made, in order: what it was asked, and what it gave."""
    made = []

    def spy(sampler, candidates, count, generator=None):
        found = original(sampler, candidates, count, generator)
        made.append((sampler, candidates, found.numpy()))
        return found

    original = vclipseg.contrast.draw
    monkeypatch.setattr(vclipseg.contrast, "draw", spy)
    return made


# The second stage in numpy


def softmax(logits):
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def naive_dice_mc(p, labels):
    """Mean over all classes, squares in the denominator, known voxels alone."""
    values = []
    for k in range(NUM_CLASSES):
        a, g = p[:, k] * (labels != IGNORE), labels == k
        values.append(1 - (2 * (a * g).sum() + 1e-5) / ((a**2).sum() + g.sum() + 1e-5))
    return np.mean(values)


def naive_ce(p, labels):
    """A map (B, X, Y, Z), 0 where the label is not known."""
    known = np.where(labels == IGNORE, 0, labels)
    return -np.log(np.take_along_axis(p, known[:, None], 1)[:, 0]) * (labels != IGNORE)


def naive_contrast(student, teacher, probs, labels, banks, draws, s):
    """Class by class; `labels` are those of voxels that take part."""
    losses, draws = [], iter(draws)
    vectors, keys = (np.moveaxis(x, 1, -1).reshape(-1, 16) for x in (student, teacher))
    labels = labels.flatten()
    present = [k for k in range(NUM_CLASSES) if (labels == k).any()]
    for k in present:
        positive = keys[labels == k].mean(0)
        candidates = np.flatnonzero((labels == k) & (probs[:, k].flatten() > 0.3))
        if not len(candidates):
            losses.append(0.0)
            continue
        _, count, chosen = next(draws)
        assert count == len(candidates)
        _, count, negatives = next(draws)
        assert count == len(banks[k])
        each = np.array_split(negatives, s.anchors)
        values = []
        for a, n in zip(vectors[candidates[chosen]], each, strict=True):
            powers = np.exp([cos(a, v) / 0.5 for v in (positive, *banks[k][n])])
            values.append(-np.log(powers[0] / powers.sum()))
        losses.append(np.mean(values))
    return (np.mean(losses) if len(present) > 1 else 0.0), len(present)


def naive_pool(x, grid):
    """(B, E, X, Y, Z) -> (B, E * cells): means over cells that overlap where they must."""
    for axis, cells in zip((2, 3, 4), grid, strict=True):
        n = x.shape[axis]
        edges = [(i * n // cells, -(-(i + 1) * n // cells)) for i in range(cells)]
        x = np.stack([x.take(range(a, b), axis).mean(axis) for a, b in edges], axis)
    return x.reshape(len(x), -1)


def naive_revisiting(student, teacher, pool, s):
    mine, theirs = (naive_pool(x, s.pooled) for x in (student, teacher))
    guides, moved = (theirs, mine) if s.revisiting == "intended" else (mine, theirs)
    values = []
    for a, b in zip(guides, moved, strict=True):
        nearest = sorted(range(len(pool)), key=lambda j: -cos(a, pool[j]))[: s.neighbours]
        values += [2 - 2 * cos(b, pool[j]) for j in nearest]
    return np.mean(values)


@torch.no_grad()
def naive_terms(method, batch, step, draws):
    """Name -> value of every term and fact, the network's outputs and the random draws given."""
    s = method.settings
    mixed = method.mix(replace(batch, generator=torch.Generator().manual_seed(5)))
    out, seen = method.network(mixed.images), method.teacher(mixed.plain)
    cut = slice(None), slice(None), slice(None), slice(6, 26)  # of 32 voxels along Y
    student, teacher = (
        x[cut].double().numpy()
        for x in (method.fusion(out.levels, further=True), method.teacher_fusion(seen.levels))
    )
    p, q = softmax(out.logits.double().numpy()), softmax(seen.logits.double().numpy())
    labeled, labels = batch.num_labeled, mixed.labels.numpy()
    ce = naive_ce(p, labels)
    sure = mixed.sure.numpy()[:, None, None, None]
    losses = ce[labeled:] * sure
    counted = (ce[labeled:] > 6e-8) & (sure > 0)  # below, the loss is 0 in float32
    entropy = -(p[labeled:] * np.log(p[labeled:])).sum(1)
    percent = s.entropy_percent * (1 - min(step / STEPS, 1))
    low = labels.copy()
    low[labeled:][entropy > np.percentile(entropy, percent)] = IGNORE
    banks = [bank.held.numpy() for bank in method.contrast.all_banks()]
    contrast, classes = naive_contrast(student, teacher, q, low, banks, draws, s)
    pool = method.pool.held.flatten(1).numpy()
    return {
        "dice": naive_dice_mc(p[:labeled], labels[:labeled]),
        "ce": ce[:labeled].sum() / (labels[:labeled] != IGNORE).sum(),
        "unlabeled": losses.sum() / max(counted.sum(), 1),
        "contrast": contrast,
        "revisiting": naive_revisiting(student, teacher, pool, s),
        "sure_share": sure.mean(),
        "contrast_classes": classes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "sg"},
        {"sampler": "uniform"},
        {"negatives": "as_released"},
        {"revisiting": "as_released"},
        {"neighbours": 1},
        {"entropy_percent": 100.0},
        {"teacher_statistics": "average"},
        {"threshold": 0.6},
        {"banks": (20, 10)},
    ],
    ids=str,
)
def test_terms_are_those_of_the_formulas(changes, draws):
    method = make(**changes)
    batch = replace(BATCH, generator=torch.Generator().manual_seed(5))
    loss = method.loss(batch, STEP)
    found = {n: float(t.value.detach()) for n, t in loss.items()} | {
        n: float(torch.as_tensor(v)) for n, v in loss.facts.items()
    }
    expected = naive_terms(method, BATCH, STEP, draws)
    assert found == {n: pytest.approx(v, rel=2e-3, abs=1e-5) for n, v in expected.items()}
    assert found["contrast_classes"] > 1
    assert 0 < found["sure_share"] < 1
    released = changes.get("revisiting") == "as_released"
    assert ("revisiting" in loss.facts) == released


def test_weights_are_the_published_ones():
    loss = make().loss(BATCH, STEP)
    assert {name: weight for name, (weight, _) in loss.items()} == {
        "dice": 1.0,
        "ce": 1.0,
        "unlabeled": 1.0,
        "contrast": 0.01,
        "revisiting": 1.0,
    }
    loss = make("pretrain").loss(BATCH, STEP)
    weights = {name: weight for name, (weight, _) in loss.items()}
    assert weights == {"dice": 0.5, "ce": 0.5, "global": 1.0, "local": 1.0}


def test_a_term_of_no_weight_is_left_out():
    loss = make(contrast_weight=0.0, revisiting_weight=0.0).loss(BATCH, STEP)
    assert list(loss) == ["dice", "ce", "unlabeled"]


# Pseudo-labels


def test_mixed_images_hold_a_box_of_the_next():
    method = make()
    mixed = method.mix(BATCH)
    labeled, unlabeled = BATCH.split(BATCH.images)
    assert torch.equal(mixed.images[:2], labeled)
    assert torch.equal(mixed.labels[:2], BATCH.labels)
    with torch.no_grad():
        probs = method.teacher(BATCH.plain[2:]).logits.softmax(1)
    confidence, pseudo = probs.max(1)
    for i in range(3):
        j = (i + 1) % 3
        box = mixed.images[2 + i, 0] != unlabeled[i, 0]
        assert 0 < int(box.sum()) < box.numel() / 10
        assert torch.equal(mixed.images[2 + i, 0][box], unlabeled[j, 0][box])
        assert torch.equal(mixed.plain[2 + i, 0][box], BATCH.plain[2 + j, 0][box])
        assert torch.equal(mixed.plain[2 + i, 0][~box], BATCH.plain[2 + i, 0][~box])
        assert torch.equal(mixed.labels[2 + i], torch.where(box, pseudo[j], pseudo[i]))
        sure = torch.where(box, confidence[j], confidence[i]) >= 0.97
        assert float(mixed.sure[i]) == pytest.approx(float(sure.float().mean()))


def test_one_unlabeled_image_is_mixed_with_itself():
    batch = patches(num_labeled=4)
    assert torch.equal(make().mix(batch).images, batch.images)


def test_without_unlabeled_images_labels_are_all_there_is():
    """As in the warm-up: contrast and revisiting are of labeled voxels, nothing is pseudo-labeled."""
    method = make("robust", warmup=0.5, revisiting_weight=1.0)
    batch = patches(num_labeled=5)
    assert method.patches_at(0) == (5, 0)
    mixed = method.mix(batch)
    assert mixed.images is batch.images
    assert mixed.labels is batch.labels
    loss = method.loss(batch, 0)
    assert float(loss["unlabeled"].value.detach()) == 0
    assert float(loss.facts["sure_share"]) == 0
    assert float(loss["contrast"].value.detach()) > 0
    assert {queue for queue, _ in method.pending} == {*method.contrast.all_banks(), method.pool}


# Contrast


def made_contrast(**changes):
    torch.manual_seed(0)
    return VoxelContrast(ContrastSettings.model_validate({**settings_of_contrast(), **changes}), 3)


def settings_of_contrast():
    return {key: SMALL[key] for key in ContrastSettings.model_fields if key in SMALL}


def maps(seed=0):
    """Embeddings of student and teacher, the teacher's probs, and labels."""
    g = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 16, 4, 4, 4, generator=g) for _ in range(2))
    probs = torch.randn(2, 3, 4, 4, 4, generator=g).mul(2).softmax(1)
    labels = torch.randint(-1, 3, (2, 4, 4, 4), generator=g)
    return student.requires_grad_(), teacher, probs, labels


def test_contrast_needs_two_classes():
    contrast, (student, teacher, probs, labels) = made_contrast(), maps()
    for kept, expected in ((1, 1), (0, 1), (IGNORE, 0)):
        alone = torch.where(labels == kept, kept, IGNORE)
        value, classes = contrast(student, teacher, probs, alone, None)
        assert (float(value.detach()), classes) == (0.0, expected)
        value.backward()  # it is 0 with a gradient of 0
        assert not student.grad.any()
    assert contrast(student, teacher, probs, labels.clamp(max=1), None)[1] == 2


def test_a_class_without_anchors_counts_as_zero():
    contrast, (student, teacher, probs, labels) = made_contrast(sampler="uniform"), maps()
    probs = torch.zeros_like(probs)
    probs[:, 0] = 1
    value, classes = contrast(student, teacher, probs, labels, None)
    assert classes == 3
    assert 0 < float(value.detach()) < np.log(1 + 9 * np.exp(4)) / 3
    probs.zero_()
    assert float(contrast(student, teacher, probs, labels, None)[0].detach()) == 0


def test_only_anchors_have_a_gradient():
    contrast, (student, teacher, probs, labels) = made_contrast(), maps()
    teacher = teacher.requires_grad_()
    value, _ = contrast(student, teacher.detach(), probs, labels, None)
    value.backward()
    moved = student.grad.abs().sum(1) > 0
    own = probs.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    assert moved.any()
    assert not (moved & ((labels == IGNORE) | (own <= 0.3))).any()


def test_banks_take_in_what_is_not_of_their_class():
    contrast, (_, teacher, probs, labels) = made_contrast(), maps()
    code = torch.cat([labels[:, None], probs, torch.zeros(2, 12, 4, 4, 4)], 1)  # names its voxel
    taken = contrast.intake(code, probs, labels, torch.Generator().manual_seed(0))
    assert [bank for bank, _ in taken] == contrast.all_banks()
    for k, (_, rows) in enumerate(taken):
        assert rows.shape == (8, 16)
        assert not ((rows[:, 0] == k) | (rows[:, 0] == IGNORE)).any()
        assert (rows[:, 1 + k] < 0.97).all()
    nobody = torch.ones_like(probs)
    assert contrast.intake(teacher, nobody, labels, None) == []
    assert made_contrast(negatives="as_released").intake(teacher, probs, labels, None) == []


def test_sizes_of_the_banks_and_the_vector_they_begin_with():
    contrast = made_contrast()
    assert [len(bank.rows) for bank in contrast.all_banks()] == [60, 40, 40]
    for bank in contrast.all_banks():
        assert bank.held.shape == (1, 16)
        assert bank.held.all()


# What takes part


def test_share_of_voxels_falls_over_the_run():
    method = make()
    logits = torch.randn(3, NUM_CLASSES, 8, 8, 8)
    pseudo = logits.argmax(1)
    known = BATCH.labels[:, :8, :8, :8]
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    for step, percent in ((0, 20), (1_500, 15), (3_000, 10), (6_000, 0), (LATE, 0)):
        low, high = method.parts(known, pseudo, logits, step)
        assert torch.equal(low[:2], known)
        assert torch.equal(high[:2], known)
        for part, least in ((low[2:], True), (high[2:], False)):
            members = part != IGNORE
            assert torch.equal(part[members], pseudo[members])
            share = float(members.float().mean())
            assert share == pytest.approx(percent / 100, abs=1.5 / entropy.numel() + 1e-6)
            edge = entropy[members].max() if least else entropy[members].min()
            outside = entropy[~members]
            assert (outside > edge).all() if least else (outside < edge).all()


# Memories and teachers


def test_memories_take_in_after_the_step():
    method = make()
    before = {k: v.clone() for k, v in method.state_dict().items() if "rows" in k or "pushed" in k}
    method.loss(BATCH, STEP)
    assert all(torch.equal(method.state_dict()[k], v) for k, v in before.items())
    method.after_step(STEP)
    assert not method.pending
    after = method.state_dict()
    assert int(after["pool.pushed"]) == 7 + 5
    assert [int(after[f"contrast.banks.{k}.pushed"]) for k in range(3)] == [59, 49, 49]  # 40 kept
    assert all(after[k].shape == v.shape for k, v in before.items())


def test_as_released_the_banks_hold_their_first_vector_for_ever():
    method = build("arco", "as_released", steps=4, **SMALL)
    first = method.contrast.all_banks()[0].held.clone()
    fit(method, fast(steps=4))
    assert torch.equal(method.contrast.all_banks()[0].held, first)
    intended = build("arco", "faithful", steps=4, **SMALL)
    fit(intended, fast(steps=4))
    assert len(intended.contrast.all_banks()[0].held) == 1 + 4 * 8


def test_revisiting_moves_the_student_only_as_intended():
    for kind, moves in (("intended", True), ("as_released", False)):
        method = make(revisiting=kind)
        student = torch.randn(5, 16, 4, 4, 4, requires_grad=True)
        assert method.revisit(student, torch.randn(5, 16, 4, 4, 4)).requires_grad == moves


@pytest.mark.parametrize("size", [(16, 16, 16), (32, 16, 24)])
@pytest.mark.parametrize("stage", ["pretrain", "faithful"])
def test_state_has_one_shape_whatever_the_patch(stage, size):
    method = make(stage)
    shapes = {k: v.shape for k, v in method.state_dict().items()}
    method.loss(batch_for(method, size=size), STEP)
    method.after_step(STEP)
    assert {k: v.shape for k, v in method.state_dict().items()} == shapes


@pytest.mark.parametrize("stage", ["pretrain", "faithful"])
def test_teachers_follow_after_the_step(stage):
    method = make(stage)
    before = [[p.clone() for p in t.network.parameters()] for t, _ in method.pairs()]
    method.loss(BATCH, LATE)
    method.after_step(LATE)
    for (teacher, student), old in zip(method.pairs(), before, strict=True):
        for mine, was, theirs in zip(
            teacher.network.parameters(), old, student.parameters(), strict=True
        ):
            torch.testing.assert_close(mine, 0.99 * was + 0.01 * theirs)


@pytest.mark.parametrize(("kind", "training"), [("batch", True), ("average", False)])
def test_statistics_of_the_teacher(kind, training):
    method = make(teacher_statistics=kind).train()
    assert method.teacher.network.training == training


# The first stage


def test_first_stage_formula():
    """Student's and teacher's relations of the same images, one of which is seen in another view."""
    method = make("pretrain")
    seed = torch.Generator().manual_seed(5)
    loss = method.loss(replace(BATCH, generator=seed), STEP)
    view = jittered_and_blurred(BATCH.images, torch.Generator().manual_seed(5))
    assert not torch.equal(view, BATCH.images)
    with torch.no_grad():
        out, seen = method.network(view), method.teacher(BATCH.plain)
        for name, relation, head, mine, theirs in (
            ("global", method.whole, method.teacher_whole, out.levels[0], seen.levels[0]),
            ("local", method.pieces, method.teacher_pieces, out.logits, seen.logits),
        ):
            student, teacher = relation.predictor(relation.head(mine)), head(theirs)
            value = float(relation.divergence(student, teacher, 0.1))
            assert float(loss[name].value.detach()) == pytest.approx(value, rel=1e-4), name
            assert value > 0
    p = softmax(out.logits[:2].double().numpy())
    labels = BATCH.labels.numpy()
    ce = naive_ce(p, labels).sum() / (labels != IGNORE).sum()
    assert float(loss["dice"].value.detach()) == pytest.approx(naive_dice_mc(p, labels), rel=1e-4)
    assert float(loss["ce"].value.detach()) == pytest.approx(ce, rel=1e-4)


def test_queues_hold_what_the_teacher_made():
    method = make("pretrain")
    method.loss(BATCH, STEP)
    with torch.no_grad():
        seen = method.teacher(BATCH.plain)
        keys = method.teacher_whole(seen.levels[0]), method.teacher_pieces(seen.logits)
    method.after_step(STEP)
    for queue, key in zip((method.whole.queue, method.pieces.queue), keys, strict=True):
        assert int(queue.pushed) == 7 + 5
        torch.testing.assert_close(queue.rows[:5], key)


def test_second_stage_starts_from_the_first():
    """From what a run ships: its network. The teacher begins as that, the rest is new."""
    first = build("arco", "pretrain", seed=1, **SMALL)
    shipped = {k: v for k, v in first.state_dict().items() if not k.startswith(first.training_only)}
    second = build("arco", "faithful", seed=2, **SMALL)
    fresh = {k: v.clone() for k, v in second.fusion.state_dict().items()}
    assert second.start_from(shipped) == list(shipped)
    for network in (second.network, second.teacher.network):
        found = network.state_dict()
        assert all(torch.equal(found[k], v) for k, v in first.network.state_dict().items())
    assert all(torch.equal(second.fusion.state_dict()[k], v) for k, v in fresh.items())
    plain = VNet(1, 2, 4)
    plain.load_state_dict(second.network.state_dict())  # what ships is the plain V-Net


# Settings


def settings_of(name):
    return ArcoSettings.model_validate(preset("arco", name)["method"]).model_dump()


def test_published_presets():
    published = {
        "stage": "train",
        "dropout": 0.5,
        "filters": 16,
        "patches": (4, 4),
        "warmup": 0.0,
        "dice": "multiclass",
        "ema_decay": 0.99,
        "teacher_statistics": "batch",
        "threshold": 0.97,
        "sampler": "sag",
        "anchors": 256,
        "negatives_per_anchor": 512,
        "temperature": 0.5,
        "anchor_probability": 0.3,
        "negative_probability": 0.97,
        "entropy_percent": 20.0,
        "banks": (50_000, 30_000),
        "queue": 36,
        "neighbours": 5,
        "embedding": 16,
        "negatives": "intended",
        "revisiting": "intended",
    }
    faithful = settings_of("faithful")
    assert {key: faithful[key] for key in published} == published
    released = {"negatives": "as_released", "revisiting": "as_released"}
    assert settings_of("as_released") == {**faithful, **released}
    first = {"stage": "pretrain", "patches": (1, 1), "supervised_weight": 0.5}
    assert settings_of("pretrain") == {**faithful, **first}
    train = {"optimizer": "sgd", "lr": 0.01, "weights": "last", "nesterov": True}
    assert preset("arco", "faithful")["train"] == train
    assert preset("arco", "as_released")["train"] == train


def test_whole_method_as_published():
    method = build("arco", "faithful", filters=16)

    def count(*modules):
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    assert count(method.network) == 9_448_866
    assert count(method) == 9_448_866 + 165_120 + 512
