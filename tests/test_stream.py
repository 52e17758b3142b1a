"""A sample is a pure function of (seed, slot): ranks, workers and restarts change no bit of it."""

import shutil
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import torch

from umbif.corpus.shards import Corpus
from umbif.downstream.data import TaskData
from umbif.downstream.tasks import MISSING, BinaryLabel, labelled
from umbif.errors import Transient, UsageError
from umbif.pretrain.masking import COLUMNS, PLACES, TOKENS, Masking
from umbif.pretrain.monitors import centre_crop
from umbif.stream.augment import BIAS, CURVE, FLIP, SCALE, Augmentation
from umbif.stream.exams import SEQUENCES, CropDataset, Exams, WholeBrainDataset, collate, person_codes, read_view
from umbif.stream.modules import (
    Position,
    PretrainData,
    SlotBatches,
    affordable_workers,
    data_loader,
    exams_of_split,
    killed,
)
from umbif.stream.order import View, draw_views, exam_of_slot, slots_of_rank
from umbif.stream.patches import MIN_BRAIN, Patches, PatchGrid, choose, gather, patch_grid, scatter
from umbif.stream.philox import philox, uniform

CROP, PATCH = (16, 16, 16), 4
ONES = 0xFFFFFFFF
OFF = Augmentation(flip_probability=0, curve=0, bias=0, scale=0)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_uniform_numbers_are_uniform():
    numbers = uniform(3, torch.arange(500), torch.zeros(500, dtype=torch.int64), 0, 401)
    assert numbers.shape == (500, 401)
    assert 0 <= numbers.min() < 1e-4
    assert 1 - 1e-4 < numbers.max() < 1
    shares = torch.histc(numbers, 20, 0, 1) / numbers.numel()
    assert (shares - 0.05).abs().max() < 6 * (0.05 * 0.95 / numbers.numel()) ** 0.5


def test_uniform_numbers_of_other_seeds_slots_views_and_purposes_are_independent():
    slots = torch.tensor([0, 1, 7, 2**31, 2**32, 2**32 + 1, 2**40])
    rows = [
        uniform(seed, slots, torch.full_like(slots, view), purpose, 4000)
        for seed in (0, 1, 2**31)
        for view in (0, 1)
        for purpose in (FLIP, CURVE, BIAS, SCALE, TOKENS, COLUMNS, PLACES)
    ]
    correlation = torch.corrcoef(torch.cat(rows)).fill_diagonal_(0)
    assert correlation.shape == (3 * 2 * 7 * 7,) * 2
    assert correlation.abs().max() < 6 / 4000**0.5


def test_uniform_numbers_do_not_depend_on_the_batch_or_the_count():
    slots, views = torch.arange(10), torch.arange(10) % 2
    all_of_them = uniform(0, slots, views, 5, 64)
    assert torch.equal(uniform(0, slots[3:4], views[3:4], 5, 64), all_of_them[3:4])
    assert torch.equal(uniform(0, slots, views, 5, 9), all_of_them[:, :9])


@pytest.mark.parametrize("num_exams", [1, 5, 64])
def test_every_exam_comes_once_an_epoch_in_an_order_of_its_own(num_exams):
    order = np.array([exam_of_slot(slot, num_exams, seed=4) for slot in range(8 * num_exams)]).reshape(8, num_exams)
    assert (np.sort(order) == np.arange(num_exams)).all()
    if num_exams == 64:
        assert len({tuple(epoch) for epoch in order}) == 8
        assert not np.array_equal(order[0], [exam_of_slot(slot, num_exams, seed=5) for slot in range(num_exams)])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_global_batch_is_the_same_for_every_world_size(world_size):
    ranks = [slots_of_rank(24, 12, rank, world_size) for rank in range(world_size)]
    for step in range(3):
        joined = [slot for rank in ranks for slot in next(rank)]
        assert joined == list(range(24 + 12 * step, 36 + 12 * step))


@pytest.mark.parametrize(("batch", "world_size", "near"), [(64, 3, 63), (10, 4, 8), (4, 8, 8), (100, 96, 96)])
def test_a_world_size_that_does_not_divide_the_batch_is_refused_with_the_nearest(batch, world_size, near):
    with pytest.raises(UsageError, match=rf"nearest that can is {near}$"):
        SlotBatches(0, batch, 0, world_size)


