"""SimMIM (Xie et al. 2022, https://arxiv.org/abs/2111.09886): the classifier of its fine-tuning."""

from __future__ import annotations

from timm.models.beit import Beit

from pss_composer.models.classifier import ViTClassifier
from pss_composer.models.shape import ViTShape


class SimMIMClassifier(ViTClassifier):
    """SimMIM's ViT for fine-tuning: timm's `Beit` with a relative position bias in every block.

    It has no absolute positions, layer scale 0.1 and mean pooling; its weights have the names of SimMIM's and PSS's
    published fine-tuning files.

    Args:
        shape: The sizes of the model; None is ViT-B.

    Raises:
        InputError: Sizes that break a rule.
    """

    def __init__(self, shape: ViTShape | None = None) -> None:
        arguments = (shape or ViTShape("base")).to_timm()
        super().__init__(
            Beit(**arguments, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1, global_pool="avg")
        )
