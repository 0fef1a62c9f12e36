"""Images with what a model makes of them: patches that stay, patches painted in."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from composer.core import DataSpec
from torch import Tensor

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.figures import CHARACTERS_PER_INCH, FONT_SIZE, INK, WRONG, make_figure, wrap_text
from pss_composer.evaluation.runs import Run
from pss_composer.pretraining.masking import draw_masks
from pss_composer.pretraining.simmim import SimMIM
from pss_composer.training.builders import build_data

TINT = (0.72, 0.82, 0.95)
TILE = 1.1  # width and height of a small image, in inches


def plot_kept_patches(
    run: Run, path: str | Path, *, num_images: int = 10, keep_rates: Sequence[float] = KEEP_RATES
) -> None:
    """Draw evaluation images with the patches that the model keeps at each keep rate, the others tinted.

    The caption of an image is the class that the model answers, and the true one too where the answer is wrong.

    Args:
        run: A finished run.
        path: The picture to write.
        num_images: Images at most, one per column, each the first one of its class.
        keep_rates: Keep rates, one per row.
    """
    data = build_data(run.recipe, "val")
    names = find_class_names(run, data)
    images, labels = _find_examples(data, min(num_images, run.recipe.model.num_classes))
    vit = run.model.vit.eval()
    pixels = _to_pixels(images, run.recipe.augmentation)
    rows = []
    for keep_rate in keep_rates:
        with run.patch_sampler.evaluating_at(keep_rate), torch.no_grad():
            answers = vit(images.to(next(vit.parameters()).device)).argmax(dim=1).tolist()
        is_kept = _kept_pixels(run.patch_sampler.keep_indices, images, run.recipe.model.patch_size)
        rows.append(_Row(
            f"ρ = {keep_rate}",
            torch.where(is_kept, pixels, 0.2 * pixels + 0.8 * torch.tensor(TINT).view(3, 1, 1)),
            [_caption(answer, label, names) for answer, label in zip(answers, labels, strict=True)],
            [answer != label for answer, label in zip(answers, labels, strict=True)],
        ))
    title = (f"{run.name}: the patches that stay ({run.patch_sampler.sampler} sampler), the others tinted. Below, the "
             "class that the model answers; where it is wrong, in red, with the true class.")
    _draw_tiles(rows, title, path)


def plot_reconstruction(run: Run, path: str | Path, *, num_images: int = 10) -> None:
    """Draw evaluation images, what a pre-trained model sees of them, and the images with the masked patches painted in.

    Args:
        run: A finished run of pre-training.
        path: The picture to write.
        num_images: Images, one per column: the first ones.
    """
    model, recipe = cast(SimMIM, run.model.eval()), run.recipe
    data = build_data(recipe, "val")
    images = data.batch_transforms(next(iter(data.dataloader)))[0][:num_images].to(next(model.parameters()).device)
    data.dataloader.close()
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    mask = draw_masks(
        len(images), model.encoder.patch_embed.grid_size, unit=recipe.masking.unit // model.patch_size,
        ratio=recipe.masking.ratio, generator=generator,
    )
    with torch.no_grad():
        painted = model.unpatchify(model((images, mask)).pixels).float()
    is_masked = mask.repeat_interleave(model.patch_size, 1).repeat_interleave(model.patch_size, 2).unsqueeze(1).cpu()
    pixels, painted = (_to_pixels(values.cpu(), recipe.augmentation) for values in (images, painted))
    rows = [
        _Row("image", pixels),
        _Row("masked", torch.where(is_masked, torch.tensor(TINT).view(3, 1, 1), pixels)),
        _Row("painted in", torch.where(is_masked, painted, pixels)),
    ]
    _draw_tiles(rows, f"{run.name}: held-out images, what the model sees, and the masked patches painted in", path)


def find_class_names(run: Run, data: DataSpec) -> list[str]:
    """The names of the classes in the order of their labels; empty if neither the data nor a file name them.

    Args:
        run: The run.
        data: Its evaluation data. Beside shards that `convert` wrote, `classes.json` has the names.
    """
    names = getattr(data.dataloader.dataset, "classes", [])
    file = Path(run.recipe.data.path or "") / "val" / "classes.json"
    if names or not file.is_file():
        return names
    try:
        return [str(name) for name in json.loads(file.read_text())]
    except (ValueError, TypeError):  # not a list of names
        return []


@dataclass
class _Row:
    """Images (B, 3, H, W) side by side, with a label on the left and a caption below each."""

    label: str
    pixels: Tensor
    captions: Sequence[str] = ()
    is_wrong: Sequence[bool] = ()


def _draw_tiles(rows: Sequence[_Row], title: str, path: str | Path) -> None:
    num_columns = len(rows[0].pixels)
    num_lines = [max((1 + caption.count("\n") for caption in row.captions), default=0) for row in rows]
    width, line = TILE * num_columns + 0.6, FONT_SIZE / 55
    title = wrap_text(title, width)
    figure = make_figure(width, TILE * len(rows) + line * (sum(num_lines) + title.count("\n") + 3))
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        for axis, image in zip(row_axes, row.pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, caption, is_wrong in zip(row_axes, row.captions, row.is_wrong, strict=False):
            axis.set_xlabel(caption, fontsize=FONT_SIZE - 1, labelpad=2, color=WRONG if is_wrong else INK)
        row_axes[0].set_ylabel(row.label, color=INK, fontsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE, color=INK)
    figure.draw_without_rendering()  # the layout needs a second pass, or the lowest captions are cut off
    figure.savefig(path)


def _caption(answer: int, label: int, names: Sequence[str]) -> str:
    """The answered class, and below it the true one if it is another; two lines each at most."""
    lines = _wrap_class("", answer, names)
    return "\n".join(lines if answer == label else [*lines, *_wrap_class("is ", label, names)])


def _wrap_class(before: str, label: int, names: Sequence[str]) -> list[str]:
    name = names[label].replace("_", " ") if label < len(names) else str(label)
    return textwrap.wrap(before + name, int(TILE * CHARACTERS_PER_INCH), max_lines=2, placeholder="…")


def _find_examples(data: DataSpec, num_images: int) -> tuple[Tensor, list[int]]:
    """The first image (3, H, W) of each class, until there are enough classes, in the order of the labels."""
    examples: dict[int, Tensor] = {}
    for images, labels in map(data.batch_transforms, data.dataloader):
        for image, label in zip(images, labels.tolist(), strict=True):
            examples.setdefault(label, image)
        if len(examples) >= num_images:
            break
    data.dataloader.close()
    labels = sorted(examples)[:num_images]
    return torch.stack([examples[label] for label in labels]), labels


def _kept_pixels(keep_indices: Tensor | None, images: Tensor, patch_size: int) -> Tensor:
    """(B, 1, H, W) bool: the pixels whose patches stayed in the last forward pass."""
    B, _, H, W = images.shape
    grid = torch.ones(B, (H // patch_size) * (W // patch_size), dtype=torch.bool)
    if keep_indices is not None:
        grid = torch.zeros_like(grid).scatter(1, keep_indices.cpu(), True)
    grid = grid.view(B, 1, H // patch_size, W // patch_size)
    return grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


def _to_pixels(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Undo the normalization: values in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augmentation.mean, augmentation.std))
    return (images * std + mean).clamp(0, 1)
