"""CrossMatch's equations, written once more in numpy, its perturbations and its switches."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy import LATE, build, make_batch
from vclipseg import views
from vclipseg.losses import IGNORE
from vclipseg.methods import preset
from vclipseg.methods.crossmatch import CrossMatchSettings, strong_view, trusted
from vclipseg.mixing import maybe_boxes
from vclipseg.training import TrainSettings, learning_rate

NUM_CLASSES = 3
SIZE = (16, 16, 32)
TERMS = ("supervised", "strong", "by_clean", "by_perturbed")


def make(preset="faithful", **changes):
    """A network without dropout of its own."""
    settings = {"dropout": 0.0, "threshold": 0.45, **changes}
    return build("crossmatch", preset, num_classes=NUM_CLASSES, steps=14_000, **settings)


def batch_for(method, seed=0):
    return make_batch(seed, SIZE, patches=method.settings.patches, num_classes=NUM_CLASSES)


def drop_first(maps, p, training=True, inplace=False):
    """In place of `dropout3d`: always the first channels, so that a pass can be repeated."""
    kept = torch.arange(maps.shape[1]) >= int(p * maps.shape[1])
    return maps * kept.view(1, -1, 1, 1, 1) / (1 - p) if training else maps


def generator_of(batch):
    """The draws of a loss of this batch, once more."""
    return torch.Generator().manual_seed(batch.generator.initial_seed())


def probs_of(logits):
    z = logits.detach().double().numpy()
    return np.exp(z) / np.exp(z).sum(1, keepdims=True)


# The loss in numpy


def naive_dice(p, labels):
    """Squared, over the batch, mean over the foreground classes present; `IGNORE` left out."""
    kept = labels != IGNORE
    values = {}
    for c in range(1, NUM_CLASSES):
        a, b = p[:, c] * kept, labels == c
        values[c] = 1 - (2 * (a * b).sum() + 1e-5) / ((a**2).sum() + b.sum() + 1e-5)
    present = [c for c in values if (labels == c).any()] or list(values)
    return np.mean([values[c] for c in present])


def naive_supervised(p, labels):
    own = np.take_along_axis(p, labels[:, None], 1)
    return 0.5 * (-np.log(own).mean() + naive_dice(p, labels))


def naive_threshold(s, step):
    ramp = math.exp(-5 * (1 - min(step / 17_000, 1)) ** 2)
    tau = s.threshold + 0.25 * ramp
    if s.tau == "as_released":
        return s.threshold if step == 0 else tau * math.log(2)
    return tau


@torch.no_grad()
def naive_loss(method, batch, step):
    """Channels are dropped as by `drop_first`."""
    s, rng = method.settings, generator_of(batch)
    tau = naive_threshold(s, step)
    x, y = batch.labeled_images, batch.labels.numpy()
    weak = batch.plain[batch.num_labeled :]
    u = weak[: len(weak) // 2] if s.donors == "further" else weak

    def labels_of(p):
        return np.where(p.max(1) >= tau, p.argmax(1), IGNORE)

    def outputs(first, second):
        encoder, decoder = method.network.encoder, method.network.decoders[0]
        maps = encoder(torch.cat([first, second]))
        levels = [
            torch.cat([m, *(drop_first(m[len(first) :], p) for p in s.feature_dropout)])
            for m in maps
        ]
        logits = decoder.head(decoder.maps(levels)[-1])
        return np.split(probs_of(logits), [len(first) + i * len(second) for i in range(3)])

    z_x, z_w, z_weak, z_strong = outputs(x, u)
    own = [labels_of(p) for p in (z_w, z_weak, z_strong)]
    s1, s2 = strong_view(u, rng), strong_view(u, rng)
    if s.donors == "further":
        v = weak[len(weak) // 2 :]
        _, _, v_weak, v_strong = outputs(x, v)
        donated = [labels_of(p) for p in (probs_of(method.network(v)), v_weak, v_strong)]
        d1, d2 = strong_view(v, rng), strong_view(v, rng)
    else:
        order = [len(u) - 1, *range(len(u) - 1)]
        donated = [labels[order] for labels in own]
        d1, d2 = s1[order], s2[order]
    reverse = s.box == "as_released"
    box1, box2 = (maybe_boxes(len(u), SIZE, rng, reverse).numpy() for _ in range(2))
    mixed = [
        torch.from_numpy(np.where(box[:, None], d.numpy(), s_.numpy()))
        for box, d, s_ in ((box1, d1, s1), (box2, d2, s2))
    ]
    z_1, z_2, z_2weak, z_2strong = outputs(*mixed)
    y1 = np.where(box1, donated[0], own[0])
    y2, y2weak, y2strong = (np.where(box2, d, o) for d, o in zip(donated, own, strict=True))
    by_clean = [
        naive_dice(z_weak, own[0]),
        naive_dice(z_strong, own[0]),
        naive_dice(z_2weak, y2),
        naive_dice(z_2strong, y2),
    ]
    by_perturbed = [naive_dice(z_2weak, y2weak), naive_dice(z_2strong, y2strong)]
    terms = {
        "supervised": (0.5, naive_supervised(z_x, y)),
        "strong": (0.125, naive_dice(z_1, y1) + naive_dice(z_2, y2)),
        "by_clean": (0.5 * 0.7, np.mean(by_clean)),
        "by_perturbed": (0.5 * 0.3, np.mean(by_perturbed)),
    }
    return terms, {"tau": tau, "pseudo_share": (own[0] != IGNORE).mean()}


@pytest.mark.parametrize("seed", [0, 1, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"box": "as_released"},
        {"tau": "no_ln2", "threshold": 0.3},
        {"donors": "neighbor", "patches": (2, 2)},
        {"donors": "neighbor", "patches": (1, 3)},
    ],
    ids=str,
)
def test_loss(changes, seed, monkeypatch):
    monkeypatch.setattr("torch.nn.functional.dropout3d", drop_first)
    method = make(**changes)
    batch, step = batch_for(method, seed), 5_000
    expected, facts = naive_loss(method, batch, step)
    loss = method.loss(batch, step)
    assert tuple(loss) == tuple(expected) == TERMS
    for name, (weight, value) in expected.items():
        assert loss[name].weight == pytest.approx(weight)
        assert float(loss[name].value.detach()) == pytest.approx(value, rel=2e-3), name
    for name, value in facts.items():
        assert float(loss.facts[name]) == pytest.approx(float(value), abs=2e-3), name
    assert 0 < float(loss.facts["pseudo_share"]) <= 1


@pytest.mark.parametrize("changes", [{"eta": 0.1}, {"strong_weight": 0.5}])
def test_weights(changes):
    method = make(**changes)
    weights = [term.weight for term in method.loss(batch_for(method), LATE).values()]
    s = method.settings
    assert weights == pytest.approx([0.5, 0.5 * s.strong_weight, 0.5 * (1 - s.eta), 0.5 * s.eta])


def test_labeled_patches_alone_are_supervision():
    method = make(warmup=0.5)
    batch = make_batch(0, SIZE, patches=(6, 0), num_classes=NUM_CLASSES)
    with torch.no_grad():
        expected = naive_supervised(probs_of(method.network(batch.images)), batch.labels.numpy())
    loss = method.loss(batch, 0)
    assert list(loss) == ["supervised"]
    assert float(loss["supervised"].value.detach()) == pytest.approx(expected, rel=1e-4)


def test_views_are_of_the_plain_images():
    """The harness's own change of contrast reaches the labeled patches only."""
    method = make("robust", feature_dropout=(0.0, 0.0))
    batch = batch_for(method)
    images = torch.cat([batch.labeled_images, 5 * batch.unlabeled_images])
    values = [
        method.loss(replace(b, plain_images=batch.images), LATE).total.detach()
        for b in (batch_for(method), replace(batch_for(method), images=images))
    ]
    assert torch.equal(*values)


