"""What a worker of the loader does to one picture, in two forms of the same distribution: timm's own and a faster one.

Every transform takes a picture (the bytes of a file, or a PIL image) and a seed, from which alone it draws. The `timm`
form runs timm's transforms on PIL images and gives normalized float32 (3, H, W). The `fast` form gives uint8 (H, W, 3)
and leaves normalization and random erasing to `augmentation.device`, which does them to whole batches.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from pss_composer.checks import raise_errors
from pss_composer.data.augmentation.decoding import decode_pil, decode_tensor
from pss_composer.data.augmentation.operations import FASTER, Operation, brightness, contrast
from pss_composer.data.augmentation.randomness import seeded, seeded_python
from pss_composer.data.augmentation.settings import Augmentation

Picture = bytes | Image.Image
Transform = Callable[[Picture, int], Tensor]

INTERPOLATIONS = {  # by timm's names; for tensors, only NEAREST_EXACT gives the pixels of PIL's `nearest`
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST_EXACT,
}


def build_transform(augmentation: Augmentation, image_size: int, *, is_training: bool) -> Transform:
    """What a worker does to one picture.

    Args:
        augmentation: Settings.
        image_size: Height and width that the model sees, in pixels.
        is_training: Random augmentation, unless `augmentation.is_plain`; else resize and centre crop.

    Raises:
        InputError: A setting is out of its range.
    """
    raise_errors(augmentation.check())
    is_random = is_training and not augmentation.is_plain
    if augmentation.form == "timm":
        return TimmTransform(augmentation, image_size, is_random=is_random)
    return (FastTraining if is_random else FastEvaluation)(augmentation, image_size)


class TimmTransform:
    """A transform of `timm.data.create_transform`.

    Args:
        augmentation: Settings.
        image_size: Height and width, in pixels.
        is_random: Random augmentation; else resize and centre crop.
    """

    def __init__(self, augmentation: Augmentation, image_size: int, *, is_random: bool) -> None:
        a = augmentation
        options: dict[str, Any] = {
            "scale": tuple(a.scale),
            "ratio": tuple(a.ratio),
            "hflip": a.hflip,
            "color_jitter": a.color_jitter or None,
            "auto_augment": a.rand_augment,
            "interpolation": a.interpolation if is_random else _choose_for_evaluation(a),
            "mean": tuple(a.mean),
            "std": tuple(a.std),
            "re_prob": a.random_erasing,
            "re_mode": "pixel",
            "crop_pct": a.crop_pct,
        }
        self.transform = create_transform(image_size, is_training=is_random, **options)

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        image = decode_pil(picture) if isinstance(picture, bytes) else picture.convert("RGB")
        with seeded(seed):
            return self.transform(image)


class FastEvaluation:
    """Resize the shortest side and crop the middle.

    Args:
        augmentation: Settings.
        image_size: Height and width of the crop, in pixels.
    """

    def __init__(self, augmentation: Augmentation, image_size: int) -> None:
        self.image_size = image_size
        self.shortest_side = math.floor(image_size / augmentation.crop_pct)
        self.interpolation = INTERPOLATIONS[_choose_for_evaluation(augmentation)]

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        image = functional.resize(_to_tensor(picture), [self.shortest_side], self.interpolation, antialias=True)
        return functional.center_crop(image, [self.image_size] * 2).permute(1, 2, 0).contiguous()


class FastTraining:
    """A random crop, resized; a random flip; then RandAugment, or colour jitter, or neither.

    timm chooses the crop's box, and RandAugment's operations with their probabilities and magnitudes. torch resizes,
    with the result of PIL but several times as fast, and `augmentation.operations` replaces PIL's slow operations.

    Args:
        augmentation: Settings.
        image_size: Height and width, in pixels.
    """

    def __init__(self, augmentation: Augmentation, image_size: int) -> None:
        a = self.settings = augmentation
        self.size = [image_size, image_size]
        names = ("bilinear", "bicubic") if a.interpolation == "random" else (a.interpolation,)
        self.interpolations = [INTERPOLATIONS[name] for name in names]
        self.rand_augment = None
        if a.rand_augment is not None:
            fill = tuple(min(255, round(255 * value)) for value in a.mean)
            options = {"translate_const": int(image_size * 0.45), "img_mean": fill}
            if a.interpolation != "random":
                options["interpolation"] = str_to_pil_interp(a.interpolation)
            self.rand_augment = auto_augment.rand_augment_transform(a.rand_augment, options)
            for operation in self.rand_augment.ops:
                operation.aug_fn = FASTER.get(operation.aug_fn, operation.aug_fn)
        # timm leaves colour jitter out beside RandAugment, unless that is restricted to its three operations `3a`
        self.color_jitter = 0.0 if a.rand_augment is not None and "3a" not in a.rand_augment else a.color_jitter
        self._last_picture: Picture | None = None
        self._last_image: Tensor | None = None

    def __call__(self, picture: Picture, seed: int) -> Tensor:
        if picture != self._last_picture:  # under repeated augmentation the views of a picture follow each other
            self._last_picture, self._last_image = picture, _to_tensor(picture)
        image = self._last_image
        with seeded_python(seed):
            box = RandomResizedCropAndInterpolation.get_params(image, self.settings.scale, self.settings.ratio)
            crop = functional.crop(image, *box).unsqueeze(0).contiguous(memory_format=torch.channels_last)[0]
            crop = functional.resize(crop, self.size, random.choice(self.interpolations), antialias=True)
            pixels = crop.permute(1, 2, 0)
            if random.random() < self.settings.hflip:
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
        """As timm's RandAugment does, but from Python's generator: to seed NumPy's takes longer than to crop."""
        operations, weights = self.rand_augment.ops, self.rand_augment.choice_weights
        if weights is None:
            return random.choices(operations, k=self.rand_augment.num_layers)
        generator = np.random.default_rng(random.getrandbits(64))
        chosen = generator.choice(np.arange(len(weights)), self.rand_augment.num_layers, replace=False, p=weights)
        return [operations[index] for index in chosen]

    def _jitter(self, image: Image.Image) -> Image.Image:
        """As torchvision's ColorJitter does: three adjustments by random factors, in random order."""
        low, high = max(0.0, 1 - self.color_jitter), 1 + self.color_jitter
        adjustments: tuple[Operation, ...] = (brightness, contrast, auto_augment.color)
        for adjust in random.sample(adjustments, 3):
            image = adjust(image, random.uniform(low, high))
        return image


def _choose_for_evaluation(augmentation: Augmentation) -> str:
    return "bilinear" if augmentation.interpolation == "random" else augmentation.interpolation


def _to_tensor(picture: Picture) -> Tensor:
    return decode_tensor(picture) if isinstance(picture, bytes) else functional.pil_to_tensor(picture.convert("RGB"))
