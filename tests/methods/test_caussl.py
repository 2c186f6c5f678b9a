"""CauSSL's equations, written once more in numpy, its rounds of maximization and its switches."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from toy import LATE, build, make_batch
from vclipseg.methods import preset
from vclipseg.methods.caussl import Adversary, icm

NUM_CLASSES = 3
STEP = 2_000

both_variants = pytest.mark.parametrize("variant", ["mc", "cps"])


def make(variant="mc", **changes):
    values = {"filters": 2, "dropout": 0.0, "num_classes": NUM_CLASSES, "steps": 5_000}
    return build("caussl", variant, **{**values, **changes})


BATCH = make_batch(3, num_classes=NUM_CLASSES)


def numbers(tensor):
    return tensor.detach().double().numpy()


def branches_of(method):
    """Networks or decoders, whichever the branches are."""
    return (
        list(method.network.decoders) if method.second is None else [method.network, method.second]
    )


def logits_of(method, images=BATCH.images):
    networks = [method.network] + ([] if method.second is None else [method.second])
    return [z for network in networks for z in network(images)]


def naive_dice(p, labels):
    """Squares in the denominator; mean over the foreground classes in the labels (B, X, Y, Z)."""
    losses = []
    for c in range(1, p.shape[1]):
        g = labels == c
        if g.any():
            a = p[:, c]
            losses.append(1 - (2 * (a * g).sum() + 1e-5) / ((a**2).sum() + g.sum() + 1e-5))
    return np.mean(losses)


def naive_ce(p, labels):
    return -np.log(np.take_along_axis(p, labels[:, None], axis=1)).mean()


def naive_icm(own, others, a):
    layers = []
    for w, r, coefficients in zip(own, others, a, strict=True):
        rows = []
        for row in range(len(w)):
            mixed = sum(coefficients[row, j] * r[j] for j in range(len(r)))
            cosine = mixed @ w[row] / np.sqrt((mixed @ mixed) * (w[row] @ w[row]))
            rows.append(cosine**2)
        layers.append(np.mean(rows))
    return np.mean(layers)


# The terms


@both_variants
def test_supervision_in_numpy(variant):
    method = make(variant)
    loss, labels = method.loss(BATCH, STEP), BATCH.labels.numpy()
    probs = [numbers(z.softmax(1))[:2] for z in logits_of(method)]
    assert len(probs) == {"mc": 3, "cps": 2}[variant]
    assert loss["dice"].weight == loss["ce"].weight == 0.5
    dice, ce = (sum(f(p, labels) for p in probs) for f in (naive_dice, naive_ce))
    assert float(loss["dice"].value.detach()) == pytest.approx(dice, rel=1e-4)
    assert float(loss["ce"].value.detach()) == pytest.approx(ce, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 0.25])
def test_consistency_of_decoders_in_numpy(temperature):
    method = make(temperature=temperature)
    probs = [numbers(z.softmax(1))[2:] for z in logits_of(method)]
    expected = 0.0
    for i, p in enumerate(probs):
        for j, q in enumerate(probs):
            if i != j:
                powered = q ** (1 / temperature)
                expected += ((p - powered / powered.sum(1, keepdims=True)) ** 2).mean()
    found = method.loss(BATCH, STEP)["consistency"].value
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_consistency_of_networks_in_numpy():
    method = make("cps")
    first, second = (numbers(z.softmax(1))[2:] for z in logits_of(method))
    expected = naive_ce(first, second.argmax(1)) + naive_ce(second, first.argmax(1))
    found = method.loss(BATCH, STEP)["consistency"].value
    assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


def test_sharpened_targets_do_not_learn():
    method = make()
    z = [torch.randn(2, 3, 2, 2, 2, requires_grad=True) for _ in range(3)]
    method.inconsistency(z).backward()
    alone = z[0].detach().requires_grad_()
    targets = [(other.detach() * 2).softmax(1) for other in z[1:]]
    sum(((alone.softmax(1) - t) ** 2).mean() for t in targets).backward()
    torch.testing.assert_close(z[0].grad, alone.grad)


@both_variants
def test_labeled_patches_alone_have_no_consistency(variant):
    method = make(variant)
    loss = method.loss(make_batch(0, num_classes=NUM_CLASSES, patches=(4, 0)), 0)
    assert float(loss["consistency"].value) == 0


@pytest.mark.parametrize(
    ("variant", "steps", "weight", "start"),
    [("mc", 5_000, 0.1, 0), ("cps", 5_000, 0.03, 400), ("cps", 500, 0.03, 40)],
)
def test_weight_of_the_consistency(variant, steps, weight, start):
    """It ramps up to step 6000 of 5000, and begins at its start."""
    method, published = make(variant, steps=steps, filters=1), steps / 5_000

    def at(step):
        return method.loss(BATCH, step)["consistency"].weight

    middle = steps // 2
    ramp = math.exp(-5 * (1 - middle / (6_000 * published)) ** 2)
    assert at(middle) == pytest.approx(weight * ramp)
    assert at(LATE) == weight
    assert at(start) > 0
    assert start == 0 or at(start - 1) == 0


# Dependence


def test_icm_in_numpy():
    rng = np.random.default_rng(0)
    own = [rng.standard_normal((4, 6)), rng.standard_normal((2, 3))]
    others = [rng.standard_normal((8, 6)), rng.standard_normal((4, 3))]
    a = [rng.standard_normal((4, 8)), rng.standard_normal((2, 4))]
    found = icm(*([torch.from_numpy(m) for m in part] for part in (own, others, a)))
    assert float(found) == pytest.approx(naive_icm(own, others, a), rel=1e-9)


def test_icm_of_zeros_is_finite():
    zeros = torch.zeros(2, 3, requires_grad=True)
    value = icm([zeros], [torch.zeros(4, 3)], [torch.zeros(2, 4)])
    value.backward()
    assert float(value.detach()) == 0
    assert torch.isfinite(zeros.grad).all()


def test_icm_is_computed_in_full_precision():
    parts = [[torch.randn(4, 50)], [torch.randn(8, 50)], [torch.randn(4, 8)]]
    with torch.autocast("cpu", torch.bfloat16):
        value = icm(*parts)
    assert torch.equal(value, icm(*parts))


def expected_filters(branch, variant):
    if variant == "cps":
        kinds = (torch.nn.Conv3d, torch.nn.ConvTranspose3d)
        weights = [m.weight for m in branch.modules() if isinstance(m, kinds)]
    else:
        weights = [m.weight for m in branch.blocks.modules() if isinstance(m, torch.nn.Conv3d)]
        weights.append(branch.head.weight)
    return [numbers(w).reshape(len(w), -1) for w in weights]


@both_variants
def test_dependence_in_numpy(variant):
    method = make(variant)
    filters = [expected_filters(branch, variant) for branch in branches_of(method)]
    assert [len(layers) for layers in filters] == {"mc": [10] * 3, "cps": [30] * 2}[variant]
    expected = 0.0
    for i, own in enumerate(filters):
        rest = [other for j, other in enumerate(filters) if j != i]
        others = [np.concatenate(layers) for layers in zip(*rest, strict=True)]
        a, start = [], 0
        values = numbers(method.adversaries[i].values)
        for w, r in zip(own, others, strict=True):
            a.append(values[start : start + len(w) * len(r)].reshape(len(w), len(r)))
            start += len(w) * len(r)
        assert start == len(values)
        expected += naive_icm(own, others, a)
    loss = method.loss(BATCH, STEP)
    assert loss["dependence"].weight == 3.0
    assert float(loss["dependence"].value.detach()) == pytest.approx(expected, rel=1e-4)


def test_matrices_at_the_published_size():
    """Decoders of 3, 3, 2, 1 convolutions and a head of 2 filters; A is G x 2G."""
    method = build("caussl", "faithful", filters=16)
    widths = [128] * 3 + [64] * 3 + [32] * 2 + [16] + [2]
    assert [list(a.shapes) for a in method.adversaries] == [[(g, 2 * g) for g in widths]] * 3
    # upsampling: 1x1x1 and a bias, instead of 2x2x2
    pairs = [(256, 128), (128, 64), (64, 32), (32, 16)]
    pointwise = 2_071_970 - sum(7 * i * o for i, o in pairs)
    count = sum(p.numel() for p in method.network.parameters())
    assert count == 7_376_896 + 2_071_970 + 2 * pointwise


def test_rows_of_transposed_convolutions_are_their_inputs():
    method = build("caussl", "cps", filters=16)
    shapes = list(method.adversaries[0].shapes)
    ups = [m for m in method.network.modules() if isinstance(m, torch.nn.ConvTranspose3d)]
    assert [len(m.weight) for m in ups] == [256, 128, 64, 32]
    assert (256, 256) in shapes
    assert len(shapes) == 30
    assert all(rows == columns for rows, columns in shapes)
    assert sum(p.numel() for p in method.second.parameters()) == 9_448_866


@both_variants
@pytest.mark.parametrize("icm_all_branches", [True, False])
def test_branches_that_part_from_the_others(variant, icm_all_branches):
    method = make(variant, icm_all_branches=icm_all_branches)
    value = method.loss(BATCH, STEP)["dependence"].value
    learns = []
    for branch in branches_of(method):
        found = torch.autograd.grad(
            value, branch.parameters(), allow_unused=True, retain_graph=True
        )
        learns.append(any(g is not None and g.any() for g in found))
    assert learns == [i == 0 or icm_all_branches for i in range(len(learns))]


def test_the_encoder_and_the_upsampling_of_decoders_stay_free():
    method = make()
    value = method.loss(BATCH, STEP)["dependence"].value
    decoder = method.network.decoders[0]
    free = [*method.network.encoder.parameters(), *decoder.ups.parameters()]
    found = torch.autograd.grad(value, free, allow_unused=True)
    assert all(g is None for g in found)


def test_filters_of_the_others_are_constants():
    """Each branch's gradient is that of its own ICM alone."""
    method = make()
    weight = method.network.decoders[1].blocks[0][0].weight
    own, others = method.filters()[1]
    adversary = method.adversaries[1]
    alone = icm(own, others, adversary.matrices(adversary.values))
    torch.testing.assert_close(
        torch.autograd.grad(method.dependence(), weight), torch.autograd.grad(alone, weight)
    )
    assert not any(r.requires_grad for r in others)


