"""VCLIPSeg's equations, written once more in numpy, and its switches one by one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy import LATE, batch_for, build, fast, fit, make_batch
from vclipseg.labeling import fuse
from vclipseg.losses import IGNORE
from vclipseg.methods import preset
from vclipseg.methods.vclipseg import VCLIPSegSettings, prototype_members
from vclipseg.networks.text import TextSettings

PLAIN = {
    "prompts": True,
    "alignment": True,
    "dlb": True,
    "supervised_weight": 0.5,
    "supervised_ce_weight": 0.0,
    "unlabeled_weight": 1.0,
    "rampup_steps": 6_000,
    "alignment_weight": 0.5,
    "alignment_rampup_steps": 0,
    "dice": "linear",
    "pseudo_labels": "hard",
    "dlb_weighting": "dynamic",
    "dlb_apply_to": "all",
    "threshold": 0.0,
    "temperature": 0.1,
    "heads": 2,
    "norm_axis": "channel",
    "prototype_grid": 16,
    "prototype_pooling": "strided",
    "teacher_decay": 0.0,
    "copy_paste": 0.0,
    "warmup": 0.0,
    "predict_with": "first",
}
"""What the authors run, with the paper's word where their code has an evident bug."""

NUM_CLASSES = 3
SIZE = (16, 40, 32)
PADDED = (16, 48, 32)  # inside the network, by 4 on both sides of Y


def make(**changes):
    return build(
        "vclipseg",
        "faithful",
        num_classes=NUM_CLASSES,
        steps=15_000,
        **{**PLAIN, "dropout": 0.0, **changes},
    )


def patches(size=SIZE):
    """A batch whose labels the untrained decoders get right here and there."""
    batch = make_batch(3, size, num_classes=NUM_CLASSES)
    with torch.no_grad():
        first, second = (z.argmax(1)[:2] for z in make().network(batch.images).logits)
    noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    agreed = (first == second) & (noise < 0.8)
    return replace(batch, labels=torch.where(agreed, first, batch.labels))


BATCH = patches()
STEP = 2_000


# The loss in numpy


def naive_dice(p, g, form):
    """Mean over the foreground classes in g (B, K, ...), or over all ("multiclass")."""
    classes = range(p.shape[1]) if form == "multiclass" else range(1, p.shape[1])
    if form != "multiclass" and g[:, 1:].any():
        classes = [c for c in classes if g[:, c].any()]
    values = []
    for c in classes:
        a, b = p[:, c], g[:, c]
        if form == "linear":
            values.append(1 - (2 * (a * b).sum() + 1e-8) / (a.sum() + b.sum() + 1e-8))
        else:
            values.append(1 - (2 * (a * b).sum() + 1e-5) / ((a**2).sum() + (b**2).sum() + 1e-5))
    return np.mean(values)


def naive_one_hot(labels):
    return np.stack([labels == c for c in range(NUM_CLASSES)], 1).astype(float)


def naive_fuse(probs, dices, weighting):
    """Equations 7 to 9 and their variants."""
    if weighting == "equal":
        return (probs[0] + probs[1]) / 2
    if weighting == "voxel_entropy":
        entropy = [-(p * np.log(p + 1e-30)).sum(1, keepdims=True) for p in probs]
        w = [np.exp(-h) for h in entropy]
    else:
        w = [math.exp(1 - 1 / (1 + math.exp(-d))) for d in dices]
    return (w[0] * probs[0] + w[1] * probs[1]) / (w[0] + w[1])