# Labels that count


@pytest.mark.parametrize("tau", ["as_released", "no_ln2"])
@pytest.mark.parametrize("step", [0, 1, 7_000, 14_000])
def test_threshold(tau, step):
    method = build("crossmatch", "faithful", steps=14_000, tau=tau)
    assert method.threshold(step) == pytest.approx(naive_threshold(method.settings, step))


def test_published_thresholds():
    released, plain = (
        build("crossmatch", "faithful", steps=14_000, tau=tau) for tau in ("as_released", "no_ln2")
    )
    assert released.threshold(0) == 0.75
    assert released.threshold(1) == pytest.approx(0.521, abs=1e-3)
    assert released.threshold(14_000) == pytest.approx(0.668, abs=1e-3)
    assert plain.threshold(14_000) == pytest.approx(0.964, abs=1e-3)
    short = build("crossmatch", "faithful", steps=140, tau="no_ln2")
    assert short.threshold(70) == pytest.approx(plain.threshold(7_000))


def test_trusted_labels():
    probs = torch.tensor([[0.2, 0.8, 0.0], [0.4, 0.3, 0.3]]).T.reshape(1, 3, 2, 1, 1)
    logits = probs.clamp(min=1e-9).log().requires_grad_()
    found = trusted(logits, 0.5)
    assert found.flatten().tolist() == [1, IGNORE]
    assert not found.requires_grad


