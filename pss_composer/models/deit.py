"""DeiT (Touvron et al. 2021, https://arxiv.org/abs/2012.12877) as a ComposerModel."""

from __future__ import annotations

from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from pss_composer.errors import InputError
from pss_composer.models.classifier import ViTClassifier
from pss_composer.models.shape import ViTShape


class DeiT(ViTClassifier):
    """timm's DeiT at any size.

    Args:
        shape: The sizes of the model; None is DeiT-S.
        is_distilled: A distillation token and a second head; the logits are the mean of both heads.
        relative_position_bias: The ViT of the paper's DeiT runs under PSS: a relative position bias in every block
            and mean pooling, beside the absolute positions. It is timm's `Beit`.

    Raises:
        InputError: Sizes that break a rule, or both options at once.
    """

    def __init__(
        self, shape: ViTShape | None = None, *, is_distilled: bool = False, relative_position_bias: bool = False
    ) -> None:
        arguments = (shape or ViTShape("small")).to_timm()
        if is_distilled and relative_position_bias:
            raise InputError("must be false with relative_position_bias=true, got true", key="is_distilled")
        vit: Beit | VisionTransformer
        if relative_position_bias:
            vit = Beit(**arguments, use_abs_pos_emb=True, use_rel_pos_bias=True, global_pool="avg")
        elif is_distilled:
            vit = VisionTransformerDistilled(**arguments)
        else:
            vit = VisionTransformer(**arguments)
        super().__init__(vit)
