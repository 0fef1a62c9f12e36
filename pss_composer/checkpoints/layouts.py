"""Finds the weights of a ViT in a checkpoint file of any known layout, and gives them timm's names."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from pss_composer.checkpoints.reading import bad_checkpoint, find_latest, read_file
from pss_composer.errors import InputError
from pss_composer.models.shape import SIZES

CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # in names of the EMA's, under activation checkpointing
CONTAINERS = ("model", "state_dict", "state")  # the keys that hold the weights; "state" is Composer's


@dataclass
class Weights:
    """The weights of a ViT by timm's names; after SimMIM pre-training also `mask_token` and `decoder`.

    Args:
        tensors: Name -> weight.
        layout: The kind of file that they come from, in words.
        is_composer: Whether it is a Composer checkpoint.
        not_weights: Names of everything else in the file.
        dropped: Names of weights in the file that no model needs: position indices, which are computed.
        num_heads: The ViT's heads, if the run's recipe or the metadata of this project's export says so.
    """

    tensors: dict[str, Tensor]
    layout: str
    is_composer: bool
    not_weights: list[str]
    dropped: list[str]
    num_heads: int | None


def read_weights(checkpoint: str | Path, *, ema: bool | None = None, is_of_library: bool = False) -> Weights:
    """Read the weights of a ViT from a file of any known layout.

    The known layouts are the pre-training and fine-tuning files of SimMIM and PSS, DeiT's, timm's, and this project's
    Composer checkpoints, folders of shards included.

    Args:
        checkpoint: A file, a folder of shards, or a run's folder.
        ema: True takes the moving averages of the weights, False the weights in training, None the model of the file.
            In a Composer checkpoint under EMA that model is the averages, which Composer also evaluates.
        is_of_library: Whether the names are those of a library's model, and stay as they are.

    Raises:
        InputError: There is no such file, it is broken, it holds more than weights and settings, it has another
            layout, it has no moving averages, or a weight is infinite or not a number.
    """
    contents = read_file(checkpoint)
    key = next((key for key in CONTAINERS if isinstance(contents.get(key), dict)), None)
    state_dict, is_average = _choose_weights(contents, key, checkpoint, ema)
    tensors: dict[str, Tensor] = {}
    dropped = []
    for original_name, tensor in state_dict.items():
        plain_name = original_name.replace(CHECKPOINT_WRAPPER, "")
        name = plain_name.removeprefix("module.") if is_of_library else timm_name(plain_name)
        if name.endswith("relative_position_index") and not is_of_library:
            dropped.append(original_name)
            continue
        if name in tensors:
            raise bad_checkpoint(checkpoint, "must hold each weight once", f"has two by the name {name}")
        if not tensor.isfinite().all():
            raise bad_checkpoint(checkpoint, "must hold finite weights", f"has NaN or infinity at {name}")
        # SimMIM's decoder is a 1 x 1 convolution, which is a linear layer
        is_decoder = name == "decoder.weight" and tensor.ndim == 4 and not is_of_library
        tensors[name] = tensor.flatten(1) if is_decoder else tensor
    kind = "SimMIM pre-training" if "mask_token" in tensors else "ViT"
    container = {None: "a bare state dict", "state": "a Composer checkpoint"}.get(key, f"under {key!r}")
    return Weights(
        tensors,
        layout=f"{kind}, {container}{', its moving averages' if is_average else ''}",
        is_composer=key == "state",
        not_weights=[str(name) for name in contents if name not in CONTAINERS] if key else [],
        dropped=dropped,
        num_heads=_find_num_heads(find_latest(checkpoint)),
    )


def timm_name(name: str) -> str:
    """Translate a weight's name, in a file or in the state dict of one of this project's models, to timm's."""
    name = name.removeprefix("module.").removeprefix("encoder.")  # "module." is of Composer and DDP
    return name.replace("patch_embed.norm.mask_token", "mask_token").replace("decoder.0.", "decoder.")


def _choose_weights(
    contents: Mapping[str, Any], key: str | None, path: str | Path, ema: bool | None
) -> tuple[dict[str, Tensor], bool]:
    """The state dict in a file, and whether it is the moving averages."""
    saved = contents if key is None else contents[key]
    trained, averages = saved, contents.get("model_ema" if key == "model" else "state_dict_ema")
    if key == "state":
        saved = saved.get("model")
        trained, averages = _find_composer_averages(contents[key])
    if ema and not isinstance(averages, dict):
        raise InputError(f"needs a checkpoint with moving averages, {path} has none", key="ema")
    chosen: Any = saved if ema is None else averages if ema else trained
    if not _is_state_dict(chosen):
        raise bad_checkpoint(path, "must hold weights under 'model', 'state_dict' or a Composer 'state', or nothing "
                             "else", f"holds {reprlib.repr(list(contents))}")
    return chosen, chosen is averages


def _find_composer_averages(state: Mapping[str, Any]) -> tuple[Any, Any]:
    """The weights in training, and the EMA's averages or None.

    While the EMA is active, Composer saves the averages as the model, and the weights in training in their place.
    """
    algorithms = state.get("algorithms")
    for entry in algorithms if isinstance(algorithms, list) else []:
        match entry:
            case _, {"ema_started": True, "ema_weights_active": swapped, "ema_model": {"named_parameters_dict": kept}}:
                return (kept, state["model"]) if swapped else (state["model"], kept)
    return state.get("model"), None


def _is_state_dict(tensors: Any) -> bool:
    return isinstance(tensors, dict) and len(tensors) > 0 and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        for name, tensor in tensors.items()
    )


def _find_num_heads(path: Path) -> int | None:
    """The number of heads in the recipe of a run's checkpoint, or in the metadata of a file of `export_weights`."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                num_heads = json.loads(file.metadata()["timm"])["arguments"]["num_heads"]
        else:
            model = OmegaConf.load(path.parent / "recipe.yaml").model
            num_heads = model.get("num_heads") or SIZES[model.size]["num_heads"]
    except Exception:  # there is neither, or it is somebody else's
        return None
    return num_heads if isinstance(num_heads, int) and num_heads > 0 else None
