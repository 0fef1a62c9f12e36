"""timm's NaFlexVit: behind its embeddings, with rotary positions, validity and attention mask at the kept tokens."""

from __future__ import annotations

from typing import Any

from timm.layers import apply_keep_indices_nlc
from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import Extension, WholeGrid, extend, put
from pss_composer.surgery.timm.plain import check_patch_drop


def fit_naflex(vit: NaFlexVit, sampler: PatchSampler) -> None:
    """NaFlex ViTs, SigLIP 2. timm has a place for dropping patches, but only in training, and blind to padding."""
    check_patch_drop(vit)
    extend(sampler, vit, SampledNaFlexVit)
    extend(sampler, vit.embeds, SampledEmbeds)
    put(sampler, vit.embeds, "patch_sampler", sampler)


class SampledEmbeds(Extension):
    """The embeddings of the kept tokens."""

    patch_sampler: PatchSampler

    def forward(self, x: Tensor, patch_coord: Tensor | None = None, patch_valid: Tensor | None = None) -> Any:
        tokens, grid_size = super().forward(x, patch_coord=patch_coord, patch_valid=patch_valid)
        return self.patch_sampler(tokens, None if patch_valid is None else patch_valid.bool()), grid_size


class SampledNaFlexVit(WholeGrid):
    """A NaFlexVit whose embeddings have lost tokens: what goes with the tokens follows them."""

    embeds: Any
    num_prefix_tokens: int
    rope_is_mixed: bool

    def _forward_embeds(self, x: Any, patch_coord: Any, patch_valid: Any, attn_mask: Any) -> Any:
        embedded = super()._forward_embeds(x, patch_coord, patch_valid, attn_mask)
        keep_indices = self.embeds.patch_sampler.keep_indices
        if keep_indices is None:
            return embedded
        if patch_valid is not None:
            embedded["patch_valid"] = patch_valid.gather(1, keep_indices)
        if embedded["attn_mask"] is not None:
            embedded["attn_mask"] = take_mask(embedded["attn_mask"], self.embeds.patch_sampler.kept_positions())
        if embedded["rope_embeds"] is not None:
            embedded["rope_embeds"] = self._take_rope(embedded, keep_indices, has_batch=patch_coord is not None)
        return embedded

    def _generate_rope_naflex(self, x: Tensor, patch_coord: Tensor) -> Any:
        # it reads off x how many tokens there are; these are all tokens, without numbers
        tokens = x.new_empty(len(x), self.num_prefix_tokens + patch_coord.shape[1], 0)
        return super()._generate_rope_naflex(tokens, patch_coord)

    def _take_rope(self, embedded: Any, keep_indices: Tensor, *, has_batch: bool) -> Any:
        """Rotary positions at the kept tokens: (B, 1 or heads, k, dim), one or an iterable over blocks."""
        x, rope = embedded["patches"], embedded["rope_embeds"]
        if has_batch and self.rope_is_mixed:
            return (apply_keep_indices_nlc(x, each, keep_indices, pos_embed_has_batch=True) for each in rope)
        rope = apply_keep_indices_nlc(x, rope, keep_indices, pos_embed_has_batch=has_batch)
        if has_batch:
            return rope
        return rope.transpose(0, 1) if self.rope_is_mixed else rope.unsqueeze(1)


def take_mask(mask: Tensor, positions: Tensor) -> Tensor:
    """What an attention mask, which broadcasts to (B, heads, T, T), has for the tokens at positions (B, t)."""
    mask = mask[(None,) * (4 - mask.ndim)].expand(len(positions), -1, -1, -1)
    num_heads, num_rows = mask.shape[1:3]
    mask = mask.gather(3, positions[:, None, None, :].expand(-1, num_heads, num_rows, -1))
    if num_rows == 1:
        return mask
    return mask.gather(2, positions[:, None, :, None].expand(-1, num_heads, -1, mask.shape[3]))
