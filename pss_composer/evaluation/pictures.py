"""Pictures: training under a schedule as curves, and images with what a model makes of them."""

from __future__ import annotations

import json
import math
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import matplotlib
import torch
from composer.core import DataSpec
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.errors import InputError
from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.runs import TRAINING_LOSS, Run, read_metrics, select_training
from pss_composer.pretraining.masking import draw_masks
from pss_composer.pretraining.simmim import SimMIM
from pss_composer.training.builders import build_data

WRONG = "#c92a2a"  # the colour of a wrong answer
FONT_SIZE, CHARACTERS_PER_INCH = 9, 12.5  # of a line of text in that size
MAX_LINES = 10  # keep rates that a picture shows apart
TINT = torch.tensor([0.72, 0.82, 0.95]).view(3, 1, 1)
TILE = 1.1  # width and height of a small image, in inches


def prepare_picture(path: Path) -> None:
    """Make the folder of a picture and try to write there, before the work that the picture needs.

    Raises:
        InputError: It cannot be written.
    """
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()  # os.access would allow root everything
        if is_new:
            path.unlink()
    except OSError as error:
        raise InputError(f"must be a place that can be written, got {error.filename!r}: {error.strerror}",
                         key="out") from error


def plot_schedule(runs: Sequence[Run], path: str | Path, *, num_epochs: int = 3) -> None:
    """Draw the loss of every run, the keep rates of a run under PSS, and its loss at each of them.

    Losses at different keep rates are never taken together: the same model has a larger loss on fewer tokens.

    Args:
        runs: The runs, at least one under PSS; the first of those has its keep rates drawn.
        path: The picture to write.
        num_epochs: Epochs at the end of training whose keep rates are drawn.
    """
    logs = [select_training(read_metrics(run.folder)) for run in runs]
    run, lines = next((run, lines) for run, lines in zip(runs, logs, strict=True) if run.recipe.pss)
    figure = Figure(figsize=(8, 10), dpi=150, layout="constrained")
    losses, keep_rates, losses_at = figure.subplots(3, 1)
    for other, log in zip(runs, logs, strict=True):
        keep_rate, means = max(mean_losses(log).items())
        losses.plot(means.keys(), means.values(), ".-", label=_wrap_text(f"{other.name}, ρ = {keep_rate}", 4))
    _finish(losses, "Training loss at the largest keep rate of each run, mean over an epoch", ylabel="loss")
    per_epoch = 1 + max(line["time/batch_in_epoch"] for line in lines)
    last = lines[-num_epochs * per_epoch:]
    # the log names a batch by its number from 1, at the end of the batch
    keep_rates.step([(line["batch"] - 1) / per_epoch for line in last], [line["pss/keep_rate"] for line in last],
                    where="post")
    keep_rates.set(ylim=(0, 1.05), yticks=KEEP_RATES)
    _finish(keep_rates, f"{run.name}: keep rate of the last epochs", ylabel="keep rate ρ")
    for keep_rate, means in sorted(mean_losses(lines).items()):
        color = matplotlib.colormaps["Blues"](0.2 + 0.8 * keep_rate)
        losses_at.plot(means.keys(), means.values(), ".-", color=color, label=f"ρ = {keep_rate}")
    _finish(losses_at, f"{run.name}: training loss at each keep rate, mean over an epoch", ylabel="loss")
    figure.savefig(path)


