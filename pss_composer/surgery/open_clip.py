"""open_clip's own ViT: the slot for a `PatchSampler`. Its timm towers are models of timm."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer
from torch import nn

from pss_composer.errors import InputError
from pss_composer.sampling import PatchSampler
from pss_composer.surgery.adapters import Adapter
from pss_composer.surgery.edits import WholeGrid, extend, put


def fit_vision_transformer(vit: VisionTransformer, sampler: PatchSampler) -> None:
    """The image tower of CLIP, CustomTextCLIP and CoCa: open_clip's own place for dropping patches."""
    if not isinstance(vit.patch_dropout, nn.Identity):
        rate = getattr(vit.patch_dropout, "prob", vit.patch_dropout)
        raise InputError(f"must be 0 under patch sampling, got {rate}", key="patch_dropout")
    put(sampler, vit, "patch_dropout", sampler)
    extend(sampler, vit, WholeGrid)


ADAPTERS = {"VisionTransformer": Adapter(fit_vision_transformer, lambda vit: 1)}