# Rounds of maximization


@pytest.mark.parametrize(
    ("variant", "steps", "first", "every", "inner"),
    [
        ("mc", 5_000, 60, 60, 60),
        ("cps", 5_000, 540, 60, 60),
        ("mc", 500, 6, 6, 6),
        ("cps", 500, 54, 6, 6),
        ("mc", 10, 1, 1, 1),
        ("cps", 10, 2, 1, 1),
    ],
)
def test_rounds_come_when_they_should(variant, steps, first, every, inner):
    method = make(variant, steps=steps, filters=1)
    rounds = []
    for adversary in method.adversaries:
        adversary.maximize = lambda objective, steps: rounds.append(steps)
    at = []
    for step in range(10 * first):
        rounds.clear()
        method.before_step(step)
        if rounds:
            assert rounds == [inner] * len(method.adversaries)
            at.append(step)
    assert at == list(range(first, 10 * first, every))
    assert [method.loss(BATCH, step)["dependence"].weight for step in (first - 1, first)] == [0, 3]


@both_variants
def test_a_round_finds_dependence_and_leaves_the_networks_alone(variant):
    method = make(variant)
    weights = copy.deepcopy(list(method.parameters()))
    before = float(method.dependence().detach())
    method.before_step(600)
    after = float(method.dependence().detach())
    assert after > before + 0.1
    for old, new in zip(weights, method.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None
    method.before_step(601)
    assert float(method.dependence().detach()) == after


def test_adam_is_that_of_torch():
    torch.manual_seed(0)
    own, others = [torch.randn(4, 6), torch.randn(2, 3)], [torch.randn(8, 6), torch.randn(4, 3)]
    adversary = Adversary([(4, 8), (2, 4)], lr=0.02)
    values = adversary.values.clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=0.02, maximize=True)
    for _ in range(2):  # moments are kept between rounds
        adversary.maximize(lambda a: icm(own, others, a), 20)
        for _ in range(20):
            optimizer.zero_grad()
            icm(own, others, adversary.matrices(values)).backward()
            optimizer.step()
    torch.testing.assert_close(adversary.values, values.detach(), atol=1e-4, rtol=1e-3)


