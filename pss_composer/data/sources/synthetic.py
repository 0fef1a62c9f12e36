"""Random images with random labels, for tests and for measuring speed."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset

from pss_composer.data.samples import Sample
from pss_composer.data.sources import Request
from pss_composer.seeds import derive_seed


def open_images(request: Request) -> SyntheticImages:
    """Images of the model's size and labels of its classes."""
    return SyntheticImages(request)


class SyntheticImages(Dataset):
    """Normally distributed pixels, made when asked for and the same in every epoch; for `EpochSampler`.

    Args:
        request: What the source is asked for. Another seed or another split has other images.
    """

    def __init__(self, request: Request) -> None:
        self.request = request

    def __len__(self) -> int:
        return self.request.settings.num_samples

    def __getitem__(self, key: tuple[int, int, int]) -> Sample:
        _, index, _ = key
        size, seed = self.request.image_size, derive_seed(self.request.seed, self.request.split, index)
        generator = torch.Generator().manual_seed(seed)
        image = torch.randn(3, size, size, generator=generator)
        return image, int(torch.randint(self.request.num_classes or 1, (), generator=generator)), []
