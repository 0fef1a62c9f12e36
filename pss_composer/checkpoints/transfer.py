"""Puts the weights of a checkpoint into a model, and accounts for every one of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from pss_composer.checkpoints.architecture import SHARED_TABLE
from pss_composer.checkpoints.layouts import Weights, read_weights, timm_name
from pss_composer.checkpoints.reading import bad_checkpoint
from pss_composer.errors import to_line
from pss_composer.models.weight_names import count_names

if TYPE_CHECKING:
    from composer.models import ComposerModel

SAME_ARCHITECTURE = "must be of the model's architecture"
TABLE = "attn.relative_position_bias_table"
# These belong to a task and not to the ViT: a checkpoint may lack them or have them for another task.
HEAD = ("head.", "head_dist.", "fc_norm.", "mask_token", "decoder.")


@dataclass
class Transfer:
    """Weights that fit a model, and what happened to each.

    Args:
        tensors: The model's name -> a weight of the model's shape.
        loaded: The model's weights that are the checkpoint's weights of the same name, unchanged.
        copied: The model's weights that are copies of the bias table that all blocks of the checkpoint share.
        interpolated: The model's weights that had another grid or patch size in the checkpoint, with both shapes.
        dropped: The checkpoint's weights that the model has no place for.
        initial: The model's weights that keep their initial values, all of its head.
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
        return "\n".join(f"{title}: {len(names)} ({count_names(names)})" for title, names in account.items() if names)


def load_pretrained(model: ComposerModel, checkpoint: str | Path) -> Transfer:
    """Start a model from a checkpoint of any layout that `read_weights` knows.

    SimMIM's shared bias table goes into every block; position embeddings and bias tables are interpolated to the
    model's grid; the head of another task is left out. Every other weight has to be there and to fit. A library's model
    takes files of that library and of runs with it.

    Args:
        model: One of `models` or `pretraining`; it stays as it is if an error is raised.
        checkpoint: A file, a folder of shards, or a run's folder.

    Returns:
        What happened to each weight.

    Raises:
        InputError: As in `read_weights`, or the weights are of another architecture.
    """
    weights = read_weights(checkpoint, is_of_library=_is_of_library(model))
    return _load(model, weights, checkpoint)


def load_checkpoint(model: ComposerModel, checkpoint: str | Path) -> None:
    """Load all weights of a Composer checkpoint into the same model.

    Args:
        model: One of `models` or `pretraining`; it stays as it is if an error is raised.
        checkpoint: A file, a folder of shards, or a run's folder.

    Raises:
        InputError: As in `read_weights`, or it is not a Composer checkpoint, or it is of another model.
    """
    weights = read_weights(checkpoint, is_of_library=_is_of_library(model))
    if not weights.is_composer:
        raise bad_checkpoint(checkpoint, "must be Composer's", "is not: it can only be used as pretrained weights")
    _load(model, weights, checkpoint, is_same_model=True)


def _is_of_library(model: Any) -> bool:
    return hasattr(model, "convert_weights")  # `models.library`, which this room does not know


def _load(model: Any, weights: Weights, path: str | Path, *, is_same_model: bool = False) -> Transfer:
    if _is_of_library(model):
        targets = {name.removeprefix("module."): weight for name, weight in model.state_dict().items()}
        transfer = _fit_library_weights(weights, targets, model, path, is_same_model=is_same_model)
    else:
        targets = {timm_name(name): parameter for name, parameter in model.state_dict().items()}
        num_heads = model.vit.blocks[0].attn.num_heads
        if weights.num_heads not in (None, num_heads):
            raise bad_checkpoint(path, SAME_ARCHITECTURE, f"has {weights.num_heads} heads, the model {num_heads}")
        transfer = fit_weights(weights, targets, model.vit, path)
    changed = [*transfer.interpolated, *transfer.copied, *transfer.initial, *transfer.dropped]
    if is_same_model and changed:
        raise bad_checkpoint(path, "must be of the same model", f"differs in {changed[0]}")
    for name, tensor in transfer.tensors.items():
        targets[name].copy_(tensor)  # what `state_dict` gives needs no gradient
    return transfer


