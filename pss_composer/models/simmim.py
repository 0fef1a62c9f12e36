"""SimMIM (Xie et al. 2022, https://arxiv.org/abs/2111.09886) as ComposerModels."""

from __future__ import annotations

from timm.models.beit import Beit

from pss_composer.models.classifier import ViTClassifier, vit_arguments


class SimMIMClassifier(ViTClassifier):
    """SimMIM's ViT for fine-tuning: timm's `Beit` with a relative position bias in every block.

    It has no absolute positions, layer scale 0.1 and mean pooling; the weights of SimMIM's and PSS's published
    fine-tuning files go by the same names.

    Args:
        size: `tiny`, `small` or `base`.
        image_size: Height and width of an image in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        num_classes: Classes of the head.
        drop_path: Stochastic depth rate of the last block, in [0, 1).
        embed_dim: Another width than the size's.
        depth: Another number of blocks than the size's.
        num_heads: Another number of heads than the size's.

    Raises:
        ValueError: Unknown size, or numbers that do not fit together.
    """

    def __init__(
        self,
        size: str = "base",
        *,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        drop_path: float = 0.1,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        arguments = vit_arguments(
            size, image_size=image_size, patch_size=patch_size, num_classes=num_classes, drop_path=drop_path,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        )
        super().__init__(
            Beit(**arguments, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, global_pool="avg")
        )
