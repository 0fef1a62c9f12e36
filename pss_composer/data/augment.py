"""From a picture to the model's input: the settings of the recipes, and what they build."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from pss_composer.data.batches import DeviceTransform
from pss_composer.data.transforms import FastEvaluation, FastTraining, TimmTransform, Transform
from pss_composer.errors import InputError

FORMS = ("fast", "timm")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "random")
# what timm's parser understands; much of the rest it skips in silence
RAND_AUGMENT = re.compile(r"rand(-((m|mmax|n)\d+|(mstd|p)\d+(\.\d+)?|inc[01]|t(weights|3a|3aw)))*")


@dataclass
class Augmentation:
    """Settings of `build_transform`; the defaults are those of SimMIM and DeiT fine-tuning at 224 px.

    Args:
        form: `fast`, or `timm` for the transforms of SimMIM and DeiT themselves. Both have the same distribution; a
            seed gives other pictures in the one than in the other.
        is_plain: Training images are prepared as evaluation images are, with nothing random, whatever
            stands below.
        rand_augment: timm's RandAugment string, or None.
        color_jitter: Strength of brightness, contrast and saturation jitter. timm leaves it out where
            RandAugment is on, which has its own.
        interpolation: `bicubic`, `bilinear`, `nearest`, or `random` (bicubic or bilinear, for training).
        hflip: Probability of a horizontal flip.
        repeats: Views of every image that is drawn; an epoch has as many batches as with one, and so shows a share
            of the images. DeiT's repeated augmentation (https://arxiv.org/abs/1901.09335) has 3.
        random_erasing: Probability of filling one rectangle with noise.
        scale: Range of the random crop's share of the area, in (0, 1].
        ratio: Range of the random crop's width over height.
        crop_pct: The evaluation crop's share of the resized image's edge: 224/256 resizes to 256 for 224 px.
        mean: Of the red, green and blue channels, in [0, 1].
        std: Of the red, green and blue channels.
    """

    form: str = "fast"
    is_plain: bool = False
    rand_augment: str | None = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.4
    interpolation: str = "bicubic"
    hflip: float = 0.5
    repeats: int = 1
    random_erasing: float = 0.25
    scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    crop_pct: float = 224 / 256
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_DEFAULT_STD))


def check_augmentation(augmentation: Augmentation) -> None:
    """Check the values of the settings.

    Raises:
        InputError: A setting is out of its range.
    """
    a = augmentation

    def require(is_right: object, key: str, rule: str) -> None:
        if not is_right:
            raise InputError(f"augmentation.{key} must be {rule}, got {getattr(a, key)!r}")

    require(a.form in FORMS, "form", f"one of {', '.join(FORMS)}")
    require(a.repeats >= 1, "repeats", "at least 1")
    require(a.interpolation in INTERPOLATIONS, "interpolation", f"one of {', '.join(INTERPOLATIONS)}")
    require(a.color_jitter >= 0, "color_jitter", "at least 0")
    for key in ("hflip", "random_erasing"):
        require(0 <= getattr(a, key) <= 1, key, "a probability in [0, 1]")
    require(len(a.scale) == 2 and 0 < a.scale[0] <= a.scale[1] <= 1, "scale", "a range [low, high] in (0, 1]")
    require(len(a.ratio) == 2 and 0 < a.ratio[0] <= a.ratio[1], "ratio", "a range [low, high] above 0")
    require(0 < a.crop_pct <= 1, "crop_pct", "in (0, 1]")
    require(len(a.mean) == 3 and all(0 <= value <= 1 for value in a.mean), "mean", "three numbers in [0, 1]")
    require(len(a.std) == 3 and all(value > 0 for value in a.std), "std", "three numbers above 0")
    require(a.rand_augment is None or RAND_AUGMENT.fullmatch(a.rand_augment), "rand_augment",
            "null or a RandAugment string of timm, like rand-m9-mstd0.5-inc1")


def build_transform(augmentation: Augmentation, image_size: int, *, is_training: bool) -> Transform:
    """What a worker does to one picture.

    Args:
        augmentation: Settings.
        image_size: Height and width that the model sees, in pixels.
        is_training: Random augmentation, unless `augmentation.is_plain`; else resize and centre crop.

    Returns:
        A function of a picture (bytes of a file, or a PIL image) and a seed: uint8 (H, W, 3) in the form `fast`,
        normalized float32 (3, H, W) in the form `timm`.

    Raises:
        InputError: A setting is out of its range.
    """
    check_augmentation(augmentation)
    a = augmentation
    is_random = is_training and not a.is_plain
    interpolation = "bilinear" if a.interpolation == "random" and not is_random else a.interpolation
    if a.form == "timm":
        return TimmTransform(create_transform(
            image_size,
            is_training=is_random,
            scale=tuple(a.scale),
            ratio=tuple(a.ratio),
            hflip=a.hflip,
            color_jitter=a.color_jitter or None,
            auto_augment=a.rand_augment,
            interpolation=interpolation,
            mean=tuple(a.mean),
            std=tuple(a.std),
            re_prob=a.random_erasing,
            re_mode="pixel",
            crop_pct=a.crop_pct,
        ))
    if not is_random:
        return FastEvaluation(image_size, crop_pct=a.crop_pct, interpolation=interpolation)
    return FastTraining(
        image_size,
        scale=a.scale,
        ratio=a.ratio,
        hflip=a.hflip,
        interpolation=interpolation,
        rand_augment=a.rand_augment,
        color_jitter=a.color_jitter,
        fill=tuple(min(255, round(255 * value)) for value in a.mean),
    )


def build_device_transform(augmentation: Augmentation, *, is_training: bool) -> DeviceTransform:
    """What happens on the device to the batches that `build_transform` makes."""
    is_random = is_training and not augmentation.is_plain
    return DeviceTransform(
        mean=augmentation.mean,
        std=augmentation.std,
        random_erasing=augmentation.random_erasing if is_random else 0.0,
    )
