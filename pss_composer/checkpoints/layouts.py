"""The layouts of checkpoints: where the weights are, and by which names; and which ViT they belong to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import safe_open
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from yaml import YAMLError

from pss_composer.checkpoints.reading import find_latest, read_file
from pss_composer.errors import InputError
from pss_composer.models.classifier import SIZES

CONTAINERS = ("model", "state_dict", "state")
BARE = "a bare state dict"
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
# what only SimMIM pre-training has, by the names that the weights have here: ours and the original's -> here
PRETRAINING_NAMES = {
    "encoder.mask_token": "mask_token", "encoder.patch_embed.norm.mask_token": "mask_token",
    "decoder.0.weight": "decoder.weight", "decoder.0.bias": "decoder.bias",
}


@dataclass
class Weights:
    """The weights of a ViT by timm's names; `mask_token` and `decoder` beside them after SimMIM pre-training.

    Args:
        tensors: Name -> weight.
        layout: What kind of file they come from, in words.
        is_composer: Whether this is a Composer checkpoint.
        not_weights: What else the file holds, by name.
        dropped: Weights of the file that nothing needs: position indices are computed.
        num_heads: Heads of the ViT, where the recipe of the run or the metadata of an export of this project tell.
    """

    tensors: dict[str, Tensor]
    layout: str
    is_composer: bool = False
    not_weights: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    num_heads: int | None = None


def read_weights(path: str | Path, *, ema: bool | None = None) -> Weights:
    """The weights of a ViT in any layout that this project knows.

    Known are SimMIM's and PSS's pre-training and fine-tuning files, DeiT's, timm's, and Composer checkpoints of this
    project, also a folder of shards.

    Args:
        path: A file, a folder of shards, or the folder of a run.
        ema: Take the moving averages of the weights (True), or the weights in training (False). None takes what the
            file has as the model's: in Composer's, under its EMA, that is the averages, which it also evaluates.

    Raises:
        InputError: No such file, a broken one, one that asks for more than weights, or none of these layouts.
    """
    contents = read_file(path)
    tensors, container = _find_weights(contents, path, ema)
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    is_pretraining = any(name.startswith("encoder.") for name in tensors)
    dropped = [name for name in tensors if name.endswith("relative_position_index")]
    named = [(timm_name(name), tensor) for name, tensor in tensors.items() if name not in dropped]
    tensors = dict(named)
    if len(tensors) < len(named):
        raise InputError(f"checkpoint must hold each weight once, {path} has two by the same name")
    if is_pretraining and tensors.get("decoder.weight", torch.empty(0)).ndim == 4:
        tensors["decoder.weight"] = tensors["decoder.weight"].flatten(1)  # a 1 x 1 convolution is a linear layer
    kind = "SimMIM pre-training" if is_pretraining else "ViT"
    not_weights = [] if container.startswith(BARE) else [str(name) for name in contents if name not in CONTAINERS]
    is_composer, num_heads = "state" in contents, _find_num_heads(find_latest(path))
    return Weights(tensors, f"{kind}, {container}", is_composer, not_weights, dropped, num_heads)


def _find_num_heads(path: Path) -> int | None:
    """What the run's recipe beside a checkpoint says, or the metadata that `import_checkpoint` writes."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return json.loads(file.metadata()["timm"])["arguments"]["num_heads"]
        recipe = OmegaConf.load(path.parent / "recipe.yaml")
        return OmegaConf.select(recipe, "model.num_heads") or SIZES[OmegaConf.select(recipe, "model.size")]["num_heads"]
    except (OSError, YAMLError, OmegaConfBaseException, LookupError, ValueError, TypeError):
        return None  # neither is there, or it is another's


def timm_name(name: str) -> str:
    """A weight's name in a file, or in the state dict of a model of this project, as timm's."""
    name = name.removeprefix("module.")  # Composer's, and DDP's
    return PRETRAINING_NAMES.get(name, name.removeprefix("encoder."))


