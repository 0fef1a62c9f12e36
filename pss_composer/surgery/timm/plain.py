"""timm's ViTs whose blocks need not know where a token comes from, or are told by timm itself."""

from __future__ import annotations

from typing import Any

from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pss_composer.errors import InputError
from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import WholeGrid, extend, put


def fit_vision_transformer(vit: VisionTransformer, sampler: PatchSampler) -> None:
    """ViT, DeiT, distilled DeiT, DeiT-III, DINOv2, CLIP, SigLIP, AIMv2, hybrids: timm's place for dropping them."""
    check_patch_drop(vit)
    put(sampler, vit, "patch_drop", sampler)
    extend(sampler, vit, WholeGrid)


def fit_eva(eva: Eva, sampler: PatchSampler) -> None:
    """EVA, EVA-02, DINOv3, PE, ViTs with rotary positions: timm's place for dropping patches."""
    check_patch_drop(eva)
    put(sampler, eva, "patch_drop", SamplerWithIndices(sampler))
    extend(sampler, eva, WholeGrid)


def fit_cait(cait: Cait, sampler: PatchSampler) -> None:
    """CaiT: behind the position embedding; blocks see patch tokens alone, and class attention what is left of them."""
    put(sampler, cait, "pos_drop", nn.Sequential(cait.pos_drop, sampler))
    extend(sampler, cait, WholeGrid)


def check_patch_drop(vit: Any) -> None:
    """Refuse a ViT that drops patches itself.

    Raises:
        InputError: It was built with a `patch_drop_rate`.
    """
    if not (vit.patch_drop is None or isinstance(vit.patch_drop, nn.Identity)):
        raise InputError(f"must be 0 under patch sampling, got {vit.patch_drop.prob}", key="patch_drop_rate")


class SamplerWithIndices(nn.Module):
    """A sampler that also returns which tokens it kept: timm then takes its rotary table at those.

    Args:
        sampler: The sampler.
    """

    def __init__(self, sampler: PatchSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The kept tokens (B, P + k, C), and `keep_indices` (B, k) or None."""
        return self.sampler(tokens), self.sampler.keep_indices