@pytest.mark.parametrize("num_sequences", [1, 2, 3, 4, 8])
def test_views_see_what_they_should(num_sequences):
    have, box = SEQUENCES[:num_sequences], (20, 9, 16)
    drawn = [views_of(slot, have, box, disjoint_share=0.5, keep_probability=0.6) for slot in range(400)]
    for views in drawn:
        for view in views:
            assert view.sequences
            assert list(view.sequences) == [s for s in have if s in view.sequences]
            assert 0 <= view.start[0] <= 4
            assert view.start[1:] == (-4, 0)  # a smaller box lies in the middle of the crop
    assert {view.start[0] for views in drawn for view in views} == set(range(5))
    apart = np.mean([not set(one.sequences) & set(other.sequences) for one, other in drawn])
    assert apart == 0 if num_sequences == 1 else apart > 0.4


@pytest.mark.parametrize("num_views", [2, 3, 4])
def test_disjoint_views_share_no_sequence_and_lose_none(num_views):
    for slot in range(200):
        views = views_of(slot, SEQUENCES[:4], CROP, num_views=num_views, disjoint_share=1.0)
        seen = [sequence for view in views for sequence in view.sequences]
        assert sorted(seen) == sorted(SEQUENCES[:4])


def test_the_share_of_sequences_kept_is_as_asked():
    views = [v for slot in range(2000) for v in views_of(slot, SEQUENCES, CROP, disjoint_share=0, keep_probability=0.3)]
    expected = 0.3 + 0.7 / 8  # one is kept whatever is drawn
    assert np.mean([len(view.sequences) / 8 for view in views]) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_and_workers_change_no_bit(corpus, undisturbed, world_size, num_workers):
    found = [stream(corpus, rank, world_size, num_workers=num_workers) for rank in range(world_size)]
    for step, expected in enumerate(undisturbed):
        assert_same(join([rank[step] for rank in found]), expected)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_stream_that_starts_again_in_the_middle_goes_on_with_the_same_bits(corpus, undisturbed, step):
    position = Position(seed=5)
    position.restore(Position(seed=5, next_slot=4 * step).state(corpus, "all"), corpus, "all")
    for expected, found in zip(undisturbed[step:], stream(corpus, start=position.next_slot), strict=False):
        assert_same(found, expected)


def test_a_stream_of_another_seed_is_another(corpus, undisturbed):
    other = stream(corpus, seed=6)
    assert not torch.equal(other[0].exam, undisturbed[0].exam) or not torch.equal(other[0].image, undisturbed[0].image)


def test_a_checkpoint_of_another_corpus_is_refused(corpus):
    with pytest.raises(UsageError, match="another corpus"):
        Position(0).restore({"next_slot": 3, "seed": 0, "corpus": "0" * 64}, corpus, "all")


@pytest.mark.parametrize("column", ["split", "person"])
def test_a_checkpoint_of_other_people_of_the_corpus_is_refused(corpus, tmp_path, column):
    before = PretrainData(str(corpus.folder), crop_size=CROP, global_batch_size=4)
    folder = shutil.copytree(corpus.folder, tmp_path / "corpus")
    index = pd.read_parquet(folder / "index.parquet")
    index[column] = index[column].map({"train": "test", "test": "train"}) if column == "split" else "one"
    index.to_parquet(folder / "index.parquet")
    now = PretrainData(str(folder), crop_size=CROP, global_batch_size=4)
    with pytest.raises(UsageError, match="persons, the split or the labels"):
        now.load_state_dict(before.state_dict())
    before.load_state_dict(before.state_dict())


def test_training_never_reads_the_test_split(corpus):
    data = PretrainData(str(corpus.folder), crop_size=CROP, global_batch_size=4)
    test = set(exams_of_split(corpus, "test"))
    seen = {int(view["exam"]) for slot in range(20) for view in data.dataset("train")[slot]}
    assert seen == set(range(len(corpus))) - test
    assert {int(view["exam"]) for slot in range(20) for view in data.dataset("test")[slot]} == test


