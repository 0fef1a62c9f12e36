"""Repeated augmentation: which views of which images each worker reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

if TYPE_CHECKING:
    from pss_composer.data.mds.dataset import StreamingImages


def partition_views(dataset: StreamingImages, world: Any, epoch: int, sample_in_epoch: int) -> NDArray[np.int64]:
    """Divide an epoch among the workers: streaming's method `random`, with `repeats` views of each image.

    Args:
        dataset: The images.
        world: streaming's `World`: the machines, devices and workers.
        epoch: Seeds the order.
        sample_in_epoch: Number of views that this epoch has shown already; they are left out.

    Returns:
        Keys, image × repeats + view, or −1 where a batch has no sample; int64 (machines, devices, workers, batches,
        samples).
    """
    repeats, num_parts = dataset.repeats, dataset.num_canonical_nodes
    places = get_partitions(
        dataset.partition_algo, dataset.epoch_size, num_parts, world.num_nodes, world.ranks_per_node,
        world.workers_per_rank, dataset.batch_size, sample_in_epoch, dataset.initial_physical_nodes,
    )
    order = np.arange(dataset.epoch_size)
    if dataset.shuffle:
        order = get_shuffle(dataset.shuffle_algo, dataset.samples_per_shard, num_parts, dataset.shuffle_seed, epoch,
                            dataset.shuffle_block_size)
    if repeats == 1:
        return np.where(places == -1, -1, order[places])
    # streaming gives the places of a machine's batch to its devices in turn. Here each device gets consecutive places:
    # it has all views of most of its images, and decodes these only once
    batches = np.moveaxis(places, 1, 3)  # (machines, workers, batches, devices, samples)
    whole = (batches != -1).all(axis=(3, 4))
    num_places = world.ranks_per_node * dataset.batch_size
    batches[whole] = np.sort(batches[whole].reshape(-1, num_places)).reshape(batches[whole].shape)
    # each part of the epoch has shards of its own, and starts with the first view of an image
    starts = np.arange(num_parts) * dataset.epoch_size // num_parts
    start = starts[np.searchsorted(starts, places, side="right") - 1]
    image, view = order[start + (places - start) // repeats], (places - start) % repeats
    return np.where(places == -1, -1, image * repeats + view)


class ViewSpanner:
    """Finds the shard of a key, and the place in that shard; `spanner` is streaming's, which finds them of an image."""

    def __init__(self, spanner: Any, repeats: int) -> None:
        self.spanner = spanner
        self.repeats = repeats

    def __getitem__(self, key: int) -> tuple[int, int]:
        return self.spanner[key // self.repeats]
