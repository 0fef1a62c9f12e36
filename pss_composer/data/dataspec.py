"""From the settings of the data to what Composer trains on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pss_composer.checks import raise_errors
from pss_composer.data.augmentation.device import DeviceTransform
from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.augmentation.transforms import build_transform
from pss_composer.data.loader import EpochSampler, Loader
from pss_composer.data.samples import Collate
from pss_composer.data.settings import DataSettings
from pss_composer.data.sources import Request
from pss_composer.errors import InputError


def build_dataspec(
    settings: DataSettings,
    augmentation: Augmentation,
    *,
    split: str,
    batch_size: int,
    image_size: int,
    num_classes: int | None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> DataSpec:
    """A split as batches (images (B, 3, H, W) float32, labels (B,) int64) for Composer's Trainer.

    Training sees the images in a new order every epoch and drops the incomplete last batch; evaluation sees all of
    them, in order, with nothing random. What training sees follows from the seed alone, whatever the number of workers
    and wherever a run was stopped and resumed; only the form `fast` erases rectangles by the global random generators.
    To resume what else draws from them within an epoch, call `loader.restore_generators`.

    Args:
        settings: The source and how to read it.
        augmentation: What happens to training images, and the normalization of all; not for synthetic images.
        split: `train` or `val`.
        batch_size: Images in the batch of one device.
        image_size: Height and width in pixels.
        num_classes: Classes that the model distinguishes; labels must be below. None where labels are not used
            (self-supervised pre-training): they are not checked, and synthetic ones are all 0.
        seed: Seeds the order, the augmentation and synthetic images, at least 0.
        device: Where batches are normalized and rectangles erased, and where the Trainer gets them.

    Raises:
        InputError: Bad settings or bad data; its key is the name of a setting or of an argument. Labels are checked as
            they are read.
    """
    raise_errors([*settings.check(), *augmentation.check()])
    if split not in ("train", "val"):
        raise InputError(f"must be train or val, got {split!r}", key="split")
    if batch_size < 1:
        raise InputError(f"must be at least 1 on every device, got {batch_size}", key="batch_size")
    is_training = split == "train"
    request = Request(
        settings,
        split=split,
        transform=build_transform(augmentation, image_size, is_training=is_training),
        image_size=image_size,
        num_classes=num_classes,
        batch_size=batch_size,
        repeats=augmentation.repeats if is_training and not augmentation.is_plain else 1,
        seed=seed,
        on_bad_sample={"raise": "raise", "skip": "replace" if is_training else "leave_out"}[settings.on_bad_sample],
    )
    dataset = import_module(f"pss_composer.data.sources.{settings.name}").open_images(request)
    loader = _build_loader(dataset, request, torch.device(device))
    to_input = _build_batch_transform(DeviceTransform(augmentation, is_training=is_training), num_classes, device)
    return DataSpec(loader, num_samples=_count(dataset), batch_transforms=to_input, split_batch=_split_batch)


def _build_loader(dataset: Dataset, request: Request, device: torch.device) -> Loader:
    is_training = request.split == "train"
    sampler = None  # an iterable dataset divides its images among the devices itself
    if not isinstance(dataset, IterableDataset):
        sampler = EpochSampler(
            dataset,
            repeats=request.repeats,
            num_replicas=dist.get_world_size(),
            rank=dist.get_global_rank(),
            shuffle=is_training,
            seed=request.seed,
            drop_last=is_training,
        )
    num_workers = request.settings.num_workers
    loader = Loader(
        dataset,
        batch_size=request.batch_size,
        sampler=sampler,
        collate_fn=Collate(request.repeats),
        drop_last=is_training,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        # every pass over a loader draws a seed for its workers, by default from the global generator
        generator=torch.Generator(),
    )
    if is_training and len(loader) == 0:
        global_batch_size = request.batch_size * dist.get_world_size()
        raise InputError(f"must be at most the {_count(dataset)} training images, got {global_batch_size}",
                         key="batch_size")
    return loader


def _build_batch_transform(
    transform: DeviceTransform, num_classes: int | None, device: str | torch.device
) -> Callable[[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """From a batch of the loader to the model's input, on the device."""

    def to_input(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if num_classes is not None:
            # here and not in a worker, which would fail batches before the bad one is due
            for label in labels.aminmax():
                if not 0 <= label < num_classes:
                    raise InputError(f"must fit the labels, which must be in [0, {num_classes}), got {int(label)}",
                                     key="num_classes")
        return transform(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True)

    return to_input


def _count(dataset: Any) -> int:
    """The images of a dataset, whose length may be the share of one device."""
    return dataset.size if hasattr(dataset, "size") else len(dataset)


def _split_batch(batch: Sequence[Tensor], microbatch_size: int | float) -> list[tuple[Tensor, ...]]:
    # Composer's own warns about every last batch that is smaller than a microbatch
    return list(zip(*(tensor.split(int(microbatch_size)) for tensor in batch), strict=True))
