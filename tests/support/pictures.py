"""Photographs, and how the tests of the augmentation prepare pictures for a model."""

import io

import torch
from PIL import Image
from timm.data import auto_augment

from pss_composer.data.augmentation.device import DeviceTransform
from pss_composer.data.augmentation.randomness import seeded
from pss_composer.data.augmentation.transforms import build_transform

UNNORMALIZED = {"mean": [0.0] * 3, "std": [1.0] * 3}
OFF = {"rand_augment": None, "color_jitter": 0.0, "hflip": 0.0, "random_erasing": 0.0,
       "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
TAIL = 1e-3  # how improbable a difference between two samples may be if both come from one distribution


def load_photographs():
    """Six colour photographs, 500 by 375."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    def cut(pixels):
        image = Image.fromarray(pixels)
        width = min(image.width, image.height * 4 // 3)
        return image.resize((500, 375), Image.Resampling.LANCZOS, box=(0, 0, width, width * 3 // 4))

    pictures = *load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket()
    return [cut(pixels) for pixels in pictures]


def encode(image, format="JPEG", **options):
    with io.BytesIO() as file:
        image.save(file, format, **options)
        return file.getvalue()


class Preparation:
    """From pictures to the model's input (B, 3, H, W), through a loader's worker and on the device."""

    def __init__(self, augmentation, image_size, *, is_training=True):
        self.transform = build_transform(augmentation, image_size, is_training=is_training)
        self.device_transform = DeviceTransform(augmentation, is_training=is_training)

    def __call__(self, pictures, seeds):
        images = torch.stack([self.transform(picture, seed) for picture, seed in zip(pictures, seeds, strict=True)])
        with seeded(seeds[0]):
            return self.device_transform(images)

    @property
    def rand_augment(self):
        transforms = getattr(self.transform, "transform", None)
        if transforms is None:
            return self.transform.rand_augment
        return next((part for part in transforms.transforms if isinstance(part, auto_augment.RandAugment)), None)
