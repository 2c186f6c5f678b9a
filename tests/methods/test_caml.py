"""CAML's equations, written once more in numpy, and its memory and switches one by one."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from toy import LATE, batch_for, build, make_batch
from vclipseg.losses import IGNORE
from vclipseg.methods.caml import VoxelMemory, choose_queries, correlation_loss, embed

NUM_CLASSES = 3
STEP = 2_000


def make(**changes):
    values = {
        "seed": 9,
        "filters": 4,
        "dropout": 0.0,
        "samples": 8,
        "memory_voxels": 16,
        "queries": 50,
    }
    return build("caml", "faithful", num_classes=NUM_CLASSES, steps=15_000, **{**values, **changes})


def named(seed=0, cases=("a", "b", "c", "d"), **kind):
    batch = make_batch(seed, num_classes=NUM_CLASSES, **kind)
    return replace(batch, case_ids=cases)


def known_here_and_there(method, batch):
    """The batch with labels that the untrained branches get right here and there."""
    with torch.no_grad():
        outs = [embed(n, batch.images)[0] for n in (method.network, method.auxiliary)]
    first, second = (z.argmax(1)[: batch.num_labeled] for z in outs)
    noise = torch.rand(first.shape, generator=torch.Generator().manual_seed(0))
    return replace(
        batch, labels=torch.where((first == second) & (noise < 0.8), first, batch.labels)
    )


def numbers(tensor):
    return tensor.detach().double().numpy()


def naive_dice(p, labels):
    """Mean over the foreground classes in the labels (B, X, Y, Z)."""
    losses = []
    for c in range(1, p.shape[1]):
        g = labels == c
        if g.any():
            a = p[:, c]
            losses.append(1 - (2 * (a * g).sum() + 1e-8) / (a.sum() + g.sum() + 1e-8))
    return np.mean(losses)


def naive_sharpen(p):
    return p**10 / (p**10 + (1 - p) ** 10)


def naive_head(x, head, running):
    """Linear, batch normalization, ReLU, linear: rows (N, F) -> (N, E)."""
    first, norm, _, last = head
    x = x @ numbers(first.weight).T + numbers(first.bias)
    mean, var = (
        (numbers(norm.running_mean), numbers(norm.running_var))
        if running
        else (x.mean(0), x.var(0))
    )
    x = (x - mean) / np.sqrt(var + norm.eps) * numbers(norm.weight) + numbers(norm.bias)
    return np.maximum(x, 0) @ numbers(last.weight).T + numbers(last.bias)


def naive_correlation_loss(first, second, memory, temperature):
    total = 0.0
    for v, a in zip(first, second, strict=True):
        rows = []
        for q in (v, a):
            scores = memory @ q / temperature
            scores = np.exp(scores - scores.max())
            rows.append(scores / scores.sum())
        total -= (rows[1] * np.log(rows[0] + 1e-8)).sum()
    return total / len(first)


# The terms


def test_supervision_and_consistency_in_numpy():
    method, batch = make(supervised_ce_weight=0.25), named()
    with torch.no_grad():
        outs = [embed(n, batch.images)[0] for n in (method.network, method.auxiliary)]
    loss = method.loss(batch, STEP)
    first, second = (numbers(z.softmax(1)) for z in outs)
    labels = batch.labels.numpy()
    expected = naive_dice(first[:2], labels) + naive_dice(second[:2], labels)
    assert float(loss["supervised"].value.detach()) == pytest.approx(expected, rel=1e-4)
    ce = sum(
        -np.log(np.take_along_axis(p[:2], labels[:, None], axis=1)).mean() for p in (first, second)
    )
    assert float(loss["supervised_ce"].value.detach()) == pytest.approx(ce, rel=1e-4)
    gap = ((first - naive_sharpen(second)) ** 2).mean()
    gap += ((second - naive_sharpen(first)) ** 2).mean()
    assert float(loss["consistency"].value.detach()) == pytest.approx(gap, rel=1e-4)


def test_sharpened_targets_learn_too():
    method, batch = make(), named()
    outs = [embed(n, batch.images)[0] for n in (method.network, method.auxiliary)]
    p, q = (z.softmax(1) for z in outs)
    expected = ((p - naive_sharpen(q)) ** 2 + (q - naive_sharpen(p)) ** 2).mean()
    weight = method.network.decoders[0].head.weight
    torch.testing.assert_close(
        torch.autograd.grad(method.loss(batch, STEP)["consistency"].value, weight),
        torch.autograd.grad(expected, weight),
    )


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_correlation_loss_in_numpy(temperature):
    torch.manual_seed(0)
    first, second, memory = torch.randn(7, 5), torch.randn(7, 5), torch.randn(11, 5)
    found = correlation_loss(first, second, memory, temperature)
    expected = naive_correlation_loss(*map(numbers, (first, second, memory)), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("heads_see", ["agreed", "selected"])
def test_correlation_term_in_numpy(heads_see):
    """From the maps to the scalar; the memory's draw is given."""
    method = make(heads_see=heads_see)
    batch = known_here_and_there(method, named())
    drawn = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    method.memory.sample = lambda count: drawn
    with torch.no_grad():
        seen = [embed(n, batch.images) for n in (method.network, method.auxiliary)]
        found = float(method.loss(batch, STEP)["correlation"].value)
    probs, maps = [numbers(z[2:].softmax(1)) for z, _ in seen], [numbers(m[2:]) for _, m in seen]
    masks = [p.argmax(1).ravel() for p in probs]
    sure = probs[0].max(1).ravel()
    agreed, chosen = [], []
    for c in range(NUM_CLASSES):
        voxels = [n for n in range(len(sure)) if masks[0][n] == masks[1][n] == c]
        if len(voxels) > 1:
            agreed += voxels
            chosen += sorted(voxels, key=lambda n: -sure[n])[:50]
    assert 50 < len(chosen) < len(agreed)
    through = agreed if heads_see == "agreed" else chosen
    vectors = []
    for m, project, predict in zip(maps, method.projections, method.predictions, strict=True):
        rows = m.transpose(0, 2, 3, 4, 1).reshape(-1, m.shape[1])[through]
        rows = naive_head(naive_head(rows, project, False), predict, False)
        vectors.append(rows[[through.index(n) for n in chosen]])
    expected = naive_correlation_loss(*vectors, numbers(drawn), 0.1)
    assert found == pytest.approx(expected, rel=1e-3)


