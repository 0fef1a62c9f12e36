"""Repeated augmentation of shards: which view of which image each worker of each device gets."""

import numpy as np
import pytest
import torch
from streaming.base.batching import generate_work
from streaming.base.world import World

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.dataspec import build_dataspec
from pss_composer.data.settings import DataSettings
from pss_composer.data.sources.digits import write_images
from pss_composer.errors import InputError
from pss_composer.seeds import derive_seed

NUM_IMAGES = 43  # five batches of 8 and a rest


def random_images(num_images, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num_images, 12, 12, 3), dtype=np.uint8), np.arange(num_images) % 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_images(folder / "train", *random_images(NUM_IMAGES, seed=0))
    return folder


def build(folder, repeats=1, **settings):
    return build_dataspec(
        DataSettings("streaming", path=str(folder), num_workers=0, **settings), Augmentation(repeats=repeats),
        split="train", batch_size=8, image_size=16, num_classes=10, seed=3,
    )


@pytest.fixture(scope="module")
def shards(folder):
    """A dataset for `partition`."""
    return build(folder).dataloader.dataset


def partition(dataset, *, repeats=1, nodes=1, ranks=1, workers=1, batch_size=8, parts=1, epoch=1, seen=0, method=None):
    """An epoch's whole global batches of pairs (image, view), each a list with a list for every device."""
    world = World(nodes, ranks, workers, 0)
    dataset.repeats, dataset.batch_size, dataset.num_canonical_nodes = repeats, batch_size // (nodes * ranks), parts
    dataset.shuffle_block_size = 1 << 18  # as streaming sets it before it partitions
    work = generate_work(method or dataset.batching_method, dataset, world, epoch, seen)
    # (node, rank, worker, batch, sample): worker after worker gives a batch
    batches = work.transpose(3, 2, 0, 1, 4).reshape(-1, nodes * ranks, dataset.batch_size)
    return [[[divmod(key, repeats) for key in device] for device in batch.tolist()]
            for batch in batches if (batch != -1).all()]


def merge(batches):
    """The same, each a set."""
    return [{key for device in batch for key in device} for batch in batches]


WORLDS = [{"ranks": 2}, {"workers": 2}, {"ranks": 2, "workers": 2}, {"ranks": 4, "workers": 3}]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_any_ranks_and_workers_see_what_one_sees_of_shards(epoch, parts, repeats, shards):
    options = {"epoch": epoch, "parts": parts, "repeats": repeats}
    alone = partition(shards, **options)
    assert len(alone) == 5 and all(len(step) == 8 for step in merge(alone))
    assert len(set().union(*merge(alone))) == 40
    for world in WORLDS + [{"nodes": 2}, {"nodes": 2, "ranks": 2, "workers": 2}] * (parts == 2):
        # several devices may have to share an odd number of images at the end
        assert merge(partition(shards, **options, **world))[:5] == merge(alone), world
        # an epoch that was left after two batches goes on with the third
        assert partition(shards, **options, **world, seen=16)[:3] == partition(shards, **options, **world)[2:5], world


@pytest.mark.parametrize("world", [{}, *WORLDS, {"nodes": 2, "parts": 2}])
def test_single_views_are_partitioned_as_by_streaming(world, shards):
    # on several machines, too, and what is left over at the end
    assert partition(shards, **world) == partition(shards, **world, method="random")


def assert_views(keys, *, num_parts=1):
    """Every image in all three views, but for the one at the end of each part."""
    views = {}
    for image, view in keys:
        views.setdefault(image, []).append(view)
    assert len(keys) == len(set(keys)) and all(sorted(some) == list(range(len(some))) for some in views.values())
    assert sum(len(some) < 3 for some in views.values()) <= num_parts
    return set(views)


@pytest.mark.parametrize("parts", [1, 2])
def test_repeated_augmentation_of_shards_draws_a_third_in_three_views(parts, shards):
    drawn = []
    for epoch in range(30):
        batches = partition(shards, repeats=3, epoch=epoch, parts=parts)
        assert len(batches) == len(partition(shards, epoch=epoch, parts=parts)) == 5
        images = assert_views([key for (device,) in batches for key in device], num_parts=parts)
        assert 40 / 3 <= len(images) <= 40 / 3 + parts
        drawn.append(frozenset(images))
    assert len(set(drawn)) == 30 and len(frozenset().union(*drawn)) == NUM_IMAGES


@pytest.mark.parametrize("world", [{"ranks": 2}, {"ranks": 2, "workers": 2}, {"ranks": 2, "parts": 2},
                                   {"nodes": 2, "parts": 2}])
def test_every_device_has_whole_runs_of_views(world, shards):
    batches = partition(shards, repeats=3, batch_size=12, **world)
    assert len(batches) == 3
    for batch in batches:
        for device in batch:
            images = assert_views(device, num_parts=0)
            assert len(images) == 2
        assert batch[0] != batch[1]


@pytest.mark.parametrize("repeats", [1, 3])
def test_seed_of_a_view_is_that_of_epoch_image_and_view(repeats, folder):
    dataset = build(folder, repeats).dataloader.dataset
    numbers = {image.tobytes(): number for number, image in enumerate(random_images(NUM_IMAGES, seed=0)[0])}
    seen = []

    def transform(picture, seed):
        seen.append((numbers[picture.tobytes()], seed))
        return torch.zeros(())

    dataset.transform = transform
    for epoch in range(2):
        seen.clear()
        samples = list(dataset)
        # `partition` leaves the rest of three out
        keys = [key for (device,) in partition(dataset, repeats=repeats, epoch=epoch) for key in device]
        assert seen[:40] == [(image, derive_seed(3, epoch, image, view)) for image, view in keys]
        assert len(samples) == NUM_IMAGES
        assert [label for _, label, _ in samples] == [number % 3 for number, _ in seen]


def assert_refused(match, folder):
    with pytest.raises(InputError, match=match) as error:
        build(folder)
    assert "\n" not in str(error.value) and error.value.key == "path"


def test_bad_shards(tmp_path):
    (tmp_path / "train").mkdir()
    index = tmp_path / "train" / "index.json"
    (tmp_path / "train" / "picture.png").touch()
    assert_refused(r"^path must hold MDS shards, got no index\.json in ", tmp_path)
    for text in ("{", "[]", "{}"):
        index.write_text(text)
        assert_refused(r"^path must hold MDS shards, got an index\.json that names none in '", tmp_path)
    index.write_text('{"version": 2, "shards": []}')
    assert_refused(r"^path must hold at least one image, got none in ", tmp_path)
    index.write_text('{"version": 2, "shards": [{"samples": 1, "column_names": ["image", "y"]}]}')
    assert_refused(r"^path must hold the columns x and y, got \['image', 'y'\] in", tmp_path)
    index.write_text('{"version": 2, "shards": [{"samples": 1, "column_names": ["x", "y"]}]}')
    assert_refused(r"^path must hold MDS shards that streaming reads, got .*raw_data.* in", tmp_path)
