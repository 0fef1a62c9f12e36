"""What happens to a whole batch on the device: normalization and random erasing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor


class DeviceTransform:
    """Normalizes a whole batch, and erases rectangles in it (https://arxiv.org/abs/1708.04896), on the device.

    Draws from the global generators, Python's for the rectangles and torch's for the noise in them.

    Args:
        mean: Of the red, green and blue channels, in [0, 1].
        std: Of the red, green and blue channels.
        random_erasing: Probability, for each image, of filling one rectangle with normal noise, as timm does.
    """

    def __init__(self, *, mean: Sequence[float], std: Sequence[float], random_erasing: float) -> None:
        self.mean = 255 * torch.tensor(mean).view(3, 1, 1)
        self.std = 255 * torch.tensor(std).view(3, 1, 1)
        self.random_erasing = random_erasing

    def __call__(self, images: Tensor) -> Tensor:
        """Images as a transform of `augmentation.transforms` makes them, to normalized float32 (B, 3, H, W).

        Args:
            images: On the device, uint8 (B, H, W, 3); float32 (B, 3, H, W) is normalized already and stays as it is.
        """
        if images.dtype != torch.uint8:
            return images
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self.mean).div_(self.std)
        if self.random_erasing:
            # here, not in __init__: timm's object holds its device
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        return images
