"""Finds the timm ViT that weights belong to, from their names and shapes."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pss_composer.checkpoints.reading import bad_checkpoint

KNOWN_VIT = "must be of a ViT of timm's, DeiT's or SimMIM's kind"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


@dataclass
class Architecture:
    """A timm class, and those of its arguments that the weights show.

    Without relative position biases, weights do not show the number of heads; then `num_heads` is missing.
    """

    vit_class: type[nn.Module]
    arguments: dict[str, Any]

    def build_empty(self) -> nn.Module:
        """The model on the meta device: its weights take no memory."""
        with torch.device("meta"):
            return self.vit_class(**{"num_heads": 1, **self.arguments})

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.vit_class.__name__}({arguments})"


def find_architecture(weights: Mapping[str, Tensor], path: str | Path) -> Architecture:
    """Find the timm ViT that has exactly these names and shapes.

    Args:
        weights: By timm's names; `mask_token` and `decoder` may be there and are ignored.
        path: Where they come from, for the message.

    Raises:
        InputError: No known ViT has these weights.
    """
    weights = {name: w for name, w in weights.items() if name != "mask_token" and not name.startswith("decoder.")}
    is_beit = any(name.endswith((".q_bias", "relative_position_bias_table", "gamma_1")) for name in weights)
    try:
        architecture = _describe_beit(weights) if is_beit else _describe_vision_transformer(weights)
        expected = architecture.build_empty().state_dict()
    except KeyError as error:
        raise bad_checkpoint(path, KNOWN_VIT, f"has no {error.args[0]}, but {reprlib.repr(list(weights))}") from error
    # timm asserts that its arguments fit together; a shape can have too few dimensions, or a zero
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
        reason = str(error).splitlines()[0] if str(error) else "no such ViT"
        raise bad_checkpoint(path, KNOWN_VIT, f"has shapes that do not fit together: {reason}") from error
    for name in {**expected, **weights}:
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise bad_checkpoint(path, KNOWN_VIT, f"has {found} at {name}, a {architecture} has {wanted}")
    return architecture


def _describe_beit(weights: Mapping[str, Tensor]) -> Architecture:
    tables = [weight for name, weight in weights.items() if name.endswith("relative_position_bias_table")]
    if tables:
        # a row for each distance between two of n x n patches, (2n - 1)² of them, and 3 for the class token
        grid_side = (_square_root(tables[0].shape[0] - 3, "relative_position_bias_table") + 1) // 2
    else:
        grid_side = _square_root(weights["pos_embed"].shape[1] - 1, "pos_embed")
    arguments = _describe_sizes(weights, grid_side)
    if tables:
        arguments["num_heads"] = tables[0].shape[1]
    return Architecture(Beit, arguments | {
        "global_pool": _find_pooling(weights),
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": SHARED_TABLE in weights,
    })


def _describe_vision_transformer(weights: Mapping[str, Tensor]) -> Architecture:
    is_distilled = "dist_token" in weights
    num_registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    num_positions = weights["pos_embed"].shape[1]
    # DeiT-III and DINOv2 with registers embed the positions of patches alone, so that their number is a square
    has_patches_alone = math.isqrt(num_positions) ** 2 == num_positions
    num_prefix_tokens = 0 if has_patches_alone else 1 + is_distilled + num_registers
    arguments = _describe_sizes(weights, _square_root(num_positions - num_prefix_tokens, "pos_embed")) | {
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
    }
    if is_distilled:
        return Architecture(VisionTransformerDistilled, arguments)
    # never CLIP's pre_norm: CLIP's ViTs also differ in activation and epsilon, which their weights do not show
    return Architecture(VisionTransformer, arguments | {
        "global_pool": _find_pooling(weights), "no_embed_class": has_patches_alone, "reg_tokens": num_registers,
    })


def _describe_sizes(weights: Mapping[str, Tensor], grid_side: int) -> dict[str, Any]:
    stem, first_layer = weights["patch_embed.proj.weight"], weights["blocks.0.mlp.fc1.weight"]
    return {
        "img_size": grid_side * stem.shape[2], "patch_size": stem.shape[2],
        "in_chans": stem.shape[1], "embed_dim": stem.shape[0],
        "depth": len({int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}),
        "mlp_ratio": first_layer.shape[0] / first_layer.shape[1],
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }


def _find_pooling(weights: Mapping[str, Tensor]) -> str:
    return "avg" if "fc_norm.weight" in weights else "token" if "head.weight" in weights else ""


def _square_root(number: int, name: str) -> int:
    if number < 1 or math.isqrt(number) ** 2 != number:
        raise ValueError(f"{name} has {number} positions, which are not a square")
    return math.isqrt(number)
