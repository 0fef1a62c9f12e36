"""The sizes of a ViT, with their defaults and rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pss_composer.checks import find_broken, raise_errors
from pss_composer.errors import InputError

# the sizes of Touvron et al. 2021 (https://arxiv.org/abs/2012.12877)
SIZES = {
    "tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}
MAX_WEIGHTS = 10**11  # more is a typing error, which would fail only when the memory is allocated


@dataclass
class ViTShape:
    """Sizes of a ViT.

    Args:
        size: `tiny`, `small` or `base`.
        image_size: Height and width of an image in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        num_classes: Classes of the head.
        drop_path: Stochastic depth rate of the last block, in [0, 1).
        embed_dim: Width, in place of the size's.
        depth: Number of blocks, in place of the size's.
        num_heads: Number of heads, in place of the size's.
    """

    size: str = "small"
    image_size: int = 224
    patch_size: int = 16
    num_classes: int = 1000
    drop_path: float = 0.1
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None

    def check(self) -> list[InputError]:
        """The rules that the sizes break."""
        errors = find_broken(
            self,
            ("size", self.size in SIZES, f"must be one of {', '.join(SIZES)}"),
            ("image_size", self.image_size >= 1, "must be at least 1"),
            ("patch_size", self.patch_size >= 1, "must be at least 1"),
            ("num_classes", self.num_classes >= 2, "must be at least 2"),
            ("drop_path", 0.0 <= self.drop_path < 1.0, "must be in [0, 1)"),
            *((name, getattr(self, name) is None or getattr(self, name) >= 1, "must be at least 1")
              for name in ("embed_dim", "depth", "num_heads")),
        )
        return errors or self._check_together()

    def _check_together(self) -> list[InputError]:
        blocks = self.blocks
        embed_dim, num_heads = blocks["embed_dim"], blocks["num_heads"]
        num_weights = {
            "image_size": (self.image_size // self.patch_size) ** 2 * embed_dim,
            "patch_size": 3 * self.patch_size**2 * embed_dim,
            "num_classes": self.num_classes * embed_dim,
        }
        errors = find_broken(
            self,
            ("image_size", self.image_size % self.patch_size == 0,
             f"must be divisible by patch_size={self.patch_size}"),
            *((name, number <= MAX_WEIGHTS, f"must make a ViT of at most {MAX_WEIGHTS:.0e} weights")
              for name, number in num_weights.items()),
        )
        if embed_dim % num_heads:
            errors.append(InputError(f"must be divisible by num_heads={num_heads}, got {embed_dim}", key="embed_dim"))
        if 12 * embed_dim**2 * blocks["depth"] > MAX_WEIGHTS:
            errors.append(InputError(f"must make a ViT of at most {MAX_WEIGHTS:.0e} weights with "
                                     f"depth={blocks['depth']}, got {embed_dim}", key="embed_dim"))
        return errors

    @property
    def blocks(self) -> dict[str, int]:
        """`embed_dim`, `depth` and `num_heads`: the size's own, or those that are given in their place."""
        return {name: getattr(self, name) or value for name, value in SIZES[self.size].items()}

    def to_timm(self, *, has_head: bool = True) -> dict[str, Any]:
        """The arguments of timm's ViT classes.

        Raises:
            InputError: The sizes break a rule.
        """
        raise_errors(self.check())
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "num_classes": self.num_classes if has_head else 0,
            "drop_path_rate": self.drop_path,
            **self.blocks,
        }
