"""timm's VisionTransformerRelPos: behind the patch embedding, and relative position biases at the kept tokens."""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor

from pss_composer.sampling import PatchSampler, gather_tokens, set_in_forward
from pss_composer.surgery.edits import Extension, WholeGrid, extend, put
from pss_composer.surgery.timm.bias import KeptPairs, gather_bias


def fit_relpos(vit: VisionTransformerRelPos, sampler: PatchSampler) -> None:
    """ViTs with a bias (a table, or an MLP of the distance) per block, or one that they share."""
    extend(sampler, vit, WholeGrid)
    extend(sampler, vit.patch_embed, SampledPatches)
    put(sampler, vit.patch_embed, "patch_sampler", sampler)
    if vit.shared_rel_pos is not None:
        extend(sampler, vit.shared_rel_pos, SharedBias)
        put(sampler, vit.shared_rel_pos, "kept_pairs", KeptPairs(sampler, vit.shared_rel_pos))
        return
    attentions: Any = [block.attn for block in vit.blocks]
    put(sampler, vit, "shared_rel_pos", KeptPairs(sampler, attentions[0].rel_pos))
    for attention in attentions:
        extend(sampler, attention, AttentionOfPairs)
        extend(sampler, attention.rel_pos, BiasOfPairs)
        put(sampler, attention.rel_pos, "pairs", None)


class SampledPatches(Extension):
    """The patch embedding, with the kept patches alone: behind it the model has no place for a sampler."""

    patch_sampler: PatchSampler

    def forward(self, x: Tensor) -> Any:
        tokens = super().forward(x)
        keep_indices = self.patch_sampler.select(tokens)
        return tokens if keep_indices is None else gather_tokens(tokens, keep_indices)


class AttentionOfPairs(Extension):
    """An attention that hands its bias the kept pairs, which come in as the argument for a shared bias."""

    rel_pos: Any

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Any:
        set_in_forward(self.rel_pos, pairs=shared_rel_pos)
        return super().forward(x)


class BiasOfPairs(Extension):
    """A block's bias, at the kept pairs."""

    pairs: Tensor | None

    def get_bias(self) -> Any:
        pairs, self.pairs = self.pairs, None
        return super().get_bias() if pairs is None else gather_bias(self, pairs)


class SharedBias(Extension):
    """The bias of all blocks, at the kept pairs."""

    kept_pairs: KeptPairs

    def get_bias(self) -> Any:
        pairs = self.kept_pairs()
        return super().get_bias() if pairs is None else gather_bias(self, pairs)
