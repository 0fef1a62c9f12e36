"""timm's Beit: behind the position embedding, and relative position biases at the kept tokens."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from torch import Tensor, nn

from pss_composer.sampling import PatchSampler, set_in_forward
from pss_composer.surgery.edits import Extension, WholeGrid, extend, put
from pss_composer.surgery.timm.bias import KeptPairs, gather_bias


def fit_beit(beit: Beit, sampler: PatchSampler) -> None:
    """BEiT, BEiT-2, and the ViT that SimMIM fine-tunes."""
    attentions = [block.attn for block in beit.blocks]
    has_bias_per_block = attentions[0].relative_position_bias_table is not None
    if has_bias_per_block and beit.rel_pos_bias is not None:
        raise TypeError("cannot drop patch tokens in a Beit with both shared and own relative position biases")
    put(sampler, beit, "pos_drop", nn.Sequential(beit.pos_drop, sampler))
    extend(sampler, beit, WholeGrid)
    if has_bias_per_block:
        # Beit calls its shared bias behind pos_drop and hands the result to every block
        put(sampler, beit, "rel_pos_bias", KeptPairs(sampler, attentions[0]))
        for attention in attentions:
            extend(sampler, attention, BiasOfBlock)
            put(sampler, attention, "pairs", None)
    elif beit.rel_pos_bias is not None:
        extend(sampler, beit.rel_pos_bias, SharedBias)
        put(sampler, beit.rel_pos_bias, "kept_pairs", KeptPairs(sampler, beit.rel_pos_bias))


class BiasOfBlock(Extension):
    """Beit's attention with its bias at the kept pairs, which come in as the argument for a shared bias."""

    pairs: Tensor | None

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Any:
        set_in_forward(self, pairs=shared_rel_pos_bias)
        return super().forward(x)

    def _get_rel_pos_bias(self) -> Any:
        pairs, self.pairs = self.pairs, None
        if pairs is None:
            return super()._get_rel_pos_bias()
        return gather_bias(self, pairs)


class SharedBias(Extension):
    """Beit's shared bias at the kept pairs."""

    kept_pairs: KeptPairs

    def forward(self) -> Any:
        pairs = self.kept_pairs()
        if pairs is None:
            return super().forward()
        return gather_bias(self, pairs)
