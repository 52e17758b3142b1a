"""Losses against their definitions, over pairs, over ranks, and over what a queue remembers."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from ranks import contrast_batch, contrast_of_rank, moved, same_contrast, two_steps
from small import small_umbif, views

from umbif.pretrain.contrast import Contrast, ContrastOptions, MovingAverage, standardised
from umbif.pretrain.losses import TargetErrors, info_nce, normalised
from umbif.pretrain.units import Identity, Units
from umbif.stream.patches import choose, gather, patch_grid


def test_the_target_is_normalised_patch_by_patch():
    voxels = 50 + 9 * torch.randn(2, 3, 64)
    found = normalised(voxels)
    assert torch.allclose(found.mean(-1), torch.zeros(2, 3), atol=1e-5)
    assert torch.allclose(found.var(-1), torch.ones(2, 3), atol=1e-4)
    assert normalised(torch.ones(1, 1, 64)).abs().max() == 0


def test_reconstruction_is_the_mean_over_valid_targets_of_an_exam_or_of_a_sequence():
    error = torch.tensor([[1.0, 4.0, 100.0], [7.0, math.inf, math.nan]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    found = TargetErrors(error, valid, sequence=torch.tensor([[0, 3, 3], [3, 0, 0]]))
    assert found.by_exam().tolist() == [2.5, 7.0]
    assert {name: float(value) for name, value in found.by_sequence().items()} == {"t1": 1.0, "flair": 5.5}
    nothing = TargetErrors(error, torch.zeros_like(valid), torch.zeros(2, 3, dtype=torch.long))
    assert nothing.by_exam().tolist() == [0.0, 0.0]
    assert nothing.by_sequence() == {}


@pytest.mark.parametrize(("num_views", "num_units"), [(2, 1), (3, 1), (2, 3)])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("same_person", [False, True])
def test_contrast_equals_a_loop_over_all_pairs(num_views, num_units, temperature, same_person):
    z, who = rows_of(contrast_batch(num_views, num_units))
    found, asked = info_nce(z, z, who, who, temperature=temperature, same_person_negatives=same_person)
    assert found.tolist() == pytest.approx(loop(z, who, temperature, same_person), rel=1e-5, abs=1e-6)
    assert asked.equal(who.valid)


def test_other_exams_of_one_person_are_never_negatives_unless_told():
    z, who = rows_of(contrast_batch())
    assert who.person[0] == who.person[4] != who.person[2]
    for told in (False, True):
        leaf = z.clone().requires_grad_()
        info_nce(leaf, leaf, who, who, temperature=0.2, same_person_negatives=told)[0][:2].sum().backward()
        assert (leaf.grad[4:6].abs().max() > 0) == told
        assert leaf.grad[2:4].abs().max() > 0


def test_similarities_have_full_precision_under_autocast():
    z, who = rows_of(contrast_batch())
    expected = (info_nce(z, z, who, who, temperature=0.2)[0], standardised(z, who, who))
    with torch.autocast("cpu", torch.bfloat16):
        found = (info_nce(z, z, who, who, temperature=0.2)[0], standardised(z, who, who))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_view_without_brain_is_neither_asked_nor_an_answer():
    z, who = rows_of(contrast_batch())
    leaf = z.clone().requires_grad_()
    loss, asked = info_nce(leaf, leaf, who, who, temperature=0.2)
    loss.sum().backward()
    assert loss[-2:].tolist() == [0.0, 0.0]
    assert (loss[:-2] > 0).all()
    assert asked.tolist() == [True] * 10 + [False] * 2
    assert leaf.grad[-2:].abs().max() == 0


def test_a_batch_of_one_person_has_no_contrast_and_no_nan():
    z, who = rows_of(contrast_batch())
    rows = who.rows.clone()
    rows[:, 2] = 0
    leaf = z.clone().requires_grad_()
    loss, _ = info_nce(leaf, leaf, Identity(rows), Identity(rows), temperature=0.2)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6
    assert leaf.grad.isfinite().all()


def test_values_are_standardised_over_what_is_valid_of_each_sequence():
    who = contrast_batch(num_units=2).who
    z = torch.randn(24, 4) * 3 + 10 + 5 * who.sequence[:, None]
    found = standardised(z, who, who)
    for sequence in (0, 1):
        own = found[who.valid & (who.sequence == sequence)]
        assert torch.allclose(own.mean(0), torch.zeros(4), atol=1e-5)
        assert torch.allclose(own.std(0), torch.ones(4), atol=1e-3)
    nobody = Identity(who.rows * torch.tensor([1, 1, 1, 1, 0]))
    assert standardised(z, nobody, nobody).isfinite().all()


def test_a_view_costs_the_mean_of_its_sequences_that_have_a_sibling():
    units, contrast = contrast_batch(num_units=2), same_contrast()
    both = contrast(units).view(6, 2)
    z = contrast.projected(units)
    each, asked = info_nce(z, z, units.who, units.who, temperature=contrast.options.temperature)
    each = each.view(6, 2, 2)  # exams, views, sequences
    assert asked.view(6, 2, 2)[2].tolist() == [[True, False]] * 2
    assert torch.allclose(both[2], each[2, :, 0])
    assert torch.allclose(both[[0, 1, 3, 4]], each[[0, 1, 3, 4]].mean(-1))


def test_units_pool_the_tokens_of_each_sequence_and_name_their_owners(corpus):
    exams = views(corpus, range(3))
    module = small_umbif()
    patches = gather(exams, patch_grid(exams, 8), *choose(patch_grid(exams, 8)))
    tokens, valid, mean = module.encoder(patches)
    whole = Units.of(tokens, valid, patches, exams, "view", None)
    assert torch.allclose(whole.features[:, 0], mean, atol=1e-6)
    assert whole.who.sequence.tolist() == [0] * len(exams)
    each = Units.of(tokens, valid, patches, exams, "sequence", 0.1)
    B, S = exams.present.shape
    assert each.features.shape == (B, S, 3 * tokens.shape[-1])
    assert each.who.valid.view(B, S).equal(exams.present)
    assert each.who.sequence.view(B, S).equal(exams.sequence)
    assert each.who.slot.view(B, S).equal(exams.slot[:, None].expand(B, S))
    own = tokens[1, valid[1] & (patches.entry[1] == 0)]
    assert torch.allclose(each.features[1, 0, : tokens.shape[-1]], own.mean(0), atol=1e-5)
    num = math.ceil(0.1 * len(own))
    assert torch.allclose(each.features[1, 0, -tokens.shape[-1] :], own.sort(0).values[:num].mean(0), atol=1e-5)


def test_the_contrast_looks_at_the_first_channels_alone(corpus):
    exams = views(corpus, range(3))
    module = small_umbif(contrast=ContrastOptions(projector_dim=16, channel_share=0.25))
    patches = gather(exams, patch_grid(exams, 8), *choose(patch_grid(exams, 8)))
    tokens, valid, _ = module.encoder(patches)
    tokens = tokens.detach().requires_grad_()
    module.contrast(module.contrast.units(tokens, valid, patches, exams)).sum().backward()
    asked = tokens.grad.abs().amax((0, 1)) > 0
    assert asked.tolist() == [channel < tokens.shape[-1] // 4 for channel in range(tokens.shape[-1])]


@pytest.mark.parametrize("world_size", [2, 3])
def test_contrast_over_ranks_equals_the_joined_batch(tmp_path, world_size):
    """Losses, gradients and the queue's order; with a person on two ranks and an exam without brain."""
    mp.start_processes(contrast_of_rank, args=(world_size, tmp_path), nprocs=world_size, start_method="spawn")
    whole = two_steps(contrast_batch(num_units=2))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world_size)]
    assert torch.allclose(torch.cat([rank["loss"] for rank in ranks]), whole["loss"], atol=1e-6)
    for name, expected in whole["gradients"].items():
        mean = sum(rank["gradients"][name] for rank in ranks) / world_size
        assert torch.allclose(mean, expected, atol=1e-6), name
    assert all(torch.equal(rank["queue"], whole["queue"]) for rank in ranks)


