"""A table and pictures of finished runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pss_composer.data.augmentation.settings import Augmentation
from pss_composer.errors import InputError
from pss_composer.evaluation.runs import KEEP_RATES, Run, evaluate_run, flop_shares
from pss_composer.pretraining.masking import draw_masks
from pss_composer.training.run_folder import LOG_FILE
from pss_composer.training.recipe import Recipe
from pss_composer.training.trainer import build_data

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
TINT, WRONG = (0.72, 0.82, 0.95), "#c92a2a"
COLORS = ("#2f6fde", "#d9480f", "#2b8a3e", "#862e9c", "#b08900")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` in order of batches; of a batch trained twice, the later line."""
    path = Path(folder) / LOG_FILE
    if not path.is_file():
        raise InputError(f"run must be the save_folder of a trained recipe, no {LOG_FILE} in {folder}")
    by_batch: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        metrics = json.loads(line)
        if "batch" in metrics:  # else the line of the settings
            key = metrics["batch"], "loss/train/total" in metrics
            by_batch[key] = by_batch.get(key, {}) | metrics
    return [by_batch[key] for key in sorted(by_batch)]


def training_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """Seconds that a run spent in training, evaluation excluded."""
    return max(line.get("time/train", 0.0) for line in lines)


def format_table(runs: Sequence[Run], keep_rates: Sequence[float] = KEEP_RATES) -> str:
    """Top-1 accuracy of each run at each keep rate, the FLOP share of the keep rate, and the training seconds.

    Args:
        runs: Runs of one model architecture, so that they share the FLOP column.
        keep_rates: Rows of the table.
    """
    shares = flop_shares(runs[0], keep_rates)
    top1 = [evaluate_run(run, keep_rates) for run in runs]
    rows = [["keep rate", "FLOP share", *(run.name for run in runs)]]
    for keep_rate in keep_rates:
        rows.append([str(keep_rate), f"{shares[keep_rate]:.3f}",
                     *(f"{100 * metrics[keep_rate]['top1']:.1f} %" for metrics in top1)])
    logs = [read_metrics(run.folder) for run in runs]
    rows.append(["", "training, s", *(f"{training_seconds(lines):.1f}" for lines in logs)])
    rows.append(["", "training, FLOP share", *(f"{_mean_flop_share(run, lines):.3f}"
                                               for run, lines in zip(runs, logs, strict=True))])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])


