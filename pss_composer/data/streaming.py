"""Images from MDS shards, with the columns of streaming's `StreamingImageNet`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist
from PIL import Image
from streaming.vision import StreamingImageNet

from pss_composer.data.randomness import derive_seed, seeded
from pss_composer.errors import InputError


class StreamingImages(StreamingImageNet):
    """An MDS folder of images `x` and labels `y` whose augmentation depends on seed, epoch and index alone.

    Args:
        folder: Folder of one split, with its `index.json`.
        transform: From a PIL image to a tensor (3, H, W).
        batch_size: Images in the batch of one device: which image goes to which worker depends on it.
        shuffle: A new order in every epoch, else that of the shards.
        seed: Seeds the order and the transform, at least 0.

    Raises:
        InputError: The folder is no MDS folder, is empty, or has other columns.
    """

    def __init__(
        self,
        folder: Path,
        *,
        transform: Callable[[Image.Image], torch.Tensor],
        batch_size: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        _check_index(folder)
        super().__init__(
            local=str(folder),
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=seed,
            # by default 64 per node, all made equally long by repeating images, in evaluation, too
            num_canonical_nodes=dist.get_world_size() // dist.get_local_world_size(),
            transform=transform,
        )
        self.seed = seed

    def get_item(self, idx: int) -> tuple[torch.Tensor, int]:
        # `next_epoch` lives in shared memory and moves on when all workers have started an epoch: while one
        # iterates, the epoch is the one before, after a resume, too
        with seeded(derive_seed(self.seed, self.next_epoch - 1, idx)):
            return super().get_item(idx)

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """The place in the data, as Composer stores it in checkpoints."""
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0:
            # at the end of an epoch Composer's count is back at 0, but streaming still names the epoch that
            # ended, and a resumed run would repeat it
            state["epoch"] = self.next_epoch
        return state


def _check_index(folder: Path) -> None:
    index_path = folder / "index.json"
    if not index_path.is_file():
        raise InputError(f"data.path must hold MDS shards, got no index.json in {str(folder)!r}")
    try:
        shards = json.loads(index_path.read_text())["shards"]
        columns = {column for shard in shards for column in shard["column_names"]}
        num_samples = sum(shard["samples"] for shard in shards)
    except (ValueError, KeyError, TypeError):
        message = f"data.path must hold MDS shards, got an index.json that names none in {str(folder)!r}"
        raise InputError(message) from None
    if num_samples == 0:
        raise InputError(f"data.path must hold at least one image, got none in {str(folder)!r}")
    if not {"x", "y"} <= columns:
        raise InputError(f"data.path must hold the columns x and y, got {sorted(columns)} in {str(folder)!r}")
