"""From a checkpoint in any known layout to a safetensors file that timm loads."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from pss_composer.checkpoints.layouts import find_architecture, read_weights
from pss_composer.checkpoints.transfer import fit_weights
from pss_composer.errors import InputError

LATEST = "latest-rank0.pt"  # Composer's link to a run's last checkpoint, a file or a folder of shards


def import_checkpoint(
    source: str | Path, out: str | Path, *, ema: bool = False, image_size: int | None = None
) -> str:
    """Write the weights of a checkpoint as safetensors by timm's names.

    The file loads with `strict=True` into the timm class that its metadata name, under `timm`, as JSON of the class and
    its arguments; `num_heads` is null where the weights do not show it. After SimMIM pre-training this is the encoder,
    with its shared relative position bias.

    Args:
        source: A file in a layout that `read_weights` knows, or a folder of shards.
        out: A new file with the suffix `.safetensors`; it is there whole or not at all.
        ema: Take the moving averages of the weights.
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
    vit = architecture.build_empty()
    transfer = fit_weights(weights, vit.state_dict(), vit, source)
    # where weights do not show the number of heads, null: timm's default would load and compute something else
    arguments = {"num_heads": None, **architecture.arguments}
    description = {"class": architecture.vit_class.__name__, "arguments": arguments}
    _write(out, transfer.tensors, {"format": "pt", "timm": json.dumps(description)})
    lines = [f"{source}: {weights.layout}", str(transfer)]
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
        ema: Take the moving averages of the weights.
        image_size: Height and width in pixels to interpolate for.

    Raises:
        InputError: No run there, or what `import_checkpoint` raises.
    """
    run = Path(run)
    is_shards = (run / ".metadata").is_file()
    if run.is_dir() and not is_shards and not (run / LATEST).exists():
        raise InputError(f"run must be the save_folder of a trained recipe or a checkpoint, no {LATEST} in {run}")
    source = run / LATEST if run.is_dir() and not is_shards else run
    return import_checkpoint(source, out, ema=ema, image_size=image_size)


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
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as workspace:
        written = Path(workspace) / out.name
        save_file(apart, written, metadata)
        os.replace(written, out)
