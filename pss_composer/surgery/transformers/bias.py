"""Beit's relative position bias of transformers at the kept tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pss_composer.sampling import PatchSampler
from pss_composer.surgery.edits import Extension


class LayerWithBias(Extension):
    """A layer that hands the positions of the kept tokens to its own bias, with the flag that it hands on anyway."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = "kept_positions" if "kept_positions" in kwargs else "relative_position_bias"
        (positions,) = kwargs.pop(name, (None,))
        if positions is not None:
            kwargs["interpolate_pos_encoding"] = kwargs.get("interpolate_pos_encoding", False), positions
        return super().forward(*args, **kwargs)


class KeptBias(Extension):
    """A relative position bias at the positions of the kept tokens, (B, P + k) int64, or None if all were kept."""

    def take(self, positions: Tensor | None, window_size: Any, is_interpolated: bool, dim_size: Any) -> Any:
        if positions is None:
            return super().forward(window_size, is_interpolated, dim_size)
        num_tokens = window_size[0] * window_size[1] + 1  # of the whole image; dim_size counts those that are left
        return select_pairs(super().forward(window_size, is_interpolated, num_tokens), positions)


class BiasOfLayer(KeptBias):
    """The bias of one layer, which hands it the positions."""

    def forward(self, window_size: Any, interpolate_pos_encoding: Any = False, dim_size: Any = None) -> Any:
        positions = None
        if isinstance(interpolate_pos_encoding, tuple):
            interpolate_pos_encoding, positions = interpolate_pos_encoding
        return self.take(positions, window_size, interpolate_pos_encoding, dim_size)


class SharedBias(KeptBias):
    """The bias of all layers, which is taken outside of them, right behind the embeddings."""

    patch_sampler: PatchSampler

    def forward(self, window_size: Any, interpolate_pos_encoding: bool = False, dim_size: Any = None) -> Any:
        return self.take(self.patch_sampler.kept_positions(), window_size, interpolate_pos_encoding, dim_size)


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
    # the gradient of index_select is added up in one bias, that of gather in B of them: 9 times slower on a CPU
    return bias.reshape(num_heads, T * T).index_select(1, pairs).view(num_heads, B, t, t).transpose(0, 1)
