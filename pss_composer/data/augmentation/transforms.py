"""What a loader's worker does to one picture, in two forms of the same distribution: timm's own, and a faster one.

Every transform takes a picture (the bytes of a file, or a PIL image) and a seed, from which alone it draws. The `timm`
form runs timm's transforms on PIL images and gives normalized float32 (3, H, W). The `fast` form gives uint8 (H, W, 3)
and leaves to `data.batches` what can be done to whole batches on the device: normalization and random erasing.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from pss_composer.data.augmentation.decoding import decode_pil, decode_tensor
from pss_composer.data.augmentation.operations import FASTER, brightness, contrast
from pss_composer.data.augmentation.randomness import seeded, seeded_python

Picture = bytes | Image.Image
Transform = Callable[[Picture, int], Tensor]

INTERPOLATIONS = {  # by timm's names; `nearest` of tensors is another than PIL's
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


class TimmTransform:
    """A transform of `timm.data.create_transform`.

    Args:
        transform: From a PIL image to a normalized float32 tensor (3, H, W).
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform = transform

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        image = decode_pil(picture) if isinstance(picture, bytes) else picture.convert("RGB")
        with seeded(seed):
            return self.transform(image)


class FastEvaluation:
    """Resize the shortest side and crop the middle.

    Args:
        image_size: Height and width of the crop, in pixels.
        crop_pct: `image_size` as a share of the resized picture's shortest side.
        interpolation: timm's name.
    """

    def __init__(self, image_size: int, *, crop_pct: float, interpolation: str) -> None:
        self.image_size = image_size
        self.shortest_side = math.floor(image_size / crop_pct)
        self.interpolation = INTERPOLATIONS[interpolation]

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        image = functional.resize(_to_tensor(picture), [self.shortest_side], self.interpolation, antialias=True)
        return functional.center_crop(image, [self.image_size] * 2).permute(1, 2, 0).contiguous()


class FastTraining:
    """A random crop, resized; a random flip; then RandAugment, or colour jitter, or neither.

    The crop's box, and RandAugment's choice of operations, their probabilities and magnitudes are timm's own. torch
    resizes, as PIL would but several times as fast, and `data.operations` replaces PIL's slow operations.

    Args:
        image_size: Height and width, in pixels.
        scale: Range of the crop's share of the area.
        ratio: Range of the crop's width over height.
        hflip: Probability of a flip.
        interpolation: timm's name; `random` draws bicubic or bilinear every time.
        rand_augment: timm's string, or None.
        color_jitter: Strength of brightness, contrast and saturation jitter; timm leaves it out beside RandAugment, but
            for its three operations `3a`.
        fill: Red, green and blue of what RandAugment moves in from outside, in [0, 255].
    """

    def __init__(
        self,
        image_size: int,
        *,
        scale: Sequence[float],
        ratio: Sequence[float],
        hflip: float,
        interpolation: str,
        rand_augment: str | None,
        color_jitter: float,
        fill: tuple[int, int, int],
    ) -> None:
        self.image_size = image_size
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        names = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)
        self.interpolations = [INTERPOLATIONS[name] for name in names]
        self.rand_augment = None
        if rand_augment is not None:
            settings = {"translate_const": int(image_size * 0.45), "img_mean": fill}
            if interpolation != "random":
                settings["interpolation"] = str_to_pil_interp(interpolation)
            self.rand_augment = auto_augment.rand_augment_transform(rand_augment, settings)
            for operation in self.rand_augment.ops:
                operation.aug_fn = FASTER.get(operation.aug_fn, operation.aug_fn)
        self.color_jitter = 0.0 if rand_augment is not None and "3a" not in rand_augment else color_jitter
        self._last_picture: Picture | None = None
        self._last_image: Tensor | None = None

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        if picture != self._last_picture:  # under repeated augmentation the views of a picture follow each other
            self._last_picture, self._last_image = picture, _to_tensor(picture)
        image = self._last_image
        with seeded_python(seed):
            box = RandomResizedCropAndInterpolation.get_params(image, self.scale, self.ratio)
            crop = functional.crop(image, *box).unsqueeze(0).contiguous(memory_format=torch.channels_last)[0]
            size = [self.image_size, self.image_size]
            crop = functional.resize(crop, size, random.choice(self.interpolations), antialias=True)
            pixels = crop.permute(1, 2, 0)
            if random.random() < self.hflip:
                pixels = pixels.flip(1)
            if self.rand_augment is None and self.color_jitter == 0:
                return pixels.contiguous()
            augmented = Image.fromarray(pixels.numpy())
            if self.rand_augment is not None:
                for operation in self._choose_operations():
                    augmented = operation(augmented)
            if self.color_jitter > 0:
                augmented = self._jitter(augmented)
        return torch.from_numpy(np.array(augmented))

    def _choose_operations(self) -> Sequence[auto_augment.AugmentOp]:
        """As timm's RandAugment does, but from Python's generator: with NumPy's, seeding takes longer than the crop."""
        operations, weights = self.rand_augment.ops, self.rand_augment.choice_weights
        if weights is None:
            return random.choices(operations, k=self.rand_augment.num_layers)
        generator = np.random.default_rng(random.getrandbits(64))
        return generator.choice(operations, self.rand_augment.num_layers, replace=False, p=weights)

    def _jitter(self, image: Image.Image) -> Image.Image:
        """As torchvision's ColorJitter does: three factors, applied in random order."""
        low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        for adjust in random.sample((brightness, contrast, auto_augment.color), 3):
            image = adjust(image, random.uniform(low, high))
        return image


def _to_tensor(picture: Picture) -> Tensor:
    return decode_tensor(picture) if isinstance(picture, bytes) else functional.pil_to_tensor(picture.convert("RGB"))