def test_exams_of_one_person_have_one_code(corpus):
    codes = person_codes(corpus)
    people = list(corpus.exams["person"])
    assert (codes[:, None] == codes).tolist() == [[one == other for other in people] for one in people]


def test_z_scores_of_the_whole_brain_have_mean_0_and_variance_1(corpus):
    for exams in whole_brains(corpus):
        z = exams.z_scores()
        for entry in range(int(exams.present.sum())):
            inside = z[0, entry][exams.brain[0]]
            assert inside.mean().abs() < 1e-3
            assert inside.std() == pytest.approx(1, abs=1e-3)


def test_background_and_padding_are_the_mean_of_the_brain(corpus):
    small, large = whole_brains(corpus, "TINY/P2", "TINY/P6")
    joined = whole_brain(corpus, "TINY/P2", "TINY/P6").padded(8)
    for row, alone in enumerate((small, large)):
        shown = joined.z_scores()[row]
        for entry in range(int(alone.present.sum())):
            outside = shown[entry][~joined.brain[row]]
            assert outside.abs().max() < 0.02  # half of what int16 can tell apart


def test_gather_then_scatter_puts_every_voxel_back(batch):
    grid = patch_grid(batch, PATCH)
    index, valid = choose(grid)
    patches = gather(batch, grid, index, valid)
    back = scatter(batch, grid, index, valid, patches.voxels.flatten(2))
    chosen = blocks_to_voxels(grid.available.view(len(batch), -1, *grid.shape))
    assert torch.equal(back.isnan(), ~chosen)
    assert torch.equal(back[chosen], batch.z_scores()[chosen])
    assert torch.equal(patches.sequence, batch.sequence.gather(1, patches.entry))


def test_only_patches_with_a_tenth_of_brain_are_available(batch):
    grid = patch_grid(batch, PATCH)
    share = batch.brain.float().unfold(1, 4, 4).unfold(2, 4, 4).unfold(3, 4, 4).mean((-3, -2, -1))
    expected = batch.present[:, :, None] & (share >= MIN_BRAIN).flatten(1)[:, None]
    assert torch.equal(grid.available, expected.flatten(1))
    assert (share[(share > 0) & (share < MIN_BRAIN)]).numel() > 0  # the border case occurs


def test_a_patch_has_the_same_millimetres_in_every_crop(corpus):
    exam = list(corpus.exams["exam"]).index("TINY/P6")
    found = {}
    for start in ((0, 0, 0), (4, 0, -4), (-8, 4, 8)):
        exams = crop_at(corpus, exam, start)
        for place, voxels in listed(all_patches(exams)).items():
            assert torch.equal(found.setdefault(place, voxels), voxels)
    box = np.array(corpus.frames(exam)["brain"].shape)
    assert np.abs([place[1:] for place in found]).max() < box.max() * corpus.spacing_mm / 2 + 2 * PATCH


