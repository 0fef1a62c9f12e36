"""What happens to a whole batch on the device: normalization and random erasing."""

from __future__ import annotations

import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from pss_composer.data.augmentation.settings import Augmentation


class DeviceTransform:
    """Normalizes a batch and erases rectangles in it (https://arxiv.org/abs/1708.04896), as timm does.

    It draws from the global generators: Python's for the rectangles, torch's for the normal noise in them.

    Args:
        augmentation: Settings.
        is_training: Erase, unless `augmentation.is_plain`.
    """

    def __init__(self, augmentation: Augmentation, *, is_training: bool) -> None:
        # mean and std are of values in [0, 1]; the batch has values in [0, 255]
        self.mean = 255 * torch.tensor(augmentation.mean).view(3, 1, 1)
        self.std = 255 * torch.tensor(augmentation.std).view(3, 1, 1)
        self.random_erasing = augmentation.random_erasing if is_training and not augmentation.is_plain else 0.0

    def __call__(self, images: Tensor) -> Tensor:
        """Normalize a batch and, in training, erase rectangles in it.

        Args:
            images: A batch on the device: uint8 (B, H, W, 3) of the form `fast`; or float32 (B, 3, H, W) of the form
                `timm` or of synthetic images, which is finished and returned as it is.

        Returns:
            float32 (B, 3, H, W).
        """
        if images.dtype != torch.uint8:
            return images
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        images = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        images = images.sub_(self.mean).div_(self.std)
        if self.random_erasing:
            # not in __init__: timm's object is bound to a device
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        return images