def test_correlations_teach_both_branches_and_the_memory_stays():
    method = make()
    batch = known_here_and_there(method, named())
    value = method.loss(batch, STEP)["correlation"].value
    assert float(value.detach()) > 0
    for part in (method.network, method.auxiliary, method.projections, method.predictions):
        found = torch.autograd.grad(value, part.parameters(), allow_unused=True, retain_graph=True)
        assert any(g is not None and g.any() for g in found)
    assert not method.memory.vectors.requires_grad


def test_queries_are_the_surest_voxels_of_each_class():
    pseudo = torch.tensor([0, 1, 1, IGNORE, 2, 1, 0, 1]).view(1, 2, 2, 2)
    confidence = torch.tensor([0.5, 0.7, 0.6, 1.0, 1.0, 0.9, 0.6, 0.8]).view(1, 2, 2, 2)
    voxels, surest = choose_queries(pseudo, confidence, 3, 2)
    assert voxels.tolist() == [0, 6, 1, 2, 5, 7]  # a single voxel of class 2 is left out
    assert sorted(voxels[surest].tolist()) == [0, 5, 6, 7]
    nothing = choose_queries(torch.full((1, 2, 2, 2), IGNORE), confidence, 3, 2)
    assert [len(found) for found in nothing] == [0, 0]