def test_the_queue_holds_the_last_accepted_keys_and_they_are_negatives():
    contrast, units = same_contrast(queue_size=5), contrast_batch()
    alone = contrast(units)
    contrast.queue.settle(accepted=False)
    assert torch.equal(contrast(units), alone)  # dropped keys are forgotten
    contrast.queue.settle(accepted=True)
    assert contrast.queue.whose.tolist() == units.who.rows[-5:].tolist()
    later = moved(units, slot=100, person=50)
    more = contrast(later)
    assert (more[:-2] > alone[:-2]).all()  # further opponents
    contrast.queue.settle(accepted=True)
    assert set(contrast.queue.whose[:, 0].tolist()) == {113, 114, 115}
    assert torch.equal(contrast.eval()(later), same_contrast()(later))  # evaluation looks at its own batch only


def test_keys_of_a_queue_of_the_same_person_are_no_negatives():
    contrast, units = same_contrast(queue_size=12), contrast_batch()
    contrast(units)
    contrast.queue.settle(accepted=True)
    later = moved(units, slot=100)
    later.who.rows[:, 2] = 7  # all of the queue's are of one person, and so is the batch
    contrast.queue.whose[:, 2] = 7
    assert contrast(later).abs().max() < 1e-6


def test_the_moving_average_keeps_its_share_and_never_a_gradient():
    layer, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    average = MovingAverage(0.9, layer=layer)
    before = layer.weight.detach().clone()
    average.follow(layer=other)
    assert torch.allclose(average.average["layer"].weight, 0.9 * before + 0.1 * other.weight)
    assert not any(p.requires_grad for p in average.parameters())
    assert torch.equal(layer.weight, before)
    assert not average.train().average["layer"].training


def test_keys_of_a_moving_average_get_no_gradient():
    options = ContrastOptions(projector_dim=5, extreme_share=None, channel_share=1)
    contrast, units = Contrast(6, options), contrast_batch()
    keys = torch.randn(len(units.features), 5, requires_grad=True)
    contrast(units, keys.detach()).sum().backward()
    assert keys.grad is None
    assert not torch.allclose(contrast(units, keys.detach()), contrast(units))


def rows_of(units: Units) -> tuple[torch.Tensor, Identity]:
    """What is compared, and whose it is."""
    return units.features.flatten(0, 1), units.who


def loop(z: torch.Tensor, who: Identity, temperature: float, same_person: bool) -> list[float]:
    """InfoNCE from its definition."""
    rows, values = who.rows.tolist(), z.double().tolist()

    def similarity(i: int, j: int) -> float:
        a, b = values[i], values[j]
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b) / temperature

    losses = []
    for i, (slot, view, person, sequence, valid) in enumerate(rows):
        keys = [j for j in range(len(rows)) if j != i and rows[j][4] and rows[j][3] == sequence]
        assert all(rows[j][1] != view for j in keys if rows[j][0] == slot)
        positives = [j for j in keys if rows[j][0] == slot]
        negatives = [j for j in keys if rows[j][0] != slot and (same_person or rows[j][2] != person)]
        if not valid or not positives:
            losses.append(0.0)
            continue
        total = sum(math.exp(similarity(i, j)) for j in positives + negatives)
        losses.append(sum(math.log(total) - similarity(i, j) for j in positives) / len(positives))
    return losses