def mean_losses(lines: Sequence[Mapping[str, Any]]) -> dict[float, dict[int, float]]:
    """Keep rate -> epoch, from 1 -> mean loss of the epoch's batches at that keep rate.

    More than `MAX_LINES` keep rates are rounded to tenths.

    Args:
        lines: Batches of training in the log of a run.
    """
    keep_rates = [line.get("pss/keep_rate", 1.0) for line in lines]
    if len(set(keep_rates)) > MAX_LINES:
        keep_rates = [round(keep_rate, 1) for keep_rate in keep_rates]
    losses: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for keep_rate, line in zip(keep_rates, lines, strict=True):
        losses[keep_rate][line["epoch"] + 1].append(line[TRAINING_LOSS])
    return {
        keep_rate: {epoch: fmean(values) for epoch, values in by_epoch.items()}
        for keep_rate, by_epoch in losses.items()
    }


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
    model = run.model.eval()
    pixels = _to_pixels(images, run.recipe.augmentation)
    tinted = 0.2 * pixels + 0.8 * TINT
    device = next(model.parameters()).device
    side = _count_patches(run, images[:1].to(device))
    rows = []
    for keep_rate in keep_rates:
        with run.patch_sampler.evaluating_at(keep_rate), torch.no_grad():
            answers = model((images.to(device), None)).argmax(dim=1).tolist()
        keep_indices = run.patch_sampler.keep_indices  # None where all stay
        is_kept = torch.full((len(images), side**2), keep_indices is None)
        if keep_indices is not None:
            is_kept.scatter_(1, keep_indices.cpu(), True)
        is_kept = _spread(is_kept.view(-1, side, side), run.recipe.model.image_size // side)
        captions = [_caption(answer, label, names) for answer, label in zip(answers, labels, strict=True)]
        rows.append(_Row(f"ρ = {keep_rate}", torch.where(is_kept, pixels, tinted), captions))
    title = (f"{run.name}: the patches that stay ({run.patch_sampler.sampler} sampler), the others tinted. Below, the "
             "class that the model answers; where it is wrong, in red, with the true class.")
    _draw_tiles(rows, title, path)


def _count_patches(run: Run, images: Tensor) -> int:
    """The patches along a side of an image."""
    with run.patch_sampler.evaluating_at(1.0), torch.no_grad():
        run.model((images, None))
    assert run.patch_sampler.num_tokens is not None  # a forward pass sets it
    return math.isqrt(run.patch_sampler.num_tokens - run.patch_sampler.num_prefix_tokens)


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
    is_masked = _spread(mask, model.patch_size).cpu()
    pixels, painted = (_to_pixels(values.cpu(), recipe.augmentation) for values in (images, painted))
    rows = [
        _Row("image", pixels),
        _Row("masked", torch.where(is_masked, TINT, pixels)),
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


def _finish(axes: Axes, title: str, *, ylabel: str) -> None:
    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.set_title(_wrap_text(title, 7), fontsize=FONT_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=FONT_SIZE)


def _wrap_text(text: str, inches: float) -> str:
    return textwrap.fill(text, int(inches * CHARACTERS_PER_INCH))


@dataclass
class _Row:
    """Images (B, 3, H, W) side by side, with a label on the left, and below each a caption and its colour."""

    label: str
    pixels: Tensor
    captions: Sequence[tuple[str, str]] = ()


def _draw_tiles(rows: Sequence[_Row], title: str, path: str | Path) -> None:
    num_columns = len(rows[0].pixels)
    num_lines = [max((1 + caption.count("\n") for caption, _ in row.captions), default=0) for row in rows]
    width, line = TILE * num_columns + 0.6, FONT_SIZE / 55
    title = _wrap_text(title, width)
    height = TILE * len(rows) + line * (sum(num_lines) + title.count("\n") + 3)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for row, row_axes in zip(rows, axes, strict=True):
        for axis, image in zip(row_axes, row.pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for axis, (caption, color) in zip(row_axes, row.captions, strict=False):
            axis.set_xlabel(caption, fontsize=FONT_SIZE - 1, labelpad=2, color=color)
        row_axes[0].set_ylabel(row.label, fontsize=FONT_SIZE)
    figure.suptitle(title, fontsize=FONT_SIZE)
    figure.draw_without_rendering()  # the layout needs a second pass, or the lowest captions are cut off
    figure.savefig(path)


def _caption(answer: int, label: int, names: Sequence[str]) -> tuple[str, str]:
    """The answered class, below it the true one if it is another, and the colour; two lines each at most."""
    lines = []
    for before, number in (("", answer),) if answer == label else (("", answer), ("is ", label)):
        name = names[number].replace("_", " ") if number < len(names) else str(number)
        lines += textwrap.wrap(before + name, int(TILE * CHARACTERS_PER_INCH), max_lines=2, placeholder="…")
    return "\n".join(lines), "black" if answer == label else WRONG


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


def _spread(patches: Tensor, patch_size: int) -> Tensor:
    """From a value per patch (B, rows, columns) to one per pixel (B, 1, H, W)."""
    return patches.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2).unsqueeze(1)


def _to_pixels(images: Tensor, augmentation: Augmentation) -> Tensor:
    """Undo the normalization: values in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augmentation.mean, augmentation.std))
    return (images * std + mean).clamp(0, 1)
