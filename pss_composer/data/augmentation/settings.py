"""The settings of the augmentation, in timm's words."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pss_composer.checks import find_broken
from pss_composer.errors import InputError

# ImageNet's, from timm.data, which is slow to import
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FORMS = ("fast", "timm")
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "random")
# what timm's parser understands; it skips most other parts without a message
RAND_AUGMENT = re.compile(r"rand(-((m|mmax|n)\d+|(mstd|p)\d+(\.\d+)?|inc[01]|t(weights|3a|3aw)))*")


@dataclass
class Augmentation:
    """What happens to an image on its way to the model; the defaults are those of SimMIM and DeiT fine-tuning at 224.

    Args:
        form: `timm` for the transforms that SimMIM and DeiT train with, or `fast` for faster ones. Both have the same
            distribution, but a seed gives different pictures.
        is_plain: Prepare training images like evaluation images, with nothing random, whatever the other settings say.
        rand_augment: timm's RandAugment string, or None.
        color_jitter: Strength of brightness, contrast and saturation jitter. With RandAugment, which has its own, timm
            leaves it out.
        interpolation: `bicubic`, `bilinear`, `nearest`, or `random` (bicubic or bilinear, for training).
        hflip: Probability of a horizontal flip.
        repeats: Views of every image that is drawn. An epoch has as many batches as with 1, and so shows only
            1 / `repeats` of the images. DeiT's repeated augmentation (https://arxiv.org/abs/1901.09335) has 3.
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
    mean: list[float] = field(default_factory=lambda: list(MEAN))
    std: list[float] = field(default_factory=lambda: list(STD))

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        scale, ratio = self.scale, self.ratio
        return find_broken(
            self,
            ("form", self.form in FORMS, f"must be one of {', '.join(FORMS)}"),
            ("repeats", self.repeats >= 1, "must be at least 1"),
            ("interpolation", self.interpolation in INTERPOLATIONS, f"must be one of {', '.join(INTERPOLATIONS)}"),
            ("color_jitter", self.color_jitter >= 0, "must be at least 0"),
            ("hflip", 0 <= self.hflip <= 1, "must be a probability in [0, 1]"),
            ("random_erasing", 0 <= self.random_erasing <= 1, "must be a probability in [0, 1]"),
            ("scale", len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1, "must be a range [low, high] in (0, 1]"),
            ("ratio", len(ratio) == 2 and 0 < ratio[0] <= ratio[1], "must be a range [low, high] above 0"),
            ("crop_pct", 0 < self.crop_pct <= 1, "must be in (0, 1]"),
            ("mean", len(self.mean) == 3 and all(0 <= value <= 1 for value in self.mean),
             "must be three numbers in [0, 1]"),
            ("std", len(self.std) == 3 and all(value > 0 for value in self.std), "must be three numbers above 0"),
            ("rand_augment", self.rand_augment is None or RAND_AUGMENT.fullmatch(self.rand_augment) is not None,
             "must be null or a RandAugment string of timm, like rand-m9-mstd0.5-inc1"),
        )