def _find_weights(contents: Mapping[str, Any], path: str | Path, ema: bool | None) -> tuple[dict[str, Tensor], str]:
    """The state dict in the contents of a file, and the file's container in words."""
    if isinstance(contents.get("state"), dict) and "model" in contents["state"]:
        container, tensors = "a Composer checkpoint", contents["state"]["model"]
        trained, averages = _find_composer_averages(contents["state"])
    else:
        key = next((key for key in ("model", "state_dict") if isinstance(contents.get(key), dict)), None)
        container = BARE if key is None else f"under {key!r}"
        tensors = trained = contents if key is None else contents[key]
        averages = contents.get("model_ema" if key == "model" else "state_dict_ema")
    if ema and not isinstance(averages, dict):
        raise InputError(f"ema must be of a checkpoint with moving averages, {path} has none")
    if ema is not None:
        tensors = averages if ema else trained
    if tensors is averages:
        container = f"{container}, its moving averages"
    if not _is_state_dict(tensors):
        raise InputError("checkpoint must hold weights under 'model', 'state_dict' or a Composer 'state', or nothing "
                         f"else, {path} holds {_shorten(contents)}")
    return dict(tensors), container


def _is_state_dict(tensors: Any) -> bool:
    return isinstance(tensors, dict) and len(tensors) > 0 and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        for name, tensor in tensors.items()
    )


def _find_composer_averages(state: Mapping[str, Any]) -> tuple[Any, Any]:
    """The weights in training, and the averages of the EMA or None.

    While the EMA is at work, Composer saves the averages as the model, and the weights in training in their place.
    """
    algorithms = state.get("algorithms")
    for entry in algorithms if isinstance(algorithms, list) else []:
        match entry:
            case _, {"ema_started": True, "ema_weights_active": swapped, "ema_model": {"named_parameters_dict": kept}}:
                return (kept, state["model"]) if swapped else (state["model"], kept)
    return state["model"], None


@dataclass
class Architecture:
    """The timm class that weights belong to, and its arguments as far as the weights tell them.

    timm's ViTs without relative position biases do not show their number of heads; then `num_heads` is missing.
    """

    vit_class: type[nn.Module]
    arguments: dict[str, Any]

    def build_empty(self, **changes: Any) -> nn.Module:
        """The model without memory for its weights, on the meta device."""
        with torch.device("meta"):
            return self.vit_class(**{"num_heads": 1, **self.arguments, **changes})

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.vit_class.__name__}({arguments})"


def find_architecture(weights: Mapping[str, Tensor], path: str | Path) -> Architecture:
    """Which of timm's ViTs the weights are of, every name and shape of theirs compared with that class.

    Args:
        weights: By timm's names; `mask_token` and `decoder` are left out of the comparison.
        path: Where they come from, for the message.

    Raises:
        InputError: They are not of a ViT that is known here.
    """
    weights = {name: w for name, w in weights.items() if name != "mask_token" and not name.startswith("decoder.")}
    needed = ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    for name in needed:
        if name not in weights:
            raise InputError(f"checkpoint must be of a ViT of timm's, DeiT's or SimMIM's kind, {path} has no {name}, "
                             f"but {_shorten(weights)}")
    is_beit = any(name.endswith((".q_bias", "relative_position_bias_table", "gamma_1")) for name in weights)
    try:
        architecture = _describe_beit(weights) if is_beit else _describe_vision_transformer(weights)
        expected = architecture.build_empty().state_dict()
    # timm asserts that its arguments fit together; a shape may have too few dimensions, or a zero
    except (AssertionError, ValueError, RuntimeError, IndexError, TypeError, ArithmeticError) as error:
        raise InputError(f"checkpoint must be of a ViT of timm's, DeiT's or SimMIM's kind, the shapes in {path} do not "
                         f"fit together: {str(error).splitlines()[0] if str(error) else 'no such ViT'}") from error
    for name in {**expected, **weights}:
        there = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if there != wanted:
            raise InputError(f"checkpoint must be of a ViT of timm's, DeiT's or SimMIM's kind, {path} has {there} at "
                             f"{name}, a {architecture} has {wanted}")
    return architecture


