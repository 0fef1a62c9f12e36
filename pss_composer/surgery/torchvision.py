"""torchvision's ViT: the slot for a `PatchSampler`."""

from __future__ import annotations

from torch import nn
from torchvision.models.vision_transformer import VisionTransformer

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.adapters import Adapter
from pss_composer.surgery.edits import put


def fit_vision_transformer(vit: VisionTransformer, sampler: PatchSampler) -> None:
    """`vit_b_16` and its relatives: the encoder's dropout stands right behind the position embedding."""
    put(sampler, vit.encoder, "dropout", nn.Sequential(vit.encoder.dropout, sampler))


ADAPTERS = {"VisionTransformer": Adapter(fit_vision_transformer, lambda vit: 1)}
