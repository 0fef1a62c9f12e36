"""BEiT and Data2VecVision of transformers: relative position biases at the kept tokens.

A layer with a bias of its own gets the positions of the kept tokens as an argument, the one for a bias that all
layers share. Activation checkpointing, which runs a layer again after other forward passes, passes the same argument.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from pss_composer.sampling import PatchSampler, set_in_forward
from pss_composer.surgery.edits import Extension, extend, put
from pss_composer.surgery.transformers.bias import BiasOfLayer, LayerWithBias, SharedBias


def fit_beit(beit: Any, sampler: PatchSampler) -> None:
    """Sample the embeddings' output, and take each bias at the kept tokens."""
    has_own, is_shared = beit.config.use_relative_position_bias, beit.config.use_shared_relative_position_bias
    if has_own and is_shared:
        raise TypeError("cannot drop patch tokens in a Beit with both shared and own relative position biases")
    extend(sampler, beit.embeddings, SampledEmbeddings)
    put(sampler, beit.embeddings, "patch_sampler", sampler)
    put(sampler, beit.embeddings, "kept", None)
    # transformers 5 has Beit's layers and its shared bias in the model itself
    encoder = getattr(beit, "encoder", None)
    if is_shared:
        bias = beit.shared_position_bias if encoder is None else encoder.relative_position_bias
        extend(sampler, bias, SharedBias)
        put(sampler, bias, "patch_sampler", sampler)
    if not has_own:
        return
    if encoder is None:
        extend(sampler, beit, ModelOfLayers)
    else:
        put(sampler, encoder, "relative_position_bias", KeptPositions(sampler))
        put(sampler, encoder, "has_relative_position_bias", True)
    for layer in beit.layers if encoder is None else encoder.layer:
        extend(sampler, layer, LayerWithBias)
        owner = layer if encoder is None else layer.attention.attention
        extend(sampler, owner.relative_position_bias, BiasOfLayer)


class SampledEmbeddings(Extension):
    """Beit's embeddings, which until transformers 4.57 return the size of the grid beside the tokens."""

    patch_sampler: PatchSampler
    kept: list[Tensor | None] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        tokens = self.patch_sampler(output[0] if isinstance(output, tuple) else output)
        if self.kept is not None:
            self.kept.append(self.patch_sampler.kept_positions())
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class ModelOfLayers(Extension):
    """transformers 5: the model hands to its layers what it does not know, here a list for each forward pass."""

    def forward(self, pixel_values: Any, bool_masked_pos: Any = None, interpolate_pos_encoding: Any = False,
                attention_mask: Any = None, **kwargs: Any) -> Any:
        kept: list[Tensor | None] = []
        set_in_forward(cast(nn.Module, self.embeddings), kept=kept)
        output = super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask,
                                 kept_positions=kept, **kwargs)
        set_in_forward(cast(nn.Module, self.embeddings), kept=None)
        return output


class KeptPositions(nn.Module):
    """transformers 4: the kept tokens' positions, (B, P + k) or None, where a bias of all layers would be."""

    def __init__(self, sampler: PatchSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        return [self.sampler.kept_positions()]
