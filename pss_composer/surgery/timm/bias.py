"""Relative position biases at the kept tokens, for timm's `Beit` and `VisionTransformerRelPos`.

A block gets the pairs of kept tokens as an argument, where timm hands it a shared bias. Activation checkpointing runs a
block again after other forward passes; it then passes the same argument, so that the block sees the tokens of its own
pass.
"""

from __future__ import annotations

from math import isqrt
from typing import Any, cast

from timm.layers import RelPosMlp
from torch import Tensor, nn
from torch.nn import functional

from pss_composer.sampling import PatchSampler


class KeptPairs(nn.Module):
    """Stands where timm keeps a bias that all blocks share, and hands them the pairs of kept tokens.

    Args:
        sampler: The sampler that ran before.
        bias: A module of timm with a relative position bias.
    """

    def __init__(self, sampler: PatchSampler, bias: Any) -> None:
        super().__init__()
        self.sampler = sampler
        self.biases = (bias,)  # a module within a tuple stays where it was in the model

    def forward(self) -> Tensor | None:
        """Where the table has the bias of each pair: (B, P + k, P + k) int64, or None if all tokens were kept."""
        positions = self.sampler.kept_positions()
        if positions is None:
            return None
        rows = make_index(*self.biases).to(positions.device)[positions]  # DataParallel replicates no tuple
        return rows.gather(2, positions.unsqueeze(1).expand(-1, positions.shape[1], -1))

    get_bias = forward  # what VisionTransformerRelPos calls

    def set_window_size(self, window_size: tuple[int, int]) -> None:
        """Nothing to do: a model that changes its input size changes the bias, too."""


def make_index(bias: Any) -> Tensor:
    """Where the table has the bias of each pair of tokens, (P + N, P + N)."""
    index = cast(Tensor, bias.relative_position_index)
    index = index.view(isqrt(index.numel()), -1)
    if isinstance(bias, RelPosMlp):  # without prefix tokens: their pairs get the row behind the last one
        index = functional.pad(index, (bias.prefix_tokens, 0) * 2, value=len(bias.rel_coords_log.flatten(0, 1)))
    return index


def make_table(bias: Any) -> Tensor:
    """The bias of every relative position, (number of them, heads)."""
    if not isinstance(bias, RelPosMlp):
        return cast(Tensor, bias.relative_position_bias_table)
    table = bias.bias_act(bias.mlp(bias.rel_coords_log).flatten(0, 1)) * (bias.bias_gain or 1)
    return functional.pad(table, (0, 0, 0, 1))  # no bias where one of the pair is a prefix token


def gather_bias(bias: Any, pairs: Tensor) -> Tensor:
    """The bias of each pair of tokens, (B, heads, T, T), from where the table has it, (B, T, T)."""
    table = make_table(bias)
    B, T, _ = pairs.shape
    num_heads = table.shape[1]
    # head by head: the table's few kilobytes for a head stay in the cache for all B * T * T indices
    index = pairs.view(B, 1, T * T).expand(-1, num_heads, -1)
    return table.t().contiguous().expand(B, -1, -1).gather(2, index).view(B, num_heads, T, T)