def test_nothing_is_sure_enough():
    method = make(threshold=1.0, tau="no_ln2")
    loss = method.loss(batch_for(method), LATE)
    assert float(loss.facts["pseudo_share"]) == 0
    for name in TERMS[1:]:
        assert float(loss[name].value.detach()) == pytest.approx(0, abs=1e-6)
    loss.total.backward()


# Perturbed features


def test_perturbed_drops_whole_channels_of_the_second_group():
    method = build("crossmatch", "faithful", filters=16, dropout=0.0)
    seen = {}
    decoder = method.network.decoders[0]
    original = decoder.maps
    decoder.maps = lambda levels: original(seen.setdefault("levels", levels))
    first, second = make_batch(0).images.split(2)
    outputs = method.perturbed(first, second)
    assert [z.shape for z in outputs] == [(2, 2, 16, 16, 16)] * 4
    for level in seen["levels"]:
        clean, few, many = level[2:].split(2)
        for changed, p in ((few, 0.25), (many, 0.75)):
            dropped = changed.flatten(2).abs().amax(2) == 0
            kept = changed / (1 / (1 - p))
            torch.testing.assert_close(kept[~dropped], clean[~dropped])
            alive = clean.flatten(2).abs().amax(2) > 0
            share = (dropped & alive).sum() / alive.sum()
            assert abs(float(share) - p) < 4 * math.sqrt(p * (1 - p) / float(alive.sum()))


def test_feature_dropout_is_always_on_and_the_last_dropout_never():
    method = build("crossmatch", "faithful", dropout=0.5).eval()
    images = make_batch(0).images
    with torch.no_grad():
        once, again = (method.perturbed(images[:2], images[2:]) for _ in range(2))
        clean = method.network(images)
    torch.testing.assert_close(torch.cat(once[:2]), clean)
    assert torch.equal(torch.cat(once[:2]), torch.cat(again[:2]))
    assert not torch.equal(once[2], again[2])
    assert not torch.equal(once[3], again[3])
    called = []
    method.network.decoders[0].dropout.register_forward_hook(lambda *_: called.append(1))
    method.train().perturbed(images[:2], images[2:])
    assert not called


def test_perturbed_outputs_of_any_size_are_those_of_the_network():
    method = make(feature_dropout=(0.0, 0.0)).eval()
    images = make_batch(0, (17, 20, 9), num_classes=NUM_CLASSES).images
    with torch.no_grad():
        found = method.perturbed(images[:1], images[1:3])
        expected = method.network(images[:3])
    torch.testing.assert_close(torch.cat(found[:2]), expected)
    torch.testing.assert_close(found[2], expected[1:])


