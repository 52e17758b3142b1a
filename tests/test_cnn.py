"""Convolutional encoders see the crops of an exam and nothing else, in any number and size; and patches are boxes."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from umbif.encoders.cnn import CNN3D, NETWORKS, alike, cut
from umbif.encoders.weights import CONFIG, save_encoder
from umbif.errors import UsageError
from umbif.stream.augment import Augmentation
from umbif.stream.exams import Exams, WholeBrainDataset, collate
from umbif.stream.patches import Patches, choose, gather, patch_grid, scatter

WIDTHS = {"resnet50": 2048, "densenet121": 1024, "efficientnet_b0": 1280, "resunet": 256}
BOXES = [(8, 4, 2), (4, 24, 12), (24, 24, 24)]  # the last is the whole crop


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_gets_a_gradient_and_the_last_map_is_as_wide_as_said(network):
    encoder, m = made(network), NETWORKS[network][2]
    with torch.enable_grad():
        tokens, valid, pooled = encoder(patches_of(noise(1, 2, 32, 20, 16)))
        (pooled * noise(*pooled.shape)).sum().backward()
    assert {name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()} == set()
    cells = -(-32 // m) * -(-20 // m) * -(-16 // m)
    assert tokens.shape == (1, 2 * cells, encoder.embed_dim)
    assert encoder.embed_dim == WIDTHS[network]
    assert valid.all()


@pytest.mark.parametrize("network", NETWORKS)
def test_a_batch_without_brain_gives_zeros_and_gradients_of_zero(corpus, network):
    encoder, exams = made(network), whole_brain(corpus, "TINY/P5")
    nothing = replace(exams, brain=torch.zeros_like(exams.brain))
    encoder.zero_grad()
    rows = []
    watch = encoder.trunk.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    with torch.enable_grad():
        tokens, valid, pooled = encoder.forward_features(nothing)
        (pooled.sum() + tokens.sum()).backward()
    watch.remove()
    assert rows == [1]  # not every layer of every device takes none
    assert not valid.any()
    assert not tokens.any()
    assert not pooled.any()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())  # NaN is not zero


@pytest.mark.parametrize("network", NETWORKS)
def test_layer_groups_hold_every_parameter_once_and_in_order(network):
    encoder = made(network)
    groups = encoder.layer_groups()
    found = []
    for name, _ in encoder.named_parameters():
        mine = [i for i, prefixes in enumerate(groups) for prefix in prefixes if name.startswith(prefix)]
        assert len(mine) == 1, name
        found += mine
    assert found == sorted(found)
    assert set(found) == set(range(len(groups)))
    assert len(groups) == (9 if network == "efficientnet_b0" else 5)


@pytest.mark.parametrize(("network", "norm"), [*((name, "group") for name in NETWORKS), ("resunet", "instance")])
def test_no_norm_of_a_whole_batch_is_left(network, norm):
    layers = {type(layer).__name__ for layer in made(network, norm).modules() if "Norm" in type(layer).__name__}
    assert layers == {"GroupNorm" if norm == "group" else "InstanceNorm3d"}


@pytest.mark.parametrize(("network", "norm"), [("resunet", "group"), ("resunet", "instance"), ("densenet121", "group")])
def test_other_exams_of_the_batch_and_their_boxes_change_nothing(corpus, network, norm):
    """They have three, four and one sequence, and other boxes. In training too: no dropped branches."""
    encoder, names = made(network, norm).train(), ("TINY/P5", "TINY/P1/1", "TINY/P2")
    exams = whole_brain(corpus, *names)
    assert network != "resunet" or len(alike(exams.padded(8), 8)) > 1
    tokens, valid, joined = encoder.forward_features(exams)
    for row, name in enumerate(names):
        alone, all_valid, pooled = encoder.forward_features(whole_brain(corpus, name))
        assert all_valid.all()
        assert torch.allclose(tokens[row, valid[row]], alone[0], atol=1e-4)
        assert torch.allclose(joined[row], pooled[0], atol=1e-4)
    assert torch.cdist(joined, joined).fill_diagonal_(1).min() > 0.1


def test_training_draws_no_number_of_its_own():
    encoder, patches = made("efficientnet_b0").train(), patches_of(noise(1, 3, 32, 32, 32))
    assert torch.equal(encoder(patches)[0], encoder(patches)[0])


def test_an_absent_sequence_changes_nothing_and_a_present_one_does(corpus):
    exams = whole_brain(corpus, "TINY/P5", "TINY/P6")
    assert exams.present.sum(1).tolist() == [3, 4]
    pooled = made("resunet").forward_features(exams)[2]
    for entry, changes in ((3, [False, True]), (1, [True, True])):
        other = exams.image.clone()
        other[:, entry] = other[:, entry].flip(1) * 2
        now = made("resunet").forward_features(replace(exams, image=other))[2]
        assert [bool((a - b).abs().max() > 1e-3) for a, b in zip(now, pooled, strict=True)] == changes


def test_what_is_not_valid_changes_nothing_even_if_not_a_number():
    voxels, valid = noise(2, 3, 16, 16, 16), torch.tensor([[True, False, True], [False] * 3])
    voxels[~valid] = torch.nan
    tokens, shown, pooled = made("resunet")(patches_of(voxels, valid))
    alone = made("resunet")(patches_of(voxels[:1, [0, 2]]))
    assert shown.sum(1).tolist() == [16, 0]
    assert torch.allclose(tokens[0, shown[0]], alone[0][0], atol=1e-5)
    assert torch.allclose(pooled[0], alone[2][0], atol=1e-5)
    assert not pooled[1].any()
    assert not tokens[~shown].any()
    assert not made("resunet")(patches_of(torch.full_like(voxels, torch.nan), valid & False))[2].any()


def test_the_order_of_sequences_does_not_matter_to_the_mean(corpus):
    exams = whole_brain(corpus, "TINY/P6", "TINY/P5")
    order = torch.tensor([2, 0, 3, 1])
    names = ("image", "scale", "intercept", "mean", "std", "low", "high", "present", "sequence")
    shuffled = replace(exams, **{name: getattr(exams, name)[:, order] for name in names})
    tokens, _, pooled = made("resunet").forward_features(exams)
    again, _, pooled_shuffled = made("resunet").forward_features(shuffled)
    assert torch.allclose(pooled_shuffled, pooled, atol=1e-5)
    assert not torch.allclose(again, tokens, atol=1e-2)


def test_the_mean_is_that_of_the_cells(corpus):
    tokens, valid, pooled = made("resunet").forward_features(whole_brain(corpus, "TINY/P6", "TINY/P2"))
    assert valid.sum(1)[0] > 2 * valid.sum(1)[1] > 0
    for row in range(2):
        assert torch.allclose(pooled[row], tokens[row, valid[row]].mean(0), atol=1e-5)


def test_a_budget_takes_the_sequences_with_the_smallest_scores(corpus):
    exams = whole_brain(corpus, "TINY/P2", "TINY/P6")
    encoder, scores = made("resunet"), torch.tensor([[0.5, 0.0, 0.0, 0.0], [0.9, 0.1, 0.8, 0.2]])
    assert encoder.num_patches(exams) == 4
    _, _, pooled = encoder.forward_features(exams, scores=scores, budget=2)
    kept = torch.tensor([[True, False, False, False], [False, True, False, True]])
    _, _, expected = encoder.forward_features(replace(exams, present=kept))
    assert torch.allclose(pooled, expected, atol=1e-5)


def test_an_exam_is_augmented_alike_in_every_batch(corpus):
    exams, encoder = whole_brain(corpus, "TINY/P3/2", "TINY/P1/2", "TINY/P2"), made("resunet")
    plain, changed = (encoder.forward_features(exams, augmentation=a)[2] for a in (None, Augmentation()))
    for row in range(3):
        alone = cut(exams, torch.tensor([row]), tuple(exams.image.shape[2:]))
        assert torch.allclose(
            encoder.forward_features(alone, augmentation=Augmentation())[2][0], changed[row], atol=1e-4
        )
        assert (plain - changed)[row].abs().max() > 0.01


@pytest.mark.parametrize("size", [(16, 16, 16), (1, 5, 40)])
@pytest.mark.parametrize("norm", ["group", "instance", "batch"])
def test_crops_of_every_size_pass(size, norm):
    tokens, _, pooled = made("efficientnet_b0", norm)(patches_of(noise(1, 1, *size)))
    assert tokens.isfinite().all()
    assert pooled.std() > 1e-3  # a single cell normed alone would be zero


def test_one_voxel_of_brain_makes_a_sequence_available_and_none_does_not(corpus):
    exams = whole_brain(corpus, "TINY/P5", "TINY/P5")
    brain = torch.zeros_like(exams.brain)
    brain[0, 3, 3, 3] = True
    padded, grid = made("resnet50").grid(replace(exams, brain=brain))
    assert padded.image.shape[2:] == made("resnet50").patch_shape(padded) == (32, 32, 32)
    assert torch.equal(grid.available, padded.present & torch.tensor([[True], [False]]))


def test_an_encoder_comes_back_from_its_folder_and_no_other_takes_its_weights(tmp_path):
    encoder, patches = made("efficientnet_b0"), patches_of(noise(1, 2, 32, 32, 32))
    save_encoder(encoder, tmp_path / "encoder", {})
    config = json.loads((tmp_path / "encoder" / CONFIG).read_text())
    assert config["class_path"] == "umbif.encoders.cnn.CNN3D"
    again = CNN3D(**config["init_args"], weights=str(tmp_path))
    assert torch.equal(again(patches)[0], encoder(patches)[0])
    with pytest.raises(UsageError, match=r"model\.encoder\.norm=instance, but the weights have group"):
        CNN3D("efficientnet_b0", "instance", weights=str(tmp_path))


# ---------------------------------------------------------------- patches that are boxes


@pytest.mark.parametrize("box", BOXES)
def test_a_box_holds_the_voxels_that_stand_there(crops, box):
    grid = patch_grid(crops, box, 0.0)
    patches = gather(crops, grid, *choose(grid))
    z, centres, (px, py, pz) = crops.z_scores(), voxel_centres(crops), box
    for row in range(len(crops)):
        number = 0
        for entry in range(int(crops.present[row].sum())):
            for x, y, z0 in np.ndindex(grid.shape):
                where = np.s_[x * px : (x + 1) * px, y * py : (y + 1) * py, z0 * pz : (z0 + 1) * pz]
                assert torch.equal(patches.voxels[row, number], z[row, entry][where])
                middle = centres[row][where].mean((0, 1, 2))
                assert torch.allclose(patches.position_mm[row, number], middle, atol=1e-3)
                number += 1
        assert patches.valid[row].sum() == number


@pytest.mark.parametrize("box", BOXES)
def test_scatter_puts_boxes_back(crops, box):
    grid = patch_grid(crops, box)
    index, valid = choose(grid)
    patches = gather(crops, grid, index, valid)
    back = scatter(crops, grid, index, valid, patches.voxels.flatten(2))
    shown = ~back.isnan()
    assert torch.equal(back[shown], crops.z_scores()[shown])
    assert shown.sum() == grid.available.sum() * np.prod(box)


@pytest.mark.parametrize("box", BOXES)
def test_a_box_is_shaded_as_the_cubes_that_tile_it(crops, box):
    fields = []
    for size in (box, 2):
        grid = patch_grid(crops, size, 0.0)
        index, valid = choose(grid)
        field = Augmentation(bias=0.3)._log_bias_field(gather(crops, grid, index, valid), crops).exp()
        fields.append(scatter(crops, grid, index, valid, field.flatten(2))[crops.present])
    assert torch.allclose(*fields, atol=1e-5)
    assert fields[0].std() > 0.01


@pytest.mark.parametrize("box", BOXES)
def test_boxes_of_the_mirrored_head_are_mirrored_boxes(crops, box):
    exams = replace(crops, crop_start=torch.zeros_like(crops.box), box=torch.full_like(crops.box, 24))
    turned = replace(exams, image=exams.image.flip(2), brain=exams.brain.flip(1))
    both = [gather(e, grid, *choose(grid)) for e in (exams, turned) for grid in (patch_grid(e, box, 0.0),)]
    ours, theirs = (listed(p) for p in (both[0].mirrored(torch.ones(len(exams), dtype=torch.bool)), both[1]))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def crops(corpus) -> Exams:
    """Two whole heads of four and one sequence, in 24 × 24 × 24 voxels."""
    exams = whole_brain(corpus, "TINY/P6", "TINY/P2").padded(24)
    assert exams.image.shape[2:] == (24, 24, 24)
    return replace(exams, crop_start=torch.tensor([[2, -1, 0], [0, 3, -2]]))


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@cache
def made(network: str, norm: str = "group") -> CNN3D:
    """As if trained: no bias is zero, and no norm leaves a channel as it was."""
    torch.manual_seed(0)
    encoder = CNN3D(network, norm)
    for p in encoder.parameters():
        if p.dim() == 1:
            p.data += 0.1 * noise(*p.shape)
    return encoder


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def patches_of(voxels: torch.Tensor, valid: torch.Tensor | None = None) -> Patches:
    zeros = torch.zeros(voxels.shape[:2], dtype=torch.int64)
    return Patches(
        voxels, zeros[..., None].expand(-1, -1, 3).float(), zeros, zeros, zeros == 0 if valid is None else valid
    )


def voxel_centres(exams: Exams) -> torch.Tensor:
    """(B, X, Y, Z, 3) in millimetres from the centre of the brain's box."""
    axes = [torch.arange(n) + 0.5 for n in exams.image.shape[2:]]
    index = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return (index + (exams.crop_start - exams.box / 2)[:, None, None, None]) * exams.spacing_mm


def listed(patches: Patches) -> dict[tuple, torch.Tensor]:
    """Voxels by exam, sequence and place."""
    found = {}
    for row, number in patches.valid.nonzero().tolist():
        place = (round(float(n), 3) + 0.0 for n in patches.position_mm[row, number])
        found[row, int(patches.entry[row, number]), *place] = patches.voxels[row, number]
    return found


def whole_brain(corpus, *names: str) -> Exams:
    rows = np.array([list(corpus.exams["exam"]).index(name) for name in names])
    dataset = WholeBrainDataset(corpus, rows, np.zeros(len(rows), np.float32))
    return collate([dataset[i] for i in range(len(rows))], spacing_mm=corpus.spacing_mm, seed=0)
