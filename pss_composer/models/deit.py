"""DeiT (Touvron et al. 2021, https://arxiv.org/abs/2012.12877) as a ComposerModel."""

from __future__ import annotations

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from pss_composer.models.classifier import ViTClassifier, vit_arguments


class DeiT(ViTClassifier):
    """timm's DeiT at any size.

    Args:
        size: `tiny`, `small` or `base`.
        image_size: Height and width of an image in pixels, a multiple of `patch_size`.
        patch_size: Height and width of a patch in pixels.
        num_classes: Classes of the head.
        drop_path: Stochastic depth rate of the last block, in [0, 1).
        is_distilled: A distillation token and a second head; the logits are the mean of both heads.
        relative_position_bias: The ViT of the paper's DeiT runs under PSS: a relative position bias in every block
            and mean pooling, beside the absolute positions. timm has it as `Beit`.
        embed_dim: Another width than the size's.
        depth: Another number of blocks than the size's.
        num_heads: Another number of heads than the size's.

    Raises:
        ValueError: Unknown size, or numbers that do not fit together.
    """

    def __init__(
        self,
        size: str = "small",
        *,
        image_size: int = 224,
        patch_size: int = 16,
        num_classes: int = 1000,
        drop_path: float = 0.1,
        is_distilled: bool = False,
        relative_position_bias: bool = False,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ) -> None:
        arguments = vit_arguments(
            size, image_size=image_size, patch_size=patch_size, num_classes=num_classes, drop_path=drop_path,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        )
        if is_distilled and relative_position_bias:
            raise ValueError("is_distilled must be false with relative_position_bias=true, got true")
        if relative_position_bias:
            vit = Beit(**arguments, use_abs_pos_emb=True, use_rel_pos_bias=True, global_pool="avg")
        elif is_distilled:
            vit = VisionTransformerDistilled(**arguments)
        else:
            vit = VisionTransformer(**arguments)
        super().__init__(vit)