def test_masks_are_drawn_from_brain_and_never_overlap(batch):
    grid = patch_grid(batch, PATCH)
    count = grid.available.sum(1)
    for slot in range(0, 200, 8):
        exams = replace(batch, slot=batch.slot + slot)
        drawn = Masking(num_visible=30, num_targets=20).draw(exams, grid)
        visible, target = flags(grid, drawn.visible, drawn.visible_valid), flags(grid, drawn.target, drawn.target_valid)
        assert not (visible & ~grid.available).any()
        assert not (target & ~grid.available).any()
        assert not (visible & target).any()
        assert torch.equal(visible.sum(1), torch.minimum((count + 1) // 2, torch.tensor(30)))
        assert torch.equal(target.sum(1), torch.minimum(count - visible.sum(1), torch.tensor(20)))


@pytest.mark.parametrize("num_visible", [1, 1000])
def test_never_more_than_half_of_an_exam_is_visible(batch, num_visible):
    grid = patch_grid(batch, PATCH)
    drawn = Masking(num_visible=num_visible, num_targets=None).draw(batch, grid)
    visible, available = drawn.visible_valid.sum(1), grid.available.sum(1)
    assert torch.equal(visible, torch.minimum((available + 1) // 2, torch.tensor(num_visible)))
    assert torch.equal(drawn.target_valid.sum(1), available - visible)


@pytest.mark.parametrize(("share", "budget"), [(0.5, None), (0.3, 9), (1.0, None)])
def test_a_share_of_what_is_hidden_is_asked_for(batch, share, budget):
    grid = patch_grid(batch, PATCH)
    drawn = Masking(num_visible=12, num_targets=budget, decoded_share=share).draw(batch, grid)
    hidden = grid.available.sum(1) - drawn.visible_valid.sum(1)
    expected = (hidden * share).ceil().long().clamp_max(budget or 10**6)
    assert torch.equal(drawn.target_valid.sum(1), expected)


def test_without_columns_no_place_is_kept_hidden(batch):
    """The switch of the measure: at 0, a place that is hidden in one sequence may be seen in another."""
    grid = patch_grid(batch, PATCH)
    seen = {}
    for share in (0.0, 0.9):
        drawn = Masking(num_visible=1000, column_share=share).draw(batch, grid)
        visible = flags(grid, drawn.visible, drawn.visible_valid).view(len(batch), batch.present.shape[1], -1)
        seen[share] = int(visible.any(1).sum())
    assert seen[0.0] > seen[0.9]


def test_a_hidden_column_is_asked_for_in_every_sequence(batch):
    grid = patch_grid(batch, PATCH)
    S, N = batch.present.shape[1], grid.position_mm.shape[1]
    num_columns = 0
    for slot in range(0, 80, 8):
        exams = replace(batch, slot=batch.slot + slot)
        drawn = Masking(num_visible=12, num_targets=60).draw(exams, grid)
        column = uniform(exams.seed, exams.slot, exams.view, COLUMNS, N) < 0.25
        visible = flags(grid, drawn.visible, drawn.visible_valid).view(-1, S, N)
        target = flags(grid, drawn.target, drawn.target_valid).view(-1, S, N)
        hidden = column & ~visible.any(1)
        asked = (target & hidden[:, None]).sum(1)
        have = (grid.available.view(-1, S, N) & hidden[:, None]).sum(1)
        torn = (asked > 0) & (asked < have)
        assert torn.sum(1).max() <= 1  # the budget may end within the last one
        num_columns += int(((asked == have) & (have > 1)).sum())
    assert num_columns > 100


def test_masks_are_the_same_for_every_share_of_the_batch(batch):
    alone = rows_of(batch, slice(2, 4))
    masking = Masking(num_visible=12, num_targets=12)
    whole = masking.draw(batch, patch_grid(batch, PATCH))
    part = masking.draw(alone, patch_grid(alone, PATCH))
    for name in ("visible", "visible_valid", "target", "target_valid"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[2:4])


@pytest.mark.parametrize("augmentation", [Augmentation(bias=0, flip_probability=0), Augmentation(1.0, 1.5, 0, 0.5)])
def test_intensities_keep_their_order(batch, augmentation):
    before = all_patches(batch)
    after = augmentation(before, batch)
    for row in range(len(batch)):
        for entry in range(int(batch.present[row].sum())):
            mine = (before.entry[row] == entry) & before.valid[row]
            old, new = before.voxels[row, mine], after.voxels[row, mine]
            if after.position_mm[row, 0, 0] != before.position_mm[row, 0, 0]:
                new = new.flip(1)
            new = new.flatten()[old.flatten().argsort()]
            assert (new.diff() >= -1e-5).all()
            assert new[-1] - new[0] > 0.5  # and do not collapse


def test_each_view_and_sequence_draws_a_curve_of_its_own(batch):
    augmented = Augmentation(flip_probability=0)(all_patches(batch), batch)
    z = all_patches(batch).voxels
    change = [
        float((augmented.voxels - z)[row][augmented.entry[row] == entry].mean())
        for row in range(len(batch))
        for entry in range(int(batch.present[row].sum()))
    ]
    assert len(set(change)) == len(change)


def test_augmentation_is_a_function_of_slot_and_view(batch):
    augmentation = Augmentation()
    once, again = (augmentation(all_patches(batch), batch) for _ in range(2))
    assert torch.equal(once.voxels, again.voxels)
    alone = rows_of(batch, slice(3, 4))
    index, valid = choose(patch_grid(batch, PATCH))
    part = augmentation(gather(alone, patch_grid(alone, PATCH), index[3:4], valid[3:4]), alone)
    assert torch.allclose(part.voxels, once.voxels[3:4], atol=1e-5)
    other = replace(batch, slot=batch.slot + 1)
    assert not torch.allclose(augmentation(all_patches(other), other).voxels, once.voxels, atol=0.01)


def test_visible_and_target_patches_of_a_view_get_the_same_augmentation(batch):
    grid = patch_grid(batch, PATCH)
    index, valid = choose(grid)
    every = Augmentation()(gather(batch, grid, index, valid), batch)
    some = torch.arange(0, index.shape[1], 3)
    part = Augmentation()(gather(batch, grid, index[:, some], valid[:, some]), batch)
    assert torch.allclose(part.voxels, every.voxels[:, some], atol=1e-5)
    assert torch.equal(part.position_mm, every.position_mm[:, some])


def test_strengths_of_zero_change_nothing(batch):
    before = all_patches(batch)
    after = OFF(before, batch)
    assert torch.equal(after.voxels, before.voxels)
    assert torch.equal(after.position_mm, before.position_mm)


@pytest.mark.parametrize("name", ["flip_probability", "curve", "bias", "scale"])
def test_each_strength_alone_changes_something(batch, name):
    changed = replace(OFF, **{name: 0.5})(all_patches(batch), batch)
    assert not torch.equal(changed.voxels, all_patches(batch).voxels)
    assert torch.equal(changed.position_mm, all_patches(batch).position_mm) == (name != "flip_probability")


def test_a_name_is_hidden_of_all_patches_of_a_sequence_or_of_none(batch):
    before = all_patches(batch)
    after = replace(OFF, hide_name=0.5)(before, batch)
    assert torch.equal(after.voxels, before.voxels)
    other, hidden = SEQUENCES.index("other"), 0
    for row in range(len(batch)):
        for entry in range(int(batch.present[row].sum())):
            own = before.entry[row] == entry
            names = set(after.sequence[row, own].tolist())
            assert names in ({other}, set(before.sequence[row, own].tolist()))
            hidden += names == {other}
    assert 0 < hidden < int(batch.present.sum())


def test_a_bias_field_is_one_polynomial_over_the_borders_of_patches(corpus):
    exams = whole_brain(corpus, "TINY/P6").padded(PATCH)
    zero, one = torch.zeros_like(exams.scale), torch.ones_like(exams.scale)
    numbers = {"scale": one, "intercept": zero, "mean": zero, "std": one, "low": zero, "high": one}
    ones = replace(exams, image=torch.ones_like(exams.image), brain=torch.ones_like(exams.brain), **numbers)
    patches = replace(OFF, bias=0.3)(all_patches(ones), ones)
    index, valid = choose(patch_grid(ones, PATCH))
    field = scatter(ones, patch_grid(ones, PATCH), index, valid, patches.voxels.flatten(2))[0, 0].log()
    for axis in range(3):
        assert field.diff(dim=axis).abs().max() > 1e-3
        assert field.diff(n=4, dim=axis).abs().max() < 1e-5  # over the whole head, it is one cubic


def test_mirroring_twice_changes_nothing_and_once_mirrors_the_head(batch):
    patches, chosen = all_patches(batch), torch.arange(len(batch)) % 2 == 0
    once = patches.mirrored(chosen)
    assert torch.equal(once.mirrored(chosen).voxels, patches.voxels)
    assert torch.equal(once.mirrored(chosen).position_mm, patches.position_mm)
    assert torch.equal(once.position_mm[0], patches.position_mm[0] * torch.tensor([-1.0, 1, 1]))
    assert torch.equal(once.voxels[0], patches.voxels[0].flip(1))
    assert torch.equal(once.voxels[1], patches.voxels[1])


def test_patches_of_the_mirrored_head_are_mirrored_patches(batch):
    exams = replace(rows_of(batch, slice(6, 7)), crop_start=torch.zeros(1, 3), box=torch.tensor([CROP]))
    turned = replace(exams, image=exams.image.flip(2), brain=exams.brain.flip(1))
    ours = listed(all_patches(exams).mirrored(torch.tensor([True])))
    theirs = listed(all_patches(turned))
    assert ours.keys() == theirs.keys() != listed(all_patches(exams)).keys()
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)


@pytest.fixture(scope="module")
def undisturbed(corpus) -> list[Exams]:
    """Five global batches of four slots, read in one process."""
    return stream(corpus)


@pytest.fixture(scope="module")
def batch(corpus) -> Exams:
    """Two views of every exam."""
    dataset = CropDataset(corpus, np.arange(len(corpus)), crop_size=CROP, seed=1, disjoint_share=0)
    exams = collate([dataset[slot] for slot in range(len(corpus))], spacing_mm=2.0, seed=1)
    assert set(exams.present.sum(1).tolist()) == {1, 2, 3, 4}
    return exams


def stream(corpus: Corpus, rank=0, world_size=1, *, start=0, num_workers=0, seed=5) -> list[Exams]:
    dataset = CropDataset(corpus, exams_of_split(corpus, "train"), crop_size=CROP, seed=seed)
    batches = SlotBatches(start, 4, rank, world_size, num_batches=5)
    return list(data_loader(dataset, batches, num_workers))


def join(parts: list[Exams]) -> Exams:
    joined = {f.name: [getattr(part, f.name) for part in parts] for f in fields(Exams)}
    tensors = {name: torch.cat(v) for name, v in joined.items() if all(isinstance(t, torch.Tensor) for t in v)}
    return replace(parts[0], **tensors)


def assert_same(found: Exams, expected: Exams) -> None:
    for name in {f.name for f in fields(Exams)}:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert torch.equal(ours, theirs) if isinstance(theirs, torch.Tensor) else ours == theirs, name


def views_of(slot, have, box, *, num_views=2, disjoint_share=0.5, keep_probability=0.75):
    return draw_views(
        7, slot, sequences=have, box=box, crop=CROP, num_views=num_views, disjoint_share=disjoint_share,
        keep_probability=keep_probability,
    )  # fmt: skip


def whole_brain(corpus: Corpus, *names: str) -> Exams:
    rows = np.array([list(corpus.exams["exam"]).index(name) for name in names])
    dataset = WholeBrainDataset(corpus, rows, np.zeros(len(rows), np.float32))
    return collate([dataset[i] for i in range(len(rows))], spacing_mm=corpus.spacing_mm, seed=0)


def whole_brains(corpus: Corpus, *names: str) -> list[Exams]:
    return [whole_brain(corpus, name) for name in names or corpus.exams["exam"]]


def crop_at(corpus: Corpus, exam: int, start) -> Exams:
    view = View(start, tuple(corpus.sequences(exam)))
    known = {"exam": exam, "person": 0, "slot": 0, "view": 0}
    return collate([[{**read_view(corpus, exam, view, CROP, 4), **known}]], spacing_mm=corpus.spacing_mm, seed=0)


def rows_of(exams: Exams, rows: slice) -> Exams:
    tensors = {f.name: getattr(exams, f.name) for f in fields(Exams)}
    return replace(exams, **{name: t[rows] for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def all_patches(exams: Exams) -> Patches:
    grid = patch_grid(exams, PATCH)
    return gather(exams, grid, *choose(grid))


def listed(patches: Patches) -> dict[tuple, torch.Tensor]:
    """The voxels of the first exam's patches by entry and place."""
    valid = patches.valid[0]
    found = zip(patches.entry[0, valid], patches.position_mm[0, valid], patches.voxels[0, valid], strict=True)
    return {(int(entry), *(round(float(n), 3) for n in mm)): voxels for entry, mm, voxels in found}


def flags(grid: PatchGrid, index: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(B, S * N): which patches an index holds."""
    return torch.zeros(grid.available.shape, dtype=torch.int64).scatter_add(1, index, valid.long()) > 0


def blocks_to_voxels(patches: torch.Tensor) -> torch.Tensor:
    for axis in (2, 3, 4):
        patches = patches.repeat_interleave(PATCH, dim=axis)
    return patches


def test_a_view_takes_no_more_sequences_than_told():
    asked = {"sequences": ("t1", "t1ce", "t2", "flair"), "box": (20, 20, 20), "crop": (8, 8, 8), "num_views": 2}
    policy = {"disjoint_share": 0.0, "keep_probability": 1.0}
    found = [view.sequences for slot in range(60) for view in draw_views(0, slot, **asked, **policy, max_sequences=2)]
    assert {len(sequences) for sequences in found} == {2}
    assert {name for sequences in found for name in sequences} == set(asked["sequences"])
    assert all(len(view.sequences) == 4 for view in draw_views(0, 0, **asked, **policy))


def test_a_crop_around_a_tumour_holds_its_centre_in_the_middle_half_where_the_box_allows():
    box, crop, focus = (60, 60, 14), (16, 16, 16), (30, 2, 7)
    asked = {"sequences": ("t1",), "num_views": 2, "disjoint_share": 0.0, "keep_probability": 1.0}
    views = (draw_views(0, slot, box=box, crop=crop, focus=focus, **asked) for slot in range(200))
    starts = np.array([view.start for several in views for view in several])
    inside = focus[0] - starts[:, 0]
    assert inside.min() == 4
    assert inside.max() == 12
    assert set(starts[:, 1]) == {0}  # at the border the crop stays in the box
    assert set(starts[:, 2]) == {-1}  # larger than the box: centred


@pytest.mark.parametrize("focus", [None, (20, 14, 30)])
def test_exams_of_a_place_are_cropped_where_the_others_are(focus):
    asked = {"sequences": ("t1", "t2"), "crop": (16, 16, 16), "num_views": 2, "disjoint_share": 0.0}
    policy = {"keep_probability": 0.5, "exams_per_place": 4, "focus": focus}
    views = [draw_views(0, slot, box=(40, 40, 60), **asked, **policy) for slot in range(2000)]
    groups = [{view.start for pair in views[at : at + 4] for view in pair} for at in range(0, 2000, 4)]
    assert {len(group) for group in groups} == {1}
    starts = np.array([next(iter(group)) for group in groups])
    reach = ([24, 24, 44], [0, 0, 0]) if focus is None else ([16, 10, 26], [8, 2, 18])
    assert (np.abs(starts.max(0) - reach[0]) <= 1).all()
    assert (np.abs(starts.min(0) - reach[1]) <= 1).all()
    (larger, _), (smaller, _) = (draw_views(0, 0, box=(n,) * 3, **asked, **policy | {"focus": None}) for n in (116, 66))
    assert np.abs(np.divide(larger.start, 100) - np.divide(smaller.start, 50)).max() < 0.03  # of their own box


def test_exams_without_a_tumour_mask_are_left_out(corpus):
    data = PretrainData(str(corpus.folder), crop_size=(8, 8, 8), around_tumour=True, num_val_exams=3, num_workers=0)
    assert sorted(corpus.exams["exam"][row] for split in ("train", "test") for row in data.exams(split)) == [
        "TINY/P1/1", "TINY/P4",
    ]  # fmt: skip
    assert len(data.dataset("train")[0]) == 2


def test_a_run_sees_the_sequences_that_it_is_told_and_exams_with_none_of_them_are_left_out(corpus, caplog):
    caplog.set_level("INFO", "umbif")
    data = PretrainData(str(corpus.folder), sequences=["t1ce", "t2"], crop_size=(8, 8, 8), num_workers=0)
    assert [record.getMessage() for record in caplog.records] == ["2 of 8 exams have none of t1ce, t2 and are left out"]
    names = {split: [data.corpus.exams["exam"][row] for row in data.exams(split)] for split in ("train", "test")}
    assert names == {"train": ["TINY/P1/1", "TINY/P2", "TINY/P5", "TINY/P6"], "test": ["TINY/P3/1", "TINY/P3/2"]}
    views = [view for slot in range(20) for view in data.dataset("train")[slot]]
    shown = {SEQUENCES[code] for view in views for code in view["sequence"][view["present"]]}
    assert (shown, len(views[0]["image"])) == ({"t1ce", "t2"}, 2)
    assert centre_crop(data.corpus, 0, (8, 8, 8))["present"].sum() == 2
    assert data.state_dict() == PretrainData(str(corpus.folder)).state_dict()  # no other people


def test_sequences_that_a_corpus_has_not_are_told_with_the_nearest(corpus):
    with pytest.raises(UsageError, match=r"data\.sequences.*got t1c\. Did you mean t1ce\?"):
        PretrainData(str(corpus.folder), sequences=["flair", "t1c"])
    data = PretrainData(str(corpus.folder), sequences=["t1"], around_tumour=True)
    with pytest.raises(UsageError, match=r"no exam with a tumour mask and with t1 in its test split"):
        data.dataset("test")


def test_a_task_leaves_out_exams_without_its_sequences(corpus, tmp_path):
    exams = ["P1/1,0", "P1/2,0", "P2/,1", "P3/1,0", "P3/2,1", "P4/,1", "P5/,0", "P6/,1"]
    (tmp_path / "labels.csv").write_text("\n".join(["subject,session,idh", *(e.replace("/", ",") for e in exams)]))
    label = BinaryLabel(columns=["idh"], positive=["1"], negative=["0"])
    data = TaskData(
        str(corpus.folder), "idh", label, str(tmp_path / "labels.csv"), ["t1", "t1ce", "t2"], val_fraction=0.5
    )
    assert [data.exams["exam"][row] for row in np.flatnonzero(data.y == MISSING)] == ["TINY/P4"]
    assert [data.exams["exam"][row] for row in data.parts["test"]] == ["TINY/P3/1", "TINY/P3/2"]


def test_labels_of_a_task_do_not_decide_who_is_tested(corpus, tmp_path):
    (tmp_path / "labels.csv").write_text("subject,split\nP1,test\n")
    with pytest.raises(UsageError, match=r"has: got split\. Rename them\. .*umbif index"):
        labelled(corpus, str(tmp_path / "labels.csv"))


def test_validation_takes_what_is_held_out_also_where_it_is_less_than_a_batch(corpus):
    data = PretrainData(str(corpus.folder), crop_size=(8, 8, 8), global_batch_size=64, num_workers=0)
    held_out = len(data.exams("test"))
    assert 0 < held_out < 64
    assert [len(batch) for batch in data.val_dataloader()] == [2 * held_out]


@pytest.mark.parametrize(
    ("free_gib", "processes", "cache_gib", "expected"),
    [(1000, 1, 0, 8), (40, 1, 0, 6), (40, 2, 0, 3), (1, 1, 0, 1), (40, 1, 2, 4), (40, 1, 200, 1)],
)
def test_reading_processes_are_as_many_as_the_memory_holds(monkeypatch, free_gib, processes, cache_gib, expected):
    wanted = {"batch_bytes": 2**30, "num_processes": processes, "cache_bytes": cache_gib * 2**30}
    monkeypatch.setattr("umbif.stream.modules.available_memory_bytes", lambda: free_gib * 2**30)
    monkeypatch.setattr("umbif.stream.modules.shared_memory_bytes", lambda: None)
    assert affordable_workers(8, **wanted) == expected
    monkeypatch.setattr("umbif.stream.modules.available_memory_bytes", lambda: None)
    assert affordable_workers(8, **wanted) == 8


@pytest.mark.parametrize(
    ("shared_gib", "processes", "expected", "said"),
    [(0.0625, 1, 0, "/dev/shm"), (10, 1, 3, "/dev/shm"), (10, 2, 1, "/dev/shm"), (100, 1, 6, "40 GiB are free")],
)
def test_reading_processes_are_as_many_as_shared_memory_holds_and_the_warning_names_what_is_short(
    monkeypatch, caplog, shared_gib, processes, expected, said
):
    monkeypatch.setattr("umbif.stream.modules.available_memory_bytes", lambda: 40 * 2**30 * processes)
    monkeypatch.setattr("umbif.stream.modules.shared_memory_bytes", lambda: shared_gib * 2**30)
    assert affordable_workers(8, batch_bytes=2**30, num_processes=processes, cache_bytes=0) == expected
    assert said in caplog.text
    assert ("--shm-size" in caplog.text) == ("shm" in said)


def test_a_reading_process_that_was_killed_is_told_with_what_ran_out():
    bus = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that ...")
    after = RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly")
    assert "lower data.num_workers" in str(killed(after))
    assert killed(after).exit_code == Transient.exit_code  # the next start may have the memory
    after.__cause__ = bus
    assert killed(bus).exit_code == 1
    assert "--shm-size" in str(killed(bus))
    assert "--shm-size" in str(killed(after))
    assert killed(RuntimeError("something else")) is None