@pytest.mark.parametrize(("steps", "full_at"), [(15_000, 6_000), (1_000, 400)])
def test_ramps_scale_with_the_run(steps, full_at):
    method = build("caml", "faithful", filters=1, steps=steps)
    batch = batch_for(method)

    def weights(step):
        loss = method.loss(batch, step)
        assert loss["supervised"].weight == 0.5
        return loss["consistency"].weight, loss["correlation"].weight

    assert weights(full_at) == (1.0, 0.05)
    assert weights(full_at // 2) == pytest.approx((math.exp(-1.25), 0.05 * math.exp(-1.25)))
    assert weights(0) == pytest.approx((math.exp(-5), 0.05 * math.exp(-5)))


def test_without_unlabeled_patches_the_memory_fills_and_nothing_is_compared():
    method = make()
    batch = known_here_and_there(method, named(patches=(4, 0)))
    loss = method.loss(batch, 0)
    assert float(loss["correlation"].value) == 0
    assert (method.memory.cases >= 0).sum() == 4
    assert "agreement" not in loss.facts


def test_agreement_is_of_the_unlabeled_voxels():
    method, batch = make(), named()
    with torch.no_grad():
        first, second = (
            embed(n, batch.images)[0].argmax(1)[2:] for n in (method.network, method.auxiliary)
        )
    assert float(method.loss(batch, STEP).facts["agreement"]) == pytest.approx(
        float((first == second).float().mean())
    )


# What is remembered


def test_only_voxels_that_both_branches_get_right_are_remembered():
    method = make(memory_voxels=10_000)
    batch = known_here_and_there(method, named())
    with torch.no_grad():
        seen = [embed(n, batch.images) for n in (method.network, method.auxiliary)]
    heads = copy.deepcopy(method.projections)
    method.loss(batch, STEP)
    masks = [z.argmax(1).numpy() for z, _ in seen]
    memory = method.memory
    for row in range(2):
        for c in range(NUM_CLASSES):
            right = (masks[0][row] == c) & (masks[1][row] == c) & (batch.labels[row].numpy() == c)
            assert int(memory.offered[row, c]) == right.sum()
            vectors = np.mean(
                [
                    naive_head(numbers(m[row])[:, right].T, head, True)
                    for head, (_, m) in zip(heads, seen, strict=True)
                ],
                axis=0,
            )
            held = numbers(memory.vectors[row, c * 10_000 :][: len(vectors)])
            np.testing.assert_allclose(np.sort(held, axis=0), np.sort(vectors, axis=0), atol=1e-5)
    assert memory.offered.sum() > 0
    assert (memory.offered[2:] == 0).all()


def test_remembering_leaves_the_heads_as_they_are():
    method = make()
    batch = known_here_and_there(method, named(patches=(4, 0)))
    before = copy.deepcopy(method.projections.state_dict())
    method.loss(batch, 0)
    after = method.projections.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(module.training for module in method.projections.modules())


def test_a_case_overwrites_its_own_slot():
    method = make()
    batch = known_here_and_there(method, named())
    method.loss(batch, 0)
    slots = method.memory.cases.tolist()
    first = method.memory.vectors.clone()
    method.loss(replace(batch, images=batch.images * 2, case_ids=("b", "e", "c", "d")), 1)
    cases = method.memory.cases.tolist()
    assert cases[:2] == slots[:2]
    assert cases[2] not in slots
    changed = (method.memory.vectors != first).flatten(1).any(1).tolist()
    assert changed[:4] == [False, True, True, False]


def test_slots_are_found_again_after_a_resumed_run():
    """Case names are stored as numbers that are the same in every process."""
    method = make()
    method.loss(named(), 0)
    assert method.memory.cases[:2].tolist() == [0xE8B7BE43, 0x71BEEFF9]  # CRC-32 of "a" and "b"


def test_a_resumed_run_equals_an_unbroken_one():
    def steps(method, numbers):
        optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.01)
        for step in numbers:
            torch.manual_seed(step)
            batch = named(step, cases=("abcde"[step % 5], "abcde"[(step + 1) % 5], "x", "y"))
            loss = method.loss(batch, step)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
        return method

    kind = {"memory_slots": 3, "dropout": 0.5, "samples": 4}
    unbroken = steps(make(**kind), range(4))
    state = copy.deepcopy(steps(make(**kind), range(2)).state_dict())
    resumed = make(seed=1, **kind)
    resumed.load_state_dict(state)
    steps(resumed, range(2, 4))
    for key, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


