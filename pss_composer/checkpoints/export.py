"""Writes the weights of a checkpoint as a safetensors file that timm loads, or the library that the model is of."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pss_composer.checkpoints.architecture import find_architecture
from pss_composer.checkpoints.layouts import Weights, read_weights
from pss_composer.checkpoints.reading import bad_checkpoint, find_latest
from pss_composer.checkpoints.transfer import fit_weights
from pss_composer.errors import InputError
from pss_composer.models.settings import CONFIG_FILE, LIBRARIES
from pss_composer.models.shape import SIZES

USUAL_NUM_HEADS = {shape["embed_dim"]: shape["num_heads"] for shape in SIZES.values()} | {1024: 16}  # and ViT-L's


def export_weights(
    checkpoint: str | Path, out: str | Path, *, ema: bool = False, image_size: int | None = None
) -> str:
    """Write the weights of a checkpoint as safetensors by timm's names.

    The file's metadata hold, under `timm`, a timm class and its arguments as JSON. The weights load into that class
    with `strict=True`. Of a SimMIM pre-training file only the encoder is written, with its shared relative position
    bias.

    Without relative position biases, weights do not show the number of heads. It is then taken from the run's recipe,
    or for files of others from the usual number for this width in DeiT and timm; null where neither helps.

    The weights of a run with a library's model keep that library's names; the metadata then hold, under `model`, the
    run's settings of the model. For transformers the result is a folder that `from_pretrained` takes.

    Args:
        checkpoint: A file, a folder of shards, or a run's folder; in a layout that `read_weights` knows.
        out: A new file with the suffix `.safetensors`, or of transformers a new folder; after an error it is not there.
        ema: Take the moving averages of the weights, not the weights in training.
        image_size: Interpolate position embeddings and bias tables to this height and width in pixels; None does not.

    Returns:
        What happened to each weight, in lines.

    Raises:
        InputError: As in `read_weights` and `find_architecture`, or `out` or `image_size` is bad.
    """
    out, settings = Path(out), _read_library_model(checkpoint)
    if settings is not None:
        return _export_library_model(checkpoint, out, settings, ema=ema, image_size=image_size)
    if out.suffix != ".safetensors" or os.path.exists(out):
        raise InputError(f"must be a new file with the suffix .safetensors, got {out}", key="out")
    weights = read_weights(checkpoint, ema=ema)
    architecture = find_architecture(weights.tensors, checkpoint)
    arguments = architecture.arguments
    if image_size is not None:
        patch_size = arguments["patch_size"]
        if image_size < patch_size or image_size % patch_size:
            raise InputError(f"must be a multiple of the patch size {patch_size}, got {image_size}", key="image_size")
        arguments["img_size"] = image_size
    vit = architecture.build_empty()
    transfer = fit_weights(weights, vit.state_dict(), vit, checkpoint)
    lines = [f"{checkpoint}: {weights.layout}", str(transfer)]
    if "num_heads" not in arguments:
        # null if unknown: timm's default would load and compute something else
        arguments["num_heads"], origin = _choose_num_heads(weights, arguments["embed_dim"])
        lines.append(f"num_heads, which the weights do not show: {arguments['num_heads']} ({origin})")
    description = {"class": architecture.vit_class.__name__, "arguments": arguments}
    with _make_place(out) as file:
        _save(transfer.tensors, file, {"format": "pt", "timm": json.dumps(description)})
    if weights.not_weights:
        lines.append(f"not weights, left out: {', '.join(weights.not_weights)}")
    return "\n".join([*lines, f"{out}: {len(transfer.tensors)} weights of timm's {architecture}"])


def _read_library_model(checkpoint: str | Path) -> dict[str, Any] | None:
    """The settings of the model in the recipe of a run, those that are set; None if it is not of a library."""
    try:
        recipe: Any = OmegaConf.to_container(OmegaConf.load(find_latest(checkpoint).parent / "recipe.yaml"))
        library, slash, _ = recipe["model"]["name"].partition("/")
        settings = {key: value for key, value in recipe["model"].items() if value and key != "pretrained"}
    except Exception:  # there is none, or it is somebody else's
        return None
    return settings if slash and library in LIBRARIES else None


def _export_library_model(
    checkpoint: str | Path, out: Path, settings: dict[str, Any], *, ema: bool, image_size: int | None
) -> str:
    name = settings["name"]
    is_folder = name.startswith("hf/")
    if os.path.exists(out) or (out.suffix != ".safetensors" and not is_folder) or (out.suffix and is_folder):
        kind = "folder without a suffix" if is_folder else "file with the suffix .safetensors"
        raise InputError(f"must be a new {kind} for a run with {name}, got {out}", key="out")
    if image_size is not None:
        raise InputError(f"must be left out for a run with {name}, got {image_size}", key="image_size")
    weights = read_weights(checkpoint, ema=ema, is_of_library=True)
    # under EMA there are two sets of parameters, but buffers only in the model of the checkpoint
    tensors = read_weights(checkpoint, is_of_library=True).tensors | weights.tensors
    metadata = {"format": "pt", "model": json.dumps(settings)}
    if is_folder:
        config = find_latest(checkpoint).parent / CONFIG_FILE
        if not config.is_file():
            raise bad_checkpoint(checkpoint, "must be in the folder of its run", f"has no {config} beside it")
        with _make_place(out) as folder:
            folder.mkdir()
            shutil.copy(config, folder)
            _save(tensors, folder / "model.safetensors", metadata)
    else:
        with _make_place(out) as file:
            _save(tensors, file, metadata)
    return f"{checkpoint}: {weights.layout}\n{out}: {len(tensors)} weights of {name}, by the library's names"


def _choose_num_heads(weights: Weights, embed_dim: int) -> tuple[int | None, str]:
    """The number of heads, and where it comes from."""
    if weights.num_heads is not None and embed_dim % weights.num_heads == 0:
        return weights.num_heads, "from the run's recipe, or from the metadata of its export"
    if not weights.is_composer and embed_dim in USUAL_NUM_HEADS:
        return USUAL_NUM_HEADS[embed_dim], "usual in DeiT and timm for this width"
    return None, "unknown: set it when you build the model"


def _save(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    # copies, because safetensors takes no two tensors that share memory
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(copies, file, metadata)


@contextmanager
def _make_place(out: Path) -> Iterator[Path]:
    """A path beside `out` for the block to write to; it is moved to `out` when it is whole."""
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as workspace:
            written = Path(workspace) / out.name
            yield written
            os.replace(written, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"must be a file that can be written, {out} cannot: {reason}", key="out") from error
