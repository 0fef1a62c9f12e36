"""timm's ViTs: the slots for a `PatchSampler`, and Beit's relative position bias at the kept tokens.

A block gets what it needs to know about the kept tokens as an argument. Activation checkpointing runs a block again
after other forward passes; it then passes the same argument, so that the block sees the tokens of its own pass.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models.beit import Beit, gen_relative_position_index
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pss_composer.errors import InputError
from pss_composer.sampling import PatchSampler
from pss_composer.surgery.adapters import Adapter
from pss_composer.surgery.edits import Extension, extend, put


def fit_vision_transformer(vit: VisionTransformer, sampler: PatchSampler) -> None:
    """ViT, DeiT, distilled DeiT, DeiT-III, CLIP, SigLIP, ...: timm's own place for dropping patches."""
    if not isinstance(vit.patch_drop, nn.Identity):
        raise InputError(f"must be 0 under patch sampling, got {vit.patch_drop}", key="patch_drop_rate")
    put(sampler, vit, "patch_drop", sampler)


def fit_beit(beit: Beit, sampler: PatchSampler) -> None:
    """BEiT and SimMIM's ViT: behind the position embedding, and relative position biases at the kept tokens."""
    attentions = [block.attn for block in beit.blocks]
    has_bias_per_block = attentions[0].relative_position_bias_table is not None
    if has_bias_per_block and beit.rel_pos_bias is not None:
        raise TypeError("no patch sampling slot known for a Beit with both shared and own relative position biases")
    put(sampler, beit, "pos_drop", nn.Sequential(beit.pos_drop, sampler))
    if has_bias_per_block:
        # Beit calls its shared bias behind pos_drop and hands the result to every block
        put(sampler, beit, "rel_pos_bias", KeptPairs(sampler, attentions[0]))
        for attention in attentions:
            extend(sampler, attention, BiasOfBlock)
            put(sampler, attention, "pairs", None)
    elif beit.rel_pos_bias is not None:
        extend(sampler, beit.rel_pos_bias, SharedBias)
        put(sampler, beit.rel_pos_bias, "kept_pairs", KeptPairs(sampler, beit.rel_pos_bias))


def _num_prefix_tokens(vit: Any) -> int:
    return cast(int, vit.num_prefix_tokens)


ADAPTERS = {
    "VisionTransformer": Adapter(fit_vision_transformer, _num_prefix_tokens),
    "Beit": Adapter(fit_beit, _num_prefix_tokens),
}


class KeptPairs(nn.Module):
    """The relative position index of every pair of tokens that a sampler kept in this forward pass.

    Args:
        sampler: The sampler that ran before.
        bias: A module of `Beit` with a `relative_position_index`.
    """

    relative_position_index: Tensor

    def __init__(self, sampler: PatchSampler, bias: nn.Module) -> None:
        super().__init__()
        self.sampler = sampler
        index = cast(Tensor, bias.relative_position_index)
        self.register_buffer("relative_position_index", index.clone(), persistent=False)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Adapt to another input size; `Beit.set_input_size` calls this."""
        index = gen_relative_position_index(window_size, device=self.relative_position_index.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self) -> Tensor | None:
        """(B, P + k, P + k) int64, or None if all tokens were kept."""
        positions = self.sampler.kept_positions()
        if positions is None:
            return None
        rows = self.relative_position_index[positions]
        return rows.gather(2, positions.unsqueeze(1).expand(-1, positions.shape[1], -1))


class BiasOfBlock(Extension):
    """Beit's attention with its bias at the kept pairs, which come in as the argument for a shared bias."""

    relative_position_bias_table: Tensor
    pairs: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Any:
        self.pairs = shared_rel_pos_bias
        return super().forward(x)

    def _get_rel_pos_bias(self) -> Any:
        pairs, self.pairs = self.pairs, None
        if pairs is None:
            return super()._get_rel_pos_bias()
        return gather_bias(self.relative_position_bias_table, pairs)


class SharedBias(Extension):
    """Beit's shared bias at the kept pairs."""

    kept_pairs: KeptPairs
    relative_position_bias_table: Tensor

    def forward(self) -> Any:
        pairs = self.kept_pairs()
        if pairs is None:
            return super().forward()
        return gather_bias(self.relative_position_bias_table, pairs)

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        super().set_window_size(window_size)
        self.kept_pairs.set_window_size(window_size)


def gather_bias(table: Tensor, pairs: Tensor) -> Tensor:
    """Relative position bias of each pair of tokens.

    Args:
        table: (number of relative positions, heads).
        pairs: Index into the table, (B, T, T) int64.

    Returns:
        (B, heads, T, T).
    """
    B, T, _ = pairs.shape
    num_heads = table.shape[1]
    # head by head: the table's few kilobytes for a head stay in the cache for all B * T * T indices
    index = pairs.view(B, 1, T * T).expand(-1, num_heads, -1)
    return table.t().contiguous().expand(B, -1, -1).gather(2, index).view(B, num_heads, T, T)
