"""What the tests of surgery need to know about a model."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


def random_images(batch_size: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Family:
    """A row of the table: 64 patch tokens of 32 x 32 pixels, width 32, two blocks, seven classes if there is a head.

    Args:
        build: Builds the model; its weights are then drawn anew.
        num_prefix_tokens: Tokens before the first patch token.
        tokens: (model, inputs) -> the tokens (B, T, C) that leave the model's body.
        head: (model, tokens) -> logits, or whatever `run` returns.
        run: (model, inputs) -> logits.
        inputs: Seed -> what the model takes, for 3 images.
        has_bias: Whether its blocks need to know the positions of the kept tokens.
        blocks: Dotted name of the list of blocks.
        checkpoint: Turns on the library's own activation checkpointing; None if there is none.
        hide: (model, is_hidden (B, T) bool) -> a context in which attention that is not PyTorch's own
            (`scaled_dot_product_attention`) sees no hidden token; for the oracle.
        unused: Names of parameters that get no gradient in the untouched model either.
        breaks: Why `torch.compile` breaks the graph of the untouched model, if it does.
    """

    build: Callable[[], nn.Module]
    num_prefix_tokens: int
    tokens: Callable[[nn.Module, Any], torch.Tensor]
    head: Callable[[nn.Module, torch.Tensor], torch.Tensor]
    run: Callable[[nn.Module, Any], torch.Tensor] = lambda model, inputs: model(inputs)
    inputs: Callable[[int], Any] = lambda seed: random_images(seed=seed)
    has_bias: bool = False
    blocks: str = "blocks"
    checkpoint: Callable[[nn.Module], Any] | None = None
    hide: Callable[[nn.Module, torch.Tensor], AbstractContextManager] = lambda model, is_hidden: nullcontext()
    unused: frozenset[str] = frozenset()
    breaks: str = ""
