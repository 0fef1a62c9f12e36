"""From a checkpoint in any known layout to a safetensors file that timm loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pss_composer.checkpoints.layouts import Weights, find_architecture, read_weights
from pss_composer.checkpoints.reading import LATEST, find_latest
from pss_composer.checkpoints.transfer import fit_weights
from pss_composer.errors import InputError
from pss_composer.models.classifier import SIZES

USUAL_NUM_HEADS = {shape["embed_dim"]: shape["num_heads"] for shape in SIZES.values()} | {1024: 16}  # and ViT-L's


def import_checkpoint(
    source: str | Path, out: str | Path, *, ema: bool = False, image_size: int | None = None
) -> str:
    """Write the weights of a checkpoint as safetensors by timm's names.

    The file loads with `strict=True` into the timm class that its metadata name, under `timm`, as JSON of the class and
    its arguments. After SimMIM pre-training this is the encoder, with its shared relative position bias.

    Weights without relative position biases do not show the number of heads: a run's recipe tells it, and for files of
    others it is that of DeiT and timm for this width; null where neither knows.

    Args:
        source: A file in a layout that `read_weights` knows, or a folder of shards.
        out: A new file with the suffix `.safetensors`; it is there whole or not at all.
        ema: Take the moving averages of the weights, else the weights in training.
        image_size: Height and width in pixels to interpolate position embeddings and bias tables for; None leaves them.

    Returns:
        An account of every weight, in lines.

    Raises:
        InputError: What `read_weights` and `find_architecture` raise, or a bad `out` or `image_size`.
    """
    source, out = Path(source), Path(out)
    _check_out(out)
    weights = read_weights(source, ema=ema)
    architecture = find_architecture(weights.tensors, source)
    if image_size is not None:
        patch_size = architecture.arguments["patch_size"]
        if image_size < patch_size or image_size % patch_size:
            raise InputError(f"--image-size must be a multiple of the patch size {patch_size}, got {image_size}")
        architecture.arguments["img_size"] = image_size
    vit = architecture.build_empty(**({"num_heads": weights.num_heads} if weights.num_heads else {}))
    transfer = fit_weights(weights, vit.state_dict(), vit, source)
    lines = [f"{source}: {weights.layout}", str(transfer)]
    if "num_heads" not in architecture.arguments:
        num_heads, origin = _choose_num_heads(weights, architecture.arguments["embed_dim"])
        # without any, null: timm's default would load and compute something else
        architecture.arguments["num_heads"] = num_heads
        lines.append(f"num_heads, which the weights do not show: {num_heads} ({origin})")
    description = {"class": architecture.vit_class.__name__, "arguments": architecture.arguments}
    _write(out, transfer.tensors, {"format": "pt", "timm": json.dumps(description)})
    if weights.not_weights:
        lines.append(f"not weights, left out: {', '.join(weights.not_weights)}")
    return "\n".join([*lines, f"{out}: {len(transfer.tensors)} weights of timm's {architecture}"])


def export_checkpoint(
    run: str | Path, out: str | Path, *, ema: bool = False, image_size: int | None = None
) -> str:
    """`import_checkpoint` of a run's last checkpoint, or of any of its checkpoints.

    Args:
        run: The `save_folder` of a run, or a checkpoint in it, a file or a folder of shards.
        out: See `import_checkpoint`, likewise the rest.
        ema: See there.
        image_size: See there.

    Raises:
        InputError: No run there, or what `import_checkpoint` raises.
    """
    source = find_latest(run)
    if source.is_dir() and not (source / ".metadata").is_file():
        raise InputError(f"run must be the save_folder of a trained recipe or a checkpoint, no {LATEST} in {run}")
    return import_checkpoint(source, out, ema=ema, image_size=image_size)


def _choose_num_heads(weights: Weights, embed_dim: int) -> tuple[int | None, str]:
    """The number of heads where weights do not show it, and who says so."""
    if weights.num_heads is not None:
        return weights.num_heads, "the run's recipe, or the metadata of its export"
    if not weights.is_composer and embed_dim in USUAL_NUM_HEADS:
        return USUAL_NUM_HEADS[embed_dim], "DeiT's and timm's for this width"
    return None, "not known: set it when you build the model"


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise InputError(f"out must be a file with the suffix .safetensors, got {out}")
    if out.exists():
        raise InputError(f"out must be a new file, {out} is there already")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise InputError(f"out must be in a folder that can be written, got {out}")


def _write(out: Path, tensors: dict, metadata: dict[str, str]) -> None:
    memory, apart = set(), {}
    for name, tensor in tensors.items():  # safetensors takes no two that share memory
        start = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone(memory_format=torch.contiguous_format) if start in memory else tensor.contiguous()
        memory.add(start)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as workspace:
            written = Path(workspace) / out.name
            save_file(apart, written, metadata)
            os.replace(written, out)
    except (OSError, SafetensorError) as error:  # a full disk, say
        raise InputError(f"out must be a file that can be written, {out} cannot: {error}") from error