def naive_alignment(out, heads, text, labels, s):
    """1 - cos(v_k, t_k), voxel by voxel of the prototype grid."""
    grid = s["prototype_grid"]
    agreed = labels.copy()
    for logits in out.logits:
        mask = logits.argmax(1).numpy()[: len(labels)]
        agreed[mask != labels] = IGNORE
    padded = np.full((len(labels), *PADDED), IGNORE)
    padded[:, :, 4:44] = agreed
    members = [[] for _ in text]
    for head in heads:
        features = head(out.fused).numpy()
        axis = 1 if s["norm_axis"] == "channel" else 4
        features = features / np.maximum(np.sqrt((features**2).sum(axis, keepdims=True)), 1e-12)
        for n in range(len(labels)):
            for cell in np.ndindex(*(n // grid for n in PADDED)):
                x, y, z = (grid * i for i in cell)
                block = padded[n, x : x + grid, y : y + grid, z : z + grid]
                counts = {c: (block == c).sum() for c in range(len(text))}
                winner = max(counts, key=counts.get)
                if s["prototype_pooling"] == "strided":
                    label = block[0, 0, 0]
                else:
                    label = winner if counts[winner] > block.size / 2 else IGNORE
                if label != IGNORE:
                    members[label].append(features[n, :, x // 16, y // 16, z // 16])
    gaps = []
    for vectors, t in zip(members, text, strict=True):
        if vectors:
            v = np.mean(vectors, 0)
            gaps.append(1 - v @ t / np.linalg.norm(v) / np.linalg.norm(t))
    return np.mean(gaps) if gaps else 0.0


@torch.no_grad()
def naive_loss(method, batch, step, s):
    """Name -> (weight, value) of every term, rows of unlabeled patches last."""
    out = method.network(batch.images)
    labels, num_labeled = batch.labels.numpy(), batch.num_labeled
    logs = [z.log_softmax(1).double().numpy() for z in out.logits]
    probs = [np.exp(log) for log in logs]
    dices = [naive_dice(p[:num_labeled], naive_one_hot(labels), s["dice"]) for p in probs]
    terms = {"supervised": (s["supervised_weight"], sum(dices))}
    if s["supervised_ce_weight"]:
        own = [np.take_along_axis(g[:num_labeled], labels[:, None], 1) for g in logs]
        terms["supervised_ce"] = (s["supervised_ce_weight"], -own[0].mean() - own[1].mean())
    ramp = math.exp(-5 * (1 - min(step / s["rampup_steps"], 1)) ** 2)
    if s["dlb"]:
        mixture = naive_fuse(probs, dices, s["dlb_weighting"])
        target = mixture if s["pseudo_labels"] == "soft" else naive_one_hot(mixture.argmax(1))
        kept = mixture.max(1) >= s["threshold"]
        if s["dlb_apply_to"] == "unlabeled":
            kept[:num_labeled] = False
        value = 0
        for p, log in zip(probs, logs, strict=True):
            value += -(target * log).sum(1)[kept].mean()
            masks = kept[:, None]
            value += naive_dice(p * masks, target * masks, s["dice"])
        terms["dlb"] = (s["unlabeled_weight"] * ramp, value)
    else:
        power = [p ** (1 / s["temperature"]) for p in probs]
        sharp = [
            a / (a + (1 - p) ** (1 / s["temperature"])) for a, p in zip(power, probs, strict=True)
        ]
        value = ((probs[0] - sharp[1]) ** 2).mean() + ((probs[1] - sharp[0]) ** 2).mean()
        terms["mutual"] = (s["unlabeled_weight"] * ramp, value)
    if s["alignment"]:
        ramp = s["alignment_rampup_steps"]
        weight = math.exp(-5 * (1 - min(step / ramp, 1)) ** 2) if ramp else 1
        value = naive_alignment(out, method.network.projections, method.text.numpy(), labels, s)
        terms["alignment"] = (s["alignment_weight"] * weight, value)
    return terms


SWITCHES = [
    # what is switched, terms whose value changes, terms whose weight changes
    ({}, "", ""),
    ({"pseudo_labels": "soft"}, "dlb", ""),
    ({"dlb_weighting": "equal"}, "dlb", ""),
    ({"dlb_weighting": "voxel_entropy"}, "dlb", ""),
    ({"dlb_weighting": "voxel_entropy", "pseudo_labels": "soft"}, "dlb", ""),
    ({"dlb_apply_to": "unlabeled"}, "dlb", ""),
    ({"threshold": 0.45}, "dlb", ""),
    ({"supervised_weight": 1.0}, "", "supervised"),
    ({"supervised_ce_weight": 0.3}, "supervised_ce", "supervised_ce"),
    ({"dice": "squared"}, "supervised dlb", ""),
    ({"dice": "multiclass"}, "supervised dlb", ""),
    ({"dice": "squared", "pseudo_labels": "soft"}, "supervised dlb", ""),
    ({"unlabeled_weight": 2.0}, "", "dlb"),
    ({"rampup_steps": 15_000}, "", "dlb"),
    ({"alignment_weight": 0.1}, "", "alignment"),
    ({"alignment_rampup_steps": 6_000}, "", "alignment"),
    ({"heads": 1}, "alignment", ""),
    ({"norm_axis": "last_spatial"}, "alignment", ""),
    ({"prototype_grid": 8}, "alignment", ""),
    ({"prototype_grid": 4}, "alignment", ""),
    ({"prototype_grid": 4, "prototype_pooling": "majority"}, "alignment", ""),
    ({"prototype_grid": 4, "norm_axis": "last_spatial", "heads": 1}, "alignment", ""),
    ({"dlb": False}, "dlb mutual", "dlb mutual"),
    ({"dlb": False, "temperature": 0.5}, "dlb mutual", "dlb mutual"),
    ({"alignment": False}, "alignment", "alignment"),
]


@pytest.fixture(scope="module")
def plain_terms():
    loss = make().loss(BATCH, STEP)
    return {name: (weight, float(value.detach())) for name, (weight, value) in loss.items()}


@pytest.mark.parametrize(
    ("changes", "values", "weights"), SWITCHES, ids=[str(row[0]) for row in SWITCHES]
)
def test_switch_changes_its_terms_as_the_formula_says(changes, values, weights, plain_terms):
    method = make(**changes)
    loss = method.loss(BATCH, STEP)
    expected = naive_loss(method, BATCH, STEP, {**PLAIN, **changes})
    assert list(loss) == list(expected)
    found = {name: (weight, float(value.detach())) for name, (weight, value) in loss.items()}
    for name, (weight, value) in expected.items():
        assert found[name] == (pytest.approx(weight), pytest.approx(value, rel=1e-4)), name
    names = {*found, *plain_terms}
    nothing = (None, None)
    changed = [
        {n for n in names if found.get(n, nothing)[i] != plain_terms.get(n, nothing)[i]}
        for i in (1, 0)
    ]
    assert changed == [set(values.split()), set(weights.split())]


def test_without_prompts_the_network_is_another_one(plain_terms):
    method = make(prompts=False)
    loss = method.loss(BATCH, STEP)
    expected = naive_loss(method, BATCH, STEP, PLAIN)
    for name, (weight, value) in expected.items():
        assert loss[name].weight == pytest.approx(weight)
        assert float(loss[name].value.detach()) == pytest.approx(value, rel=1e-4), name
        assert float(loss[name].value.detach()) != plain_terms[name][1], name


# Presets as the specification's table has them; `robust` is ours and may change


def settings_of(name):
    return VCLIPSegSettings.model_validate(preset("vclipseg", name)["method"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("faithful", {}),
        ("code", {"norm_axis": "last_spatial"}),
        (
            "paper",
            {
                "pseudo_labels": "soft",
                "dlb_apply_to": "unlabeled",
                "supervised_weight": 1.0,
                "heads": 1,
            },
        ),
        ("mcnet_dlb", {"prompts": False, "alignment": False}),
    ],
)
def test_published_presets(name, changes):
    published = {**PLAIN, "dropout": 0.5, "filters": 16, **changes}
    found = settings_of(name).model_dump()
    assert {key: found[key] for key in published} == published
    train = preset("vclipseg", name)["train"]
    assert train == {"optimizer": "sgd", "lr": 0.01, "lr_power": 0.0, "weights": "last"}


def test_the_papers_prompt():
    assert TextSettings(**preset("vclipseg", "paper")["text"]).template == "A pixel of {item}"
    assert "text" not in preset("vclipseg", "faithful")


# Steps scale with the length of the run


@pytest.mark.parametrize(("steps", "full_at"), [(15_000, 6_000), (1_500, 600), (30, 12)])
def test_rampup_scales_with_the_length_of_the_run(steps, full_at):
    method = build(
        "vclipseg", "faithful", steps=steps, **{**PLAIN, "alignment_rampup_steps": 6_000}
    )
    batch = make_batch()

    def weights(step):
        loss = method.loss(batch, step)
        return loss["dlb"].weight, loss["alignment"].weight

    assert weights(full_at) == (1.0, 0.5)
    assert weights(full_at - 1) < (1.0, 0.5)
    assert weights(full_at // 2) == pytest.approx((math.exp(-1.25), 0.5 * math.exp(-1.25)))
    assert weights(0) == pytest.approx((math.exp(-5), 0.5 * math.exp(-5)))


# Dynamic labeling


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_pseudo_labels(kind):
    method = make(pseudo_labels=kind)
    guides = [torch.softmax(torch.randn(4, 3, 2, 2, 2), 1) for _ in range(2)]
    mixture = fuse(guides, torch.tensor([0.3, 0.5]), "dynamic")
    everywhere = torch.ones(4, 2, 2, 2, dtype=torch.bool)
    pseudo, kept = method.pseudo_labels(guides, torch.tensor([0.3, 0.5]), everywhere)
    if kind == "soft":
        assert torch.equal(pseudo, mixture)
    else:
        assert torch.equal(pseudo.argmax(1), mixture.argmax(1))
        assert torch.equal(pseudo.sum(1), torch.ones(4, 2, 2, 2))
        assert set(pseudo.unique().tolist()) == {0.0, 1.0}
    assert kept.all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_voxels_that_pseudo_labels_supervise(threshold):
    method = make(threshold=threshold)
    guides = [torch.softmax(torch.randn(4, 3, 4, 4, 4), 1) for _ in range(2)]
    taught = torch.ones(4, 4, 4, 4, dtype=torch.bool)
    taught[:2, :, :, :2] = False
    _, kept = method.pseudo_labels(guides, torch.zeros(2), taught)
    expected = fuse(guides, torch.zeros(2), "dynamic").amax(1) >= threshold
    assert torch.equal(kept.bool(), taught & expected)


@pytest.mark.parametrize("name", ["vclipseg", "vclipseg_x"])
@pytest.mark.parametrize("teacher_decay", [0.0, 0.9])
@pytest.mark.parametrize("apply_to", ["all", "unlabeled"])
def test_pseudo_labels_move_labeled_patches_only_where_they_apply(apply_to, teacher_decay, name):
    """Not even where a reviewer said that nobody knows the class."""
    chosen = {"dlb_apply_to": apply_to, "teacher_decay": teacher_decay, "threshold": 0.0}
    method = build(name, "faithful", num_classes=NUM_CLASSES, **chosen)
    unsure = BATCH.labels.clone()
    unsure[:, :4] = IGNORE
    seen = []
    follow = method.follow
    method.follow = lambda *given: seen.append(given[3]) or follow(*given)
    loss = method.loss(replace(BATCH, labels=unsure), 50)
    labeled, unlabeled = BATCH.split(seen[0])
    assert unlabeled.all()
    assert labeled.all() if apply_to == "all" else not labeled.any()
    assert float(loss.facts["pseudo_share"]) == 1


def test_pseudo_share_is_of_the_unlabeled_voxels():
    method = make(threshold=0.45, dlb_apply_to="all")
    loss = method.loss(BATCH, STEP)
    with torch.no_grad():
        out = method.network(BATCH.images)
    probs = [z.softmax(1) for z in out.logits]
    dices = [
        naive_dice(p[:2].numpy(), naive_one_hot(BATCH.labels.numpy()), "linear") for p in probs
    ]
    confidence = fuse(probs, torch.tensor(dices).float(), "dynamic").amax(1)[2:]
    expected = (confidence >= 0.45).float().mean()
    assert 0 < float(expected) < 1
    assert float(loss.facts["pseudo_share"]) == pytest.approx(float(expected), abs=1e-3)


def test_pseudo_labels_have_no_gradient():
    """Soft ones hold the probabilities themselves: following them must not move them."""
    method = make(pseudo_labels="soft")
    logits = [torch.randn(4, 3, 2, 2, 2, requires_grad=True) for _ in range(2)]
    probs = [z.softmax(1) for z in logits]
    guides = method.guides(BATCH, probs)
    pseudo, kept = method.pseudo_labels(guides, torch.zeros(2), torch.ones(4, 2, 2, 2).bool())
    assert not any(x.requires_grad for x in (*guides, pseudo, kept))


# Vision-text consistency


def test_alignment_does_not_teach_the_decoders():
    method = make()
    value = method.loss(BATCH, STEP)["alignment"].value
    for part, taught in (
        ("encoder", True),
        ("prompts", True),
        ("projections", True),
        ("decoders", False),
    ):
        parameters = list(getattr(method.network, part).parameters())
        found = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
        assert any(g is not None and g.any() for g in found) == taught, part


def test_alignment_is_about_labeled_patches_only():
    method = make()
    out = method.network(BATCH.images)
    known = torch.full((4, *SIZE), IGNORE)
    gap, counts = method.misalignment(out, known)
    assert float(gap.detach()) == 0
    assert counts.tolist() == [0, 0, 0]


def test_absent_classes_are_left_out_of_the_alignment():
    method = make(prototype_grid=4)
    out = method.network(BATCH.images)
    known = torch.full((4, *SIZE), IGNORE)
    known[:2] = BATCH.labels
    both = (out.logits[0].argmax(1) == known) & (out.logits[1].argmax(1) == known)
    present = known[both].unique().tolist()
    assert len(present) > 1
    one = torch.where(known == present[0], known, IGNORE)
    gap, counts = method.misalignment(out, one)
    assert (counts > 0).tolist() == [c == present[0] for c in range(NUM_CLASSES)]
    assert 0 < float(gap.detach()) <= 2
    facts = method.loss(BATCH, STEP).facts
    assert {f"prototype {name}" for name in method.class_names} <= set(facts)


@pytest.mark.parametrize("pooling", ["strided", "majority"])
@pytest.mark.parametrize("grid", [4, 8, 16])
def test_prototype_members(grid, pooling):
    rng = np.random.default_rng(grid)
    labels = rng.integers(-1, 2, (2, 32, 16, 16))
    labels[:, ::grid, :, :grid] = 1
    labels[0, :grid, :, :] = 1  # sure majorities
    found = prototype_members(torch.from_numpy(labels), 3, grid, pooling).numpy()
    assert found.shape == (2, 3, 32 // grid, 16 // grid, 16 // grid)
    for n, x, y, z in np.ndindex(2, *found.shape[2:]):
        block = labels[n][tuple(slice(grid * i, grid * i + grid) for i in (x, y, z))]
        if pooling == "strided":
            expected = [block[0, 0, 0] == c for c in range(3)]
        else:
            expected = [(block == c).mean() > 0.5 for c in range(3)]
        assert found[n, :, x, y, z].tolist() == expected


def test_perfectly_aligned_features_cost_nothing():
    method = make(prototype_grid=16, heads=1)
    batch = make_batch(1, 32, num_classes=NUM_CLASSES)
    out = method.network(batch.images)
    mask = out.logits[0].argmax(1)
    out = out._replace(logits=[out.logits[0]] * 2)
    cells = mask[:, ::16, ::16, ::16]
    vectors = method.text[cells].movedim(-1, 1)  # each cell's own text vector
    method.network.projections[0] = torch.nn.Identity()
    gap, counts = method.misalignment(out._replace(fused=vectors), mask)
    assert float(gap) == pytest.approx(0, abs=1e-6)
    assert counts.sum() == cells.numel()


# Copy-paste


def two_colors(labels=None):
    """Labeled images are 1, unlabeled ones -1, so that each voxel shows where it came from."""
    batch = make_batch(0, 16, num_classes=NUM_CLASSES)
    images = torch.ones_like(batch.images)
    images[2:] = -1
    return replace(batch, images=images)


def test_copy_paste_needs_as_many_labeled_as_unlabeled_patches():
    with pytest.raises(ValueError, match=r"patches is \[1, 3\]; make both equal"):
        VCLIPSegSettings(copy_paste=0.5, patches=(1, 3))
    assert VCLIPSegSettings(copy_paste=0.5, patches=(3, 0)).patches == (3, 0)


def test_without_copy_paste_the_view_is_the_batch():
    images, known, guided = make().view(BATCH)
    assert images is BATCH.images
    assert guided.all()
    assert torch.equal(known[:2], BATCH.labels)
    assert (known[2:] == IGNORE).all()


def test_labels_are_unknown_exactly_where_unlabeled_content_is():
    batch = two_colors()
    images, known, guided = make(copy_paste=0.67).view(batch)
    assert images.shape == batch.images.shape
    unlabeled = images[:, 0] == -1
    assert torch.equal(known == IGNORE, unlabeled)
    assert torch.equal(guided, unlabeled)
    box = unlabeled[0]
    assert int(box.sum()) == int(0.67 * 16) ** 3
    assert torch.equal(unlabeled, torch.stack([box, box, ~box, ~box]))
    for i in range(2):
        assert torch.equal(known[i][~box], batch.labels[i][~box])
        assert torch.equal(known[2 + i][box], batch.labels[i][box])


def test_pairs_of_patches_exchange_their_boxes():
    batch = make_batch(0, 16)
    images, known, _ = make(copy_paste=0.5).view(batch)
    for i in range(2):
        inside = known[i] == IGNORE
        outside = ~inside
        mine, theirs = batch.images[i], batch.images[2 + i]
        assert torch.equal(images[i], torch.where(inside, theirs, mine))
        assert torch.equal(images[2 + i], torch.where(outside, theirs, mine))


def test_the_box_is_drawn_by_the_batch():
    method = make(copy_paste=0.5)
    first, again, other = (
        replace(two_colors(), generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    )
    assert torch.equal(method.view(first)[1], method.view(again)[1])
    assert not torch.equal(method.view(first)[1], method.view(other)[1])


def test_supervision_and_prototypes_reach_labels_in_either_half():
    """All labels outside the box of the first rows and inside that of the others are used."""
    method = make(copy_paste=0.5, dlb_apply_to="unlabeled")
    batch = make_batch(0, 16, num_classes=NUM_CLASSES)
    totals = []
    for labels in (batch.labels, torch.where(batch.labels == 1, 2, batch.labels)):
        again = replace(batch, labels=labels, generator=torch.Generator().manual_seed(0))
        totals.append(float(method.loss(again, STEP)["supervised"].value.detach()))
    assert totals[0] != totals[1]


def test_ignored_voxels_of_a_labeled_patch_have_no_pseudo_label_of_another():
    """What an ignored voxel shows is the labeled patch, of which a teacher of the unlabeled says nothing."""
    method = make(copy_paste=0.5, teacher_decay=0.9, dlb_apply_to="unlabeled", alignment=False)
    totals = []
    for ignored in (False, True):
        batch = make_batch(0, 16, num_classes=NUM_CLASSES)
        if ignored:
            batch.labels[:, :3] = IGNORE
        _, known, guided = method.view(replace(batch, generator=torch.Generator().manual_seed(0)))
        assert bool((known == IGNORE)[~guided].any()) is ignored
        again = replace(batch, generator=torch.Generator().manual_seed(0))
        loss = method.loss(again, STEP)
        totals.append(float(loss["dlb"].value.detach()))
        assert float(loss.facts["pseudo_share"]) <= 1
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


# The teacher


def test_without_decay_there_is_no_teacher():
    assert make(teacher_decay=0.0).teacher is None
    assert not any(key.startswith("teacher") for key in make().state_dict())


def test_teacher_follows_the_student_in_closed_form():
    method = make(teacher_decay=0.5)
    before = [p.clone() for p in method.teacher.network.parameters()]
    seen = []
    steps = 4
    state = fit(
        method,
        fast(steps=steps),
        lambda step: make_batch(step, num_classes=NUM_CLASSES),
        lambda state, loss: seen.append(
            {k: v.clone() for k, v in method.network.state_dict().items()}
        ),
    )
    assert state.step == steps
    keep = [min(1 - 1 / (t + 1), 0.5) for t in range(steps)]
    shares = [(1 - keep[t]) * math.prod(keep[t + 1 :]) for t in range(steps)]
    assert sum(shares) == pytest.approx(1)
    for key, value in method.teacher.network.state_dict().items():
        if value.is_floating_point():
            expected = sum(w * weights[key] for w, weights in zip(shares, seen, strict=True))
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    pairs = zip(before, method.teacher.network.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_teacher_labels_in_evaluation_mode_and_is_not_trained():
    method = make(teacher_decay=0.9, dropout=0.5).train()
    assert method.network.training
    assert not method.teacher.network.training
    assert not any(p.requires_grad for p in method.teacher.parameters())
    batch = make_batch(0, num_classes=NUM_CLASSES)
    first, second = (method.guides(batch, [])[0] for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    expected = copy.deepcopy(method.teacher.network).eval()(batch.images).logits[0].softmax(1)
    torch.testing.assert_close(first, expected.detach())


def test_teacher_can_take_the_statistics_of_what_it_labels():
    method = make(
        teacher_decay=0.9, teacher_statistics="batch", copy_paste=0.5, dropout=0.0
    ).train()
    with torch.no_grad():
        for norm in [m for m in method.modules() if isinstance(m, torch.nn.BatchNorm3d)]:
            norm.running_mean.fill_(3.0)  # of another contrast
    batch = make_batch(size=32)
    guide = method.guides(batch, [torch.zeros(4, 2, 32, 32, 32)] * 2)[0]
    alone = copy.deepcopy(method.teacher.network).train()
    expected = alone(batch.split(batch.plain)[1]).logits[0].softmax(1)
    torch.testing.assert_close(guide[-2:], expected)
    assert method.teacher.network.training
    assert method.eval().teacher.training is False


def test_guides_without_a_teacher_are_the_students_own():
    probs = [torch.rand(4, 3, 2, 2, 2, requires_grad=True) for _ in range(2)]
    guides = make().guides(BATCH, probs)
    assert all(torch.equal(g, p) for g, p in zip(guides, probs, strict=True))


@pytest.mark.parametrize("copy_paste", [0.0, 0.5])
def test_the_teacher_sees_unmixed_patches_and_its_rows_match_the_view(copy_paste):
    """Where the view shows unlabeled patch i, the guide holds the teacher's word on patch i."""
    method = make(teacher_decay=0.9, copy_paste=copy_paste)
    batch = make_batch(0, num_classes=NUM_CLASSES)
    _, known, _ = method.view(batch)
    guides = method.guides(batch, [])
    with torch.no_grad():
        clean = [z.softmax(1) for z in method.teacher.network(batch.unlabeled_images).logits]
    assert len(guides) == 2
    for guide, own in zip(guides, clean, strict=True):
        assert guide.shape == (4, NUM_CLASSES, 16, 16, 16)
        for row in range(4):
            at = known[row] == IGNORE
            torch.testing.assert_close(guide[row][:, at], own[row % 2][:, at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("copy_paste", [0.0, 0.5])
def test_the_teacher_sees_patches_in_their_own_contrast(copy_paste):
    method = make(teacher_decay=0.9, copy_paste=copy_paste)
    batch = make_batch(0, num_classes=NUM_CLASSES)
    changed = replace(batch, images=3 * batch.images, plain_images=batch.images)
    for expected, guide in zip(method.guides(batch, []), method.guides(changed, []), strict=True):
        assert torch.equal(guide, expected)
    assert not torch.equal(method.view(changed)[0], method.view(batch)[0])


def test_teacher_changes_pseudo_labels_only():
    plain, taught = make(), make(teacher_decay=0.9)
    with torch.no_grad():
        for p in taught.teacher.network.parameters():
            p.mul_(1.5)
    a, b = plain.loss(BATCH, STEP), taught.loss(BATCH, STEP)
    assert list(a) == list(b)
    assert {n for n in a if not torch.equal(a[n].value, b[n].value)} == {"dlb"}


# The warm-up


def test_warmup_is_a_share_of_the_run():
    method = build("vclipseg", "faithful", steps=200, warmup=0.25)
    asked = [method.patches_at(step) for step in range(200)]
    assert asked == [(4, 0)] * 50 + [(2, 2)] * 150
    assert build("vclipseg", "faithful", steps=200, warmup=0.0).patches_at(0) == (2, 2)


def test_warmup_is_supervision_only():
    """No pseudo-labels are followed; the labels of all patches are used."""
    method = make(warmup=0.5, copy_paste=0.5, teacher_decay=0.9, dlb_apply_to="unlabeled")
    batch = make_batch(0, num_classes=NUM_CLASSES, patches=(4, 0))
    images, known, _ = method.view(batch)
    assert torch.equal(images, batch.images)
    assert torch.equal(known, batch.labels)
    loss = method.loss(batch, 0)
    found = torch.autograd.grad(
        loss["dlb"].value, method.network.encoder.parameters(), allow_unused=True
    )
    assert not any(g is not None and g.any() for g in found)


# Prediction


@pytest.mark.parametrize("predict_with", ["first", "mean"])
def test_predict_with(predict_with):
    method = make(predict_with=predict_with).eval()
    images = batch_for(method, num_classes=NUM_CLASSES).images
    with torch.no_grad():
        first, second = (z.softmax(1) for z in method.network(images).logits)
        expected = first if predict_with == "first" else (first + second) / 2
        torch.testing.assert_close(method.predict(images), expected)


def test_the_teacher_has_no_part_in_prediction():
    method = make(teacher_decay=0.9).eval()
    images = batch_for(method).images
    with torch.no_grad():
        before = method.predict(images)
        for p in method.teacher.parameters():
            p.zero_()
        assert torch.equal(before, method.predict(images))
    method.after_step(LATE)
