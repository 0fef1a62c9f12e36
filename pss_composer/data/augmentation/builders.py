"""From the settings of the augmentation to the transforms."""

from __future__ import annotations

from timm.data import create_transform

from pss_composer.data.augmentation.device import DeviceTransform
from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.data.augmentation.transforms import FastEvaluation, FastTraining, TimmTransform, Transform
from pss_composer.errors import raise_errors


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
    raise_errors(augmentation.check())
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
