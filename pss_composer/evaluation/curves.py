"""Training under a schedule, as curves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.figures import FONT_SIZE, GRID, INK, MUTED, make_figure, wrap_text
from pss_composer.evaluation.runs import Run, read_metrics, select_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#2f6fde", "#d9480f", "#2b8a3e", "#862e9c", "#b08900")
MAX_LINES = 10  # keep rates that a picture shows apart


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
    width = 8
    figure = make_figure(width, 10)
    losses, keep_rates, losses_at = figure.subplots(3, 1)
    for color, other, log in zip(cycle(COLORS), runs, logs, strict=False):
        keep_rate, means = max(mean_losses(log).items())
        losses.plot(*_split(means), ".-", color=color, label=wrap_text(f"{other.name}, ρ = {keep_rate}", width / 2))
    _finish(losses, "Training loss at the largest keep rate of each run, mean over an epoch", ylabel="loss")
    per_epoch = 1 + max(line["time/batch_in_epoch"] for line in lines)
    last = lines[-num_epochs * per_epoch:]
    # the log names a batch by its number from 1, at the end of the batch
    keep_rates.step([(line["batch"] - 1) / per_epoch for line in last], [line["pss/keep_rate"] for line in last],
                    where="post", color=INK)
    keep_rates.set(ylim=(0, 1.05), yticks=KEEP_RATES)
    _finish(keep_rates, f"{run.name}: keep rate of the last {num_epochs} epochs", ylabel="keep rate ρ")
    for keep_rate, means in sorted(mean_losses(lines).items()):
        shade = tuple(1 - (0.25 + 0.75 * keep_rate) * (1 - value) for value in (0.0, 0.16, 0.42))
        losses_at.plot(*_split(means), ".-", color=shade, label=f"ρ = {keep_rate}")
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
        losses[keep_rate][line["epoch"] + 1].append(line["loss/train/total"])
    return {
        keep_rate: {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}
        for keep_rate, by_epoch in losses.items()
    }


def _split(means: Mapping[int, float]) -> tuple[list[int], list[float]]:
    return list(means), list(means.values())


def _finish(axes: Axes, title: str, *, ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="epoch", ylabel=ylabel)
    axes.set_title(wrap_text(title, axes.figure.get_figwidth() - 1), fontsize=FONT_SIZE, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)
    axes.grid(color=GRID, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=FONT_SIZE)