def _describe_beit(weights: Mapping[str, Tensor]) -> Architecture:
    tables = [weight for name, weight in weights.items() if name.endswith("relative_position_bias_table")]
    arguments = _describe_shape(weights)
    if "pos_embed" in weights:
        num_patches_per_side = _square_root(weights["pos_embed"].shape[1] - 1, "pos_embed")
    elif tables:
        num_patches_per_side = count_positions(tables[0])
    else:
        raise ValueError("neither a position embedding nor a relative position bias")
    if tables:
        arguments["num_heads"] = tables[0].shape[1]
        if arguments["embed_dim"] % arguments["num_heads"]:
            raise ValueError(f"width {arguments['embed_dim']} with a bias table of {arguments['num_heads']} heads")
    return Architecture(Beit, {
        "img_size": num_patches_per_side * arguments["patch_size"], **arguments,
        "qkv_bias": "blocks.0.attn.q_bias" in weights,
        "init_values": 0.1 if "blocks.0.gamma_1" in weights else None,
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": SHARED_TABLE in weights,
        "global_pool": _describe_pooling(weights),
    })


def _describe_vision_transformer(weights: Mapping[str, Tensor]) -> Architecture:
    arguments = _describe_shape(weights)
    if "pos_embed" not in weights:
        raise ValueError("no position embedding")
    is_distilled = "dist_token" in weights
    num_registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    num_positions = weights["pos_embed"].shape[1]
    # DeiT-III and DINOv2 with registers embed the positions of patches alone, so that their number is a square
    has_patches_alone = math.isqrt(num_positions) ** 2 == num_positions
    num_prefix_tokens = 0 if has_patches_alone else 1 + is_distilled + num_registers
    num_patches_per_side = _square_root(num_positions - num_prefix_tokens, "pos_embed")
    arguments = {
        "img_size": num_patches_per_side * arguments["patch_size"], **arguments,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
    }
    if is_distilled:
        return Architecture(VisionTransformerDistilled, arguments)
    return Architecture(VisionTransformer, {
        **arguments, "global_pool": _describe_pooling(weights), "no_embed_class": has_patches_alone,
        "reg_tokens": num_registers,
        # never pre_norm, CLIP's: its ViTs differ in activation and epsilon too, and their weights do not show in which
    })


def _describe_shape(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    stem, first_layer = weights["patch_embed.proj.weight"], weights["blocks.0.mlp.fc1.weight"]
    blocks = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    return {
        "patch_size": stem.shape[2], "in_chans": stem.shape[1], "embed_dim": stem.shape[0], "depth": len(blocks),
        "mlp_ratio": first_layer.shape[0] / first_layer.shape[1],
        "num_classes": len(weights["head.weight"]) if "head.weight" in weights else 0,
    }


def _describe_pooling(weights: Mapping[str, Tensor]) -> str:
    if "fc_norm.weight" in weights:
        return "avg"
    return "token" if "head.weight" in weights else ""


def count_positions(table: Tensor) -> int:
    """Patches along a side of the square grid that a bias table (positions, heads) of `Beit` is for.

    The table has a row for each of (2n - 1)² distances between two patches, and 3 for the class token.

    Raises:
        ValueError: No square grid has as many rows.
    """
    side = _square_root(table.shape[0] - 3, "relative_position_bias_table")
    if side % 2 == 0:
        raise ValueError(f"a relative_position_bias_table of {table.shape[0]} positions")
    return (side + 1) // 2


def _square_root(number: int, name: str) -> int:
    root = math.isqrt(max(number, 0))
    if root < 1 or root**2 != number:
        raise ValueError(f"{name} is for {number} patches, which are no square")
    return root


def _shorten(names: Mapping[str, Any]) -> str:
    shown = ", ".join(map(str, list(names)[:4]))
    return f"{shown}, ... ({len(names)} names)" if len(names) > 4 else shown or "nothing"
