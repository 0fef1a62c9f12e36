"""Random images with random labels, for tests and for measuring speed."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from pss_composer.data.samples import Sample
from pss_composer.seeds import derive_seed
from pss_composer.data.sources import Request


def open_images(request: Request) -> SyntheticImages:
    """Images of the model's size and classes."""
    return SyntheticImages(
        request.settings.num_samples,
        image_size=request.image_size,
        num_classes=request.num_classes or 1,
        seed=request.seed,
        split=request.split,
    )


class SyntheticImages(Dataset):
    """Normally distributed pixels, made when asked for and the same in every epoch; for `EpochSampler`.

    Args:
        num_samples: Images.
        image_size: Height and width in pixels.
        num_classes: Labels are below this.
        seed: Seeds images and labels.
        split: Another split has other images.
    """

    def __init__(self, num_samples: int, *, image_size: int, num_classes: int, seed: int, split: str) -> None:
        self.num_samples = num_samples
        self.image_size = image_size
        self.num_classes = num_classes
        self.seed = seed
        self.split = split

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        _, index, _ = key
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.split, index))
        image = torch.randn(3, self.image_size, self.image_size, generator=generator)
        return image, int(torch.randint(self.num_classes, (), generator=generator)), []
