"""Images for training and evaluation: five sources, one function that opens them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch
from composer.core import DataSpec
from composer.utils import dist
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from pss_composer.data.augment import Augmentation, build_device_transform, build_transform
from pss_composer.data.batches import Collate, DeviceTransform
from pss_composer.data.loader import Loader
from pss_composer.data.randomness import EpochSampler, restore_generators
from pss_composer.data.settings import StreamingSettings, check_streaming
from pss_composer.errors import InputError

__all__ = [
    "DATA_SOURCES",
    "ON_BAD_SAMPLE",
    "Augmentation",
    "StreamingSettings",
    "build_dataspec",
    "check_streaming",
    "restore_generators",
]

DATA_SOURCES = ("digits", "folder", "idx", "streaming", "synthetic")
ON_BAD_SAMPLE = ("raise", "skip")


def build_dataspec(
    name: str,
    *,
    split: str,
    path: str | None = None,
    image_size: int,
    num_classes: int | None,
    batch_size: int,
    augmentation: Augmentation | None = None,
    streaming: StreamingSettings | None = None,
    on_bad_sample: str = "raise",
    num_workers: int = 0,
    seed: int = 0,
    num_samples: int = 1024,
    device: str | torch.device = "cpu",
) -> DataSpec:
    """A source of batches (images (B, 3, H, W) float32, labels (B,) int64) for Composer's Trainer.

    Training sees the images in a new order every epoch and drops the incomplete last batch; evaluation sees
    all of them, in order, with nothing random. What training sees depends on the seed alone, not on the
    number of workers or on where a run was stopped and resumed; where rectangles are erased, in the form `fast`, on
    the global random generators. To resume what else draws from them within an epoch, call `restore_generators`.

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
        streaming: How `streaming` reads its shards; `StreamingSettings()` by default.
        on_bad_sample: What to do about a picture that does not decode: `raise`, or `skip`. Training then sees the next
            picture instead, so that batches stay full; evaluation goes on without. The loader counts and logs them.
        num_workers: Processes per device that load images; 0 loads in the main process.
        seed: Seeds the order, the augmentation and synthetic images, at least 0.
        num_samples: Images per split, for `synthetic`.
        device: Where batches are normalized and rectangles erased, and where they are when the Trainer gets them.

    Returns:
        The data loader with what happens to its batches.

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
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise InputError(f"data.on_bad_sample must be one of {', '.join(ON_BAD_SAMPLE)}, got {on_bad_sample!r}")
    streaming = streaming or StreamingSettings()
    check_streaming(streaming, name=name)
    augmentation = augmentation or Augmentation()

    is_training = split == "train"
    transform = build_transform(augmentation, image_size, is_training=is_training)
    repeats = augmentation.repeats if is_training and not augmentation.is_plain else 1
    if on_bad_sample == "skip":
        on_bad_sample = "replace" if is_training else "leave_out"
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
        dataset = FolderImages(
            folder, num_classes=num_classes, transform=transform, seed=seed, on_bad_sample=on_bad_sample
        )
    elif name == "idx":
        from pss_composer.data.idx import IdxImages

        folder = _find_folder(path)
        dataset = IdxImages(folder, split=split, num_classes=num_classes, transform=transform, seed=seed)
    else:
        from pss_composer.data.shared_memory import remove_stale_segments
        from pss_composer.data.streaming import StreamingImages

        if name == "digits":
            _prepare_digits(path, num_classes)
        if dist.get_local_rank() == 0:
            remove_stale_segments()
        dist.barrier()  # every process counts what is there
        folder, remote = _locate_shards(path, split, streaming)
        dataset = StreamingImages(
            folder,
            remote=remote,
            settings=streaming,
            transform=transform,
            batch_size=batch_size,
            shuffle=is_training,
            seed=seed,
            repeats=repeats,
            on_bad_sample=on_bad_sample,
        )
    return _build_loader(
        dataset,
        is_training=is_training,
        batch_size=batch_size,
        num_classes=num_classes,
        num_workers=num_workers,
        seed=seed,
        repeats=repeats,
        device_transform=build_device_transform(augmentation, is_training=is_training),
        device=torch.device(device),
    )


def _build_loader(
    dataset: Dataset,
    *,
    is_training: bool,
    batch_size: int,
    num_classes: int | None,
    num_workers: int,
    seed: int,
    repeats: int,
    device_transform: DeviceTransform,
    device: torch.device,
) -> DataSpec:
    if isinstance(dataset, IterableDataset):
        # a StreamingDataset deals its images out to the devices itself, and its length is that of one device
        sampler, num_samples = None, dataset.size
    else:
        num_samples = len(dataset)
        sampler = EpochSampler(
            dataset,
            repeats=repeats,
            num_replicas=dist.get_world_size(),
            rank=dist.get_global_rank(),
            shuffle=is_training,
            seed=seed,
            drop_last=is_training,
        )
    loader = Loader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=Collate(repeats),
        drop_last=is_training,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=device.type == "cuda",
        # every pass over a loader draws a seed for its workers, by default from the global generator
        generator=torch.Generator(),
    )
    if is_training and len(loader) == 0:
        global_batch_size = batch_size * dist.get_world_size()
        raise InputError(
            f"train_batch_size must be at most the {num_samples} training images, got {global_batch_size}"
        )

    def prepare(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        if num_classes is not None:
            # here and not in a worker, where nobody can tell which batch it is of
            for label in labels.aminmax():
                if not 0 <= label < num_classes:
                    raise InputError(f"labels must be in [0, model.num_classes={num_classes}), got {int(label)}")
        images = images.to(device, non_blocking=True)
        return device_transform(images), labels.to(device, non_blocking=True)

    return DataSpec(loader, num_samples=num_samples, batch_transforms=prepare, split_batch=_split_batch)


def _split_batch(batch: Sequence[torch.Tensor], microbatch_size: int) -> list[tuple[torch.Tensor, ...]]:
    # Composer's own warns about every last batch that is smaller than a microbatch
    return list(zip(*(tensor.split(microbatch_size) for tensor in batch), strict=True))


def _find_folder(path: str | None) -> Path:
    if path is None:
        raise InputError("data.path must name a folder, got null")
    if not Path(path).is_dir():
        raise InputError(f"data.path must be a folder, got {path!r}, which is not one")
    return Path(path)


def _locate_shards(path: str | None, split: str, streaming: StreamingSettings) -> tuple[Path, str | None]:
    """The folder of a split's shards, or of their cache, and its URL in the remote."""
    if streaming.remote is None:
        return _find_split(path, split), None
    cache = streaming.local or path
    if cache is None:
        raise InputError("data.local must name a folder that caches data.remote, got null")
    return Path(cache) / split, f"{streaming.remote.rstrip('/')}/{split}"


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