def plot_schedule(runs: Sequence[Run], path: str | Path, *, num_epochs: int = 3) -> None:
    """Draw the loss of every run, and below it the keep rates of the last epochs with the loss of the same batches.

    Args:
        runs: The runs, at least one under PSS; the first of those has its schedule drawn.
        path: The picture to write.
        num_epochs: Epochs at the end of training that the lower part shows.
    """
    plt = _import_pyplot()
    logs = {run.name: [line for line in read_metrics(run.folder) if "loss/train/total" in line] for run in runs}
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 7), layout="constrained")
    for color, (name, lines) in zip(COLORS, logs.items(), strict=False):
        # a line stands at the end of its batch, and the last batch of an epoch counts to the next one
        epochs = [line["batch"] / _batches_per_epoch(lines) for line in lines]
        losses = [line["loss/train/total"] for line in lines]
        upper.plot(epochs, losses, color=color, alpha=0.2, linewidth=0.8)
        upper.plot(epochs, _running_mean(losses, _batches_per_epoch(lines)), color=color, label=name)
    upper.set(title="Training loss, batch by batch, and its mean over an epoch", xlabel="epoch", ylabel="loss")
    upper.legend(frameon=False)
    name, lines = next((name, lines) for name, lines in logs.items() if "pss/keep_rate" in lines[0])
    per_epoch = _batches_per_epoch(lines)
    lines = lines[-num_epochs * per_epoch:]
    epochs = [(line["batch"] - 1) / per_epoch for line in lines]
    lower.step(epochs, [line["pss/keep_rate"] for line in lines], where="post", color=INK, label="keep rate ρ")
    lower.set(title=f"{name}: keep rate and loss of the last {num_epochs} epochs", xlabel="epoch",
              ylabel="keep rate ρ", ylim=(0, 1.05), yticks=KEEP_RATES)
    losses = lower.twinx()
    color = COLORS[list(logs).index(name) % len(COLORS)]
    losses.plot(epochs, [line["loss/train/total"] for line in lines], color=color, linewidth=1, alpha=0.8)
    losses.set_ylabel("loss", color=color)
    losses.set_ylim(bottom=0)
    for axes in (upper, lower, losses):
        axes.spines[["top"]].set_visible(False)
        axes.tick_params(colors=MUTED)
    for axes in (upper, lower):
        axes.grid(color=GRID, linewidth=0.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_kept_patches(
    run: Run, path: str | Path, *, num_images: int = 10, keep_rates: Sequence[float] = KEEP_RATES
) -> None:
    """Draw evaluation images with the patches that the model keeps at each keep rate, the others tinted.

    Args:
        run: A finished run.
        path: The picture to write.
        num_images: Images, one a column, each of another class: the first ones of the first batch.
        keep_rates: Keep rates, one a row.
    """
    plt = _import_pyplot()
    images, labels = _first_batch(run.recipe)
    chosen = [labels.tolist().index(label) for label in labels.unique()][:num_images]
    images, labels = images[chosen], labels[chosen]
    vit = run.model.vit.eval()
    device = next(vit.parameters()).device
    pixels = _to_pixels(images, run.recipe.augmentation)
    tinted = 0.2 * pixels + 0.8 * torch.tensor(TINT).view(3, 1, 1)
    figure, axes = plt.subplots(len(keep_rates), len(images), squeeze=False, layout="constrained",
                                figsize=(1.1 * len(images) + 0.6, 1.25 * len(keep_rates) + 0.4))
    for row, keep_rate in zip(axes, keep_rates, strict=True):
        run.patch_sampler.eval_keep_rate = keep_rate
        with torch.no_grad():
            predictions = vit(images.to(device)).argmax(dim=1).tolist()
        is_kept = _kept_pixels(run.patch_sampler, images, run.recipe.model.patch_size)
        shown = torch.where(is_kept, pixels, tinted).permute(0, 2, 3, 1).numpy()
        for axis, image, prediction, label in zip(row, shown, predictions, labels.tolist(), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            axis.set_xlabel(str(prediction), fontsize=9, labelpad=2, color=INK if prediction == label else WRONG,
                            weight="normal" if prediction == label else "bold")
        row[0].set_ylabel(f"ρ = {keep_rate}", color=INK)
    run.patch_sampler.eval_keep_rate = 1.0
    figure.suptitle(f"{run.name}: the patches that stay ({run.patch_sampler.sampler} sampler), the others tinted; "
                    "below, the class that the model answers, bold and red where it is wrong", fontsize=9, color=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_reconstruction(run: Run, path: str | Path, *, num_images: int = 10) -> None:
    """Draw evaluation images, what a pre-trained model sees of them, and the images with the masked patches painted in.

    Args:
        run: A finished run of pre-training.
        path: The picture to write.
        num_images: Images, one a column: the first ones.
    """
    plt = _import_pyplot()
    model, recipe = run.model.eval(), run.recipe
    images = _first_batch(recipe)[0][:num_images].to(next(model.parameters()).device)
    generator = torch.Generator(images.device).manual_seed(recipe.seed)
    mask = draw_masks(
        len(images), model.encoder.patch_embed.grid_size, unit=recipe.masking.unit // model.patch_size,
        ratio=recipe.masking.ratio, generator=generator,
    )
    with torch.no_grad():
        painted = model.unpatchify(model((images, mask)).pixels).float()
    is_masked = mask.unsqueeze(1)
    for dim in (2, 3):
        is_masked = is_masked.repeat_interleave(model.patch_size, dim)
    is_masked, augmentation = is_masked.cpu(), recipe.augmentation
    pixels, painted = _to_pixels(images.cpu(), augmentation), _to_pixels(painted.cpu(), augmentation)
    rows = {
        "image": pixels,
        "masked": torch.where(is_masked, torch.tensor(TINT).view(3, 1, 1), pixels),
        "painted in": torch.where(is_masked, painted, pixels),
    }
    figure, axes = plt.subplots(len(rows), len(images), squeeze=False, layout="constrained",
                                figsize=(1.1 * len(images) + 0.6, 1.15 * len(rows) + 0.4))
    for row, (title, shown) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, shown.permute(0, 2, 3, 1).numpy(), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(title, color=INK)
    figure.suptitle(f"{run.name}: held-out images, what the model sees, and the masked patches painted in",
                    fontsize=9, color=INK)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _kept_pixels(patch_sampler: Any, images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 1, H, W) bool: the pixels whose patches stayed in the last forward pass."""
    B, _, H, W = images.shape
    grid = torch.ones(B, (H // patch_size) * (W // patch_size), dtype=torch.bool)
    if patch_sampler.keep_indices is not None:
        grid = torch.zeros_like(grid).scatter(1, patch_sampler.keep_indices.cpu(), True)
    grid = grid.view(B, 1, H // patch_size, W // patch_size)
    return grid.repeat_interleave(patch_size, dim=2).repeat_interleave(patch_size, dim=3)


def _first_batch(recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    data = build_data(recipe, "val")
    batch = data.batch_transforms(next(iter(data.dataloader)))
    data.dataloader.close()
    return batch


def _to_pixels(images: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Undo the normalization: values in [0, 1]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (augmentation.mean, augmentation.std))
    return (images * std + mean).clamp(0, 1)


def _mean_flop_share(run: Run, lines: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs of a run's training as a share of training on all tokens."""
    rates = [line.get("pss/keep_rate", 1.0) for line in lines if "loss/train/total" in line]
    shares = flop_shares(run, sorted(set(rates)))
    return sum(shares[rate] for rate in rates) / len(rates)


def _batches_per_epoch(lines: Sequence[Mapping[str, Any]]) -> int:
    return 1 + max(line["time/batch_in_epoch"] for line in lines)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    means = []
    for index in range(len(values)):
        window = values[max(0, index + 1 - width):index + 1]
        means.append(sum(window) / len(window))
    return means


def _import_pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise InputError("pictures need matplotlib: pip install 'pss-composer[report]'") from None
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
