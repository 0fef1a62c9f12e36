"""Images for training and evaluation: five sources, one function that opens them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pss_composer.data.augment import Augmentation, build_transform
from pss_composer.data.randomness import EpochSampler, restore_generators
from pss_composer.errors import InputError

__all__ = ["DATA_SOURCES", "Augmentation", "build_dataspec", "restore_generators"]

DATA_SOURCES = ("digits", "folder", "idx", "streaming", "synthetic")


def build_dataspec(
    name: str,
    *,
    split: str,
    path: str | None = None,
    image_size: int,
    num_classes: int | None,
    batch_size: int,
    augmentation: Augmentation | None = None,
    num_workers: int = 0,
    seed: int = 0,
    num_samples: int = 1024,
) -> DataSpec:
    """A source of batches (images (B, 3, H, W) float32, labels (B,) int64) for Composer's Trainer.

    Training sees the images in a new order every epoch and drops the incomplete last batch; evaluation sees
    all of them, in order, with nothing random. What training sees depends on the seed alone, not on the
    number of workers or on where a run was stopped and resumed. Nothing is drawn from the global random
    generators; to resume what else draws from them, call `restore_generators`.

    Args:
        name: One of `DATA_SOURCES`: `digits` (scikit-learn's, written to `path` on first use), `folder` (a
            folder per class), `idx` (the four files of MNIST or Fashion-MNIST), `streaming` (MDS shards) or
            `synthetic`.
        split: `train` or `val`.
        path: Folder that holds a folder for each split, or the files of both for `idx`; not for `synthetic`.
        image_size: Height and width in pixels.
        num_classes: Classes that the model tells apart; labels must be below. None where labels are not used
            (self-supervised pre-training): nothing about them is checked, and synthetic ones are all 0.
        batch_size: Images in the batch of one device.
        augmentation: What happens to training images, and the normalization of all; `Augmentation()` by
            default. Synthetic images are left as they are.
        num_workers: Processes per device that load images; 0 loads in the main process.
        seed: Seeds the order, the augmentation and synthetic images, at least 0.
        num_samples: Images per split, for `synthetic`.

    Returns:
        The data loader with the checks of its labels, if any.

    Raises:
        InputError: Bad input; the message names the key of the recipe. Labels are checked as they are read.
    """
    if name not in DATA_SOURCES:
        raise InputError(f"data.name must be one of {', '.join(DATA_SOURCES)}{_nearest(name)}, got {name!r}")
    if split not in ("train", "val"):
        raise InputError(f"split must be train or val, got {split!r}")
    if batch_size < 1:
        key = "train_batch_size" if split == "train" else "eval_batch_size"
        raise InputError(f"{key} must be at least 1 on every device, got {batch_size}")
    if num_workers < 0:
        raise InputError(f"data.num_workers must be at least 0, got {num_workers}")

    is_training = split == "train"
    transform = build_transform(augmentation or Augmentation(), image_size, is_training=is_training)
    # the modules are imported here so that nobody needs the libraries of the sources they do not use
    if name == "synthetic":
        from pss_composer.data.synthetic import SyntheticImages

        dataset = SyntheticImages(
            num_samples,
            image_size=image_size,
            num_classes=1 if num_classes is None else num_classes,
            seed=seed,
            split=split,
        )
    elif name == "folder":
        from pss_composer.data.folder import FolderImages

        folder = _find_split(path, split)
        dataset = FolderImages(folder, num_classes=num_classes, transform=transform, seed=seed)
    elif name == "idx":
        from pss_composer.data.idx import IdxImages

        folder = _find_folder(path)
        dataset = IdxImages(folder, split=split, num_classes=num_classes, transform=transform, seed=seed)
    else:
        from pss_composer.data.streaming import StreamingImages

        if name == "digits":
            _prepare_digits(path, num_classes)
        folder = _find_split(path, split)
        dataset = StreamingImages(
            folder, transform=transform, batch_size=batch_size, shuffle=is_training, seed=seed
        )
    return _build_loader(
        dataset,
        is_training=is_training,
        batch_size=batch_size,
        num_classes=num_classes,
        num_workers=num_workers,
        seed=seed,
    )


def _build_loader(
    dataset: Dataset, *, is_training: bool, batch_size: int, num_classes: int | None, num_workers: int, seed: int
) -> DataSpec:
    if isinstance(dataset, IterableDataset):
        # a StreamingDataset deals its images out to the devices itself, and its length is that of one device
        sampler, num_samples = None, dataset.size
    else:
        num_samples = len(dataset)
        sampler = EpochSampler(
            dataset,
            num_replicas=dist.get_world_size(),
            rank=dist.get_global_rank(),
            shuffle=is_training,
            seed=seed,
            drop_last=is_training,
        )
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=is_training,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        # every pass over a loader draws a seed for its workers, by default from the global generator
        generator=torch.Generator(),
    )
    if is_training and len(loader) == 0:
        global_batch_size = batch_size * dist.get_world_size()
        raise InputError(
            f"train_batch_size must be at most the {num_samples} training images, got {global_batch_size}"
        )

    def check_labels(batch: list[torch.Tensor]) -> list[torch.Tensor]:
        # here and not in a worker, whose exceptions arrive with a traceback in their message
        for label in batch[1].aminmax():
            if not 0 <= label < num_classes:
                raise InputError(f"labels must be in [0, model.num_classes={num_classes}), got {int(label)}")
        return batch

    return DataSpec(
        loader,
        num_samples=num_samples,
        batch_transforms=None if num_classes is None else check_labels,
        split_batch=_split_batch,
    )


def _split_batch(batch: Sequence[torch.Tensor], microbatch_size: int) -> list[tuple[torch.Tensor, ...]]:
    # Composer's own warns about every last batch that is smaller than a microbatch
    return list(zip(*(tensor.split(microbatch_size) for tensor in batch), strict=True))


def _find_folder(path: str | None) -> Path:
    if path is None:
        raise InputError("data.path must name a folder, got null")
    if not Path(path).is_dir():
        raise InputError(f"data.path must be a folder, got {path!r}, which is not one")
    return Path(path)


def _find_split(path: str | None, split: str) -> Path:
    folder = _find_folder(path) / split
    if not folder.is_dir() or not any(folder.iterdir()):
        raise InputError(f"data.path must hold a folder {split!r} with images, got none in {path!r}")
    return folder


def _prepare_digits(path: str | None, num_classes: int | None) -> None:
    from pss_composer.data.digits import NUM_CLASSES, prepare_digits

    if path is None:
        raise InputError("data.path must name a folder for the digits, got null")
    if num_classes is not None and num_classes < NUM_CLASSES:
        raise InputError(f"model.num_classes must be at least {NUM_CLASSES} for digits, got {num_classes}")
    prepare_digits(Path(path))


def _nearest(name: str) -> str:
    matches = difflib.get_close_matches(name, DATA_SOURCES, n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""
