"""The loader, its sampler and its batches: in which order, on how many devices, in which views."""

import pytest
import torch
from support.sources import NUM_IMAGES, assert_same_batches, build, read_inputs

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.loader import EpochSampler
from pss_composer.data.samples import Collate


@pytest.mark.parametrize("name", ["folder", "streaming"])
def test_a_loader_that_was_closed_has_no_workers_and_starts_anew(name, paths):
    loader = build(name, paths[name], "val", num_workers=2).dataloader
    expected = list(loader)
    workers = loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    for _ in range(2):
        loader.close()
    assert not any(worker.is_alive() for worker in workers)
    assert_same_batches(list(loader), expected)
    loader.close()


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("is_shuffled", [True, False])
@pytest.mark.parametrize("epoch", [0, 1])
def test_two_ranks_see_what_one_sees(is_shuffled, epoch, repeats):
    def steps(num_ranks, rank, batch_size):
        sampler = EpochSampler(
            range(NUM_IMAGES), repeats=repeats, num_replicas=num_ranks, rank=rank, shuffle=is_shuffled, seed=3,
            drop_last=True,
        )
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        return [set(keys[i:i + batch_size]) for i in range(0, len(keys) - batch_size + 1, batch_size)]

    alone = steps(1, 0, 8)
    assert len(alone) == 5 and all(len(step) == 8 and {key[0] for key in step} == {epoch} for step in alone)
    assert [a | b for a, b in zip(steps(2, 0, 4), steps(2, 1, 4), strict=True)] == alone


def test_repeated_augmentation_of_a_sampler_draws_a_third_in_three_views():
    drawn = []
    sampler = EpochSampler(range(NUM_IMAGES), repeats=3, num_replicas=1, rank=0, seed=3, drop_last=True)
    for epoch in range(30):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler) == NUM_IMAGES and {key[0] for key in keys} == {epoch}
        assert [view for _, _, view in keys] == [0, 1, 2] * 14 + [0]
        images = [image for _, image, _ in keys]
        assert images[0::3][:14] == images[1::3] == images[2::3]
        drawn.append(frozenset(images))
        assert len(drawn[-1]) == 15
    assert len(set(drawn)) == 30 and len(frozenset().union(*drawn)) == NUM_IMAGES


@pytest.mark.parametrize("form", ["fast", "timm"])
@pytest.mark.parametrize("name", ["folder", "streaming", "torchvision"])
def test_views_of_an_image_are_different_pictures(name, form, paths):
    spec = build(name, paths[name], batch_size=9, augmentation=Augmentation(form=form, repeats=3))
    assert len(spec.dataloader) == 4
    images = torch.cat([images for images, _ in read_inputs(spec, epochs=2)])
    assert len(images) == 72
    # the first three places of a batch of nine have view 0 of three images, and so on
    for first in range(0, 72, 9):
        views = images[first:first + 9].view(3, 3, -1)
        assert not any((views[a] == views[b]).all(-1).any() for a, b in ((0, 1), (0, 2), (1, 2)))


@pytest.mark.parametrize("num_samples", [8, 9, 64])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_views_of_an_image_are_no_neighbours_in_a_batch(start, num_samples):
    images = [(start + place) // 3 for place in range(num_samples)]
    _, labels, messages = Collate(3)([(torch.zeros(1), image, []) for image in images])
    assert sorted(labels.tolist()) == images and messages == []
    assert (labels.diff() != 0).all()