def _fit_library_weights(
    weights: Weights, targets: Mapping[str, Tensor], model: Any, path: str | Path, *, is_same_model: bool
) -> Transfer:
    """Fit weights to a library's model, by the library's own conversion; what it has no place for is dropped."""
    sources = dict(weights.tensors)
    if not is_same_model:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # torch's, about timm's memory layout
                sources = dict(model.convert_weights(sources))
        except Exception as error:  # the libraries take weights of another architecture for granted
            raise bad_checkpoint(path, SAME_ARCHITECTURE, f"cannot be converted: {to_line(error)}") from error
    transfer = Transfer()
    for name, target in targets.items():
        source = sources.pop(name, None)
        if source is not None and source.shape == target.shape:
            transfer.tensors[name] = source
            before = weights.tensors.get(name, source)
            if before.shape == source.shape:
                transfer.loaded.append(name)
            else:
                transfer.interpolated.append(f"{name} {tuple(before.shape)} -> {tuple(source.shape)}")
        elif model.is_head(name):
            transfer.initial.append(name)
            transfer.dropped += [] if source is None else [f"{name} {tuple(source.shape)}"]
        elif source is None:
            raise bad_checkpoint(path, SAME_ARCHITECTURE, f"has no {name}")
        else:
            raise bad_checkpoint(path, SAME_ARCHITECTURE,
                                 f"has {tuple(source.shape)} at {name}, the model {tuple(target.shape)}")
    transfer.dropped += sources
    return transfer


def fit_weights(weights: Weights, targets: Mapping[str, Tensor], vit: Any, path: str | Path) -> Transfer:
    """Fit weights to a model's shapes.

    Args:
        weights: The weights of a checkpoint.
        targets: The model's weights by timm's names; only their shapes are used.
        vit: The model's timm ViT; only its grid is used.
        path: Where the weights come from, for the message.

    Raises:
        InputError: A weight outside the head is missing, has no place in the model, or does not fit.
    """
    sources, copied = dict(weights.tensors), set()
    if SHARED_TABLE in sources and SHARED_TABLE not in targets:
        copied = {name for name in targets if name.endswith(TABLE)}
        sources |= dict.fromkeys(copied, sources.pop(SHARED_TABLE))
    transfer = Transfer(dropped=list(weights.dropped))
    for name, target in targets.items():
        source = sources.pop(name, None)
        is_head = name.startswith(HEAD)
        if source is None and not is_head:
            raise bad_checkpoint(path, SAME_ARCHITECTURE, f"has no {name}")
        if source is None or (is_head and source.shape != target.shape):
            transfer.initial.append(name)
            if source is not None:
                transfer.dropped.append(f"{name} {tuple(source.shape)}")
        elif source.shape == target.shape:
            transfer.tensors[name] = source
            (transfer.copied if name in copied else transfer.loaded).append(name)
        else:
            resized = _resize(name, source, target, vit)
            if resized.shape != target.shape:
                raise bad_checkpoint(path, SAME_ARCHITECTURE,
                                     f"has {tuple(source.shape)} at {name}, the model {tuple(target.shape)}")
            transfer.tensors[name] = resized
            transfer.interpolated.append(f"{name} {tuple(source.shape)} -> {tuple(target.shape)}")
    for name in sources:
        # the norm after SimMIM's last block is for tokens; mean pooling has its own norm, in the head
        is_other_norm = name.startswith("norm.") and "fc_norm.weight" in targets
        if not name.startswith(HEAD) and not is_other_norm:
            raise bad_checkpoint(path, SAME_ARCHITECTURE, f"has {name}, the model has not")
        transfer.dropped.append(name)
    return transfer


def _resize(name: str, source: Tensor, target: Tensor, vit: Any) -> Tensor:
    """Interpolate a weight for another grid or patch size, as timm does; another weight stays as it is."""
    grid_size, num_patches = vit.patch_embed.grid_size, vit.patch_embed.num_patches
    # a weight with another number of dimensions, or of a grid that is not a square
    with suppress(ValueError, RuntimeError, IndexError, AssertionError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, about timm's memory layout
        if name == "pos_embed":
            return resample_abs_pos_embed(source, grid_size, num_prefix_tokens=target.shape[1] - num_patches)
        if name.endswith("relative_position_bias_table"):
            return resize_rel_pos_bias_table(source, grid_size, (target.shape[0], source.shape[1]))
        if name == "patch_embed.proj.weight":
            return resample_patch_embed(source, list(target.shape[2:]))
    return source
