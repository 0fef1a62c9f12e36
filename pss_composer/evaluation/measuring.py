"""Metrics and FLOPs of trained models at each keep rate, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from composer import Trainer
from composer.core import Evaluator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pss_composer.evaluation import KEEP_RATES
from pss_composer.evaluation.runs import Run, read_metrics, select_training, training_seconds
from pss_composer.training.builders import build_data


def evaluate_run(run: Run, keep_rates: Sequence[float] = KEEP_RATES) -> dict[float, dict[str, float]]:
    """A classifier's metrics on the evaluation data of its recipe, at each keep rate.

    Args:
        run: A finished run.
        keep_rates: Shares of the tokens to keep, each in (0, 1].

    Returns:
        Keep rate -> metric name -> value.
    """
    # on the device that the Trainer takes
    data = build_data(run.recipe, "val", "cuda" if torch.cuda.is_available() else "cpu")
    # Composer needs an optimizer even if nothing is trained
    trainer = Trainer(model=run.model, optimizers=torch.optim.SGD(run.model.parameters()), progress_bar=False)
    metrics = {}
    for keep_rate in keep_rates:
        with run.patch_sampler.evaluating_at(keep_rate):
            # Composer takes each label once
            trainer.eval(Evaluator(label=f"keep_rate_{keep_rate}", dataloader=data))
        metrics[keep_rate] = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    data.dataloader.close()
    return metrics


def count_flops(model: Callable[[Tensor], object], images: Tensor) -> int:
    """FLOPs of a forward pass over a batch, by torch's counter.

    Args:
        model: Any module or function that takes images.
        images: (B, 3, H, W).
    """
    # the counter does not know the CPU's fused attention, but it does know the matrix products that it is made of;
    # it fails without gradients where a parameter goes into a module, like the class token of CaiT
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def flop_shares(run: Run, keep_rates: Sequence[float] = KEEP_RATES) -> dict[float, float]:
    """Keep rate -> FLOPs of a forward pass as a share of those at ρ = 1."""
    model, size = run.model.eval(), run.recipe.model.image_size
    images = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    flops = {}
    for keep_rate in {1.0, *keep_rates}:
        with run.patch_sampler.evaluating_at(keep_rate):
            flops[keep_rate] = count_flops(lambda images: model((images, None)), images)
    return {keep_rate: flops[keep_rate] / flops[1.0] for keep_rate in keep_rates}


def format_table(runs: Sequence[Run], keep_rates: Sequence[float] = KEEP_RATES) -> str:
    """Top-1 accuracy of each run at each keep rate, the FLOP share of the keep rate, and the cost of training.

    Runs of one architecture share a column of FLOP shares; else each run has its own.

    Args:
        runs: Runs of classifiers.
        keep_rates: Rows of the table.
    """
    logs = [read_metrics(run.folder) for run in runs]
    shares = [flop_shares(run, keep_rates) for run in runs]
    titles = [f"FLOP share of {run.name}" for run in runs]
    if all(share == shares[0] for share in shares):
        titles, shares = ["FLOP share"], shares[:1]
    top1 = [evaluate_run(run, keep_rates) for run in runs]
    rows = [["keep rate", *titles, *(run.name for run in runs)]]
    rows += [
        [str(keep_rate), *(f"{share[keep_rate]:.3f}" for share in shares),
         *(f"{100 * metrics[keep_rate]['top1']:.1f} %" for metrics in top1)]
        for keep_rate in keep_rates
    ]
    before = len(titles) * [""]
    rows.append([*before, "training, s", *(f"{training_seconds(lines):.1f}" for lines in logs)])
    costs = []
    for run, lines in zip(runs, logs, strict=True):
        rates = [line.get("pss/keep_rate", 1.0) for line in select_training(lines)]
        share = flop_shares(run, sorted(set(rates)))
        costs.append(f"{fmean(share[rate] for rate in rates):.3f}")
    rows.append([*before, "training, FLOP share", *costs])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text[0], rule, *text[1:-2], rule, *text[-2:]])