# The memory by itself


def test_the_case_seen_longest_ago_makes_room():
    memory = VoxelMemory(3, 2, 4, 5)
    slots = [int(memory.open(case, step)) for step, case in enumerate([7, 8, 9, 7, 10, 8])]
    assert slots == [0, 1, 2, 0, 1, 2]
    assert memory.cases.tolist() == [7, 10, 8]
    assert memory.opened.tolist() == [3, 4, 5]


def filled(*offered, voxels=4):
    """A memory whose vectors say their slot, class and place."""
    memory = VoxelMemory(len(offered), len(offered[0]), voxels, 3)
    for slot, counts in enumerate(offered):
        opened = memory.open(slot, slot)
        for k, count in enumerate(counts):
            kept = min(count, voxels)
            rows = [(slot, k, place) for place in range(kept)]
            memory.write(opened, k, torch.tensor(rows, dtype=torch.float).view(-1, 3), count)
    return memory


def test_a_draw_is_of_different_vectors_and_ordered_by_class():
    memory = filled((3, 0), (2, 4))
    torch.manual_seed(0)
    drawn = memory.sample(4)
    assert drawn[:, 1].tolist() == [0] * 4 + [1] * 4
    assert len({tuple(row) for row in drawn.tolist()}) == 8
    assert {tuple(row) for row in memory.sample(5).tolist()} == {
        (0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 0), (1, 0, 1)
    }  # fmt: skip  # class 1 has four only


def test_an_empty_memory_gives_nothing():
    assert VoxelMemory(2, 2, 4, 3).sample(1).shape == (0, 3)


def test_cases_are_drawn_from_in_proportion_to_what_they_offered():
    memory = filled((90_000, 0), (10_000, 0), voxels=500)
    torch.manual_seed(0)
    share = (memory.sample(200)[:, 0] == 1).float().mean()
    assert 0.03 < float(share) < 0.2


def test_what_a_case_offered_before_is_gone():
    memory = filled((4, 4))
    slot = memory.open(0, 1)
    memory.write(slot, 0, torch.full((1, 3), 9.0), 1)
    memory.write(slot, 1, torch.zeros(0, 3), 0)
    assert memory.sample(1).tolist() == [[9.0] * 3]


# Networks and prediction


def test_parameter_counts_at_the_published_size():
    method = build("caml", "faithful", filters=16)

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert count(method.network) == 9_448_866
    assert count(method.auxiliary) == 7_376_896 + 2_898_850 + 2 * 198_272
    assert count(method.projections) == 2 * 1_664
    assert count(method.predictions) == 2 * 2_176


def test_attended_features_are_skip_and_input_of_the_next_level():
    method, images = make(), named().images
    encoder = method.auxiliary.encoder
    block, attention = encoder.blocks[3]
    features = encoder(images)
    x3 = features[2]
    attended = attention(block(encoder.downs[2](x3)))
    torch.testing.assert_close(features[3], attended)
    torch.testing.assert_close(features[4], encoder.blocks[4](encoder.downs[3](attended)))


def test_without_attention_the_auxiliary_branch_sees_one_patch_at_a_time():
    images = named().images
    for attention in (True, False):
        encoder = make(attention=attention).auxiliary.encoder
        for module in encoder.modules():  # batch statistics look across patches, too
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
        together, alone = encoder(images)[3][:2], encoder(images[:2])[3]
        assert torch.allclose(together, alone, atol=1e-5) == (not attention)


def test_embed_gives_logits_of_any_size_and_what_they_are_made_of():
    method = make()
    images = torch.randn(2, 1, 16, 20, 6)
    logits, maps = embed(method.network, images)
    assert maps.shape == (2, 4, 16, 20, 6)
    torch.testing.assert_close(logits, method.network(images))
    torch.testing.assert_close(logits, method.network.decoders[0].head(maps))


def test_the_main_branch_predicts():
    method = make().eval()
    images = named().images
    expected = method.network(images).softmax(1)
    assert torch.equal(method.predict(images), expected)
    method.loss(named(), LATE)
