"""Weights into a model: into its blocks, onto its grid, under its head; with an account of every one of them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from pss_composer.checkpoints.layouts import SHARED_TABLE, Weights, count_positions, read_weights, timm_name
from pss_composer.errors import InputError

if TYPE_CHECKING:
    from composer.models import ComposerModel

TABLE = "attn.relative_position_bias_table"
# what belongs to a task and not to the ViT: it may be missing, or be there for another task
HEAD = ("head.", "head_dist.", "fc_norm.", "mask_token", "decoder.")


@dataclass
class Transfer:
    """Weights that fit a model, and the account of how they came to.

    Args:
        tensors: The model's names -> weights of its shapes.
        loaded: Names of the model that took the weight of that name as it is.
        copied: Names of the model that took the bias table that the blocks of the file share.
        interpolated: Names of the model that took a weight of another grid or patch size, with both sizes.
        dropped: Names of the file that the model has no place for.
        initial: Names of the model, all of its head, that keep their initial values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    interpolated: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    initial: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        account = {
            "loaded": self.loaded, "copied from the shared bias table": self.copied,
            "interpolated": self.interpolated, "dropped": self.dropped, "left at initial values": self.initial,
        }
        return "\n".join(f"{title}: {_list(names)}" for title, names in account.items() if names)


def load_pretrained(model: ComposerModel, path: str | Path) -> Transfer:
    """Start a model of this project from a checkpoint in any layout that `read_weights` knows.

    SimMIM's shared bias table goes into every block, position embeddings and bias tables are interpolated where the
    grid is another one, and a head of another task stays behind. Everything else has to be there and to fit.

    Args:
        model: One of `models`; nothing of it changes on an error.
        path: A file, a folder of shards, or the folder of a run.

    Returns:
        The account of every weight.

    Raises:
        InputError: What `read_weights` raises, or weights of another architecture.
    """
    targets = _find_targets(model)
    transfer = fit_weights(read_weights(path), targets, model.vit, path)
    _copy(transfer, targets)
    return transfer


def load_checkpoint(model: ComposerModel, path: str | Path) -> None:
    """Give a model of this project all of the weights in a Composer checkpoint of the same model.

    Args:
        model: One of `models`; nothing of it changes on an error.
        path: A file, a folder of shards, or the folder of a run.

    Raises:
        InputError: What `read_weights` raises, a file that is none of Composer's, or one of another model.
    """
    weights, targets = read_weights(path), _find_targets(model)
    if not weights.is_composer:
        raise InputError(f"checkpoint must be Composer's, {path} is none: model.pretrained takes it")
    transfer = fit_weights(weights, targets, model.vit, path)
    changed = [*transfer.interpolated, *transfer.copied, *transfer.initial, *transfer.dropped]
    if changed:
        raise InputError(f"checkpoint must be of the same model, {path} differs in {changed[0]}")
    _copy(transfer, targets)


def _find_targets(model: ComposerModel) -> dict[str, Tensor]:
    return {timm_name(name): parameter for name, parameter in model.state_dict().items()}


def _copy(transfer: Transfer, targets: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in transfer.tensors.items():
            targets[name].copy_(tensor)


def fit_weights(weights: Weights, targets: Mapping[str, Tensor], vit: nn.Module, path: str | Path) -> Transfer:
    """Fit weights to a model's shapes.

    Args:
        weights: The weights of a file.
        targets: The model's weights by timm's names; only their shapes are read.
        vit: The timm ViT that they are of, for its grid.
        path: Where the weights come from, for the message.

    Raises:
        InputError: The model lacks a weight, or the weights a place; heads are left out of this.
    """
    num_heads = vit.blocks[0].attn.num_heads
    if weights.num_heads not in (None, num_heads):
        raise InputError(f"checkpoint must be of the model's architecture, {path} has {weights.num_heads} heads, the "
                         f"model {num_heads}")
    sources, copied = dict(weights.tensors), set()
    if SHARED_TABLE in sources and SHARED_TABLE not in targets:
        shared = sources.pop(SHARED_TABLE)
        copied = {name for name in targets if name.endswith(TABLE)}
        sources |= dict.fromkeys(copied, shared)
    transfer = Transfer(dropped=list(weights.dropped))
    for name, target in targets.items():
        source = sources.pop(name, None)
        is_head = name.startswith(HEAD)
        if source is None and not is_head:
            raise InputError(f"checkpoint must be of the model's architecture, {path} has no {name}")
        if source is None or (is_head and source.shape != target.shape):
            transfer.initial.append(name)
            if source is not None:
                transfer.dropped.append(f"{name} {tuple(source.shape)}")
            continue
        if source.shape == target.shape:
            transfer.tensors[name] = source
            (transfer.copied if name in copied else transfer.loaded).append(name)
        else:
            transfer.tensors[name] = _resize(name, source, target, vit, path)
            transfer.interpolated.append(f"{name} {tuple(source.shape)} -> {tuple(target.shape)}")
    for name in sources:
        # SimMIM's norm behind the last block is for tokens, and mean pooling has one of its own, in the head
        is_other_norm = name.startswith("norm.") and "fc_norm.weight" in targets
        if not name.startswith(HEAD) and not is_other_norm:
            raise InputError(f"checkpoint must be of the model's architecture, {path} has {name}, the model has not")
        transfer.dropped.append(name)
    return transfer


def _resize(name: str, source: Tensor, target: Tensor, vit: nn.Module, path: str | Path) -> Tensor:
    """A weight for another grid or patch size, by timm's interpolation."""
    grid_size = vit.patch_embed.grid_size
    resized = source
    try:
        if name == "pos_embed":
            num_prefix_tokens = target.shape[1] - vit.patch_embed.num_patches
            resized = resample_abs_pos_embed(source, list(grid_size), num_prefix_tokens=num_prefix_tokens)
        elif name.endswith("relative_position_bias_table") and count_positions(source):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, about timm's memory layout
                resized = resize_rel_pos_bias_table(source, grid_size, (target.shape[0], source.shape[1]))
        elif name == "patch_embed.proj.weight":
            resized = resample_patch_embed(source, list(target.shape[2:]))
    # a weight of another number of dimensions, or of a grid that is no square
    except (ValueError, RuntimeError, IndexError, AssertionError):
        pass
    if resized.shape != target.shape:
        raise InputError(f"checkpoint must be of the model's architecture, {path} has {tuple(source.shape)} at {name}, "
                         f"the model {tuple(target.shape)}")
    return resized


def _list(names: Iterable[str]) -> str:
    """The names, those of the blocks taken together."""
    counts = Counter(re.sub(r"blocks\.\d+", "blocks.*", name) for name in names)
    shown = [f"{name} ({count} x)" if count > 1 else name for name, count in counts.items()]
    return f"{counts.total()} ({', '.join(shown)})"