def test_copies_are_found_out():
    """Filters that are combinations of the others' have an ICM of 1."""
    torch.manual_seed(0)
    others = torch.randn(4, 9)
    own = torch.randn(2, 4) @ others
    adversary = Adversary([(2, 4)], lr=0.02)
    adversary.maximize(lambda a: icm([own], [others], a), 400)
    assert float(icm([own], [others], adversary.matrices(adversary.values))) > 0.99


def test_a_resumed_run_equals_an_unbroken_one():
    """The matrices and the moments of their optimizer go on where they were."""

    def steps(method, which):
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01)
        for step in which:
            torch.manual_seed(step)
            method.before_step(step)
            optimizer.zero_grad()
            method.loss(make_batch(step, num_classes=NUM_CLASSES), step).total.backward()
            optimizer.step()
        return method

    unbroken = steps(make(steps=100), range(5))
    state = copy.deepcopy(steps(make(steps=100), range(3)).state_dict())
    resumed = make(steps=100, seed=1)
    resumed.load_state_dict(state)
    steps(resumed, range(3, 5))
    for key, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert int(resumed.adversaries[0].steps) == 4  # one each from step 1


# Presets and prediction


def test_the_first_variant_is_the_faithful_one():
    assert preset("caussl", "faithful") == preset("caussl", "mc")


@both_variants
def test_the_first_branch_predicts(variant):
    method = make(variant).eval()
    with torch.no_grad():
        expected = logits_of(method)[0].softmax(1)
        assert torch.equal(method.predict(BATCH.images), expected)


def test_decoders_upsample_in_three_ways():
    first = [decoder.ups[0] for decoder in make().network.decoders]
    assert isinstance(first[0][0], torch.nn.ConvTranspose3d)
    for up, mode in zip(first[1:], ("trilinear", "nearest"), strict=True):
        assert up[0].kernel_size == (1, 1, 1)
        assert up[1].mode == mode
