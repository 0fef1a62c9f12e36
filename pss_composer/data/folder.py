"""Images from a folder with one sub-folder per class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import find_classes

from pss_composer.data.randomness import derive_seed, seeded
from pss_composer.errors import InputError


class FolderImages(ImageFolder):
    """An ImageFolder whose augmentation depends on seed, epoch and index alone; for `EpochSampler`.

    Args:
        folder: Folder of one split, with a sub-folder per class.
        num_classes: Classes that the model tells apart, or None where labels are not used.
        transform: From a PIL image to a tensor (3, H, W).
        seed: Seeds the transform.

    Raises:
        InputError: A class without images, more classes than `num_classes`, or a split whose classes are not
            those of its neighbour `train`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_classes: int | None,
        transform: Callable[[Image.Image], torch.Tensor],
        seed: int,
    ) -> None:
        try:
            super().__init__(str(folder), transform=transform)
        except FileNotFoundError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"data.path must hold a folder of images per class: {reason}") from None
        if num_classes is not None and len(self.classes) > num_classes:
            raise InputError(
                f"model.num_classes must be at least the {len(self.classes)} classes in {str(folder)!r}, "
                f"got {num_classes}"
            )
        # the class number is the place of the name in the alphabet: one name more or less shifts the rest
        train_folder = folder.parent / "train"
        if train_folder.is_dir() and find_classes(str(train_folder))[0] != self.classes:
            raise InputError(
                f"data.path must hold the same class folders in every split, got others in {str(folder)!r}"
            )
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        with seeded(derive_seed(self.seed, epoch, index)):
            return super().__getitem__(index)
