"""BEiT and Data2VecVision of transformers: relative position biases at the kept tokens.

A layer with a bias of its own gets the positions of the kept tokens as an argument, the one for a bias that all
layers share. Activation checkpointing, which runs a layer again after other forward passes, passes the same argument.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import Extension, extend, put


def fit_beit(beit: Any, sampler: PatchSampler) -> None:
    """Sample the embeddings' output, and take each bias at the kept tokens."""
    has_own, is_shared = beit.config.use_relative_position_bias, beit.config.use_shared_relative_position_bias
    if has_own and is_shared:
        raise TypeError("no patch sampling slot known for a Beit with both shared and own relative position biases")
    extend(sampler, beit.embeddings, SampledEmbeddings)
    put(sampler, beit.embeddings, "patch_sampler", sampler)
    put(sampler, beit.embeddings, "kept", [])
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
        extend(sampler, layer.find_bias(), BiasOfLayer)
        put(sampler, layer.find_bias(), "positions", None)


class SampledEmbeddings(Extension):
    """Beit's embeddings, which until transformers 4.57 return the size of the grid beside the tokens."""

    patch_sampler: PatchSampler
    kept: list[Tensor | None]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        tokens = self.patch_sampler(output[0] if isinstance(output, tuple) else output)
        self.kept[:] = [self.patch_sampler.kept_positions()]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens


class ModelOfLayers(Extension):
    """transformers 5: the model hands to its layers what it does not know, here a list for each forward pass."""

    def forward(self, pixel_values: Any, bool_masked_pos: Any = None, interpolate_pos_encoding: Any = False,
                attention_mask: Any = None, **kwargs: Any) -> Any:
        self.embeddings.kept = kept = []
        return super().forward(pixel_values, bool_masked_pos, interpolate_pos_encoding, attention_mask,
                               kept_positions=kept, **kwargs)


class KeptPositions(nn.Module):
    """transformers 4: stands where a bias of all layers would be."""

    def __init__(self, sampler: PatchSampler) -> None:
        super().__init__()
        self.sampler = sampler

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor | None]:
        """The positions of the kept tokens, (B, P + k) int64, or None if all were kept."""
        return [self.sampler.kept_positions()]


class LayerWithBias(Extension):
    """A layer that puts the positions of the kept tokens where its own bias is."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = "kept_positions" if "kept_positions" in kwargs else "relative_position_bias"
        [self.find_bias().positions] = kwargs.pop(name, [None])
        return super().forward(*args, **kwargs)

    def find_bias(self) -> Any:
        owner = self if hasattr(self, "relative_position_bias") else self.attention.attention
        return owner.relative_position_bias


class BiasOfLayer(Extension):
    """A layer's bias at the positions that its layer has put here for this forward pass."""

    positions: Tensor | None

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Any:
        positions, self.positions = self.positions, None
        if positions is None:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        bias = super().forward(window_size, interpolate_pos_encoding, count_tokens(window_size))
        return select_pairs(bias, positions)


class SharedBias(Extension):
    """The bias of all layers at the kept positions."""

    patch_sampler: PatchSampler

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Any:
        positions = self.patch_sampler.kept_positions()
        if positions is None:
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        bias = super().forward(window_size, interpolate_pos_encoding, count_tokens(window_size))
        return select_pairs(bias, positions)


def count_tokens(window_size: Any) -> Any:
    """Tokens of an image before sampling: to as many a bias is interpolated."""
    return window_size[0] * window_size[1] + 1


def select_pairs(bias: Tensor, positions: Tensor) -> Tensor:
    """The bias of each pair of kept tokens.

    Args:
        bias: Of each pair of tokens, (1, heads, T, T).
        positions: Of the kept tokens, (B, t) int64.

    Returns:
        (B, heads, t, t).
    """
    _, num_heads, T, _ = bias.shape
    B, t = positions.shape
    pairs = (positions.unsqueeze(2) * T + positions.unsqueeze(1)).flatten()
    # the gradient of index_select is added up in one bias, that of gather in B of them
    return bias.reshape(num_heads, T * T).index_select(1, pairs).view(num_heads, B, t, t).transpose(0, 1)
