"""The settings of SimMIM's masks and their rules."""

from __future__ import annotations

from dataclasses import dataclass

from pss_composer.checks import find_broken
from pss_composer.errors import InputError


@dataclass
class MaskingSettings:
    """Which patches are masked.

    Args:
        unit: Height and width in pixels of the squares that are masked, a multiple of the patch size.
        ratio: Share of the squares that are masked, in (0, 1].
    """

    unit: int = 32
    ratio: float = 0.6

    def check(self) -> list[InputError]:
        """The rules that the settings break."""
        return find_broken(
            self,
            ("unit", self.unit >= 1, "must be at least 1"),
            ("ratio", 0 < self.ratio <= 1, "must be in (0, 1]"),
        )

    def check_fit(self, image_size: tuple[int, int], patch_size: int) -> list[InputError]:
        """Images must divide into units, and units into patches."""
        size = " x ".join(map(str, image_size))
        fits = self.unit % patch_size == 0 and not any(length % self.unit for length in image_size)
        return find_broken(
            self, ("unit", fits, f"must be a multiple of the patch size {patch_size} and divide the image size {size}")
        )