def test_targets_have_no_gradient_and_the_clean_output_is_not_taught():
    """Without the supervised term, only perturbed and strong outputs are pulled."""
    method = make()
    batch = batch_for(method)
    outputs, original = [], method.perturbed

    def recorded(*images):
        found = original(*images)
        if found[0].requires_grad:
            outputs.append([z.clone() for z in found])
            return tuple(outputs[-1])
        return found

    method.perturbed = recorded
    loss = method.loss(batch, LATE)
    (z_x, z_w, *perturbed_w), (z_1, z_2, *perturbed_2) = outputs
    for term, taught in (
        ("supervised", [z_x]),
        ("strong", [z_1, z_2]),
        ("by_clean", [*perturbed_w, *perturbed_2]),
        ("by_perturbed", perturbed_2),
    ):
        everything = [z_x, z_w, *perturbed_w, z_1, z_2, *perturbed_2]
        found = torch.autograd.grad(
            loss[term].value, everything, allow_unused=True, retain_graph=True
        )
        reached = [z for z, g in zip(everything, found, strict=True) if g is not None and g.any()]
        assert [id(z) for z in reached] == [id(z) for z in taught], term


# Views and donors


def test_strong_view():
    x = make_batch(0, 8, patches=(3, 0)).images
    rng = torch.Generator().manual_seed(3)
    changed = views.gamma(views.bias_field(x, rng), rng)
    use = torch.rand(3, generator=rng) < 0.8
    changed = torch.stack([changed[i] if use[i] else x[i] for i in range(3)])
    blurred = views.gaussian_blur(changed, rng)
    use = torch.rand(3, generator=rng) < 0.5
    expected = torch.stack([blurred[i] if use[i] else changed[i] for i in range(3)])
    assert torch.equal(strong_view(x, torch.Generator().manual_seed(3)), expected)


def test_further_donors_are_never_learned_on_outside_the_boxes(monkeypatch):
    """Without boxes the further patches do not matter."""
    monkeypatch.setattr("torch.nn.functional.dropout3d", drop_first)
    monkeypatch.setattr(
        "vclipseg.methods.crossmatch.maybe_boxes",
        lambda n, shape, *_: torch.zeros(n, *shape, dtype=torch.bool),
    )
    method = make()
    batch = batch_for(method)
    images = batch.images.clone()
    images[4:] = images[4:].flip(2) * 2
    totals = [
        method.loss(replace(batch_for(method), images=i), LATE).total.detach()
        for i in (batch.images, images)
    ]
    assert torch.equal(*totals)


@pytest.mark.parametrize(
    ("changes", "gradient_free", "with_gradient"), [({}, 2, 2), ({"donors": "neighbor"}, 0, 2)]
)
def test_passes_of_a_step(changes, gradient_free, with_gradient):
    method, seen = make(**changes), []
    method.network.encoder.register_forward_hook(
        lambda _, args, out: seen.append(out[0].requires_grad)
    )
    method.loss(batch_for(method), LATE)
    assert sorted(seen) == [False] * gradient_free + [True] * with_gradient


# Settings


def test_donors_need_pairs():
    with pytest.raises(ValueError, match="must be even"):
        CrossMatchSettings(donors="further", patches=(2, 3))
    CrossMatchSettings(donors="neighbor", patches=(2, 3))


def test_published_settings():
    values = preset("crossmatch", "faithful")
    s = CrossMatchSettings.model_validate(values["method"])
    assert (s.patches, s.donors, s.dropout, s.warmup) == ((2, 4), "further", 0.5, 0.0)
    assert (s.eta, s.threshold, s.feature_dropout) == (0.3, 0.75, (0.25, 0.75))
    assert (s.tau, s.box) == ("as_released", "fixed")
    train = TrainSettings(steps=14_000, **values["train"])
    assert train.optimizer == "adamw"
    assert train.weight_decay == 1e-4
    assert learning_rate(train, 7_000) == pytest.approx(1e-3 * (1 - 7 / 17) ** 0.9)
    assert learning_rate(train, 14_000) == pytest.approx(2.1e-4, rel=0.01)


def test_number_of_parameters():
    method = build("crossmatch", "faithful", filters=16)
    assert sum(p.numel() for p in method.parameters()) == 9_448_866
