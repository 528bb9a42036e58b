"""The loader: augmentation against a plain reference, seeds, shards, going on in mid-epoch, evaluation and its fill."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kalmannorm.data.loader import Loader, derive_seed
from kalmannorm.errors import UserError

COUNT, SIZE = 50, 8
IMAGES = np.random.RandomState(0).randint(0, 256, (COUNT, SIZE, SIZE, 3)).astype(np.uint8)
LABELS = np.arange(COUNT, dtype=np.int64)  # the label tells which image it is


def loader(**options: Any) -> Loader:
    return Loader(IMAGES, LABELS, **{"batch": 8, "device": "cpu", "pad": 2, "flip": True, "seed": 3, **options})


def epoch_of(source: Loader, epoch: int = 0, start_step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*source.epoch(epoch, start_step), strict=True)
    return torch.cat(images), torch.cat(labels)


def normalized(raw: np.ndarray, mean: torch.Tensor) -> torch.Tensor:
    return (torch.from_numpy(raw.astype(np.float32)).permute(2, 0, 1) - mean) / 128


def crops(image: np.ndarray, pad: int) -> Iterator[tuple[tuple[int, int, int], np.ndarray]]:
    """All crops of one zero-padded image [H, W, 3], mirrored and not."""
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[row : row + SIZE, column : column + SIZE]
            yield (row, column, 0), crop
            yield (row, column, 1), crop[:, ::-1].copy()


# Augmentation --------------------------------------------------------------------------------------------------------


def test_batches_are_the_released_recipe_drawn_as_documented() -> None:
    source = loader()
    mean = torch.from_numpy(IMAGES.astype(np.float64).mean(axis=0)).permute(2, 0, 1).float()
    assert torch.equal(source.mean, mean)
    images, labels = epoch_of(source, epoch=5)
    generator = torch.Generator().manual_seed(derive_seed(3, 5))
    order = torch.randperm(COUNT, generator=generator)
    rows, columns = torch.randint(0, 5, (2, COUNT), generator=generator)
    flips = torch.randint(0, 2, (COUNT,), generator=generator)
    assert torch.equal(labels, order[:48])
    for i in range(48):
        crop = dict(crops(IMAGES[order[i]], 2))[int(rows[i]), int(columns[i]), int(flips[i])]
        assert torch.equal(images[i], normalized(crop, mean)), i


def test_batches_are_float32_nchw_on_the_device() -> None:
    source = loader()
    for images, labels in source.epoch(0):
        assert images.shape == (8, 3, SIZE, SIZE) and images.dtype == torch.float32 and images.is_contiguous()
        assert labels.shape == (8,) and labels.dtype == torch.int64
        images.zero_()  # nobody else's memory
    assert not (epoch_of(source)[0] == 0).all()


def test_every_shift_and_both_sides_come_up_equally_often() -> None:
    image = IMAGES[:1]
    source = Loader(image.repeat(6000, 0), np.zeros(6000, np.int64), batch=6000, device="cpu", pad=1, flip=True,
                    mean=torch.zeros(3, SIZE, SIZE))  # fmt: skip
    images, _ = epoch_of(source)
    counts = [int((images == normalized(crop, source.mean)).flatten(1).all(1).sum()) for _, crop in crops(image[0], 1)]
    assert sum(counts) == 6000 and len(counts) == 18
    assert max(abs(count - 6000 / 18) for count in counts) < 5 * (6000 / 18) ** 0.5


def test_no_pad_and_no_flip_leave_the_pixels() -> None:
    source = loader(pad=0, flip=False)
    images, labels = epoch_of(source)
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, normalized(IMAGES[label], source.mean))


def test_flip_off_changes_nothing_but_the_flips() -> None:
    (with_flips, labels), (without, same) = epoch_of(loader()), epoch_of(loader(flip=False))
    assert torch.equal(labels, same)
    mean = loader().mean
    mirrored = ((with_flips * 128 + mean).flip(-1) - mean) / 128
    equal = (with_flips == without).flatten(1).all(1)
    assert 10 < int(equal.sum()) < 38
    assert torch.allclose(mirrored[~equal], without[~equal], atol=1e-5)


def test_given_mean_is_used() -> None:
    mean = torch.full((3, SIZE, SIZE), 7.0)
    images, labels, _ = next(loader(mean=mean, pad=0).unaugmented(4))
    assert torch.equal(images[0], normalized(IMAGES[labels[0]], mean))


# Seeds and order -----------------------------------------------------------------------------------------------------


def test_mix_is_stable_and_depends_on_every_number_and_its_place() -> None:
    assert derive_seed(1, 2) == 863661761539424187
    numbers = [(), (0,), (0, 0), (1, 2), (2, 1), (12,), (1, 2, 0), (-1,)]
    values = [derive_seed(*each) for each in numbers]
    assert len({value & 0xFFFFFFFF for value in values}) == len(values)
    assert all(0 <= value < 2**63 for value in values)


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    source = loader()
    first, labels = epoch_of(source, 1)
    torch.manual_seed(0)
    epoch_of(source, 2)
    again, same = epoch_of(source, 1)
    assert torch.equal(first, again) and torch.equal(labels, same)
    assert torch.equal(epoch_of(loader(), 1)[0], first)
    assert not torch.equal(epoch_of(source, 2)[1], labels)
    assert not torch.equal(epoch_of(loader(seed=4), 1)[1], labels)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    epoch_of(loader())
    list(loader().unaugmented(8))
    assert torch.equal(before, torch.get_rng_state())


def test_an_epoch_has_each_image_once_and_drops_the_ragged_end() -> None:
    source = loader()
    _, labels = epoch_of(source)
    assert source.steps_per_epoch == 6 and len(labels) == 48 == len(labels.unique())


@pytest.mark.parametrize("start_step", [0, 1, 4, 6])
@pytest.mark.parametrize("ahead", [1, 4])
def test_going_on_in_mid_epoch(start_step: int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = epoch_of(loader(), 2)
    monkeypatch.setattr("kalmannorm.data.loader.AHEAD", {"cpu": ahead})
    rest = list(loader().epoch(2, start_step))
    assert len(rest) == 6 - start_step
    for step, (some, their) in enumerate(rest, start_step):
        assert torch.equal(some, images[step * 8 : step * 8 + 8])
        assert torch.equal(their, labels[step * 8 : step * 8 + 8])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_together_are_one(world: int) -> None:
    ranks = [list(loader(shard=(rank, world)).epoch(1)) for rank in range(world)]
    for step, (images, labels) in enumerate(loader().epoch(1)):
        for rank in range(world):
            assert torch.equal(ranks[rank][step][0], images[rank::world])
            assert torch.equal(ranks[rank][step][1], labels[rank::world])
    assert all(len(steps) == 6 for steps in ranks)


# Evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 16, 50, 64])
def test_plain_counts_each_image_once_in_a_fixed_random_order(batch: int) -> None:
    seen = []
    for images, labels, counted in loader().unaugmented(batch):
        assert len(images) == len(labels) == counted <= batch
        for image, label in zip(images, labels, strict=True):
            assert torch.equal(image, normalized(IMAGES[label], loader().mean))
        seen += labels.tolist()
    assert sorted(seen) == list(range(COUNT)) and seen != sorted(seen)
    other = [label for _, labels, _ in loader(seed=99, pad=0).unaugmented(batch) for label in labels.tolist()]
    assert seen == other  # not the run's seed


@pytest.mark.parametrize(
    ("batch", "fill", "last"), [(16, 8, 8), (16, 16, 16), (20, 4, 12), (48, 3, 3), (50, 5, 50), (64, 64, 64)]
)
def test_the_last_batch_is_filled_up_uncounted(batch: int, fill: int, last: int) -> None:
    batches = list(loader().unaugmented(batch, fill=fill))
    order = torch.cat([labels[:counted] for _, labels, counted in batches])
    assert sorted(order.tolist()) == list(range(COUNT))
    for _, labels, counted in batches[:-1]:
        assert len(labels) == counted == batch
    images, labels, counted = batches[-1]
    assert len(images) == len(labels) == last and counted == (COUNT - 1) % batch + 1
    assert torch.equal(labels[counted:], order[: last - counted])


def test_plain_in_a_given_order() -> None:
    for order in ([4, 2, 9], np.array([4, 2, 9]), torch.tensor([4, 2, 9])):
        batches = [(labels.tolist(), counted) for _, labels, counted in loader().unaugmented(8, order, fill=8)]
        assert batches == [([4, 2, 9, 4, 2, 9, 4, 2], 3)]
    assert list(loader().unaugmented(8, [])) == []


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("batch", "fill"), [(16, 4), (16, 1), (8, 2), (24, 3)])
def test_sharded_evaluation_has_the_same_groups(world: int, batch: int, fill: int) -> None:
    def groups(source: Loader) -> list[list[int]]:
        """Each statistics group as the normalizers form it: image i of G groups belongs to group i mod G."""
        found = []
        for _, labels, _ in source.unaugmented(batch, fill=fill):
            count = len(labels) // fill
            found += [labels[group::count].tolist() for group in range(count)]
        return sorted(found)

    ranks = [loader(shard=(rank, world)) for rank in range(world)]
    assert sorted(group for rank in ranks for group in groups(rank)) == groups(loader())
    counted = [i for rank in ranks for _, labels, n in rank.unaugmented(batch, fill=fill) for i in labels[:n].tolist()]
    assert sorted(counted) == list(range(COUNT))


# Bad input -----------------------------------------------------------------------------------------------------------


def test_user_errors() -> None:
    with pytest.raises(UserError, match="batch 6 cannot be dealt out to 4 devices: give a multiple of 4"):
        loader(batch=6, shard=(0, 4))
    with pytest.raises(UserError, match="batch 64 is larger than the 50 training images"):
        next(loader(batch=64).epoch(0))
    with pytest.raises(UserError, match="evaluation batch 10 is not a multiple of the statistics batch 4"):
        loader().unaugmented(10, fill=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_sees_bitwise_the_same() -> None:
    for epoch in range(2):
        for here, there in zip(loader().epoch(epoch), loader(device="cuda").epoch(epoch), strict=True):
            assert torch.equal(here[0], there[0].cpu()) and torch.equal(here[1], there[1].cpu())
    for here, there in zip(
        loader().unaugmented(16, fill=16), loader(device="cuda").unaugmented(16, fill=16), strict=True
    ):
        assert torch.equal(here[0], there[0].cpu()) and torch.equal(here[1], there[1].cpu()) and here[2] == there[2]


@pytest.mark.parametrize("world", [2, 4])
def test_groups_that_do_not_divide_evenly_are_dealt_out_whole(world: int) -> None:
    """3 groups of 4 images a batch: the ranks together see every batch's groups, each whole, and count every image."""
    one = list(loader().unaugmented(12, fill=4))
    counted = 0
    for rank in range(world):
        for images, _, count in loader(shard=(rank, world)).unaugmented(12, fill=4):
            assert len(images) % 4 == 0
            counted += count
    assert counted == len(IMAGES) == sum(count for _, _, count in one)
    first = [next(iter(loader(shard=(rank, world)).unaugmented(12, fill=4)), None) for rank in range(world)]
    for rank, batch in enumerate(first):
        mine = [i for i in range(12) if i % 3 % world == rank]
        assert (batch is None and not mine) or torch.equal(batch[0], one[0][0][mine])
